"""Test scripts/benchmarks/speed.py on tiny inputs: equal work of both detectors, and all figures. No times are compared."""

import json
from pathlib import Path

import pytest
import torch

from fpn_ablate.model.ops.onednn import linear
from fpn_ablate.utils.blocks import fill_blocks

CPU = torch.device("cpu")
PEAK = {"GEMM float32 (GFLOP/s)": 20.0, "convolution float32 (GFLOP/s)": 40.0, "copy, read and written (GB/s)": 10.0}
RETINANETS = ("ResNet-50, 800 x 1066", "small, 128 px", "small, 256 px")


@pytest.fixture(scope="module")
def bench(script):
    return script("benchmarks/speed")


def tiny(bench, task):
    return bench.Case("tiny", ("recipe=smoke", "backbone.freeze_at=0", *task), (64, 64), 2, 6, warmup_steps=2)


@pytest.fixture(scope="module")
def built(bench):
    """Return a function: task -> case, configuration, batch, our detector."""

    def build(task):
        case = tiny(bench, task)
        cfg, batch = bench.case_config(case), bench.case_batch(case)
        return case, cfg, batch, bench.our_model(case, cfg, batch)

    return build


@pytest.mark.parametrize("task", ["JOINT", *(pytest.param(task, marks=pytest.mark.slow) for task in ("RPN", "RETINANET"))])
def test_a_case_is_fair_and_has_all_figures(bench, task):
    results = bench.measure(tiny(bench, getattr(bench, task)), CPU, seconds=0, min_rounds=2, peak=PEAK)
    counts = results["equal (ours, torchvision's)"]
    assert all(ours == theirs for ours, theirs in counts.values())
    assert {"parameters trained", "anchors an image"} <= set(counts) and ("RoIs" in counts) == (task == "JOINT")
    assert ("proposals" in counts) == (task != "RETINANET")
    assert set(results["compared"]) == ({"training step"} if task == "RPN" else {"training step", "inference"})
    for work, compared in results["compared"].items():
        figures, parts = compared["contenders"], compared["parts of ours (processor s)"]
        assert [contender.split(",")[0] for contender in figures] == [
            "ours",
            *["torchvision"] * (len(figures) - 2),
            "layers alone",
        ]
        assert figures["ours"]["times ours, medians"] == 1 and compared["rounds"] == 2
        assert all(f["GFLOP"] > 0 and f["processor (s)"]["minimum"] <= f["processor (s)"]["median"] for f in figures.values())
        assert all(f["GB"] > 0 and f["roofline (s)"] > 0 for f in figures.values())
        assert figures["layers alone"]["GFLOP"] == pytest.approx(figures["ours"]["GFLOP"], rel=0.05)
        assert {"backbone and neck", "the rest", "all"} <= set(parts) and parts["the rest"] >= 0
        assert ("backward" in parts) == ("optimiser" in parts) == (work == "training step")
    assert json.loads(json.dumps(results))["images"] == 2


def test_the_roofline_counts_work_as_torch_does_and_each_tensor_once_an_operator(bench):
    from torch.utils.flop_counter import FlopCounterMode

    x, layer = torch.rand(2, 8, 16, 16), torch.nn.Conv2d(8, 4, 3)

    def run():
        layer(x).sum().backward()

    with bench.Roofline(1, 1) as ours:
        run()
    with FlopCounterMode(display=False) as theirs:
        run()
    assert ours.flop == theirs.get_total_flops() > 0

    with bench.Roofline(peak=1, copy=2) as ours:
        (x + x.view_as(x)).add_(1)
    assert (ours.flop, ours.moved) == (0, (3 + 2) * x.nbytes)
    assert ours.seconds == pytest.approx(ours.moved / 2e9)
    a, b = torch.rand(300, 300), torch.rand(300, 300)
    with bench.Roofline(peak=1, copy=1) as ours:
        linear(a, b)
    assert ours.flop == 2 * 300**3 and ours.seconds == ours.flop / 1e9  # computing takes longer than moving the data


def test_torchvisions_detector_finds_what_ours_finds(bench, built):
    case, cfg, batch, ours = built(bench.JOINT)
    bench.warm_up(ours, case, cfg, batch)
    theirs = bench.their_model(ours, cfg, case).eval()
    detections = ours.eval().detect(batch.images, batch.sizes)
    with torch.no_grad():
        expected = theirs(bench.their_input(batch)[0])
    for n, their_detections in enumerate(expected):
        count = int(detections.valid[n].sum())
        assert count == len(their_detections["scores"]) > 0
        torch.testing.assert_close(detections.scores[n, :count], their_detections["scores"], rtol=1e-4, atol=1e-5)


