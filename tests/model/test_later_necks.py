"""The necks after FPN: equal to other code bases' from equal weights, identities, and switches that do what they say."""

import pytest
import torch
from networks import randomise
from parts import fpn_config
from peers import mmdetection_neck
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fpn_ablate.config.necks import BiFPNNeck, NASFPNNeck, StackedNeck, YOLONeck
from fpn_ablate.config.parts import FPNNeck, PAFPNNeck
from fpn_ablate.model.necks.bifpn import BiFPN
from fpn_ablate.model.necks.fpn import FPN
from fpn_ablate.model.necks.nas_fpn import NASFPN
from fpn_ablate.model.necks.pafpn import PAFPN
from fpn_ablate.model.necks.stacked import Stacked
from fpn_ablate.model.necks.upsample import CARAFE
from fpn_ablate.model.necks.yolo import YOLO
from fpn_ablate.structures.levels import Level

CHANNELS = (3, 5, 7, 9)
LEVELS = tuple(Level(f"c{k}", c) for k, c in zip(range(2, 6), CHANNELS, strict=True))
WIDTH = 8
FPN_KEYS = fpn_config().model_dump()
DEFAULTS = {
    BiFPN: (
        BiFPNNeck,
        {"name": "bifpn", "layers": 2, "fusion": "fast", "separable": True, "bottom_up": True, "act": "swish", "norm": "bn"},
    ),
    NASFPN: (NASFPNNeck, {"name": "nas_fpn", "stacks": 2, "attention": "coarse_max", "norm": "bn"}),
    YOLO: (YOLONeck, {"name": "yolo", "fuse": "concat", "norm": "bn"}),
    FPN: (FPNNeck, FPN_KEYS | {"name": "fpn"}),
    PAFPN: (PAFPNNeck, FPN_KEYS | {"name": "pafpn", "act": "none", "chain": "output"}),
    Stacked: (StackedNeck, {"name": "stacked", "layers": 2, "block": "fpn", "separable": False, "norm": "none"}),
}
EVERY = pytest.mark.parametrize("kind", DEFAULTS)


def neck(kind, channels=WIDTH, levels="p2-p6", **keys):
    """A neck with random weights, in double precision."""
    config, defaults = DEFAULTS[kind]
    model = kind(LEVELS, config(**defaults | {"channels": channels, "levels": levels} | keys))
    return randomise(model, scale=0.5).double()


