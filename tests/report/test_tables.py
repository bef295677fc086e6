"""Tables as text: Markdown, CSV, LaTeX and the terminal."""

import csv
import io
import math
import re

import pytest
from records import METRICS
from rich.console import Console

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import decode, load
from fpn_ablate.report.collate.table import GENERATED
from fpn_ablate.report.formats import tables, terminal
from fpn_ablate.report.formats.grid import grid

pytestmark = pytest.mark.usefixtures("three_seeds")

HOSTILE = r"a_b & 50% \input{x} <script>|#$~^*`[x](y)"


@pytest.fixture
def table1(runs, put):
    for row in ("c4", "fpn", "bottom_up", "finest"):
        for seed in range(3):
            put(row, seed)
    put("no_lateral", 0, status="diverged", error="loss_objectness is nan at step 12")
    put("finest", 3, status="failed")
    put("mine", 0, metrics={"AR1k_s": None})
    (table,) = collate(load(runs))
    return table


def hostile_table(runs, put, **changes):
    put(HOSTILE, data=HOSTILE, table=HOSTILE, recipe=HOSTILE.replace("/", ""), error=HOSTILE, **changes)
    (table,) = collate(load(runs))
    return table


def printed(table, width=100, force_terminal=False, **how):
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=force_terminal, color_system=None, legacy_windows=False)
    terminal.show(table, console, **how)
    return re.sub(r"\x1b\[[\d;]*m", "", buffer.getvalue())


def csv_lines(table):
    rows = list(csv.reader(io.StringIO(tables.csv_text(table))))
    return [dict(zip(rows[0], map(decode, row), strict=True)) for row in rows[1:]]


def markdown_cells(text):
    """Cells of the table's lines, unescaped."""
    start = text.index("\n|") + 1
    lines = text[start : text.index("\n\n", start)].splitlines()
    split = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[re.sub(r"\\(.)", r"\1", cell).strip() for cell in line] for line in split]


def test_markdown_parses_back_to_the_numbers(table1):
    header, _, *lines = markdown_cells(tables.markdown(table1))
    assert {len(line) for line in lines} == {len(header)}
    first = len(table1.definition.facts) + 2
    ours = iter([line for line in lines if line[0].startswith("**")])
    paper = iter([line for line in lines if line[0].startswith("*paper")])
    for row in table1.rows:
        line = next(ours)
        published = next(paper) if row.published else None
        for number, metric in enumerate(table1.definition.metrics, start=first):
            cell = row.cells[metric.key]
            values = [float(value) for value in re.findall(r"[+-]?\d+\.\d", line[number])]
            expected = [value for value in (cell.ours.mean, cell.ours.half_width) if value is not None]
            assert values == [round(value, 1) for value in expected]
            if published:
                values = [float(value) for value in re.findall(r"[+-]?\d+\.\d", published[number])]
                expected = [value for value in (cell.published, cell.difference) if value is not None]
                assert values == pytest.approx([round(value, 1) for value in expected], abs=1e-9)


def test_csv_is_tidy_and_exact(table1):
    lines = csv_lines(table1)
    assert len(lines) == (len(table1.rows) + len(table1.effects)) * len(table1.definition.metrics)
    for line in lines:
        values = [value for key, value in line.items() if key.startswith("seed_") and value is not None]
        assert len(values) == line["n"]
        if values:
            assert line["mean"] == math.fsum(values) / len(values)
        if line["difference"] is not None:
            assert line["difference"] == line["mean"] - line["published"]
            assert line["difference_between"] == "different data sets"
    fpn = next(line for line in lines if line["row"] == "fpn")
    assert (fpn["anchors"], fpn["lateral"], fpn["letter"]) == (199974, True, "c")
    states = {line["row"]: line["state"] for line in lines}
    assert [effect.title for effect in table1.effects] == ["c4 − fpn", "bottom_up − fpn", "finest − fpn", "mine − fpn"]
    assert all((line["p_holm"] is not None) is (line["row"] is None and line["n"] == 3) for line in lines)
    assert states["no_lateral"] == "diverged @ step 12" and states["c5"] == "not run"
    assert states["finest"] == "seed 0 finished, seed 1 finished, seed 2 finished, seed 3 failed"


def test_generated_data_is_marked_in_every_output(table1):
    assert GENERATED in printed(table1)
    assert f"> **{GENERATED}**" in tables.markdown(table1)
    assert GENERATED in re.search(r"\\caption\{.*\}", tables.latex(table1))[0]
    assert all(line["generated"] is True and line["warning"] == GENERATED for line in csv_lines(table1))


