"""Pickles are read without running what they name."""

import builtins
import os
import pickle
import pickletools
from collections import OrderedDict

import numpy as np
import pytest

from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights import unpickle
from fpn_ablate.weights.files import read

ARRAYS = {
    "f4": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big": np.arange(4, dtype=">f4"),
    "half": np.ones((2, 1, 2), np.float16),
    "int": np.array([1, -2]),
    "bool": np.array([True, False]),
    "scalar": np.array(3, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_come_back_as_pickle_gives_them(protocol):
    data = pickle.dumps({"model": OrderedDict(ARRAYS), "__author__": "x", "matching_heuristics": True}, protocol)
    content = unpickle.read(data)
    assert content["__author__"] == "x" and content["matching_heuristics"] is True
    assert content["model"].keys() == ARRAYS.keys()
    for name, value in content["model"].items():
        assert value.shape == ARRAYS[name].shape and value.dtype.isnative, name
        assert np.array_equal(value, pickle.loads(data)["model"][name]), name


def test_names_of_older_numpy_and_bytes_of_python_2_are_read():
    data = pickle.dumps({"w": ARRAYS["f4"]}, 2)
    assert b"numpy._core" in data
    assert np.array_equal(unpickle.read(data.replace(b"numpy._core", b"numpy.core"))["w"], ARRAYS["f4"])
    # As Python 2 did: a string where there are bytes.
    raw = ARRAYS["f4"].tobytes()
    start = data.index(b"h\x05X")  # the second call of _codecs.encode
    old = data[:start] + b"T" + len(raw).to_bytes(4, "little") + raw + data[data.index(b"R", start) + 1 :]
    assert np.array_equal(unpickle.read(old)["w"], ARRAYS["f4"])


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(mark) -> dict[str, object]:
    python = f"open({str(mark)!r}, 'w')"
    return {
        "posix.system": Calls(os.system, f"touch {mark}"),
        "builtins.eval": Calls(builtins.eval, python),
        "builtins.exec": Calls(builtins.exec, python),
        "builtins.getattr": Calls(builtins.getattr, np.ndarray, "tofile"),
        "io.open": Calls(open, str(mark), "w"),
        "numpy.load": Calls(np.load, str(mark), None, True),
        "numpy.fromfile": Calls(np.fromfile, str(mark)),
        "numpy.memmap": Calls(np.memmap, str(mark), "u1", "w+", 0, (8,)),
    }


@pytest.mark.parametrize("name", attacks(""))
def test_a_name_that_is_no_part_of_an_array_is_refused_and_not_run(tmp_path, name):
    mark, path = tmp_path / "run", tmp_path / "evil.pkl"
    evil = attacks(mark)[name]
    path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": ARRAYS["f4"], "x": evil}}, 4))
    if name == "posix.system":  # the attack is one: what refuses it is not pickle itself
        pickle.loads(path.read_bytes())
        assert mark.exists()
        mark.unlink()
    with pytest.raises(UserError, match=rf"evil\.pkl: it asks for {name}, .*nothing in a file is run"):
        read(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["os.system", "open", "O", "V8", "O8", [("f", "O")], []])
def test_admitted_names_run_nothing_of_numpys(name):
    """The replacements fail when they get other arguments than those of arrays."""
    with pytest.raises(UserError, match="only arrays of numbers"):
        unpickle.read(pickle.dumps(Calls(np.dtype, name), 2))


@pytest.mark.parametrize("value", [np.array([{}, 1], object), np.array(["a"]), np.array([(1, 2.0)], "i4,f4"), np.array([1j])])
def test_arrays_of_other_things_than_numbers_are_refused(tmp_path, value):
    path = tmp_path / "objects.pkl"
    path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": value}}, 4))
    with pytest.raises(UserError, match=r"objects\.pkl: it holds an array of type .*; only arrays of numbers are read"):
        read(path)


def test_attributes_that_a_pickle_sets_do_not_outlive_it():
    before = {key: (dict(vars(value)) if hasattr(value, "__dict__") else None) for key, value in unpickle.ADMITTED.items()}
    # BUILD with a pair sets attributes on what the name stands for.
    data = b"\x80\x02c_codecs\nencode\nN}X\x04\x00\x00\x00evilK\x01s\x86b."
    unpickle.read(data)
    after = {key: (dict(vars(value)) if hasattr(value, "__dict__") else None) for key, value in unpickle.ADMITTED.items()}
    assert before == after


def test_a_shape_larger_than_its_bytes_costs_nothing(tmp_path):
    data = pickle.dumps({"w": np.zeros((3, 5), np.float32)}, 2)
    assert data.count(b"K\x03K\x05") == 1
    path = tmp_path / "large.pkl"
    path.write_bytes(data.replace(b"K\x03K\x05", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f"))
    with pytest.raises(UserError, match=r"not a readable state dict .*60 bytes"):
        read(path)
    # A memo of 2^31 entries, which C's reader makes room for.
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(UserError, match="expected a dictionary of tensors"):
        read(path)


def test_a_pickle_cut_anywhere_is_refused(tmp_path):
    whole, path = pickle.dumps({"model": {"stem.conv1.weight": ARRAYS["f4"]}}, 4), tmp_path / "cut.pkl"
    ends = [position for _, _, position in pickletools.genops(whole)] + list(range(0, len(whole), 7))
    for end in ends:
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"cut\.pkl: not a readable state dict"):
            read(path)
