"""The typed configuration: what is wrong is refused by name, and what would be allowed is listed."""

import pytest
import yaml

from fpn_ablate.config.schema import Config
from fpn_ablate.config.validation import keys, load_saved_config, unknown_key, validate
from fpn_ablate.utils.errors import UserError


@pytest.fixture
def values(config):
    return config().model_dump(mode="json")


def put(values, key, value):
    *path, last = key.split(".")
    for part in path:
        values = values[part]
    values[last] = value


def test_what_is_composed_is_valid_and_survives_a_round_trip(values):
    assert validate(values).model_dump(mode="json") == values


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("neck.topdown", True, "neck.topdown.*Did you mean neck.top_down\\? Allowed in neck: channels, "),
        (
            "neck.level",
            "c4",
            "neck.level with neck=fpn: there is no such key. Did you mean neck.levels\\? Allowed in neck: channels, ",
        ),
        ("recipe.optimiser", 1, "Did you mean recipe.optimizer"),
        ("sede", 1, "sede: there is no such key. Did you mean seed\\?"),
        ("neck.upsample", "cubic", "neck.upsample='cubic': give 'nearest', 'bilinear', 'deconv' or 'carafe'"),
        ("neck.upsample_init", "random", "upsample_init=random needs upsample=deconv: nearest has no weights to start from"),
        ("neck.output", "p6", "neck.output='p6': .*'pyramid', 'p2', 'p3', 'p4' or 'p5'"),
        ("neck.smooth", None, "neck.smooth=None"),
        ("neck.p6", True, "neck.p6=True"),
        ("neck.channels", 0, "neck.channels=0: give at least 1"),
        ("neck.channels", 2.5, "neck.channels=2.5: give an integer"),
        ("neck.top_down", "perhaps", "neck.top_down='perhaps': give true or false"),
        ("seed", -1, "seed=-1"),
        ("seed", True, "seed=True: give an integer"),
        ("recipe.steps", 0, "recipe.steps=0"),
        ("recipe.steps", True, "recipe.steps=True"),
        ("recipe.optimizer.lr", 0, "recipe.optimizer.lr=0"),
        ("recipe.optimizer.lr", float("inf"), "recipe.optimizer.lr=inf: .*finite"),
        ("recipe.optimizer.weight_decay", float("inf"), "recipe.optimizer.weight_decay=inf: .*finite"),
        ("recipe.optimizer.weight_decay", float("nan"), "recipe.optimizer.weight_decay=nan"),
        ("recipe.optimizer.momentum", 1.5, "recipe.optimizer.momentum=1.5"),
        ("recipe.short_side", 16, "recipe.short_side=16"),
        ("recipe.max_side", 32, "max_side .* must not be below short_side"),
        ("recipe.schedule.name", "linear", "'step' or 'cosine'"),
        ("recipe.schedule.drops", [1.5], "recipe.schedule.drops.0=1.5"),
        ("backbone.name", "resnet20", "'small', 'small_deep', 'resnet18'"),
        ("backbone.freeze_at", 6, "backbone.freeze_at=6"),
        ("backbone.weights", "imagenet", "the small backbone has no ImageNet weights"),
        ("backbone.weights", "none", "weights=none starts from random weights"),
        ("backbone.name", "small_deep", "only the weights of backbone=small come with the package"),
        ("rpn.nms_thresh", 2, "rpn.nms_thresh=2"),
        ("rpn.negative_iou", 0.9, "negative_iou .* must not exceed positive_iou"),
        ("rpn.anchor_sizes", [], "rpn.anchor_sizes"),
        ("rpn.anchor_sizes", [8, 16, 32, 64], "rpn.anchor_sizes has 4 sizes for the 5 levels p2, p3, p4, p5, p6"),
        ("rpn.anchor_ratios", [0], "rpn.anchor_ratios.0=0"),
        ("rpn.pre_nms_topk", [5], "rpn.pre_nms_topk"),
        ("data.objects", [5, 2], "objects: the first number"),
        ("data.extent", [0, 0.5], "data.extent.0=0"),
        ("data.single_scale", 0, "data.single_scale=0"),
        ("data.mix", [0, 0, 0], "mix: at least one share"),
        ("data.aspect", 3.9, "recipe.max_side cuts the generated pictures"),
        ("data.name", "voc", "data=.*'shapes', 'coco'"),
        ("seed", 2**53 + 1, "seed=9007199254740993: give at most"),
        ("workers", 10**6, "workers=1000000: give at most 1024"),
        ("threads", 10**9, "threads=1000000000: "),
        ("data.train_images", 10**12, "data.train_images=1000000000000: give at most 1000000"),
        ("data.objects", [1, 10**9], "data.objects.1=1000000000: "),
        ("recipe.batch_size", 10**9, "recipe.batch_size=1000000000: "),
        ("recipe.roi.fc_dim", 10**9, "recipe.roi.fc_dim=1000000000: "),
        ("recipe.optimizer.lr", 1e300, "recipe.optimizer.lr=1e\\+300: "),
        ("rpn.anchor_sizes", [1e300] * 5, "rpn.anchor_sizes.0=1e\\+300: "),
        ("rpn.post_nms_topk", [10**9, 1], "rpn.post_nms_topk.0=1000000000: "),
        ("recipe.steps", "x" * 10**6, "recipe.steps='xxx.*\\.\\.\\.xxx"),
        ("neck", [[1] * 99] * 99, "neck=\\[\\[1, 1"),
        ("device", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("log.wandb", "on", "'disabled', 'offline' or 'online'"),
    ],
)
def test_a_wrong_key_or_value_is_named_and_the_allowed_listed(values, key, value, message):
    put(values, key, value)
    with pytest.raises(UserError, match=message) as refused:
        validate(values)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("spoilt", [[], None, {"rpn": []}, {"recipe": {"optimizer": 5}}, {5: 6}])