def test_torchvisions_rpn_has_equal_losses_with_and_without_proposals(bench, built):
    case, cfg, batch, ours = built(bench.RPN)
    theirs, losses = bench.their_model(ours, cfg, case), []
    for proposals in (True, False):
        torch.manual_seed(0)  # its sampler has no generator of its own
        losses.append(
            [float(x.detach()) for x in bench.their_rpn_losses(theirs, *bench.their_input(batch), proposals).values()]
        )
    assert losses[0] == losses[1]


def test_the_command_fills_a_readme_and_writes_json(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "cases", lambda large, device: [tiny(bench, bench.RPN)])
    monkeypatch.setattr(bench, "peaks", lambda device: PEAK)
    readme, out = tmp_path / "README.md", tmp_path / "bench.json"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    assert bench.main(["--out", str(out), "--readme", str(readme), "--seconds", "0", "--device", "cpu"]) == 0
    results, text = json.loads(out.read_text()), readme.read_text()
    assert results["machine"]["threads"] == 1 and set(results["cases"]) == {"tiny"}
    assert text == f"before\n<!-- bench -->\n{bench.markdown(results)}<!-- /bench -->\nafter\n"
    assert "| ours |" in text and "| ours |" in capsys.readouterr().out


def test_a_readme_without_a_block_is_refused_before_anything_is_measured(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "peaks", lambda device: pytest.fail("measured"))
    readme = tmp_path / "README.md"
    for text in ("nothing\n", "<!-- bench -->\nnot closed\n"):
        readme.write_text(text)
        assert bench.main(["--readme", str(readme), "--device", "cpu"]) == 2
        assert "<!-- bench -->" in capsys.readouterr().err and readme.read_text() == text
    assert bench.main(["--readme", str(tmp_path / "none.md"), "--device", "cpu"]) == 2


@pytest.mark.parametrize(("name", "block", "figures"), [("speed", "bench", "bench-cpu"), ("sweep", "sweep", "sweep-cpu")])
def test_the_figures_of_the_readme_are_those_of_the_file(script, name, block, figures):
    results = Path(__file__).parents[2] / "results"
    text, content = (results / "README.md").read_text(), json.loads((results / "reference" / f"{figures}.json").read_text())
    assert fill_blocks(text, block, lambda _: script(f"benchmarks/{name}").markdown(content)) == text


def test_the_shares_in_the_documentation_are_those_of_the_file():
    root = Path(__file__).parents[2]
    cases = json.loads((root / "results" / "reference" / "bench-cpu.json").read_text())["cases"]
    shares, beside_layers = {}, {}
    for name, case in cases.items():
        for work, compared in case["compared"].items():
            seconds = {contender: f["processor (s)"]["median"] for contender, f in compared["contenders"].items()}
            best = min(time for contender, time in seconds.items() if contender.startswith("torchvision"))
            shares.setdefault((name.split(",")[0], work), []).append(seconds["ours"] / best)
            beside_layers[name, work] = f"{seconds['ours'] / seconds['layers alone']:.2f}"
    lines = (root / "docs" / "pages" / "speed.md").read_text().splitlines()
    for detector in ("Faster R-CNN", "RPN", "RetinaNet"):
        both = [shares.get((detector, work)) for work in ("training step", "inference")]
        figures = [f"{min(values):.2f} to {max(values):.2f}" if values else "" for values in both]
        (line,) = (line for line in lines if line.startswith(f"| {detector}"))
        assert [cell.strip() for cell in line.strip("|").split("|")[1:]] == figures
    text = " ".join((root / "docs" / "pages" / "detectors.md").read_text().split())
    large, *small = (beside_layers[f"RetinaNet, {size}", "training step"] for size in RETINANETS)
    assert f"takes {large} times what its layers alone take" in text
    assert f"it takes {small[0]} times" in text and small[0] == small[1]


@pytest.mark.slow
def test_a_sweep_is_timed_in_each_way(script, monkeypatch):
    bench_sweep = script("benchmarks/sweep")
    monkeypatch.setattr(bench_sweep, "ROWS", "ablation=c5")
    monkeypatch.setenv("FPN_ABLATE_PAGE", "off")
    results = bench_sweep.measure("smoke", [1], "cpu")
    assert list(results["ways"]) == ["row by row", "a finished sweep again"]
    first, second = results["ways"].values()
    assert 0 < first["train, all rows (s)"] + first["eval, all rows (s)"] < first["wall (s)"]
    assert results["pre-training (s)"] == 0  # its weights come with the package
    assert set(second) == {"wall (s)", "processor (s)"}  # nothing was trained
    assert f"| row by row | {first['wall (s)']} |" in bench_sweep.markdown(results)


def test_a_sweep_that_fails_is_reported(script, capsys):
    assert script("benchmarks/sweep").main(["--recipe", "none", "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert "ended with code 2" in message and "recipe=none: there is no such file" in message