def test_real_data_is_not_marked_generated(runs, put):
    put(data="facemask", generated=False)
    (table,) = collate(load(runs))
    everything = printed(table) + tables.markdown(table) + tables.latex(table) + tables.csv_text(table)
    assert "GENERATED" not in everything
    assert "DIFFERENT DATA SETS (facemask and COCO minival)" in tables.markdown(table)


def test_difference_to_the_same_data_is_plain(runs, put):
    put(data="coco", generated=False, images={"count": 5000, "digest": "d"})
    (table,) = collate(load(runs))
    assert "DIFFERENT" not in tables.markdown(table) and "*paper (Δ)*" in tables.markdown(table)
    assert {line["difference_between"] for line in csv_lines(table) if line["row"] == "fpn"} == {"same data"}


def test_cells_say_what_happened(runs, put):
    for seed, value in enumerate((0.2, None, 0.4)):
        put(seed=seed, metrics={"AR100": value, "AR1k": None, "AR1k_s": 0.0})
    put("c4", 0, status="diverged", error="loss is nan at step 12")
    (table,) = collate(load(runs))
    lines = {line.label.split(" [")[0]: line for line in grid(table).lines if line.ours}
    assert lines["(c) FPN"].metrics[:3] == ("30.0 ± 127.1 (n=2)", "n/a", "0.0")  # nothing found is no certainty
    assert set(lines["(a) baseline on conv4"].metrics) == {"diverged @ step 12"}
    assert set(lines["(b) baseline on conv5"].metrics) == {"not run"}
    assert grid(table).notes == ("c4, seed 0: diverged @ step 12 (loss is nan at step 12)",)


def test_anchors_are_printed_as_in_the_paper(runs, put):
    for row in ("c4", "c5", "fpn", "bottom_up", "no_lateral", "finest"):
        put(row)
    (table,) = collate(load(runs))
    lines = grid(table).lines
    assert [line.facts[1] for line in lines if line.kind == "ours"] == ["47k", "12k", "200k", "200k", "200k", "750k"]
    # Equal to what stands above: not printed twice.
    assert {line.facts for line in lines if line.kind == "paper"} == {("",) * 5}
    put("c4", verify={"anchors": 40000, "feature": "C4"})
    (table,) = collate(load(runs))
    assert [line.facts[1] for line in grid(table).lines[:2]] == ["40k", "47k"]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_terminal_cuts_no_figure(table1, width):
    text = printed(table1, width)
    assert "…" not in text and "not run: c5" in text and "conv5" not in text
    lines = grid(table1).lines
    absent = next(n for n, line in enumerate(lines) if line.row and line.row.row == "c5")
    for line in (*lines[:absent], *lines[absent + 2 :]):  # without the paper's line below it
        for cell in (*line.facts, *line.metrics, *line.differences):
            assert cell.replace(" ± ", "±").removeprefix("p ") in text


@pytest.mark.parametrize("width", [60, 80, 110, 160])
def test_a_table_fits_a_terminal_and_says_what_is_left_out(table1, table2, width):
    for table in (table1, table2):
        text = printed(table, width, force_terminal=True, whole="results/tables/x.md")
        sentences = " ".join(text.split())
        assert max(map(len, text.splitlines())) <= width
        assert "the whole table: results/tables/x.md" in sentences and GENERATED in sentences
        assert ("left out, as the terminal is narrow: " in sentences) == (width <= 80 or (table is table2 and width <= 110))
        first, *_ = (metric.title for metric in table.definition.metrics)
        assert first in text  # figures go last


def test_a_single_run_prints_its_row_the_baseline_and_their_difference(table1):
    text = printed(table1, 100, rows=["c4"], whole="x.md")
    assert "baseline on" in text and "(c) FPN" in text and "c4 − fpn" in text and "the whole table: x.md" in text
    assert not re.search(r"bottom|finest|not run|supported|mine", text)
    alone = printed(table1, 100, rows=["fpn"])
    assert "(c) FPN" in alone and "baseline on" not in alone and "− fpn" not in alone


def test_a_single_run_without_a_baseline_prints_its_row(runs, put):
    put("c4")
    (table,) = collate(load(runs))
    text = printed(table, 100, rows=["c4"])
    assert "baseline on" in text and "(c) FPN" not in text and "not run" not in text