def test_what_is_no_configuration_at_all_is_refused(values, spoilt):
    with pytest.raises(UserError):
        validate(values | spoilt if isinstance(spoilt, dict) else spoilt)


def test_a_backbone_from_random_weights_is_not_trained_at_a_pre_trained_ones_rate(config):
    scratch = ("backbone.weights=none", "backbone.freeze_at=0", "backbone.frozen_bn=false")
    with pytest.raises(UserError, match=r"backbone_lr_factor=.* is for pre-trained backbones"):
        config(*scratch, "recipe.optimizer.backbone_lr_factor=0.1")
    config(*scratch)


def test_what_a_run_has_left_is_read_again(config, values, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    assert load_saved_config(file) == config()


@pytest.mark.parametrize("text", ["", "[]", "a: [", "neck: 5", "head: {}", "\x00", "[" * 5000])
def test_a_damaged_file_of_a_run_is_refused_by_name(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    for path in (file, tmp_path / "none.yaml"):
        with pytest.raises(UserError, match=rf"{path}: cannot be read as a configuration"):
            load_saved_config(path)


def test_a_file_with_a_key_of_an_earlier_version_is_refused_with_the_key(values, tmp_path):
    values["head"] = values.pop("rpn")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"head: there is no such key"):
        load_saved_config(tmp_path / "config.yaml")


def test_every_problem_is_listed_at_once(values):
    put(values, "neck.upsample", "cubic")
    put(values, "seed", -1)
    del values["recipe"]["steps"]
    with pytest.raises(UserError) as refused:
        validate(values)
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    assert "recipe.steps: missing; set recipe.steps=..." in lines


def test_a_pyramid_that_is_connected_to_nothing_is_refused_with_the_reason(values):
    values["neck"] |= {"top_down": False, "lateral": False}
    with pytest.raises(UserError, match=r"connects P2..P4 to nothing: switch at most one of them off"):
        validate(values)


@pytest.mark.parametrize("switches", [{"top_down": False, "fuse": "weighted"}, {"lateral": False, "fuse": "mean"}])
def test_a_fusion_of_nothing_is_refused(values, switches):
    values["neck"] |= switches
    with pytest.raises(UserError, match=r"fuse=\w+ needs top_down=true and lateral=true"):
        validate(values)


@pytest.mark.parametrize("neck", ["fpn", "pafpn", "bifpn", "nas_fpn", "stacked", "yolo"])
@pytest.mark.parametrize(("task", "key"), [("rpn", "rpn.anchor_sizes"), ("retinanet", "task.anchor_sizes")])
def test_a_level_without_anchors_is_refused_on_every_neck(config, neck, task, key):
    with pytest.raises(UserError, match=rf"{key} has 4 sizes for the 5 levels"):
        config(f"neck={neck}", f"task={task}", f"{key}=[32,64,128,256]")


def test_every_key_can_be_named_and_every_leaf_is_a_key(values):
    names = set(keys())
    assert {"neck.top_down", "neck.level", "data.root", "data.seed", "recipe.pretrain.steps", "log.wandb", "rpn"} <= names
    assert "row" not in names

    def leaves(part, prefix=""):
        for key, value in part.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")

    assert set(leaves(values)) - {"row"} <= names


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("neck.topdown", "Did you mean neck.top_down? Allowed in neck: act, attention, block, bottom_up, chain, channels"),
        ("nek.top_down", "Did you mean neck.top_down?"),
        ("recipe.optimizer.lrr", "Did you mean recipe.optimizer.lr? Allowed in recipe.optimizer: backbone_lr_factor, lr, "),
        ("zzz", "Allowed: ablation, backbone, data"),
    ],
)
def test_the_nearest_key_is_offered(key, expected):
    assert expected in unknown_key(key)


def test_a_configuration_cannot_be_changed(config):
    with pytest.raises(Exception, match="frozen"):
        config().seed = 1
    assert isinstance(config(), Config)
