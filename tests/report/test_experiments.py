"""The files in experiments/: each sweeps the rows that it shows, and shows the paper's figures and no others."""

import csv
import functools
from itertools import product
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from fpn_ablate.config.composition import cell_config, register, without_hydra
from fpn_ablate.config.schema import Config
from fpn_ablate.report.collate.definition import find_definition
from fpn_ablate.runs.identity import comparison_key, fingerprint_inputs
from fpn_ablate.sweep.checks import reject_duplicate_rows, reject_unfair_rows
from fpn_ablate.utils.paths import CLAIMS, CONF, EXPERIMENTS

FILES = sorted(file.stem for file in EXPERIMENTS.glob("*.yaml") if file.name != CLAIMS)
PAPER = Path(__file__).resolve().parents[2].parent / "shared" / "paper"
# The task of a file that does not train Table 1's.
TASKS = {"table2_fast_rcnn": "fast_rcnn", "table6_segments": "segment_proposals"} | dict.fromkeys(
    ("table3_faster_rcnn", "table4_systems", "table5_sharing", "joint", "modern", "necks"), "faster_rcnn"
)
TASKS["masks"] = "mask_rcnn"
# Of files whose rows are of several tasks.
SEVERAL_TASKS = {
    "figure1": {"faster_rcnn", "ssd"},
    "ssd_steps": {"rpn", "ssd"},
    "retinanet": {"retinanet", "faster_rcnn"},
}


def content(name: str) -> dict:
    return yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text(encoding="utf-8"))


def definition(name: str):
    return find_definition(content(name)["table"], ())


@functools.cache  # a composition takes 0.1 s, and two tests read those of each file
def cells(name: str, *more: str) -> list[Config]:
    """What `-m +experiments=<name> recipe=smoke` would run, for the first seed."""
    register()
    params = content(name)["hydra"]["sweeper"]["params"] | dict(item.split("=", 1) for item in more)
    choices = [[f"{key}={value}" for value in str(values).split(",")] for key, values in params.items() if key != "seed"]
    found = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for overrides in product(*choices):
            own = [f"+experiments={name}", "recipe=smoke", *overrides]
            composed = compose("config", own, return_hydra_config=True)
            found.append(cell_config(without_hydra(composed), composed.hydra.runtime.choices, own))
    return found


@pytest.mark.parametrize("name", FILES)
def test_what_is_swept_is_what_is_shown(name):
    swept, shown = cells(name), definition(name)
    assert [cfg.row for cfg in swept] == [row.names[0] for row in shown.rows if not row.published_only]
    assert {cfg.table for cfg in swept} == {content(name)["table"]} == {name}
    assert {cfg.task.name for cfg in swept} == SEVERAL_TASKS.get(name, {TASKS.get(name, "rpn")})
    reject_duplicate_rows(swept)
    reject_unfair_rows(swept)


@pytest.mark.parametrize("name", FILES)
def test_rows_differ_in_declared_factors_alone(name):
    configurations = cells(name)
    facts = [fingerprint_inputs(cfg, "", "", "cpu", True) for cfg in configurations]
    assert len({comparison_key(of_row, configurations[0].factors) for of_row in facts}) == 1  # or their table is refused
    first, *others = (cfg.model_dump() for cfg in configurations)
    factors = [tuple(factor.split(".")) for factor in first["factors"]]

    def differing(a, b, where=()):
        if where in factors or where == ("row",) or a == b:
            return []
        if isinstance(a, dict) and isinstance(b, dict):
            return [key for k in a.keys() | b.keys() for key in differing(a.get(k), b.get(k), (*where, k))]
        return [where]

    assert [key for other in others for key in differing(first, other)] == []


def test_table_5_swept_over_the_papers_backbones_fills_the_same_lines():
    swept = [cfg.row for cfg in cells("table5_sharing", "backbone=resnet50,resnet101")]
    assert swept == [row.names[1] for row in definition("table5_sharing").rows]


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_how_it_is_run_and_what_it_costs(name):
    text = (EXPERIMENTS / f"{name}.yaml").read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    command = next(line.split("+experiments=")[1] for line in head if "command" in line and "+experiments=" in line)
    assert [stem for stem in FILES if stem.startswith(command)] == [name]
    assert any(line.startswith("#   cost  ") for line in head)


