"""paper2017 is the paper's, in every cell of every table; modern and torchvision differ from it in what they say."""

from itertools import product

import pytest
import yaml
from settings import JOINT

from fpn_ablate.engine.optim import base_learning_rate, learning_rate_factor
from fpn_ablate.utils.paths import EXPERIMENTS

TABLES = ("table1_rpn", "table2_fast_rcnn", "table3_faster_rcnn", "table5_sharing")
COCO = ("data=coco2017", "data.root=/nowhere")


def cells(config, table, recipe="paper2017"):
    """Every row of a table, as `-m +experiments=<table> recipe=paper2017 data=coco2017` would run it."""
    content = yaml.safe_load((EXPERIMENTS / f"{table}.yaml").read_text(encoding="utf-8"))
    params = content["hydra"]["sweeper"]["params"] | ({"backbone": "resnet50,resnet101"} if table == "table5_sharing" else {})
    choices = [[f"{key}={value}" for value in str(values).split(",")] for key, values in params.items() if key != "seed"]
    return [config(f"+experiments={table}", f"recipe={recipe}", *COCO, *one) for one in product(*choices)]


@pytest.mark.parametrize("table", TABLES)
def test_every_row_has_the_papers_settings(config, table):
    """Sec. 4.1, 4.2, 5, 5.1, 5.2."""
    rows = cells(config, table)
    assert len(rows) == {"table1_rpn": 6, "table2_fast_rcnn": 6, "table3_faster_rcnn": 3, "table5_sharing": 6}[table]
    for cfg in rows:
        recipe, rpn = cfg.recipe, cfg.rpn
        assert (recipe.short_side, recipe.batch_size, recipe.optimizer.name) == (800, 16, "sgd")
        assert (recipe.optimizer.momentum, recipe.optimizer.weight_decay) == (0.9, 1e-4)
        assert (rpn.anchor_sizes, rpn.anchor_ratios, rpn.anchor_grid) == ((32, 64, 128, 256, 512), (0.5, 1, 2), "exact")
        assert (rpn.positive_iou, rpn.negative_iou, rpn.samples) == (0.7, 0.3, 256)
        assert cfg.backbone.weights == "imagenet" and cfg.backbone.name.startswith("resnet")
        assert cfg.neck.name == "single_level" or (cfg.neck.channels, cfg.neck.upsample) == (256, "nearest")
        if cfg.task.name != "rpn":
            roi = cfg.task.roi
            assert (roi.samples, roi.proposals, roi.pooling, roi.resolution, roi.fc_dim) == (512, (2000, 1000), "pool", 7, 1024)
            assert (roi.canonical_level, roi.canonical_box_size, roi.conv5_resolution) == (4, 224, 14)


@pytest.mark.parametrize(("table", "steps"), [("table1_rpn", (30_000, 40_000)), ("table2_fast_rcnn", (60_000, 80_000))])
def test_the_rate_is_the_papers_at_every_iteration(config, table, steps):
    drop, end = steps
    for cfg in cells(config, table):
        base, schedule = base_learning_rate(cfg.recipe.optimizer, cfg.recipe.batch_size), cfg.recipe.schedule
        assert cfg.steps == end
        for step, rate in ((500, 0.02), (drop - 1, 0.02), (drop, 0.002), (end - 1, 0.002)):
            assert base * learning_rate_factor(step, end, schedule) == pytest.approx(rate)


def test_every_row_of_table_6_has_the_papers_settings(config):
    """Sec. 6 and appendix A; the last row trains twice as long."""
    rows = cells(config, "table6_segments", "table6_2017")
    assert [(cfg.task.mlp, cfg.task.mask, cfg.steps) for cfg in rows] == [
        *((5, 14, 80_000), (7, 14, 80_000), ("dual", 14, 80_000), ("dual", 28, 80_000), ("dual", 28, 160_000))
    ]
    for cfg in rows:
        recipe, task = cfg.recipe, cfg.task
        assert (recipe.short_side, recipe.batch_size, cfg.neck.channels, cfg.neck.p6) == (800, 16, 128, "subsample")
        assert (task.hidden, task.scales, task.padding, task.ratio_7x7) == (512, (32, 64, 128, 256, 512), 0.25, 2**0.5)
        assert (task.samples, task.positive_fraction, task.mask_weight, task.proposals) == (128, 0.25, 10, 1000)
        base = base_learning_rate(recipe.optimizer, recipe.batch_size)
        for share, rate in ((0.01, 0.03), (0.7499, 0.03), (0.75, 0.003), (0.9999, 0.003)):
            assert base * learning_rate_factor(round(share * cfg.steps), cfg.steps, recipe.schedule) == pytest.approx(rate)


def test_fewer_images_a_step_lower_the_rate_and_parts_of_a_step_do_not(config):
    def rate(*more):
        recipe = config("recipe=paper2017", *COCO, *more).recipe
        return base_learning_rate(recipe.optimizer, recipe.batch_size)

    assert rate("recipe.batch_size=2") == pytest.approx(0.0025)
    assert rate("recipe.accumulate=8") == rate() == 0.02


def differing(a, b, where=""):
    if isinstance(a, dict) and isinstance(b, dict):
        return {key for k in a.keys() | b.keys() for key in differing(a.get(k), b.get(k), f"{where}.{k}" if where else k)}
    return set() if a == b else {where}


def test_what_later_recipes_change_is_what_they_say(config):
    paper, modern, theirs = (
        config(*JOINT, f"recipe={name}", *COCO).model_dump() for name in ("paper2017", "modern", "torchvision")
    )
    schedule = {"recipe.name", "recipe.steps", "recipe.roi.steps", "recipe.schedule.drops"}
    assert differing(paper, modern) == schedule | {"recipe.roi.pooling", "task.roi.pooling"}
    assert differing(modern, theirs) == schedule | {
        *("rpn.anchor_grid", "recipe.antialias", "recipe.eval_batch_size", "recipe.schedule.warmup_steps"),
        *("recipe.roi.loss_beta", "task.roi.box_loss_beta"),
    }
    drops = [round(share * modern["recipe"]["steps"]) for share in modern["recipe"]["schedule"]["drops"]]
    assert drops == [60_000, 80_000]
