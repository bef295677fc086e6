"""The hierarchy of a network as it is (Fig. 1 (c)), and heads of an RPN that levels do not share."""

import math

import pytest
import torch
import torch.nn.functional as F
from parts import hierarchy_config, rpn_config, segments_config
from settings import ROWS
from test_neck import LEVELS, features

from fpn_ablate.model import anchors
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.contracts import check_neck
from fpn_ablate.model.heads.roi_pooler import RoIPooler
from fpn_ablate.model.heads.rpn import RPN
from fpn_ablate.model.heads.segments import SegmentHead
from fpn_ablate.model.init import initialise
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.model.necks.hierarchy import Hierarchy
from fpn_ablate.structures.instances import Targets
from fpn_ablate.structures.levels import Level
from fpn_ablate.utils.errors import UserError

PYRAMID = tuple(Level(f"p{k}", 8) for k in range(2, 7))
WIDTHS = tuple(Level(f"c{k}", 4 * k) for k in range(3, 6))


def neck(**keys):
    model = Hierarchy(LEVELS, hierarchy_config(extra_channels=6, **keys))
    initialise(torch.nn.ModuleDict({"neck": model}), seed=1)
    return model


@pytest.mark.parametrize("start", ["c2", "c3", "c4", "c5"])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (75, 41)])
def test_the_levels_are_the_backbones_maps_and_those_of_stride_2_layers(start, height, width):
    inputs, model = features(height, width), neck(start=start, extras=2, l2_norm=False)
    out = model(inputs)
    read = [level.name for level in LEVELS if level.name >= start]
    assert list(out) == [level.name for level in model.levels] == [*read, "c6", "c7"]
    assert all(out[name] is inputs[name] for name in read)
    for level in model.levels:
        assert out[level.name].shape == (2, level.channels, *(math.ceil(side / level.stride) for side in (height, width)))
    assert model.label == "{Ck}" and not (model.has_lateral or model.has_top_down)
    layer = model.extra["c6"]
    assert (layer.reduce.kernel_size, layer.reduce.out_channels, layer.conv.stride) == ((1, 1), 3, (2, 2))
    hidden = F.relu(F.conv2d(inputs["c5"], layer.reduce.weight, layer.reduce.bias))
    expected = F.relu(F.conv2d(hidden, layer.conv.weight, layer.conv.bias, 2, 1))
    torch.testing.assert_close(out["c6"], expected)


def test_a_switch_that_is_off_builds_nothing():
    assert not list(neck(start="c3", extras=0, l2_norm=False).parameters())
    assert {name.split(".")[0] for name, _ in neck(start="c3", extras=1, l2_norm=False).named_parameters()} == {"extra"}
    assert [name for name, _ in neck(start="c3", extras=0, l2_norm=True).named_parameters()] == ["l2_norm.c3.factor"]


def test_l2_normalisation_scales_each_cell_of_the_finest_map_to_20():
    inputs, (off, on) = features(), (neck(start="c3", extras=1, l2_norm=switch) for switch in (False, True))
    inputs["c3"][0, :, 0, 0] = 0  # behind a ReLU a cell may have no feature at all
    a, b = off(inputs), on(inputs)
    assert [name for name in a if not torch.equal(a[name], b[name])] == ["c3"]
    lengths = b["c3"].norm(dim=1)
    assert lengths[0, 0, 0] == 0
    lengths[0, 0, 0] = 20
    torch.testing.assert_close(lengths, torch.full_like(lengths, 20.0))
    with torch.no_grad():
        on.l2_norm["c3"].factor[1] = 0
    assert not on(inputs)["c3"][:, 1].any()


def test_sizes_without_a_level_stay_on_their_stride_or_go_to_the_nearest_level():
    levels = {k: tuple(Level(f"c{n}", 8) for n in range(*k)) for k in ((2, 6), (4, 7), (4, 6), (5, 8), (4, 9), (5, 6))}
    sizes = {k: anchors.sizes_per_level(of, [32, 64, 128, 256, 512], shared=False) for k, of in levels.items()}
    assert sizes == {
        (2, 6): [[32], [64], [128], [256, 512]],
        (4, 7): [[32, 64, 128], [256], [512]],
        (4, 6): [[32, 64, 128], [256, 512]],
        (5, 8): [[32, 64, 128], [256], [512]],  # by stride alone C7 would have none
        (4, 9): [[32], [64], [128], [256], [512]],
        (5, 6): [[32, 64, 128, 256, 512]],
    }


