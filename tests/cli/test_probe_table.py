"""The table that the probe prints."""

import pytest

from fpn_ablate.cli import probe

SIZES = ("small", "medium", "large")


@pytest.fixture
def report():
    """A run whose probe asks for other categories at each size: three of small objects, two of medium ones, none of large."""

    def accuracy(classes, places):
        return {"value": 0.5, "low": 0.45, "high": 0.55, "classes": classes, "places": places}

    categories = (accuracy(3, 40), accuracy(2, 17), None)
    level = {size: {"object": accuracy(2, 80), "category": category} for size, category in zip(SIZES, categories, strict=True)}
    run = {"folder": "here", "row": "fpn", "seed": 0, "features": {"p2": 64}, "levels": {"p2": level}}
    objects = dict(zip(SIZES, (40, 20, 5), strict=True))
    pictures = {"train": 9, "val": 9}
    facts = {"data": "faces", "generated": False, "background": "places", "categories": 4}
    return {**facts, "pictures": pictures, "objects": {"val": objects}, "runs": [run]}


def test_chance_is_that_of_the_categories_that_remain(report, capsys):
    probe.show(report)
    lines = capsys.readouterr().out.splitlines()
    (chance,) = (line for line in lines if "by chance" in line)
    assert [cell.strip() for cell in chance.split("|")] == ["", "by chance", "50", "50", "50", "33.3", "50", "n/a"]
    assert any(line.startswith("objects: 40 small, 20 medium, 5 large; ") and "0 small, 3 medium" in line for line in lines)


def test_runs_of_one_row_are_told_apart_by_seed_and_otherwise_by_folder(report, capsys):
    (run,) = report["runs"]
    probe.show(report | {"runs": [run, run | {"folder": "there"}, run | {"row": "c4"}]})
    printed = capsys.readouterr().out
    assert "fpn #1: here\n" in printed and "fpn #2: there\n" in printed and "c4 #" not in printed and "seed" not in printed
    probe.show(report | {"runs": [run, run | {"folder": "there", "seed": 1}]})
    printed = capsys.readouterr().out
    assert "fpn seed 1" in printed and "#" not in printed and "there" not in printed
