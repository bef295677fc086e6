"""`python -m fpn_ablate verify`: what each row is, on the terminal and in a README."""

import dataclasses
import io
import re

import pytest
from rich.console import Console
from settings import JOINT, ROWS

from fpn_ablate.cli.verify_text import markdown, show
from fpn_ablate.model.summary import RowFacts, row_facts

FACTS = RowFacts("{Pk}", 9, True, True, ["c2"], "2fc", "RPN {Pk}", 1_500_000, 1, 20.0, 10.0, 5.0, 0.0, 5.0)


def rows_of(printed):
    """The lines of the table, by row."""
    lines = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.count("│") > 5}
    return {row: line for row, line in lines.items() if row}


def test_every_row_of_table_1_is_shown_before_training(cli, tmp_path):
    code, out, _ = cli("verify", "recipe=smoke")
    assert code == 0
    lines = rows_of(out)
    assert tuple(lines) == ROWS
    pyramids = dict.fromkeys(("fpn", "bottom_up", "no_lateral"), "199,974")
    for row, anchors in ({"c4": "47,250", "c5": "12,000", "finest": "750,000"} | pyramids).items():
        assert anchors in lines[row]
    assert "c2 c3 c4 c5" in lines["fpn"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (["task=faster_rcnn"], ["c4", "c5", "fpn"]),  # those of Table 3
        (["ablation=fpn,finest"], ["fpn", "finest"]),
        (["ablation=c4", "rpn.samples=8"], ["c4"]),
        (["+experiments=figure1"], ["image_pyramid_tested", "image_pyramid", "c4", "c5", "ssd", "fpn"]),  # of several tasks
    ],
)
def test_the_rows_are_those_of_the_tasks_table_or_those_named(cli, arguments, rows):
    code, out, _ = cli("verify", "recipe=smoke", *arguments)
    assert (code, list(rows_of(out))) == (0, rows)


def test_rows_with_and_without_an_rpn_stand_in_one_table(cli):
    """An RPN is a part of the cost, and its anchors are counted, also where another row has a head of another kind."""
    code, out, _ = cli("verify", "recipe=smoke", "ablation=bottom_up,ssd/own_heads,ssd/from_c4,ssd")
    assert code == 0 and "# anchors" in out
    cells = {row: [cell.strip() for cell in line.split("│")[2:-1]] for row, line in rows_of(out).items()}
    assert [cells[row][0] for row in cells] == ["{Pk}", "{Pk}", "{Ck}", "{Ck}"]
    assert cells["bottom_up"][5] == cells["own_heads"][5] == "199,974" and cells["from_c4"][5] == "31,374"
    assert cells["bottom_up"][-5:] == cells["own_heads"][-5:]  # heads of their own are no dearer, but have more parameters
    assert float(cells["ssd"][-3]) == 0 < float(cells["from_c4"][-3]) and float(cells["from_c4"][-2]) == 0 < float(
        cells["ssd"][-2]
    )


def test_scales_are_shown_of_a_row_with_an_image_pyramid_and_its_cost_is_of_all_of_them(cli):
    lines = rows_of(cli("verify", "recipe=smoke", "ablation=c4,image_pyramid")[1])
    assert "0.5, 1, 2" in lines["image_pyramid"] and "0.5, 1, 2" not in lines["c4"]
    c4, pyramid = (float(line.rstrip(" │").split("│")[-1]) for line in lines.values())
    assert pyramid == pytest.approx(5.25 * c4, rel=0.05)
    assert "image scales" not in cli("verify", "recipe=smoke", "ablation=c4")[1]


@pytest.mark.parametrize(
    ("task", "rows"), [pytest.param("rpn", list(ROWS), marks=pytest.mark.slow), ("faster_rcnn", ["c4", "c5", "fpn"])]
)
def test_rows_of_ones_own_stand_below_them(cli, mine, task, rows):
    code, out, _ = cli("verify", "recipe=smoke", f"task={task}", "--config-dir", mine)
    assert (code, list(rows_of(out))) == (0, [*rows, "mine"])
    assert list(rows_of(cli("verify", "recipe=smoke", "ablation=mine", "--config-dir", mine)[1])) == ["mine"]
    assert cli("verify", "recipe=smoke", "ablation=mine")[0] == 2


@pytest.mark.parametrize("arguments", [["neck.topdown=true"], ["ablation=fpm"], ["--size", "800"], ["-m"]])
def test_bad_arguments_are_refused(cli, arguments):
    code, out, err = cli("verify", "recipe=smoke", *arguments)
    assert (code, out) == (2, "")
    assert arguments[0].partition("=")[0] in err and "Traceback" not in err


def test_markdown_is_in_multiply_adds_and_leaves_out_parts_that_no_row_has():
    text = markdown({"mine": FACTS}, (800, 1024))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert dict(zip(table[0], table[2], strict=True)) == {
        "row": "mine",
        "parameters (M)": "1.5",
        "backbone": "5.0",
        "neck": "2.5",
        "head": "2.5",
        "total": "10.0",
        "neck / backbone": "50%",
    }
    assert "GMAC" in text and "800 x 1024" in text


