"""The neck: each switch does what it says, and nothing else."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from parts import fpn_config, single_level_config
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fpn_ablate.model.init import initialise
from fpn_ablate.model.necks.fpn import FPN
from fpn_ablate.model.necks.single_level import SingleLevel
from fpn_ablate.model.necks.upsample import Deconvolution, bilinear
from fpn_ablate.structures.levels import Level

CHANNELS = (3, 5, 7, 9)
LEVELS = tuple(Level(f"c{k}", c) for k, c in zip(range(2, 6), CHANNELS, strict=True))
WIDTH = 4


def features(height=64, width=96, seed=0, requires_grad=False):
    """Random C2..C5 of an image; sides are ceil-divided by the strides."""
    generator = torch.Generator().manual_seed(seed)
    return {
        level.name: torch.randn(
            2, level.channels, -(-height // level.stride), -(-width // level.stride), generator=generator
        ).requires_grad_(requires_grad)
        for level in LEVELS
    }


def neck(**switches):
    """A neck whose weights depend on their names alone, with biases that are not 0."""
    model = FPN(LEVELS, fpn_config(channels=WIDTH, **switches))
    initialise(torch.nn.ModuleDict({"neck": model}), seed=1)
    for number, (name, p) in enumerate(sorted(model.named_parameters())):
        if name.endswith("bias"):
            torch.nn.init.uniform_(p, -1, 1, generator=torch.Generator().manual_seed(number))
    return model


def with_weights_of(other, **switches):
    """A neck with these switches and, where names agree, the weights of `other`."""
    model = neck(**switches)
    model.load_state_dict(other.state_dict(), strict=False)
    return model


def reach(model, level="p2"):
    inputs = features(requires_grad=True)
    model(inputs)[level].square().sum().backward()
    return {name for name, x in inputs.items() if x.grad is not None and x.grad.abs().sum() > 0}


def differing(a, b):
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, {"c2", "c3", "c4", "c5"}),
        ({"top_down": False}, {"c2"}),
        ({"lateral": False}, {"c5"}),
        ({"output": "p2"}, {"c2", "c3", "c4", "c5"}),
        ({"output": "p2", "top_down": False}, {"c2"}),
        ({"output": "p2", "lateral": False}, {"c5"}),
    ],
)
@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "deconv"])
def test_which_backbone_maps_reach_p2(switches, expected, upsample):
    assert reach(neck(upsample=upsample, **switches)) == expected


@pytest.mark.parametrize(
    ("level", "expected"), [("p3", {"c3", "c4", "c5"}), ("p4", {"c4", "c5"}), ("p5", {"c5"}), ("p6", {"c5"})]
)
def test_a_level_is_reached_by_its_own_map_and_the_coarser_ones(level, expected):
    assert reach(neck(), level) == expected
    assert reach(neck(lateral=False), level) == {"c5"}
    assert reach(neck(top_down=False), level) == {level.replace("p", "c") if level != "p6" else "c5"}


def test_the_formula_of_figure_3_written_out():
    """P_k = smooth_k(lateral_k(C_k) + up(M_{k+1})), from C5 down; P6 = every second pixel of P5."""
    model, inputs = neck(), features()
    m5 = model.lateral["p5"](inputs["c5"])
    m4 = model.lateral["p4"](inputs["c4"]) + m5.repeat_interleave(2, -1).repeat_interleave(2, -2)
    m3 = model.lateral["p3"](inputs["c3"]) + m4.repeat_interleave(2, -1).repeat_interleave(2, -2)
    m2 = model.lateral["p2"](inputs["c2"]) + m3.repeat_interleave(2, -1).repeat_interleave(2, -2)
    out = model(inputs)
    for name, merged in {"p2": m2, "p3": m3, "p4": m4, "p5": m5}.items():
        torch.testing.assert_close(out[name], model.smooth[name](merged))
    assert torch.equal(out["p6"], out["p5"][:, :, ::2, ::2])
    assert list(out) == [level.name for level in model.levels] == ["p2", "p3", "p4", "p5", "p6"]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (65, 97), (33, 127), (1, 1), (100, 50)])
def test_torchvisions_pyramid_gives_the_same_with_the_same_weights(height, width):
    ours = neck()
    theirs = FeaturePyramidNetwork(list(CHANNELS), WIDTH, LastLevelMaxPool())
    for k, name in enumerate(["p2", "p3", "p4", "p5"]):
        theirs.inner_blocks[k][0].load_state_dict(ours.lateral[name].state_dict())
        theirs.layer_blocks[k][0].load_state_dict(ours.smooth[name].state_dict())
    inputs = features(height, width)
    expected = list(theirs(inputs).values())  # its last level, a max-pool with a window of 1, is a subsampling
    for level, (mine, other) in enumerate(zip(ours(inputs).values(), expected, strict=True)):
        torch.testing.assert_close(mine, other, msg=f"level {level}")


@pytest.mark.parametrize("switch", ["top_down", "lateral"])
def test_each_switch_changes_p2_to_p4_and_leaves_p5_and_p6_bitwise_as_they_are(switch):
    on = neck()
    off = with_weights_of(on, **{switch: False})
    inputs = features()
    assert differing(on(inputs), off(inputs)) == {"p2", "p3", "p4"}


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(["nearest", "bilinear", "deconv"], 2)))
def test_the_way_of_upsampling_changes_p2_to_p4_alone(a, b):
    one, other = neck(upsample=a), with_weights_of(neck(upsample=a), upsample=b)
    inputs = features()
    assert differing(one(inputs), other(inputs)) == {"p2", "p3", "p4"}


def test_the_way_of_upsampling_does_not_matter_without_a_top_down_path():
    inputs = features()
    outputs = [neck(upsample=mode, top_down=False)(inputs) for mode in ("nearest", "bilinear", "deconv")]
    assert not differing(outputs[0], outputs[1])
    assert not differing(outputs[0], outputs[2])


def test_smooth_merged_takes_the_3x3_off_p5_alone_and_none_off_all():
    inputs, every = features(), neck()
    merged, none = with_weights_of(every, smooth="merged"), with_weights_of(every, smooth="none")
    assert differing(every(inputs), merged(inputs)) == {"p5", "p6"}
    assert torch.equal(merged(inputs)["p5"], every.lateral["p5"](inputs["c5"]))
    assert differing(merged(inputs), none(inputs)) == {"p2", "p3", "p4"}
    assert "p5" not in with_weights_of(every, smooth="merged", top_down=False).smooth


def test_p6_by_subsampling_by_convolution_or_not_at_all():
    inputs, subsampled = features(64, 160), neck()
    convolved, none = with_weights_of(subsampled, p6="conv"), with_weights_of(subsampled, p6="none")
    assert differing(subsampled(inputs), convolved(inputs)) == {"p6"}
    conv = convolved.p6_conv["p6"]
    expected = torch.nn.functional.conv2d(convolved(inputs)["p5"], conv.weight, conv.bias, stride=2, padding=1)
    assert torch.equal(convolved(inputs)["p6"], expected)
    assert list(none(inputs)) == ["p2", "p3", "p4", "p5"] == [level.name for level in none.levels]


@pytest.mark.parametrize("level", ["p2", "p3", "p4", "p5"])
@pytest.mark.parametrize("switches", [{}, {"top_down": False}, {"lateral": False}, {"upsample": "deconv"}])
def test_a_single_output_equals_that_level_of_the_pyramid(level, switches):
    whole = neck(**switches)
    single = with_weights_of(whole, output=level, **switches)
    inputs = features()
    out = single(inputs)
    assert list(out) == [level] == [spec.name for spec in single.levels]
    assert torch.equal(out[level], whole(inputs)[level])


@pytest.mark.parametrize(
    ("switches", "lateral", "smooth", "up", "p6"),
    [
        ({}, "p2 p3 p4 p5", "p2 p3 p4 p5", "", ""),
        ({"top_down": False}, "p2 p3 p4 p5", "p2 p3 p4 p5", "", ""),
        ({"lateral": False}, "p5", "p2 p3 p4 p5", "", ""),
        ({"output": "p2"}, "p2 p3 p4 p5", "p2", "", ""),
        ({"output": "p3"}, "p3 p4 p5", "p3", "", ""),
        ({"output": "p2", "top_down": False}, "p2", "p2", "", ""),
        ({"output": "p5"}, "p5", "p5", "", ""),
        ({"upsample": "deconv"}, "p2 p3 p4 p5", "p2 p3 p4 p5", "p2 p3 p4", ""),
        ({"upsample": "deconv", "top_down": False}, "p2 p3 p4 p5", "p2 p3 p4 p5", "", ""),
        ({"upsample": "deconv", "output": "p4"}, "p4 p5", "p4", "p4", ""),
        ({"smooth": "merged"}, "p2 p3 p4 p5", "p2 p3 p4", "", ""),
        ({"smooth": "merged", "output": "p5"}, "p5", "", "", ""),
        ({"smooth": "none"}, "p2 p3 p4 p5", "", "", ""),
        ({"p6": "conv"}, "p2 p3 p4 p5", "p2 p3 p4 p5", "", "p6"),
        ({"p6": "conv", "output": "p2"}, "p2 p3 p4 p5", "p2", "", ""),
        ({"p6": "none"}, "p2 p3 p4 p5", "p2 p3 p4 p5", "", ""),
    ],
)
def test_a_part_that_is_switched_off_is_not_built(switches, lateral, smooth, up, p6):
    model = neck(**switches)
    built = [" ".join(sorted(part)) for part in (model.lateral, model.smooth, model.up, model.p6_conv)]
    assert built == [lateral, smooth, up, p6]


LEGAL = [
    {"top_down": t, "lateral": la, "output": o, "upsample": u, "smooth": s, "p6": p}
    for t, la, o, u, s, p in itertools.product(
        (True, False),
        (True, False),
        ("pyramid", "p2", "p3", "p5"),
        ("nearest", "bilinear", "deconv"),
        ("all", "merged", "none"),
        ("subsample", "conv", "none"),
    )
    if t or la
]


def test_every_legal_combination_runs_and_gives_each_of_its_parameters_a_gradient():
    inputs = features(33, 65)
    for switches in LEGAL:
        model = neck(**switches)
        out = model(inputs)
        assert {(n, x.shape[1]) for n, x in out.items()} == {(lv.name, lv.channels) for lv in model.levels}, switches
        sum(x.square().sum() for x in out.values()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), switches


@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "deconv"])
@pytest.mark.parametrize(("height", "width"), [(65, 97), (31, 33), (127, 1), (800, 1000)])
def test_odd_sizes_keep_the_size_of_each_map(upsample, height, width):
    inputs = features(height, width)
    out = neck(upsample=upsample)(inputs)
    for k in range(2, 6):
        assert out[f"p{k}"].shape[-2:] == inputs[f"c{k}"].shape[-2:]
    assert out["p6"].shape[-2:] == (-(-height // 64), -(-width // 64))
    assert out["p6"].shape[-2:] == neck(p6="conv")(inputs)["p6"].shape[-2:]


# From, to: doubled, odd, one pixel, one line, stretched by different factors, shrunk.
SIZES = [((4, 6), (8, 12)), ((13, 17), (25, 33)), ((25, 32), (50, 63)), ((1, 1), (2, 1)), ((1, 5), (2, 9)), ((3, 4), (17, 5))]
SIZES += [((9, 10), (5, 3)), ((7, 7), (7, 7))]


@pytest.mark.parametrize(("before", "after"), SIZES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bilinear_upsampling_gives_torchs_values_and_gradients(before, after, memory_format):
    """In double precision: in single, torch rounds the places of pixels, and differs by more from the exact values."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *before, generator=generator, dtype=torch.float64).contiguous(memory_format=memory_format)
    weight = torch.randn(2, 3, *after, generator=generator, dtype=torch.float64)
    results = []
    for function in (bilinear, lambda x, size: F.interpolate(x, size=size, mode="bilinear", align_corners=False)):
        x.requires_grad_().grad = None
        out = function(x, after)
        (out * weight).sum().backward()
        results.append((out.detach(), x.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bilinear(x.detach().float(), after), results[1][0].float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_bilinear_upsampling_in_bf16_is_as_exact_as_bf16_is(before, after):
    x = torch.rand(2, 3, *before, generator=torch.Generator().manual_seed(0))
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            out = bilinear(given, after)
        assert out.dtype == torch.bfloat16
        # Values up to 1, rounded as they are read, as are two weights, and after the rows and the columns: half of 2^-8 each.
        torch.testing.assert_close(out.float(), bilinear(x, after), rtol=0, atol=2.5 / 2**8)


def test_bilinear_upsampling_calls_nothing_that_adds_in_any_order_on_a_gpu():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.__name__)
            return function(*args, **(kwargs or {}))

    called, x = [], torch.rand(1, 2, 5, 7, requires_grad=True)
    with Names():
        bilinear(x, (9, 13)).sum().backward()
    assert sum("mm" in name for name in called) >= 4  # two products, forward and backward
    assert not [name for name in called if any(word in name for word in ("upsample", "index", "scatter", "gather"))]


def test_bilinear_upsampling_works_in_deterministic_mode_and_in_training_after_inference():
    model, inputs = neck(upsample="bilinear"), features(49, 71, requires_grad=True)  # sizes that no other test has cached
    with torch.inference_mode():
        expected = model(inputs)["p2"].clone()
    torch.use_deterministic_algorithms(True)
    try:
        out = model(inputs)["p2"]
        out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(out, expected)
    assert inputs["c5"].grad.abs().sum() > 0


def deconvolution(seed=0, **how):
    model = Deconvolution(3, **how)
    initialise(torch.nn.ModuleDict({"up": model}), seed)
    return model


@pytest.mark.parametrize(("before", "after"), [((4, 6), (8, 12)), ((13, 17), (25, 33)), ((2, 3), (3, 6))])
def test_a_deconvolution_starts_as_bilinear_interpolation_by_2_within_the_border(before, after):
    """Of an odd size too: it is cut, and not stretched. The border sees zeros outside, where interpolation sees the edge."""
    x = torch.randn(2, 3, *before, generator=torch.Generator().manual_seed(0))
    doubled = bilinear(x, [2 * side for side in before])[..., : after[0], : after[1]]
    out = deconvolution(start="bilinear")(x, after)
    assert out.shape[-2:] == after
    torch.testing.assert_close(out[..., 1:-1, 1:-1], doubled[..., 1:-1, 1:-1])
    ones = deconvolution(start="bilinear")(torch.ones(1, 3, *before), after)
    assert (ones[..., 0, 0].unique(), ones[..., 0, 1].unique(), ones[..., 1, 1].unique()) == (0.75**2, 0.75, 1)


def test_before_training_a_deconvolutions_pyramid_is_the_bilinear_one_but_for_borders():
    """The border of P5 reaches 7 cells into the merged map of P2, and the 3x3 one more."""
    inputs = features(128, 192)
    one, other = neck(upsample="bilinear")(inputs), neck(upsample="deconv")(inputs)
    for name, border in {"p2": 8, "p3": 4, "p4": 2}.items():
        inner = (..., slice(border, -border), slice(border, -border))
        assert one[name][inner].numel()
        torch.testing.assert_close(one[name][inner], other[name][inner], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(one[name], other[name], rtol=1e-2, atol=1e-2)
    random = neck(upsample="deconv", upsample_init="random")(inputs)
    assert differing(random, other) == {"p2", "p3", "p4"}


def test_only_a_random_start_depends_on_the_seed():
    bilinear_start, random_start = (
        [deconvolution(seed, start=start).weight for seed in (0, 1)] for start in ("bilinear", "random")
    )
    assert torch.equal(*bilinear_start)
    assert not torch.equal(*random_start)
    assert float(random_start[0].detach().abs().max()) == pytest.approx((6 / (4 * 6)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("height, width", [(64, 96), (65, 190)])
def test_p3_to_p7_are_the_pyramid_above_p2_and_two_levels_more(height, width):
    maps, pyramid = features(height, width), neck()
    levels = with_weights_of(pyramid, levels="p3-p7")
    out, expected = levels(maps), pyramid(maps)
    assert list(out) == [level.name for level in levels.levels] == ["p3", "p4", "p5", "p6", "p7"]
    assert not hasattr(levels.lateral, "p2") and reach(levels, "p3") == {"c3", "c4", "c5"}
    for name in ("p3", "p4", "p5", "p6"):
        assert torch.equal(out[name], expected[name])
    assert torch.equal(out["p7"], out["p6"][..., ::2, ::2])
    assert [tuple(x.shape[-2:]) for x in out.values()] == [(-(-height // 2**k), -(-width // 2**k)) for k in range(3, 8)]


def test_p6_by_a_convolution_on_p5_or_c5_and_p7_by_one_on_p6_behind_a_relu():
    maps = features()
    for p6, source in (("conv", lambda out: out["p5"]), ("conv_c5", lambda out: maps["c5"])):
        model = neck(levels="p3-p7", p6=p6)
        out = model(maps)
        assert torch.equal(out["p6"], model.p6_conv["p6"](source(out)))
        assert torch.equal(out["p7"], model.p7_conv["p7"](out["p6"].relu()))
        assert (out["p6"] < 0).any()  # so that the ReLU shows
    assert list(neck(levels="p3-p7", p6="none")(maps)) == ["p3", "p4", "p5"]
    assert list(neck(p6="conv_c5")(maps)) == ["p2", "p3", "p4", "p5", "p6"]
    assert list(neck(levels="p3-p7", output="p3")(maps)) == ["p3"]
    with pytest.raises(ValueError, match="output=p2 is none of levels=p3-p7"):
        neck(levels="p3-p7", output="p2")


@pytest.mark.parametrize("level", ["c2", "c3", "c4", "c5"])
def test_a_single_level_is_the_backbones_map_itself(level):
    inputs, model = features(), SingleLevel(LEVELS, single_level_config(level))
    out = model(inputs)
    assert list(out) == [level]
    assert out[level] is inputs[level]
    assert [(spec.name, spec.channels) for spec in model.levels] == [(level, inputs[level].shape[1])]
    assert not list(model.parameters())


def test_a_levels_name_means_its_stride():
    assert [level.stride for level in neck().levels] == [4, 8, 16, 32, 64]