@pytest.fixture
def table2(runs, put):
    """A table of many columns."""
    parts = {f"gflops_{part}": 123.45 for part in ("backbone", "neck", "rpn", "head")}
    facts = {"proposals": "RPN {Pk}", "feature": "{Pk}", "head": "conv5", "lateral": True, "top_down": True, "params": 41e6}
    metrics = {"AP50": 0.5, "AP": 0.123, "AP_s": 0.1, "AP_m": 0.2, "AP_l": 0.3}
    cost = {"latency_ms": 12345.6, "peak_memory_mib": 98765.0}
    put("c4", table="table2_fast_rcnn", task="fast_rcnn", verify=facts | parts, metrics=metrics, cost=cost)
    return next(table for table in collate(load(runs)) if table.key[0] == "table2_fast_rcnn")


def test_where_there_is_no_terminal_no_figure_nor_title_of_a_wide_table_is_cut(table2):
    text = printed(table2, 80)
    for word in ("memory", "latency", "GFLOPs", "parameters", "12.3", "12345.6", "98765", "{Pk}"):
        assert re.search(rf"(?<!\S){re.escape(word)}(?!\S)", text), word


def test_what_smoke_trains_cannot_be_mistaken_for_a_result(runs, put):
    put("fpn", recipe="smoke+seed=1")
    (made,) = collate(load(runs))
    for text in (printed(made), tables.markdown(made), tables.latex(made)):
        assert "RECIPE smoke: its few steps teach a row nothing" in text


def test_terminal_fits_100_columns(runs, put):
    for row in ("c4", "c5", "fpn", "bottom_up", "no_lateral", "finest"):
        for seed in range(3):
            put(row, seed, metrics=dict.fromkeys(METRICS, 0.1 * len(row) + 0.002 * seed * len(row)))
    (table,) = collate(load(runs))
    assert max(map(len, printed(table, 100).splitlines())) <= 100


def test_latex_is_balanced_and_escaped(runs, put):
    text = tables.latex(hostile_table(runs, put))
    assert r"a\_b \& 50\% \textbackslash{}input\{x\} \textless{}script\textgreater{}" in text
    assert r"\input" not in text
    bare = re.sub(r"\\[\\%&$#_{}]", "", text.split("\n", 1)[1])
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0 and "%" not in bare.replace("{!}{%", "")
    assert not re.search(r"[#~^]", bare)
    for name in ("table", "tabular", "minipage"):
        assert bare.count(rf"\begin{{{name}}}") == bare.count(rf"\end{{{name}}}") == 1


def test_latex_has_equal_columns_in_every_line(table1):
    text = tables.latex(table1)
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1])
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + len(grid(table1).lines)
    assert {len(re.split(r"(?<!\\)&", line)) for line in lines} == {columns}
    assert text.isascii()


def test_names_are_escaped_in_markdown(runs, put):
    text = tables.markdown(hostile_table(runs, put))
    assert "<script>" not in text and "&lt;script&gt;" in text
    header, *lines = markdown_cells(text)
    assert {len(line) for line in lines} == {len(header)}
    assert not re.search(r"(?<!\\)[`\[]", text)


def test_no_csv_cell_is_a_formula(runs, put):
    put("=cmd|' /C calc'!A0", data="@x", recipe="+r", table="-t", verify={"feature": "=1+1", "anchors": -5})
    (table,) = collate(load(runs))
    cells = [cell for line in csv.reader(io.StringIO(tables.csv_text(table))) for cell in line]
    assert [cell for cell in cells if cell[:1] in tuple("=+@") or (cell[:1] == "-" and not _number(cell))] == []
    assert {line["row"] for line in csv_lines(table)} == {"=cmd|' /C calc'!A0"}


def _number(cell):
    return re.fullmatch(r"-\d+(\.\d+)?(e-?\d+)?", cell) is not None


def test_escape_codes_and_line_breaks_do_not_reach_the_terminal(runs, put):
    put("fpn", status="failed", error="bad\x1b[31m\nnews\r\n" + "x" * 500)
    (table,) = collate(load(runs))
    for text in (printed(table), tables.markdown(table), tables.latex(table)):
        assert "\x1b" not in text and "\r" not in text and "x" * 201 not in text
    assert "bad�[31m news" in grid(table).notes[0]


def test_markup_in_names_is_text(runs, put):
    put("[bold]x[/bold]")
    (table,) = collate(load(runs))
    assert "[bold]x[/bold]" in "".join(printed(table, 200).split())
