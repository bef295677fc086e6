"""Metrics on drawn images, as files."""

import copy

import numpy as np
import pytest

from fpn_ablate.store.bootstrap_store import Replicates, save
from fpn_ablate.utils.paths import RESAMPLED


@pytest.fixture
def values():
    generator = np.random.default_rng(0)
    return {"AP": generator.uniform(0, 1, 40), "AP_s": np.where(generator.uniform(size=40) < 0.5, np.nan, 0.25)}


def test_values_come_back_to_a_hundred_thousandth(tmp_path, values):
    save(tmp_path / RESAMPLED, values)
    found = Replicates.of_runs([("f", tmp_path)])["f"]
    assert list(found) == ["AP", "AP_s"]
    for name, expected in values.items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
        assert (np.isnan(found[name]) == np.isnan(expected)).all()


def test_many_runs_in_one_file_are_the_same_and_equal_bytes(tmp_path, values):
    for name in "ab":
        (tmp_path / name).mkdir()
        save(tmp_path / name / RESAMPLED, values | {"AP": values["AP"] * (1 if name == "a" else 0.5)})
    runs = Replicates.of_runs((name, tmp_path / name) for name in "ab")
    for place, names in (("one", ["b", "a", "a", "unknown"]), ("two", ["a", "b"])):
        runs.write(tmp_path / place / RESAMPLED, names)
    assert (tmp_path / "one" / RESAMPLED).read_bytes() == (tmp_path / "two" / RESAMPLED).read_bytes()
    together = Replicates.beside(tmp_path / "one" / "ledger.csv")
    assert sorted(together) == ["a", "b"]
    for name in "ab":
        for metric in values:
            np.testing.assert_array_equal(together[name][metric], runs[name][metric])


@pytest.mark.parametrize("content", [b"", b"rubbish", None])
def test_a_damaged_or_absent_file_is_as_if_there_were_none(tmp_path, content):
    if content is not None:
        (tmp_path / RESAMPLED).write_bytes(content)
    runs = Replicates.of_runs([("f", tmp_path)])
    with pytest.raises(KeyError):
        runs["f"]
    runs.write(tmp_path / "all.npz", ["f"])
    assert not (tmp_path / "all.npz").exists()
    assert len(Replicates.beside(tmp_path / "ledger.csv")) == 0


def test_a_file_with_flipped_bytes_gives_its_values_or_none(tmp_path, values):
    save(tmp_path / RESAMPLED, values)
    whole = (tmp_path / RESAMPLED).read_bytes()
    for place in range(0, len(whole), 7):
        (tmp_path / RESAMPLED).write_bytes(
            whole[:place] + bytes(255 - byte for byte in whole[place : place + 8]) + whole[place + 8 :]
        )
        try:
            assert set(Replicates.of_runs([("f", tmp_path)])["f"]) == set(values)
        except KeyError:
            continue


@pytest.mark.parametrize(
    "array", [np.arange(5, dtype="<u2"), np.array([("abc",)], dtype=[("AP", "U3")])], ids=["numbers", "texts"]
)
def test_an_array_of_something_else_is_no_record(tmp_path, array):
    np.savez_compressed(tmp_path / RESAMPLED, resampled=array)
    with pytest.raises(KeyError):
        Replicates.of_runs([("f", tmp_path)])["f"]


def test_it_is_not_copied_with_a_frame(tmp_path):
    runs = Replicates({})
    assert copy.deepcopy(runs) is runs
