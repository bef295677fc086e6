"""`python -m fpn_ablate weights`: files of other programs in and out."""

import pytest
import safetensors.torch
import torch
import yaml
from networks import torchvision_detector
from settings import JOINT, SCRATCH

from fpn_ablate.weights.files import read

PYRAMID = ("backbone=resnet18", *JOINT, *SCRATCH, "neck.channels=256", "task.roi.fc_dim=16")


@pytest.fixture
def run(config, ours, tmp_path):
    """`run("neck.upsample=bilinear")` -> the folder of a finished run with weights of that network."""

    return lambda *overrides: leave_run(config, ours, tmp_path / "run", *overrides)


def leave_run(config, ours, folder, *overrides):
    """Write what a finished run would leave to read weights from; return the folder and the state dict."""
    folder.mkdir()
    common = [o for o in PYRAMID if "ablation=c4" not in overrides or not o.startswith("neck")]
    cfg, model = config(*common, *overrides), ours(3, *common, *overrides)
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    return folder, model.state_dict()


@pytest.fixture(scope="module")
def pyramid(config, ours, tmp_path_factory):
    """The folder of a finished run with a pyramid, which is read only, and a file of its weights alone."""
    root = tmp_path_factory.mktemp("pyramid")
    folder, state = leave_run(config, ours, root / "run")
    torch.save(state, root / "bare.pt")
    return folder, root / "bare.pt"


def test_a_file_of_torchvision_comes_in_and_goes_out_again(cli, torchvision_file, tmp_path):
    path, theirs = torchvision_file
    own, out, again = (tmp_path / name for name in ("own.safetensors", "out.pth", "again.safetensors"))
    code, said, _ = cli("weights", "import", path, own)
    assert code == 0 and "torchvision detector, resnet, 3 classes" in said
    stored = read(own)
    assert stored.facts["source"] == "torchvision detector" and stored.facts["num_classes"] == "3"
    assert (stored.facts["format"], stored.facts["version"]) == ("fpn_ablate", "2")
    code, said, _ = cli("weights", "export", own, out, "--to", "torchvision")
    assert code == 0
    assert "FasterRCNN(resnet_fpn_backbone(backbone_name='resnet...', weights=None), num_classes=4)" in said
    net = torchvision_detector()
    net.load_state_dict(torch.load(out, weights_only=True), strict=True)
    for name, value in net.state_dict().items():
        background = 4 if name.startswith("roi_heads.box_predictor.bbox_pred") else 0  # not trained, and not kept
        if value.dim():
            assert torch.equal(value[background:], theirs[name][background:]), name
            assert not value[:background].any(), name
        else:
            assert torch.equal(value, theirs[name]), name
    assert cli("weights", "import", out, again)[0] == 0
    a, b = (safetensors.torch.load_file(file) for file in (own, again))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_goes_out_both_ways(cli, run, tmp_path):
    folder, state = run()
    own, out, again = (tmp_path / name for name in ("own.safetensors", "out.pth", "again.safetensors"))
    assert cli("weights", "export", folder, own, "--to", "safetensors")[0] == 0
    assert all(torch.equal(value, state[name]) for name, value in read(own).tensors.items())
    assert read(own).facts["backbone"] == "resnet18" and '"top_down": true' in read(own).facts["neck"]
    for source in (folder, folder / "model.pt", own):
        assert cli("weights", "export", source, out, "--to", "torchvision")[0] == 0
        assert cli("weights", "import", out, again)[0] == 0
        back = read(again).tensors
        assert back.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in back.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("ablation=bottom_up",), "torchvision only has a pyramid with neck.top_down=True"),
        (("neck.upsample=bilinear",), "only has a pyramid with neck.upsample=nearest"),
        (("neck.fuse=mean",), "only has a pyramid with neck.fuse=sum"),
        (("rpn.relu=false",), "only has heads with rpn.relu=True"),
        (("task.roi.levels=all",), "only has heads with task.roi.levels=assigned"),
        (("neck.smooth=none",), "only has a pyramid with neck.smooth=all"),
        (("backbone=small",), "torchvision has no such detector on small"),
        (("ablation=c4",), "torchvision only has a pyramid with neck.name=fpn"),
        (("backbone=resnet50", "backbone.stride_in_1x1=true"), "strides in the 1x1"),
    ],
)
def test_what_torchvision_does_not_have_is_not_exported(cli, run, tmp_path, overrides, message):
    folder, _ = run(*overrides)
    code, _, err = cli("weights", "export", folder, tmp_path / "out.pth", "--to", "torchvision")
    assert code == 2 and message in err
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("import {theirs} {folder}/out.pth", "give it a name that ends in .safetensors"),
        ("import {theirs} {theirs}", "would replace the file that is read"),
        ("export {run} {folder} --to torchvision", "Is a directory"),
        ("import {folder}/none.pth {out}", "no such file"),
        ("import {theirs} {out} --pixel-std 1", "--pixel-std and --rgb are for files of detectron2"),
        ("import {run} {out} --bn-eps 0", "a file of this project"),
        ("export {bare} {out} --to torchvision", "does not say what its backbone is; give the run's folder"),
        ("import {theirs} {out} --pixel-std 1,2", "give one number above 0, or three"),
        ("import {theirs} {out} --pixel-std x", "give one number above 0, or three"),
        ("import {theirs} {out} --pixel-std 0", "give one number above 0, or three"),
        ("import {theirs} {out} --bn-eps -1", "--bn-eps"),
    ],
)
def test_bad_arguments_are_told_with_the_fix(cli, torchvision_file, pyramid, tmp_path, arguments, message):
    out = tmp_path / "out.safetensors"
    folder, bare = pyramid
    places = {"theirs": torchvision_file[0], "folder": tmp_path, "out": out, "run": folder, "bare": bare}
    code, _, err = cli("weights", *(word.format(**places) for word in arguments.split()))
    assert code == 2 and message in err
    assert not out.exists()


def test_the_help_says_when_an_option_matters(cli):
    code, out, _ = cli("weights", "import", "--help")
    text = " ".join(out.split())
    assert code == 0
    for word in ("COCO_V1", "No file says it", "58.395,57.12,57.375", "BGR"):
        assert word in text
