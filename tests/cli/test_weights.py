"""`python -m fpn_ablate weights`."""

import pytest
import safetensors.torch
import torch
import yaml

from fpn_ablate.cli.weights import main
from fpn_ablate.weights.files import read

JOINT = ("task=faster_rcnn", "task.training=joint", "backbone.weights=none", "backbone.freeze_at=0", "backbone.frozen_bn=false")
PYRAMID = ("backbone=resnet18", *JOINT, "neck.channels=256", "task.roi.fc_dim=16")


@pytest.fixture
def run(config, ours, tmp_path):
    """`run("neck.upsample=bilinear")` -> the folder of a finished run with weights of that network."""

    def make(*overrides: str):
        folder = tmp_path / "run"
        folder.mkdir()
        common = [o for o in PYRAMID if "ablation=c4" not in overrides or not o.startswith("neck")]
        cfg, model = config(*common, *overrides), ours(3, *common, *overrides)
        torch.save(model.state_dict(), folder / "model.pt")
        (folder / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
        return folder, model.state_dict()

    return make


def test_a_file_of_torchvision_comes_in_and_goes_out_again(torchvision_file, tmp_path, capsys):
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    path, theirs = torchvision_file
    own, out, again = (tmp_path / name for name in ("own.safetensors", "out.pth", "again.safetensors"))
    assert main(["import", str(path), str(own)]) == 0
    assert "torchvision detector, resnet18, row fpn, 3 classes" in capsys.readouterr().out
    stored = read(own)
    assert stored.facts["source"] == "torchvision detector" and stored.facts["num_classes"] == "3"
    assert (stored.facts["format"], stored.facts["version"], stored.facts["row"]) == ("fpn_ablate", "1", "fpn")
    assert main(["export", str(own), str(out), "--to", "torchvision"]) == 0
    said = capsys.readouterr().out
    assert "FasterRCNN(resnet_fpn_backbone(backbone_name='resnet18', weights=None), num_classes=4)" in said
    trunk = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    net = FasterRCNN(trunk, box_head=TwoMLPHead(256 * 49, 16), box_predictor=FastRCNNPredictor(16, 4))
    net.load_state_dict(torch.load(out, weights_only=True), strict=True)
    for name, value in net.state_dict().items():
        skip = 4 if name.startswith("roi_heads.box_predictor.bbox_pred") else 0
        assert torch.equal(value[skip:], theirs[name][skip:]) if value.dim() else torch.equal(value, theirs[name]), name
        assert not value[:skip].any() if value.dim() else True
    assert main(["import", str(out), str(again)]) == 0
    a, b = (safetensors.torch.load_file(file) for file in (own, again))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_goes_out_both_ways(run, tmp_path, capsys):
    folder, state = run()
    own, out = tmp_path / "own.safetensors", tmp_path / "out.pth"
    assert main(["export", str(folder), str(own), "--to", "safetensors"]) == 0
    assert all(torch.equal(value, state[name]) for name, value in read(own).tensors.items())
    assert read(own).facts["backbone"] == "resnet18" and '"top_down": true' in read(own).facts["neck"]
    for source in (folder, folder / "model.pt", own):
        assert main(["export", str(source), str(out), "--to", "torchvision"]) == 0
        assert torch.equal(torch.load(out)["backbone.fpn.inner_blocks.2.0.weight"], state["neck.lateral.p4.weight"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("ablation=bottom_up",), "torchvision has a pyramid with neck.top_down=True alone"),
        (("neck.upsample=bilinear",), "neck.upsample=nearest alone"),
        (("neck.smooth=none",), "neck.smooth=all alone"),
        (("backbone=small",), "torchvision has no such detector on small"),
        (("ablation=c4",), "torchvision has a pyramid with neck.name=fpn alone"),
        (("backbone=resnet50", "backbone.stride_in_1x1=true"), "strides in the 1x1"),
    ],
)
def test_what_torchvision_does_not_have_is_not_exported(run, tmp_path, capsys, overrides, message):
    folder, _ = run(*overrides)
    assert main(["export", str(folder), str(tmp_path / "out.pth"), "--to", "torchvision"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


def test_bad_arguments_are_told_with_the_fix(torchvision_file, run, tmp_path, capsys):
    path, _ = torchvision_file
    folder, _ = run()
    out = str(tmp_path / "out.safetensors")
    for arguments, message in (
        (["import", str(path), str(tmp_path / "out.pth")], "give it a name that ends in .safetensors"),
        (["import", str(path), str(path)], "would replace the file that is read"),
        (["import", str(path), str(tmp_path)], "a folder; give the name of a file"),
        (["import", str(tmp_path / "none.pth"), out], "no such file"),
        (["import", str(path), out, "--pixel-std", "1"], "of detectron2's alone"),
        (["import", str(folder), out, "--bn-eps", "0"], "a file of this project"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    for option in (["--pixel-std", "1,2"], ["--pixel-std", "x"], ["--pixel-std", "0"], ["--bn-eps", "-1"]):
        with pytest.raises(SystemExit):
            main(["import", str(path), out, *option])
    assert not (tmp_path / "out.safetensors").exists()


def test_the_help_says_when_an_option_matters(capsys):
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for word in ("COCO_V1", "No file says it", "57.375,57.12,58.395", "BGR"):
        assert word in text
