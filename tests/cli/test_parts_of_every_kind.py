"""A part of the user's of each kind, in a folder outside the package: it runs, and the tables call it what it is."""

import json
from pathlib import Path

import pytest
from settings import ROWS, TINY
from user_folder import write
from users_network import FILES

from fpn_ablate.config.composition import compose
from fpn_ablate.model.summary import row_facts

SHORT = (*TINY, "log.wandb=disabled", "out=results")


@pytest.fixture
def mine(tmp_path):
    return write(tmp_path / "mine", FILES)


def records(table):
    return {r["row"]: r for r in (json.loads(file.read_text()) for file in Path("results/runs", table).rglob("record.json"))}


@pytest.mark.parametrize(
    ("row", "task", "key", "name"),
    [
        ("pan", "rpn", "neck", "necks.PathAggregation"),
        ("five", "rpn", "backbone", "backbones.FiveConvolutions"),
        ("two_conv", "rpn", "rpn.head", "heads.TwoConvolutions"),
        ("four_conv", "fast_rcnn", "task.roi.head", "heads.FourConvolutions"),
    ],
)
def test_a_part_of_the_users_makes_a_row_that_says_so(cli, mine, row, task, key, name):
    code, out, err = cli("--config-dir", mine, *SHORT, f"ablation={row}", f"task={task}", "factors=[neck,backbone,rpn.head,task.roi.head]")
    assert code == 0, err
    record = records("table1_rpn" if task == "rpn" else "table2_fast_rcnn")[row]
    assert record["status"] == "finished"
    assert record["user_parts"][key]["class"] == name
    assert f"{row}: the user's" in out.replace("\n", " ") and name in out
    (table,) = Path("results/tables").glob("*.md")
    assert name in table.read_text()


def facts(mine, *overrides):
    return row_facts(compose(overrides, mine))


def test_labels_of_a_row_are_asked_of_its_parts(mine):
    pan, fpn = facts(mine, "ablation=pan", "recipe=smoke"), facts(mine, "recipe=smoke")
    assert (pan.feature, pan.lateral, pan.top_down, pan.reach) == ("{Pk}", True, True, ["c2", "c3", "c4", "c5"])
    assert pan.anchors == fpn.anchors
    assert facts(mine, "ablation=four_conv", "task=fast_rcnn", "recipe=smoke").head == "4conv"
    proposals = facts(mine, "task=fast_rcnn", "neck@task.proposals.neck=pan", "recipe=smoke").proposals
    assert proposals == "RPN {Pk}"


def test_a_neck_with_maps_that_are_rounded_down_is_refused(cli, mine):
    code, _, err = cli("verify", "--config-dir", mine, "ablation=pan", "neck.ceil=false")
    assert (code, "neck.class=necks.PathAggregation: p6 of the maps of an image of 96 x 160" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "table"), [("rpn", "table1_rpn"), ("fast_rcnn", "table2_fast_rcnn"), ("faster_rcnn", "table3_faster_rcnn")])
def test_the_users_rows_stand_beside_the_papers(cli, mine, task, table):
    heads = "two_conv" if task == "rpn" else "four_conv"
    rows = ",".join([*ROWS, "pan", "five", heads])
    arguments = ("-m", "recipe=smoke", "log.wandb=disabled", "out=results", f"ablation={rows}", f"task={task}")
    code, out, err = cli("--config-dir", mine, *arguments, "factors=[neck,backbone,rpn.head,task.roi.head]")
    assert code == 0, err
    assert {row: r["status"] for row, r in records(table).items()} == dict.fromkeys(rows.split(","), "finished")
    assert all(row in out for row in rows.split(","))