def features(height=128, width=192, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    return {
        level.name: torch.randn(
            *(2, level.channels, -(-height // level.stride), -(-width // level.stride)),
            generator=generator,
            dtype=torch.float64,
        ).requires_grad_(requires_grad)
        for level in LEVELS
    }


def copy_convolution(ours, theirs):
    """Copy a ConvModule of mmcv, with its norm if there is one."""
    ours.load_state_dict(theirs.conv.state_dict(), strict=False)
    if theirs.with_norm:
        if theirs.conv.bias is not None:
            theirs.conv.bias.data.zero_()
        ours.norm.load_state_dict(theirs.norm.state_dict())


@EVERY
@pytest.mark.parametrize("levels", ["p2-p6", "p3-p7"])
@pytest.mark.parametrize("size", [(128, 192), (97, 65), (1, 1)])
def test_every_neck_puts_out_its_levels_at_their_strides(kind, levels, size):
    out = neck(kind, levels=levels)(features(*size))
    model_levels = neck(kind, levels=levels).levels
    assert list(out) == [level.name for level in model_levels] == [f"p{k}" for k in range(int(levels[1]), int(levels[-1]) + 1)]
    for level in model_levels:
        assert out[level.name].shape == (2, WIDTH, -(-size[0] // level.stride), -(-size[1] // level.stride))


@EVERY
def test_every_parameter_gets_a_gradient_and_every_map_reaches_every_way(kind):
    model, inputs = neck(kind), features(requires_grad=True)
    next(iter(model(inputs).values())).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in inputs.values())  # the finest level reads all
    sum(x.square().sum() for x in model(features()).values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]


@pytest.mark.parametrize(
    ("kind", "switch"),
    [
        (BiFPN, {"fusion": "softmax"}),
        (BiFPN, {"fusion": "sum"}),
        (BiFPN, {"bottom_up": False}),
        (BiFPN, {"act": "none"}),
        (BiFPN, {"layers": 1}),
        (NASFPN, {"attention": "fine_mean"}),
        (NASFPN, {"stacks": 1}),
        (Stacked, {"layers": 1}),
        (Stacked, {"act": "swish"}),
        (PAFPN, {"act": "relu"}),
        (PAFPN, {"chain": "sum"}),
        (FPN, {"fuse": "mean"}),
        (FPN, {"upsample": "carafe"}),
    ],
)
def test_a_switch_changes_what_comes_out(kind, switch):
    on, off = neck(kind), neck(kind, **switch)
    off.load_state_dict(on.state_dict(), strict=False)
    level = "p4" if kind is PAFPN else "p2"
    assert not torch.allclose(on(features())[level], off(features())[level])


@EVERY
@pytest.mark.parametrize("norm", ["none", "gn", "bn"])
def test_norm_follows_each_convolution_or_is_not_built(kind, norm):
    built = {type(module) for module in neck(kind, norm=norm).modules()}
    assert built & {nn.GroupNorm, nn.BatchNorm2d} == {"none": set(), "gn": {nn.GroupNorm}, "bn": {nn.BatchNorm2d}}[norm]


def test_a_bifpn_of_plain_sums_without_the_way_up_is_a_block_of_repeated_fpn():
    bifpn = neck(BiFPN, layers=1, fusion="sum", separable=False, bottom_up=False, act="none", norm="none")
    stacked = neck(Stacked, layers=1)
    layer = bifpn.layers[0]
    for name, node in (*layer.down.items(), *layer.up.items()):
        stacked.blocks[0].convs[name].load_state_dict(node.conv.state_dict())
        if not isinstance(node.project, nn.Identity):
            stacked.inputs.lateral[name].load_state_dict(node.project.state_dict())
    for conv in (
        layer.up["p6"].conv,
        stacked.blocks[0].convs["p6"],
    ):  # the way down starts from it in the one, from its output in the other
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    bifpn_p6 = bifpn.first_pooled["p6"]
    # The coarsest level comes from another projection of C5: give both the same input.
    inputs = features()
    stacked.inputs.lateral["p5"].load_state_dict(layer.down["p5"].project.state_dict())
    bifpn_p6.load_state_dict(layer.down["p5"].project.state_dict())
    bifpn_maps = {n: node.project(inputs[n.replace("p", "c")]) for n, node in layer.down.items()}
    p6 = nn.functional.max_pool2d(bifpn_p6(inputs["c5"]), 3, 2, 1)
    expected = stacked.blocks[0]({**bifpn_maps, "p6": p6})
    for name, x in bifpn(inputs).items():
        torch.testing.assert_close(x, expected[name])


def test_shares_of_a_weighted_sum_are_told_and_start_equal():
    model = BiFPN(LEVELS, BiFPNNeck(**DEFAULTS[BiFPN][1] | {"channels": WIDTH, "levels": "p2-p6", "layers": 1}))
    assert list(model.fusion_shares) == [
        *(f"layers.0.down.p{k}" for k in (2, 3, 4, 5)),
        *(f"layers.0.up.p{k}" for k in (3, 4, 5, 6)),
    ]
    assert model.fusion_shares["layers.0.up.p3"] == pytest.approx([1 / 3] * 3, abs=1e-3)
    assert not neck(BiFPN, fusion="sum").fusion_shares and not neck(FPN).fusion_shares
    assert list(neck(FPN, fuse="weighted").fusion_shares) == ["weights.p2", "weights.p3", "weights.p4"]


def test_nas_fpn_is_mmdetections():
    theirs = mmdetection_neck("nas_fpn", "NASFPN")
    theirs = randomise(theirs(list(CHANNELS), WIDTH, 5, 2, start_level=1, norm_cfg={"type": "BN"}), scale=0.5).double()
    ours = neck(NASFPN, levels="p3-p7", attention="fine_mean")
    for name, lateral in zip(("p3", "p4", "p5"), theirs.lateral_convs, strict=True):
        copy_convolution(ours.inputs.lateral[name], lateral)
    for extra in theirs.extra_downsamples:  # theirs has one more 1x1 in front of each pool
        extra[0] = nn.Identity()
    order = ("gp_64_4", "sum_44_4", "sum_43_3", "sum_34_4", "sum_55_5", "sum_77_7", "gp_75_6")
    for stack, stage in zip(ours.stacks, theirs.fpn_stages, strict=True):
        for conv, cell in zip(stack.convs, order, strict=True):
            copy_convolution(conv, stage[cell].out_conv)
    inputs = features(128, 256)  # of other sizes theirs cuts cells off, where ours keeps them
    for mine, other in zip(ours(inputs).values(), theirs(tuple(inputs.values())), strict=True):
        torch.testing.assert_close(mine, other)


def test_yolos_neck_is_mmdetections():
    theirs = mmdetection_neck("yolo_neck", "YOLOV3Neck")(3, [9, 7, 5], [2 * WIDTH, WIDTH, WIDTH // 2])
    theirs = randomise(theirs, scale=0.5).double()
    ours = neck(YOLO, levels="p3-p7")
    for name, n in (("p5", 1), ("p4", 2), ("p3", 3)):
        block = getattr(theirs, f"detect{n}")
        for k, layer in enumerate(ours.blocks[name]):
            copy_convolution(layer[0], getattr(block, f"conv{k + 1}"))
        if n > 1:
            copy_convolution(ours.reduce[name][0], getattr(theirs, f"conv{n - 1}"))
    inputs = features()
    out = ours(inputs)
    for name, x in zip(("p3", "p4", "p5"), theirs((inputs["c3"], inputs["c4"], inputs["c5"]))[::-1], strict=True):
        torch.testing.assert_close(out[name], ours.output[name](x))


def test_bifpn_is_effdets():
    efficientdet = pytest.importorskip("effdet.efficientdet")
    settings = pytest.importorskip("effdet").get_efficientdet_config("efficientdet_d0")
    settings.fpn_cell_repeats, settings.fpn_channels, settings.image_size = 2, WIDTH, (128, 192)
    maps = [{"num_chs": level.channels, "reduction": level.stride} for level in LEVELS[1:]]
    theirs = randomise(efficientdet.BiFpn(settings, maps), scale=0.5).double()
    ours = neck(BiFPN, levels="p3-p7")
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = settings.norm_kwargs["eps"]
    copy_convolution_of_effdet(ours.first_pooled["p6"], theirs.resample["3"].conv)
    for layer, cell in zip(ours.layers, theirs.cell, strict=True):
        nodes = [layer.down[n] for n in ("p6", "p5", "p4", "p3")] + [layer.up[n] for n in ("p4", "p5", "p6", "p7")]
        for node, other in zip(nodes, cell.fnode, strict=True):
            node.fusion.weight.data.copy_(other.combine.edge_weights.abs())
            other.combine.edge_weights.data.abs_()
            after = other.after_combine.conv
            node.conv[0].load_state_dict(after.conv_dw.state_dict())
            node.conv[1].load_state_dict(after.conv_pw.state_dict(), strict=False)
            node.conv[1].norm.load_state_dict(after.bn.state_dict())
            for resample in other.combine.resample.values():
                if hasattr(resample, "conv"):
                    copy_convolution_of_effdet(node.project, resample.conv)
    inputs = features()
    for mine, other in zip(ours(inputs).values(), theirs([inputs["c3"], inputs["c4"], inputs["c5"]]), strict=True):
        torch.testing.assert_close(mine, other)


def copy_convolution_of_effdet(ours, theirs):
    ours.load_state_dict(theirs.conv.state_dict(), strict=False)
    ours.norm.load_state_dict(theirs.bn.state_dict())


RESNET50 = tuple(Level(f"c{k}", 256 * 2 ** (k - 2)) for k in range(2, 6))


@pytest.mark.parametrize(
    ("kind", "keys", "parameters", "products"),  # of shared figures at 800 x 1024, in 1e6 and 1e9
    [
        (FPN, {}, 3.344, 46.4),
        (PAFPN, {}, 6.885, 66.22),
        (NASFPN, {"stacks": 1, "norm": "bn"}, 5.049, 16.78),
        (NASFPN, {"stacks": 3, "norm": "bn"}, 13.31, 44.45),
        (YOLO, {}, 15.391 + 0.230, 28.3 + 0.73),  # and the 1x1 convolutions to one width
        # That figure has one projection a map; C4 and C5 feed two nodes each.
        (BiFPN, {"layers": 1}, 1.988 + 0.786, 4.8 + 1.258),
        (BiFPN, {"layers": 3, "separable": False}, 15.605 + 0.786, 41.0 + 1.258),
    ],
)
def test_costs_are_those_of_the_literature(kind, keys, parameters, products):
    levels = "p3-p7" if kind in (NASFPN, YOLO, BiFPN) else "p2-p6"
    with torch.device("meta"):
        config, defaults = DEFAULTS[kind]
        model = kind(RESNET50, config(**defaults | {"channels": 256, "levels": levels} | keys))
        maps = {level.name: torch.empty(1, level.channels, 800 // level.stride, 1024 // level.stride) for level in RESNET50}
        with FlopCounterMode(display=False) as counter:
            model(maps)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=2e-3)
    assert counter.get_total_flops() / 2e9 == pytest.approx(products, rel=0.01)


def test_pafpn_is_mmdetections():
    theirs = randomise(mmdetection_neck("pafpn", "PAFPN")(list(CHANNELS), WIDTH, 5), scale=0.5).double()
    ours = neck(PAFPN, chain="sum")
    for n, name in enumerate(("p2", "p3", "p4", "p5")):
        copy_convolution(ours.lateral[name], theirs.lateral_convs[n])
        copy_convolution(ours.smooth[name], theirs.fpn_convs[n])
        if n:
            copy_convolution(ours.down[name], theirs.downsample_convs[n - 1])
            copy_convolution(ours.path[name], theirs.pafpn_convs[n - 1])
    inputs = features()
    for mine, other in zip(ours(inputs).values(), theirs(tuple(inputs.values())), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_pafpn_without_a_way_up_is_fpn():
    pafpn, fpn = neck(PAFPN), neck(FPN)
    fpn.load_state_dict(pafpn.state_dict(), strict=False)
    for name in pafpn.down:
        nn.init.zeros_(pafpn.down[name].weight)
        nn.init.zeros_(pafpn.down[name].bias)
        nn.init.dirac_(pafpn.path[name].weight)
        nn.init.zeros_(pafpn.path[name].bias)
    expected = fpn(features())
    for name, x in pafpn(features()).items():
        torch.testing.assert_close(x, expected[name])


def test_carafe_is_its_formula_written_out():
    layer = randomise(CARAFE(3, compressed=4), scale=0.5).double()
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = nn.functional.pixel_shuffle(layer.encode(layer.compress(x)), 2).softmax(1)
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    out = layer(x, (9, 14))
    assert out.shape == (2, 3, 9, 14)
    for y, column in ((0, 0), (3, 8), (8, 13)):
        window = padded[:, :, y // 2 : y // 2 + 5, column // 2 : column // 2 + 5]
        expected = (window.flatten(2) * weights[:, None, :, y, column]).sum(2)
        torch.testing.assert_close(out[:, :, y, column], expected)
