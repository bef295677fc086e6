"""What a composed job is called, and which keys may be factors."""

import subprocess
import sys

import pytest

from fpn_ablate.config.composition import compose
from fpn_ablate.config.rows import compose_rows
from fpn_ablate.utils.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "row", "recipe"),
    [
        (["neck.upsample=bilinear", "rpn.samples=8"], "fpn+upsample=bilinear", "smoke+rpn.samples=8"),
        (["backbone.freeze_at=3"], "fpn", "smoke+backbone.freeze_at=3"),
        (["backbone.freeze_at=3", "backbone.freeze_at=1"], "fpn", "smoke+backbone.freeze_at=1"),
        (["factors=[neck,backbone]", "backbone.freeze_at=3"], "fpn+backbone.freeze_at=3", "smoke"),
        (["factors=[neck,backbone]", "backbone=resnet50", "ablation=c4"], "c4+backbone=resnet50", "smoke"),
        (["factors=[neck,backbone]", "backbone.weights=a/b.pth"], "fpn+backbone.weights=b.pth", "smoke"),
        (["factors=[backbone]", "neck.smooth=none"], "fpn", "smoke+neck.smooth=none"),
        (["factors=[neck.upsample]", "neck.upsample=deconv", "neck.p6=none"], "fpn+upsample=deconv", "smoke+neck.p6=none"),
        (
            ["neck.upsample=deconv", "neck.upsample_init=random"],
            "fpn+upsample=deconv+upsample_init=random",
            "smoke",
        ),
        (["image_pyramid=tested"], "fpn+image_pyramid=tested", "smoke"),
        (["ablation=image_pyramid", "image_pyramid.roi=adjacent_max"], "image_pyramid+image_pyramid.roi=adjacent_max", "smoke"),
        (["task=faster_rcnn", "task.training=joint"], "fpn", "smoke"),  # its table says it
        (["task=faster_rcnn", "task.roi.head=2fc"], "fpn", "smoke+task.roi.head=2fc"),
        (
            ["task=faster_rcnn", "factors=[backbone,task.training]", "task.training=joint", "seed=1", "backbone=resnet18"],
            "fpn+backbone=resnet18+training=joint",
            "smoke",
        ),
    ],
)
def test_factors_name_the_row_and_all_else_the_recipe(config, overrides, row, recipe):
    cfg = config(*overrides)
    assert (cfg.row, cfg.recipe.name) == (row, recipe)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ("[nek]", r"factors: nek: there is no such key. Did you mean neck\?"),
        ("[neck,task.trainng]", r"factors: task.trainng: .*Did you mean task.training\? Allowed in task: .*training"),
        ("[neck.]", "factors: neck.: there is no such key"),
        ("[recipe.steps]", "factors: recipe.steps cannot be one. Allowed: backbone, neck, rpn, task"),
        ("[seed]", "factors: seed cannot be one"),
        ("[]", r"factors=\[\]"),
        ("neck", "factors='neck': give a list, as"),
    ],
)
def test_a_factor_that_cannot_be_one_is_refused_with_what_can(config, factors, message):
    with pytest.raises(UserError, match=message):
        config(f"factors={factors}")


@pytest.mark.parametrize(
    ("overrides", "table"),
    [
        (["task=rpn"], "table1_rpn"),
        (["task=fast_rcnn"], "table2_fast_rcnn"),
        (["task=faster_rcnn"], "table3_faster_rcnn"),
        (["task=faster_rcnn", "task.training=joint"], "joint"),  # not "features not shared", Table 3
        (["task=faster_rcnn", "task.training=four_step"], "four_step"),
        (["task=faster_rcnn", "task.training=joint", "table=mine"], "mine"),
    ],
)
def test_a_run_without_a_table_stands_in_its_tasks(config, overrides, table):
    assert config(*overrides).table == table


def test_a_row_in_a_folder_of_the_users_keeps_the_folder_in_its_name(tmp_path):
    folder = tmp_path / "ablation" / "wide"
    folder.mkdir(parents=True)
    (folder / "fpn.yaml").write_text("# @package _global_\nneck: {upsample: bilinear}\n")
    cfg = compose(["recipe=smoke", "ablation=wide/fpn"], tmp_path)
    assert cfg.row == "wide/fpn" and compose(["recipe=smoke", "task=mask_rcnn", "ablation=masks/mlp"]).row == "mlp"


def test_rows_of_a_tasks_table_that_are_of_another_task_are_left_out_unless_the_table_is_named() -> None:
    alone = [cfg.row for cfg in compose_rows(["task=retinanet", "recipe=smoke"])]
    table = [cfg.row for cfg in compose_rows(["+experiments=retinanet", "recipe=smoke"])]
    assert "focal" in alone and [row for row in table if row not in alone] == ["two_stage"]


IN_ANOTHER_PROCESS = """
import sys
from fpn_ablate.config.composition import compose
for line in sys.stdin.read().splitlines():
    print(compose(line.split()).model_dump_json())
"""


def test_the_tests_short_cut_composes_what_hydra_does():
    """Each set twice, since the second is from what was kept, in between sets of the same choices with other values."""
    lines = [
        "recipe=smoke ablation=ssd task.nms_thresh=0.3 recipe.channels=8 data.objects=[1,2]",
        "recipe=smoke ablation=ssd task.nms_thresh=0.4 seed=3",
        "recipe=smoke ablation=fpn neck.channels=16 neck.smooth=none neck.upsample=bilinear",
        "recipe=smoke task=mask_rcnn backbone=resnet18 rpn.nms_thresh=0.5",
    ] * 2
    done = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS], input="\n".join(lines), capture_output=True, text=True)
    assert [compose(line.split()).model_dump_json() for line in lines] == done.stdout.splitlines(), done.stderr


def test_rows_are_every_combination_of_several_values_and_what_a_table_sweeps_over() -> None:
    both = compose_rows(["ablation=fpn,c4", "backbone=small,vgg16", "factors=[neck,backbone]"])
    assert [cfg.row for cfg in both] == [f"{row}+backbone={body}" for row in ("fpn", "c4") for body in ("small", "vgg16")]
    table = compose_rows(["+experiments=table5", "task.training=joint"])
    assert [(cfg.backbone.name, cfg.task.training) for cfg in table] == [("small", "joint"), ("small_deep", "joint")]


def test_a_neck_that_is_named_is_the_row() -> None:
    assert [cfg.row for cfg in compose_rows(["neck=pafpn"])] == ["fpn+neck=pafpn"]
    assert [cfg.neck.upsample for cfg in compose_rows(["neck.upsample=bilinear,deconv"])] == ["bilinear", "deconv"]


def test_the_wide_fpn_is_as_wide_as_the_recipe_says() -> None:
    assert [compose(["ablation=necks/fpn_wide", f"recipe.channels={width}"]).neck.channels for width in (64, 256)] == [96, 384]


def test_batch_norm_needs_more_than_one_number_a_channel() -> None:
    alone = ["ablation=bifpn", "recipe.batch_size=2", "recipe.accumulate=2", "recipe.short_side=128"]
    with pytest.raises(UserError, match=r"one image a part and a map of one cell \(stride 128\): set neck.norm=gn"):
        compose([*alone, "neck.levels=p3-p7"])
    for fix in ("neck.norm=gn", "recipe.accumulate=1", "neck.levels=p2-p6"):
        compose([*alone, "neck.levels=p3-p7", fix])