def test_the_factorials_effects_weigh_only_what_they_name():
    """Over the rows of an effect the other factors cancel, so that it is not mixed with theirs."""
    levels = {
        cfg.row: {"top-down": cfg.neck.top_down, "lateral": cfg.neck.lateral, "pyramid": cfg.neck.output == "pyramid"}
        for cfg in cells("factorial")
    }
    for effect in definition("factorial").effects[:3]:
        for key in levels["fpn+output=p2"]:
            plus, minus = ([levels[name][key] for name in side] for side in (effect.plus, effect.minus))
            if key in effect.title.split(",")[0]:
                assert all(plus) and not any(minus)
            else:
                assert sum(plus) / len(plus) == sum(minus) / len(minus)
    for effect in definition("factorial").effects[3:]:
        (path,) = (key for key in ("top-down", "lateral") if key in effect.title)
        signs = {name: side for side, names in ((1, effect.plus), (-1, effect.minus)) for name in names}
        for name, sign in signs.items():
            assert (levels[name][path] == levels[name]["pyramid"]) == (sign == 1)
        assert effect.scale == 2 and len({(levels[n][path], levels[n]["pyramid"]) for n in signs}) == 4


TRANSCRIPTS = {
    "table1_rpn": "table1_rpn_proposals.csv",
    "table2_fast_rcnn": "table2_fast_rcnn.csv",
    "table3_faster_rcnn": "table3_faster_rcnn.csv",
}


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_published_values_are_the_papers(name):
    source = PAPER / TRANSCRIPTS[name]
    if not source.exists():
        pytest.skip("the transcription of the paper's tables is not beside this checkout")
    with source.open(newline="") as file:
        paper = {line["row"]: line for line in csv.DictReader(file)}
    rows = definition(name).rows
    assert [row.letter for row in rows] == list(paper)
    for row in rows:
        expected = {key: value for key, value in paper[row.letter].items() if value and key not in ("row", "label")}
        assert row.label == paper[row.letter]["label"]
        found = {key: str(int(value)) if isinstance(value, bool) else str(value) for key, value in row.published.items()}
        assert found == expected


def test_published_values_of_table_6_are_the_papers():
    source = PAPER / "table6_segmentation_proposals.csv"
    if not source.exists():
        pytest.skip("the transcription of the paper's tables is not beside this checkout")
    with source.open(newline="") as file:
        paper = {line["label"]: line for line in csv.DictReader(file)}
    rows = definition("table6_segments").rows
    assert [row.label for row in rows] == list(paper)
    metrics = {"AR1k": "AR", "AR1k_s": "AR_s", "AR1k_m": "AR_m", "AR1k_l": "AR_l"}
    for row in rows:
        line = paper[row.label]
        assert {key: row.published.get(key) for key in metrics} == {
            key: float(line[name]) if line[name] else None for key, name in metrics.items()
        }
        assert row.published["latency"] == round(1000 * float(line["time_s"]))
        assert row.published["pyramid"] == (line["image_pyramid"] == "yes")


def test_published_values_of_table_4_are_the_papers():
    source = PAPER / "table4_single_model.csv"
    if not source.exists():
        pytest.skip("the transcription of the paper's tables is not beside this checkout")
    with source.open(newline="") as file:
        paper = {line["row"]: line for line in csv.DictReader(file)}
    rows = {row.names[0]: row.published for row in definition("table4_systems").rows}
    named = {
        "fpn": "ours",
        "image_pyramid_tested": "FRCNN+++",
        **{name: name for name in ("G-RMI", "AttractioNet", "Multipath", "ION")},
    }
    metrics, splits = ("AP50", "AP", "AP_s", "AP_m", "AP_l"), {"": "dev", "_test_std": "std"}
    expected = {}
    for row, name in named.items():
        line, pyramid = paper[name], paper[name]["image_pyramid"] == "yes"  # a blank is no
        for suffix, split in splits.items():
            values = {key: float(line[f"{split}_{key}"]) for key in metrics if line[f"{split}_{key}"]}
            if values:
                expected[row + suffix] = {"backbone": line["backbone"], "pyramid": pyramid} | values
    read = {row: {k: v for k, v in values.items() if k not in ("feature", "head")} for row, values in rows.items()}
    assert {row: read[row] for row in expected} == expected
    assert {row: values["AP"] for row, values in read.items() if row not in expected} == {"fpn_minival": 35.6, "c4": 32.2}


def test_published_values_of_table_5_are_the_papers():
    source = PAPER / "table5_sharing_features.csv"
    if not source.exists():
        pytest.skip("the transcription of the paper's tables is not beside this checkout")
    with source.open(newline="") as file:
        paper = {line["share_features"]: line for line in csv.DictReader(file)}
    rows = definition("table5_sharing").rows
    found = [row.published for row in rows if row.published]
    assert [(p["backbone"], p["sharing"], str(p["AP50"]), str(p["AP"])) for p in found] == [
        (f"ResNet-{depth}", text, paper[share][f"R{depth}_AP50"], paper[share][f"R{depth}_AP"])
        for depth in (50, 101)
        for share, text in (("no", "not shared"), ("yes", "shared"))
    ]
    assert [row.names[0].split("=")[-1] for row in rows if not row.published] == ["joint", "joint"]


