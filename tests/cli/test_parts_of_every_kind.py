"""A part of the user's of each kind, in a folder outside the package: it runs, and the tables call it what it is."""

import json
from pathlib import Path

import pytest
from settings import JOINT, ROWS, TINY
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


def test_a_network_of_the_users_parts_runs_and_says_whose_they_are(cli, mine):
    code, _, err = cli("--config-dir", mine, *SHORT, *JOINT, "ablation=everything")
    assert code == 0, err
    record = records("joint")["everything"]
    classes = {
        "backbone": "backbones.FiveConvolutions",
        "neck": "necks.PathAggregation",
        "rpn.head": "heads.TwoConvolutions",
        "task.roi.head": "heads.FourConvolutions",
    }
    assert (record["status"], {key: part["class"] for key, part in record["user_parts"].items()}) == ("finished", classes)
    (table,) = Path("results/tables").glob("*.md")
    assert all(f"{name}" in table.read_text() for name in ("everything: the user's", *classes.values()))


def facts(mine, *overrides):
    return row_facts(compose(overrides, mine))


def test_labels_of_a_row_are_asked_of_its_parts(mine):
    pan, fpn = facts(mine, "ablation=pan", "recipe=smoke"), facts(mine, "recipe=smoke")
    assert (pan.feature, pan.lateral, pan.top_down, pan.reach) == ("{Pk}", True, True, ["c2", "c3", "c4", "c5"])
    assert pan.anchors == fpn.anchors
    assert facts(mine, "ablation=fourconv", "task=fast_rcnn", "recipe=smoke").head == "4conv"
    proposals = facts(mine, "task=fast_rcnn", "neck@task.proposals.neck=pan", "recipe=smoke").proposals
    assert proposals == "RPN {Pk}"


def test_a_neck_with_maps_that_are_rounded_down_is_refused(cli, mine):
    code, _, err = cli("verify", "--config-dir", mine, "ablation=pan", "neck.ceil=false")
    assert (code, "neck.class=necks.PathAggregation: p6 of the maps of an image of 96 x 160" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "table"), [("rpn", "table1_rpn"), ("fast_rcnn", "table2_fast_rcnn"), ("faster_rcnn", "table3_faster_rcnn")]
)
def test_the_users_rows_stand_beside_the_papers(cli, mine, task, table):
    heads = "twoconv" if task == "rpn" else "fourconv"
    rows = ",".join([*ROWS, "pan", "five", heads])
    factors = "factors=[neck,backbone,rpn.head,task.roi.head]"
    settings = ("recipe=smoke", "jobs=1", "log.wandb=disabled", "out=results")
    arguments = ("-m", *settings, factors, f"ablation={rows}", f"task={task}")
    code, out, err = cli("--config-dir", mine, *arguments)
    assert code == 0, err
    assert {row: r["status"] for row, r in records(table).items()} == dict.fromkeys(rows.split(","), "finished")
    assert all(row in out for row in rows.split(","))
