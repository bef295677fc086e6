"""Files of weights as training programs write them, and files that claim more than they hold."""

import _codecs
import ast
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from fpn_ablate.engine.train import read_checkpoint
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.utils import files
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import PACKAGE
from fpn_ablate.weights.files import read

STATE = {"conv1.weight": torch.rand(4, 3, 7, 7), "layer1.0.conv1.weight": torch.rand(4, 4, 1, 1)}


def prefixed(prefix: str) -> dict:
    return {f"{prefix}{name}": value for name, value in STATE.items()}


# --------------------------------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize(
    "content",
    [
        {"epoch": 3, "arch": "resnet18", "state_dict": STATE, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        {"epoch": 3, "model_state_dict": STATE},
        {"state_dict": prefixed("model."), "pytorch-lightning_version": "2.5"},
        {"state_dict": prefixed("model.backbone.net.")},
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        {"conv1._orig_mod.weight": STATE["conv1.weight"], "layer1._orig_mod.0.conv1.weight": STATE["layer1.0.conv1.weight"]},
    ],
    ids=["timm", "script", "lightning", "prefixes", "compile", "ddp", "compiled parts"],
)
def test_a_state_dict_is_read_from_what_training_programs_wrap_it_in(tmp_path, content):
    torch.save(content, tmp_path / "a.pth.tar")
    stored = read(tmp_path / "a.pth.tar")
    assert stored.tensors.keys() == STATE.keys() and not stored.notes
    assert all(torch.equal(value, STATE[name]) for name, value in stored.tensors.items())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("features.conv0.weight", "features.norm0.weight"), ("features.conv0.weight", "features.norm0.weight")),
        (("model.features.conv0.weight", "model.features.norm0.weight"), ("features.conv0.weight", "features.norm0.weight")),
        (("stages.stem.0.weight", "stages.c2.0.conv1.weight"), ("stages.stem.0.weight", "stages.c2.0.conv1.weight")),
    ],
)
def test_a_prefix_that_may_be_the_networks_own_is_kept(tmp_path, names, expected):
    torch.save({name: torch.ones(2) for name in names}, tmp_path / "a.pth")
    assert tuple(read(tmp_path / "a.pth").tensors) == expected


def test_averaged_weights_beside_those_that_are_read_are_named(tmp_path):
    averaged = {name: value + 1 for name, value in STATE.items()}
    torch.save({"state_dict": STATE, "state_dict_ema": averaged}, tmp_path / "a.pth")
    stored = read(tmp_path / "a.pth")
    assert torch.equal(stored.tensors["conv1.weight"], STATE["conv1.weight"])
    fix = r"to use that, save torch.load\(FILE\)\['{}'\] alone"
    assert stored.notes == ["'state_dict' is read, not 'state_dict_ema'; " + fix.format("state_dict_ema").replace("\\", "")]
    torch.save({"model_ema": averaged, "step": 5}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="its tensors are below 'model_ema'; " + fix.format("model_ema")):
        read(tmp_path / "a.pth")


def test_names_that_become_one_are_refused(tmp_path):
    torch.save({**STATE, **prefixed("_orig_mod.")}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"differ by _orig_mod. in their names alone"):
        read(tmp_path / "a.pth")


# ------------------------------------------------------------------------------------------------ more than the file's size


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


SHARED = np.random.default_rng(0).bytes(40_000)
CLAIMS = {
    "stride 0": {"conv1.weight": torch.zeros(1).expand(2**32)},
    "views": {f"layer1.{n}.weight": view for n, view in enumerate([torch.rand(50_000).view(1, -1)] * 200)},
}


@pytest.mark.parametrize("content", CLAIMS.values(), ids=CLAIMS)
def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "large.pt")
    with pytest.raises(UserError, match=r"large.pt: its tensors claim (17,179,869,184|40,000,000) bytes, and the file has"):
        read(tmp_path / "large.pt")


def test_tied_weights_are_read(tmp_path):
    torch.save({f"layer{n}.0.weight": STATE["conv1.weight"] for n in (1, 2, 3)}, tmp_path / "tied.pt")
    assert len(read(tmp_path / "tied.pt").tensors) == 3


@pytest.mark.parametrize("what", ["arrays", "texts"])
def test_a_pickle_that_names_its_bytes_again_and_again_is_refused(tmp_path, what):
    text = SHARED.decode("latin1")
    one = {
        "arrays": lambda: Calls(np._core.numeric._frombuffer, SHARED, np.dtype("f4"), (10_000,), "C"),
        "texts": lambda: Calls(_codecs.encode, text, "latin1"),
    }[what]
    path = tmp_path / "large.pkl"
    path.write_bytes(pickle.dumps({"model": {str(n): one() for n in range(100)}}, 5))
    with pytest.raises(UserError, match=r"large.pkl: its arrays claim more than 10 times the bytes of the file"):
        read(path)


def test_a_compressed_archive_of_torch_is_not_unpacked(tmp_path):
    torch.save({"step": 1, "model": {"conv1.weight": torch.zeros(500_000)}}, tmp_path / "plain.pt")
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert path.stat().st_size < 10_000
    for reader in (read, read_checkpoint):
        with pytest.raises(UserError, match=r"bomb.pt: not a .* \(it unpacks to 2,00\d,\d+ bytes\)"):
            reader(path)


def test_arrays_that_unpack_to_much_are_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "detections.npz"
    DetectionSet(np.zeros(99_999, int), np.zeros((99_999, 4), np.float32), np.zeros(99_999, np.float32)).save(path)
    assert len(DetectionSet.load(path).scores) == 99_999
    monkeypatch.setattr(files, "MAX_UNPACKED", 10**5)
    with pytest.raises(ValueError, match="it unpacks to 2,"):
        DetectionSet.load(path)


def test_archives_are_opened_where_their_size_is_looked_at():
    openers = {"np.load": "utils/files.py", "numpy.load": "utils/files.py", "torch.load": "weights/files.py"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (place := openers.get(ast.unparse(node.func))):
                assert file.relative_to(PACKAGE).as_posix() == place, f"{file}:{node.lineno}"


def test_a_damaged_checkpoint_is_no_reason_to_read_it_unsafely(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"step": 3, "model": nn.Linear(1, 1)}, path)
    with pytest.raises(UserError, match=r"not a checkpoint .*could run code.*; remove it to train from the start") as refused:
        read_checkpoint(path)
    path.write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(UserError, match="not a checkpoint") as damaged:
        read_checkpoint(path)
    for error in (refused, damaged):
        assert "weights_only" not in str(error.value) and "False" not in str(error.value)