@pytest.mark.parametrize("width", [60, 80, 220])
def test_a_narrow_terminal_gets_the_columns_that_fit_and_a_hint(width):
    stream = io.StringIO()
    rows = dict.fromkeys(("fpn", "a_row_of_ones_own"), dataclasses.replace(FACTS, anchors=199974, mask="conv", gflops_mask=3.0))
    show(rows, (800, 1000), Console(file=stream, width=width, force_terminal=True, color_system=None, legacy_windows=False))
    text = re.sub(r"\x1b\[\d*m", "", stream.getvalue())
    assert max(map(len, text.splitlines())) <= width
    assert "a_row_of_ones_own" in text and "199,974" in text and "20.0" in text
    assert ("left out, as the terminal is narrow" in text) == (width < 220) == ("| less -S" in text)


def test_the_command_fills_a_readme_with_what_it_prints(cli, tmp_path, config):
    arguments = "recipe=smoke ablation=c4,fpn task=faster_rcnn task.training=joint --size 64x96"
    code, printed, _ = cli("verify", *arguments.split(), "--markdown")
    assert code == 0
    cfg = config("ablation=c4", *JOINT)
    assert markdown({"c4": row_facts(cfg, size=(64, 96))}, (64, 96)).splitlines()[2] in printed
    path = tmp_path / "README.md"
    path.write_text(f"<!-- verify: {arguments} -->\n<!-- /verify -->\n")
    assert cli("verify", "--readme", path)[0] == 0
    assert path.read_text() == f"<!-- verify: {arguments} -->\n{printed}<!-- /verify -->\n"
    code, _, err = cli("verify", "--readme", tmp_path / "none.md")
    assert code == 2 and "none.md: no such file" in err


def test_the_second_stage_is_shown_where_there_is_one(cli):
    code, shown, _ = cli("verify", "recipe=smoke", "ablation=c4", "task=faster_rcnn", "--size=64x64")
    assert code == 0
    assert "conv5" in shown and "RPN C4" in shown and "64 x 64" in shown
    assert "conv5" not in cli("verify", "recipe=smoke", "ablation=c4")[1]


@pytest.mark.parametrize("command", ["verify", "doctor"])
def test_a_backbone_of_timm_that_a_run_would_refuse_is_refused(cli, command):
    pytest.importorskip("timm")
    code, out, err = cli(command, "recipe=smoke", "ablation=fpn", "backbone=timm/gcvit_xxtiny", "data.train_images=1")
    assert (code, out) == (2, "") and err.startswith("backbone=timm/gcvit_xxtiny: fails on an image of 96 x 160")


def test_a_table_without_a_file_of_its_own_shows_all_rows(cli):
    for table in ("claims", "mine"):
        assert set(ROWS) <= set(rows_of(cli("verify", "recipe=smoke", f"table={table}")[1]))


@pytest.mark.parametrize("name", ["a,b", "a (b)", "a'b", "a b", "a[b]", "a=b"])
def test_a_folder_of_ones_own_may_have_any_name(cli, mine, name):
    folder = mine.rename(mine.with_name(name))
    assert list(rows_of(cli("verify", "recipe=smoke", "ablation=mine", "--config-dir", folder)[1])) == ["mine"]
    readme = folder / "README.md"
    readme.write_text("<!-- verify: recipe=smoke ablation=mine -->\n<!-- /verify -->\n")
    assert cli("verify", "--readme", readme, "--config-dir", folder)[0] == 0 and "| mine |" in readme.read_text()


def test_a_table_of_ones_own_has_its_rows(cli, mine):
    (mine / "experiments").mkdir()
    (mine / "experiments" / "own.yaml").write_text(
        '# @package _global_\ntable: own\nhydra: {mode: MULTIRUN, sweeper: {params: {ablation: "fpn,c4"}}}\n'
    )
    printed = cli("verify", "recipe=smoke", "+experiments=own", "--config-dir", mine)[1]
    assert list(rows_of(printed)) == ["fpn", "c4", "mine"]


@pytest.mark.parametrize("command", ["verify", "doctor"])
def test_a_broken_file_of_ones_own_is_refused_by_name(cli, mine, command):
    (mine / "ablation" / "bad.yaml").write_text("neck: [\n :::")
    code, out, err = cli(command, "recipe=smoke", "ablation=bad", "--config-dir", mine)
    assert (code, out) == (2, "") and "bad.yaml" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "cannot be read as YAML"),
        ("hydra: [1]", "hydra.sweeper.params: "),
        ("hydra: {sweeper: {params: [a]}}", "write KEY: VALUES"),
        ("hydra: {sweeper: {params: {ablation: [c4, c5]}}}", "write KEY: VALUES"),
        ("hydra: {sweeper: {params: {ablation: 'a,,b'}}}", "hydra.sweeper.params: "),
    ],
)
def test_a_wrong_table_of_ones_own_is_refused_by_name(cli, mine, text, reason):
    (mine / "experiments").mkdir()
    file = mine / "experiments" / "wrong.yaml"
    file.write_text(text + "\n")
    code, out, err = cli("verify", "recipe=smoke", "table=wrong", "--config-dir", mine)
    assert (code, out) == (2, "") and str(file) in err and reason in err
