"""Run the measuring scripts on a set of some hundred images, and compare the rehearsal's set with COCO."""

import argparse
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fpn_ablate.data.checks import examine
from fpn_ablate.data.coco import load
from fpn_ablate.utils.blocks import fill_blocks

SCRIPTS = Path(__file__).parents[2] / "scripts"
SCALE = 0.002


@pytest.fixture(scope="module")
def rehearsal(script):
    return script("benchmarks/rehearse_coco")


@pytest.fixture(scope="module")
def folder(rehearsal, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    rehearsal.write_set(folder, SCALE)
    return folder


def test_the_set_is_coco_in_small(rehearsal, folder):
    train, val = load(rehearsal._splits(folder))
    assert (len(train), len(val)) == (237, 10) and train.repairs == {}
    truth = train.coco()["annotations"]
    assert len(truth) == 1720 and 0 < np.mean([a["iscrowd"] for a in truth]) < 0.03
    assert [c["id"] for c in train.categories] == rehearsal.CATEGORY_IDS and len(train.categories) == 80
    sides = np.sqrt([a["bbox"][2] * a["bbox"][3] for a in truth])
    shares = np.histogram(sides, [0, 32, 96, 1000])[0] / len(sides)
    np.testing.assert_allclose(shares, list(rehearsal.SIDES.values()), atol=0.06)
    file = folder / "annotations" / "instances_train2017.json"
    assert 400 < file.stat().st_size / len(truth) < 700  # bytes an object: 546 in COCO's own file
    report = examine.examine(file, folder / "train2017", masks=True)
    assert report.sound and not report.findings


def test_the_pictures_are_links_to_a_few_files(rehearsal, folder):
    pictures = list((folder / "train2017").iterdir())
    assert len({picture.stat().st_ino for picture in pictures}) == len(rehearsal.SIZES) < len(pictures)


def test_a_set_that_is_there_is_left_alone(rehearsal, folder):
    file = folder / "annotations" / "instances_val2017.json"
    before = file.stat().st_mtime_ns
    rehearsal.write_set(folder, SCALE)
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("step", ["index", "index_masks", "rasterise", "recall", "mask_precision", "pycocotools"])
def test_every_step_measures(rehearsal, folder, step):
    clock = rehearsal.Clock()
    rehearsal.STEPS[step](folder, clock, argparse.Namespace(scale=SCALE, pycocotools=2))
    figures = clock.figures
    assert any(name.endswith("s)") for name in figures)
    if step == "pycocotools":
        assert figures["greatest difference from ours"] < 1e-9
        assert {"AP, 2 x 100 (s)", "AR, 2 x 1,000 (s)"} <= set(figures)


def test_a_readmes_table_is_that_of_the_figures(rehearsal):
    root = SCRIPTS.parent
    file, text = root / "results" / "reference" / "rehearsal.json", (root / "results" / "README.md").read_text(encoding="utf-8")
    results = json.loads(file.read_text())
    assert set(results["steps"]) == set(rehearsal.STEPS) and results["scale"] == 1
    assert fill_blocks(text, rehearsal.BLOCK, lambda _: rehearsal.markdown(results)) == text


def test_a_step_that_fails_is_reported(rehearsal, tmp_path, capsys, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError: too much\n")
    monkeypatch.setattr(rehearsal.subprocess, "run", lambda *arguments, **options: failed)
    out = tmp_path / "figures.json"
    arguments = ["--folder", str(tmp_path / "set"), "--scale", "0.0002", "--only", "index", "--out", str(out)]
    assert rehearsal.main(arguments) == 1
    results = json.loads(out.read_text())
    assert results["steps"]["index"] == {"failed": "code 1: MemoryError: too much"}
    assert "MemoryError" in capsys.readouterr().out and results["machine"]["cores"] == os.cpu_count()


def test_the_loaders_rate_and_stages(script, folder, tmp_path, capsys):
    threads, out = torch.get_num_threads(), tmp_path / "rate.json"
    arguments = [str(folder / "annotations" / "instances_val2017.json"), str(folder / "val2017"), "--workers", "0"]
    arguments += ["--sides", "64", "128", "--seconds", "0.1", "--out", str(out)]
    assert script("benchmarks/loader_rate").main(arguments) == 0
    torch.set_num_threads(threads)
    figures = json.loads(out.read_text())
    assert figures["images a second, 0 workers"] > 0 and figures["all of an image (ms)"] > 0
    assert "enough" in capsys.readouterr().out
    if "torchvision is faster by" in figures:  # torchvision is about to drop its decoder
        assert 0 <= figures["greatest difference of a pixel value"] <= 2