def test_published_values_of_later_code_are_those_reported():
    source = PAPER / "later_references.csv"
    if not source.exists():
        pytest.skip("the transcription of later figures is not beside this checkout")
    with source.open(newline="") as file:
        reported = {
            line["backbone_neck"]: line["value"]
            for line in csv.DictReader(file)
            if (line["project"], line["model"], line["schedule"]) == ("Detectron", "Faster R-CNN (end-to-end)", "1x")
        }
    found = {row.names[0]: str(row.published["AP"]) for row in definition("modern").rows}
    assert found == {"c4": reported["R-50-C4"], "fpn": reported["R-50-FPN"]}


def test_published_values_of_figure_1_are_those_reported():
    tables = [PAPER / "systems" / f"{name}.csv" for name in ("testdev_single_models", "image_pyramid_costs")]
    if not all(table.exists() for table in tables):
        pytest.skip("the transcriptions of other systems' figures are not beside this checkout")
    models, pyramids = ([*csv.DictReader(table.read_text(encoding="utf-8").splitlines())] for table in tables)
    of_model = {line["row"]: line for line in models}
    keys = {"AP": "AP", "AP50": "AP50", "AP_s": "APs", "AP_m": "APm", "AP_l": "APl"}
    named = {"image_pyramid_tested": "Faster R-CNN+++", "ssd": "SSD513", "fpn": "Faster R-CNN w FPN"}
    expected = {row: {key: float(of_model[model][column]) for key, column in keys.items()} for row, model in named.items()}
    (pyramid,) = [line for line in pyramids if line["metric"] == "COCO test-dev AP" and line["pyramid"] == "34.9"]
    expected["c4"] = {"AP": float(pyramid["single_scale"])}
    assert {row.names[0]: row.published for row in definition("figure1").rows if row.published} == expected


def test_rows_of_figure_1_train_for_equally_many_steps():
    assert {cfg.steps for cfg in cells("figure1") if cfg.row != "image_pyramid_tested"} == {4}
    longer = {cfg.steps for cfg in cells("figure1", "recipe.roi.steps=7") if cfg.row != "image_pyramid_tested"}
    assert longer == {7}


def test_published_values_of_masks_are_those_reported():
    tables = [PAPER / "systems" / f"maskrcnn_{name}.csv" for name in ("table2_ablations", "later_codebases")]
    if not all(table.exists() for table in tables):
        pytest.skip("the transcriptions of Mask R-CNN's figures are not beside this checkout")
    paper, later = ([*csv.DictReader(table.read_text(encoding="utf-8").splitlines())] for table in tables)
    of_masks = {
        (line["row"].split(" (")[0], line["group"]): [line[key] for key in ("mask_AP", "AP50", "AP75")] for line in paper
    }
    lines = {
        "fpn": ("ResNet-50-FPN", "backbone"),
        "c4": ("ResNet-50-C4", "backbone"),
        "mlp": ("MLP 1024-1024-80x28x28", "mask branch"),
        "roi_pool": ("RoIPool max", "RoI layer"),
    }
    boxes = {line["row"]: line for line in later if line["schedule"] == "1x"}
    fpn, c4 = boxes["Detectron R50-FPN"], boxes["Detectron R50-C4"]
    of_boxes = {"fpn": fpn["box_AP"], "c4": c4["box_AP"], "boxes": fpn["box_only_AP_same_code"]}
    rows = {row.names[0]: row.published for row in definition("masks").rows}
    assert {name: str(row["AP"]) for name, row in rows.items() if "AP" in row} == of_boxes
    keys = ("mask_AP", "mask_AP50", "mask_AP75")
    assert {name: [str(row[key]) for key in keys] for name, row in rows.items() if "mask_AP" in row} == {
        name: of_masks[line] for name, line in lines.items()
    }


RETINANET = {
    "focal": ("retinanet_table1b_gamma.csv", "FL gamma 2.0"),
    "ce": ("retinanet_table1a_alpha_ce.csv", "CE alpha 0.5"),
    "balanced_ce": ("retinanet_table1a_alpha_ce.csv", "CE alpha 0.75"),
    "one_anchor": ("retinanet_table1c_anchors.csv", "1 scales x 1 ratios"),
    "six_anchors": ("retinanet_table1c_anchors.csv", "2 scales x 3 ratios"),
}


def test_published_values_of_retinanet_are_the_papers():
    if not PAPER.exists():
        pytest.skip("the transcription of the paper's tables is not beside this checkout")
    shown = {row.names[0]: row.published for row in definition("retinanet").rows if "AP" in row.published}
    assert shown.keys() == RETINANET.keys()
    for row, (file, line) in RETINANET.items():
        with (PAPER / "systems" / file).open(encoding="utf-8", newline="") as text:
            (printed,) = [entry for entry in csv.DictReader(text) if entry["row"] == line]
        assert {key: float(printed[key]) for key in ("AP", "AP50", "AP75")} == {
            k: shown[row][k] for k in ("AP", "AP50", "AP75")
        }