def rpn(levels, shared, **keys):
    keys = {"anchor_sizes": [8 * 2**k for k in range(5)], "samples": 60, "post_nms_topk": [40, 20]} | keys
    model = RPN(levels, rpn_config(shared=shared, **keys))
    initialise(torch.nn.ModuleDict({"rpn": model}), seed=1)
    return model


def maps(levels, images=2, side=80):
    generator = torch.Generator().manual_seed(0)
    return {lv.name: torch.randn(images, lv.channels, *[math.ceil(side / lv.stride)] * 2, generator=generator) for lv in levels}


def targets(objects=2):
    gt = torch.tensor([[[5.0, 5, 20, 18], [10, 10, 70, 60]], [[40.0, 30, 52, 44], [0, 0, 60, 30]]])[:, :objects]
    valid, crowd = torch.ones(2, objects, dtype=torch.bool), torch.zeros(2, objects, dtype=torch.bool)
    crowd[1, 1:], valid[1, 1:] = True, False
    return Targets(gt, valid.long(), valid, crowd, torch.tensor([[80, 80], [70, 60]]))


def test_heads_of_their_own_with_equal_weights_compute_what_a_shared_head_does():
    """Losses and proposals are equal, and the gradients of the levels' heads add up to that of the one."""
    one, own = rpn(PYRAMID, shared=True), rpn(PYRAMID, shared=False)
    for head in own.head.levels.values():
        head.load_state_dict(one.head.state_dict())
    features, losses, proposals = maps(PYRAMID), [], []
    for model in (one, own):
        losses.append(model.losses(features, targets(), torch.Generator().manual_seed(3)))
        sum(losses[-1].values()).backward()
        proposals.append(model.propose(*model(features), targets().sizes, to_train=False))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(proposals[0].boxes, proposals[1].boxes)
    for name, p in one.head.named_parameters():
        parts = [head.get_parameter(name).grad for head in own.head.levels.values()]
        torch.testing.assert_close(torch.stack([x for x in parts if x is not None]).sum(0), p.grad)


def test_the_switch_gives_each_level_a_head_and_leaves_the_names_of_a_shared_one():
    one, own = rpn(PYRAMID, shared=True), rpn(PYRAMID, shared=False)
    names = {"conv", "objectness", "deltas"}
    assert set(one.state_dict()) == {f"head.{n}.{kind}" for n in names for kind in ("weight", "bias")}
    assert set(own.state_dict()) == {
        f"head.levels.{lv.name}.{n}.{kind}" for lv in PYRAMID for n in names for kind in ("weight", "bias")
    }
    with torch.no_grad():
        before = own(maps(PYRAMID))[0]
        own.head.levels["p4"].objectness.bias += 1
        after = own(maps(PYRAMID))[0]
    assert [lv.name for lv, a, b in zip(PYRAMID, before, after, strict=True) if not torch.equal(a, b)] == ["p4"]


@pytest.mark.parametrize("objects", [0, 2])
def test_heads_on_levels_of_several_widths_and_numbers_of_anchors_learn(objects):
    model = rpn(WIDTHS, shared=False)
    features = maps(WIDTHS)
    objectness, deltas, grids = model(features)
    assert [len(sizes) for sizes in model.level_sizes] == [2, 1, 2]
    assert [x.shape[1] for x in objectness] == [x.shape[1] for x in deltas] == [len(grid) for grid in grids]
    losses = model.losses(features, targets(objects), torch.Generator().manual_seed(3))
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert objects == 0 or trained >= {f"head.levels.{lv.name}.objectness.weight" for lv in WIDTHS}


def test_what_shares_weights_refuses_levels_of_several_widths():
    widths = r"needs levels of one width, and the neck's are c3 \(12 channels\), c4 \(16 channels\), c5 \(20 channels\)"
    for build in (
        lambda: rpn(WIDTHS, shared=True),
        lambda: RoIPooler(WIDTHS, 7),
        lambda: SegmentHead(WIDTHS, segments_config()),
    ):
        with pytest.raises(UserError, match=widths):
            build()


class TwoWidths(Neck):
    """A user's neck whose levels differ in width."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = (Level("p3", 5), Level("p4", 7))

    def forward(self, features):
        return {"p3": features["c3"], "p4": features["c4"]}


def test_a_users_neck_may_have_several_widths_where_heads_are_not_shared():
    check_neck(TwoWidths(), LEVELS, "neck.class=x", 5, one_width=False)
    with pytest.raises(UserError, match=r"and all one width \(an RPN alone can do with several: rpn.shared=false\)"):
        check_neck(TwoWidths(), LEVELS, "neck.class=x", 5)
    with pytest.raises(UserError, match=r"task\.anchor_sizes of RetinaNet.* 1 sizes: give one a level"):
        check_neck(TwoWidths(), LEVELS, "neck.class=x", 1, one_width=False)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("task=rpn", "rpn.shared=true"), "the RPN has one head for all: set rpn.shared=false"),
        (("task=faster_rcnn",), "task=faster_rcnn has one head for all: use task=ssd"),
        (("task=retinanet",), "task=retinanet has one head for all: use task=ssd"),
        (("task=segment_proposals",), "task=segment_proposals has one head for all: use task=ssd"),
        (("task=rpn", "neck.start=c2"), "rpn.anchor_sizes has 5 sizes for the 7 levels c2, c3, c4, c5, c6, c7, c8"),
    ],
)
def test_heads_that_do_not_fit_are_refused_before_anything_is_built(config, overrides, problem):
    with pytest.raises(UserError, match=problem):
        config("neck=hierarchy", "rpn.shared=false", *overrides)


@pytest.mark.parametrize("neck", ["fpn", "pafpn", "bifpn", "nas_fpn", "yolo", "stacked"])
@pytest.mark.parametrize(
    ("task", "key"), [("retinanet", "task.anchor_sizes"), ("rpn", "rpn.anchor_sizes"), ("segment_proposals", "task.scales")]
)
def test_a_level_without_a_size_is_refused_with_every_neck(config, neck, task, key):
    with pytest.raises(UserError, match=rf"{key} has 2 sizes for the 5 levels p3, p4, p5, p6, p7: give one a level"):
        config(f"task={task}", f"neck={neck}", "neck.levels=p3-p7", f"{key}=[32,64]")


def test_proposals_of_an_rpn_on_the_hierarchy_serve_a_second_stage_on_another_neck(config):
    proposals = ("task=fast_rcnn", "neck@task.proposals.neck=hierarchy")
    with pytest.raises(UserError, match=r"set rpn\.shared=false"):
        config(*proposals)
    cfg = config(*proposals, "rpn.shared=false")
    assert cfg.task.proposals.neck.row == "hierarchy+start=c4+extras=3"


STEPS = ("own_heads", "no_1x1", "from_c4", "extras", "l2_norm")


def test_each_step_to_ssd_is_one_change(config):
    rows = {name: config(f"ablation=ssd/{name}") for name in STEPS}
    assert [rows[name].neck.level_names for name in STEPS[1:]] == [
        ("c2", "c3", "c4", "c5", "c6"),
        ("c4", "c5", "c6"),
        *[("c4", "c5", "c6", "c7", "c8")] * 2,
    ]
    assert [cfg.row for cfg in rows.values()] == list(STEPS) and not set(STEPS) & set(ROWS)
    assert not any(cfg.rpn.shared for cfg in rows.values())
    bottom_up = config("ablation=bottom_up")
    assert rows["own_heads"].neck == bottom_up.neck
    assert rows["own_heads"].rpn == bottom_up.rpn.model_copy(update={"shared": False})
    assert rows["l2_norm"].neck == rows["extras"].neck.model_copy(update={"l2_norm": True})
    models = {name: build_detector(cfg) for name, cfg in rows.items()}
    assert {name: model.rpn.level_sizes for name, model in models.items() if name != "from_c4"} == {
        name: [[s * 64 / 800] for s in (32, 64, 128, 256, 512)] for name in STEPS if name != "from_c4"
    }
    assert [len(sizes) for sizes in models["from_c4"].rpn.level_sizes] == [3, 1, 1]
    ssd = config("ablation=ssd/ssd")
    assert (ssd.row, ssd.task.name, ssd.neck) == ("ssd", "ssd", rows["l2_norm"].neck)
