import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from fpn_ablate.cli.report import main
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.formats import plots, tables
from fpn_ablate.report.output import readme, write
from fpn_ablate.utils.errors import UserError

NAME = "table1_rpn-shapes-quick"


@pytest.fixture
def filled(runs, put):
    for row in ("c4", "fpn"):
        for seed in range(2):
            put(row, seed)
    return runs


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_report_imports_neither_torch_nor_hydra():
    code = (
        "import sys, fpn_ablate.report, fpn_ablate.cli.report, fpn_ablate.report.formats.plots\n"
        "banned = {'torch', 'torchvision', 'hydra', 'omegaconf', 'wandb', 'matplotlib'}\n"
        "ours = {m for m in sys.modules if m.startswith('fpn_ablate.') and not m.startswith('fpn_ablate.report')}\n"
        "print(sorted(banned & set(sys.modules)), sorted(ours))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    ours = ["console", "errors", "files", "locks", "paths", "plan", "replicates", "schema"]
    assert out.strip() == f"[] {[f'fpn_ablate.{name}' for name in ours]}"


def test_writing_twice_and_from_the_ledger_gives_equal_bytes(filled, tmp_path):
    write(filled, tmp_path / "a")
    first = contents(tmp_path / "a")
    assert set(first) == {f"tables/{NAME}{kind}" for kind in (".md", ".csv", ".tex", "-claims.csv")} | {
        f"plots/{NAME}.png", f"plots/{NAME}.svg", "ledger.csv",
    } | {f"figures/{NAME}-{name}.{kind}" for name in ("effects", "cost") for kind in ("svg", "pdf")}  # fmt: skip
    write(filled, tmp_path / "a")
    assert contents(tmp_path / "a") == first
    write(tmp_path / "a" / "ledger.csv", tmp_path / "b")
    assert contents(tmp_path / "b") == first


def test_only_limits_tables_but_not_the_ledger(filled, put, tmp_path):
    put(table="other", fingerprint="f")
    written = write(filled, tmp_path / "out", only={("other", "quick", "shapes")})
    assert [table.name for table in written] == ["other-shapes-quick"]
    assert {path.stem for path in (tmp_path / "out" / "tables").iterdir()} == {"other-shapes-quick"}
    assert len(load(tmp_path / "out" / "ledger.csv")) == 5


def test_wrong_definition_writes_nothing(filled, put, tmp_path):
    put(table="mine", fingerprint="m")
    (tmp_path / "mine.yaml").write_text("table: mine\nreport: {tittle: x}\n")
    with pytest.raises(UserError):
        write(filled, tmp_path / "out", experiments=[tmp_path])
    assert not (tmp_path / "out").exists()


def test_command_makes_the_other_tables_of_a_wrong_one_and_ends_with_code_2(filled, put, tmp_path, capsys):
    put(table="mine", fingerprint="m")
    (tmp_path / "mine.yaml").write_text("table: mine\nreport: {tittle: x}\n")
    out = tmp_path / "out"
    assert main([str(filled), "--out", str(out), "--experiments", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "(c) FPN" in shown.out
    assert shown.err.startswith("error: ") and "mine.yaml: report" in shown.err
    assert {path.stem for path in (out / "tables").iterdir()} == {NAME, f"{NAME}-claims"}
    assert len(load(out / "ledger.csv")) == 5


def test_twins_stand_side_by_side_in_the_ledger(filled, put, tmp_path):
    """A table of the ledger is that of the runs, which chooses between them."""
    fingerprint = load(filled).query("row == 'fpn' and seed == 0")["fingerprint"].item()
    put("fpn+upsample=nearest", 0, "twin", fingerprint=fingerprint)
    (table,) = write(filled, tmp_path / "out")
    (again,) = collate(load(tmp_path / "out" / "ledger.csv"))
    assert tables.markdown(again) == tables.markdown(table)
    assert len(load(tmp_path / "out" / "ledger.csv")) == 5


def test_plot_marks_generated_data_and_names_survive(runs, put):
    put("$x_{1} <b>&", data="a $\\frac{$", status="finished")
    put("c4", data="a $\\frac{$", status="failed")
    (table,) = collate(load(runs))
    svg = plots.render(table)["svg"].decode()
    ElementTree.fromstring(svg)
    assert "GENERATED DATA" in svg and "<dc:date>" not in svg
    put("fpn", data="real", generated=False, fingerprint="r")
    (real,) = [found for found in collate(load(runs)) if found.data == "real"]
    assert "GENERATED DATA" not in plots.render(real)["svg"].decode()


def test_plot_shows_every_value(runs, put):
    for seed, value in enumerate((0.3, 0.5)):
        put("fpn", seed, metrics={"AR100": value})
    (table,) = collate(load(runs))
    panel = plots.draw(table).axes[0]
    points = sorted({float(x) for line in panel.lines for x in line.get_xdata()})
    published = [row.cells["AR100"].published for row in table.rows]
    cell = next(row for row in table.rows if row.row == "fpn").cells["AR100"]
    ends = [cell.ours.low, cell.ours.high]
    assert points == pytest.approx(sorted({30.0, 50.0, 40.0, *ends, *published}))
    assert [text.get_text() for text in panel.texts] == ["not run"] * 5


def test_a_panel_spans_at_least_5_points_and_one_without_values_has_no_ticks(runs, put):
    put("fpn", 0, table="own", metrics={"AR100": 0.301, "AR1k": 0.002, "AR1k_s": None, "AR1k_m": 0.3, "AR1k_l": 0.1})
    put("c4", 0, table="own", metrics={"AR100": 0.303, "AR1k": 0.001, "AR1k_s": None, "AR1k_m": 0.9, "AR1k_l": None})
    (table,) = collate(load(runs))
    panels = dict(zip([metric.key for metric in table.definition.metrics], plots.draw(table).axes, strict=True))
    spans = {key: panel.get_xlim() for key, panel in panels.items()}
    assert spans["AR100"] == pytest.approx((30.2 - 2.5, 30.2 + 2.5))
    assert spans["AR1k"] == pytest.approx((-0.25, 4.75))
    assert spans["AR1k_m"] == pytest.approx((30 - 7.2, 90 + 7.2))
    assert [key for key, panel in panels.items() if not len(panel.get_xticks())] == ["AR1k_s"]


def test_what_stands_for_a_missing_value_hides_no_published_one(runs, put):
    put("c4")
    (table,) = collate(load(runs))
    figure = plots.draw(table)
    figure.canvas.draw()
    for panel in figure.axes:
        texts = [text.get_window_extent() for text in panel.texts]
        (published, *_) = (line for line in panel.lines if line.get_marker() == "D")
        marks = [panel.transData.transform(point) for point in published.get_xydata()]
        half = published.get_markersize() * figure.dpi / 72 / 2
        assert not [mark for mark in marks for box in texts if box.y0 - half < mark[1] < box.y1 + half]


@pytest.mark.parametrize("panels", [1, 2, 3, 5])
def test_the_legend_fits_the_figure(runs, put, panels):
    """As in a table of two metrics."""
    for row, seed in (("fpn", 0), ("fpn", 1), ("c4", 0)):
        put(row, seed)
    (table,) = collate(load(runs))
    metrics = table.definition.metrics[:panels]
    figure = plots.draw(replace(table, definition=replace(table.definition, metrics=metrics)))
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_readme_block_is_filled_and_kept(filled):
    (table,) = collate(load(filled))
    text = f"before\n<!-- table: {NAME} -->\nold\n<!-- /table -->\nafter\n"
    once = readme(text, [table])
    assert once == f"before\n<!-- table: {NAME} -->\n{tables.markdown(table)}<!-- /table -->\nafter\n"
    assert readme(once, [table]) == once
    assert readme(text.replace(NAME, "table1_rpn"), [table]).count("FPN") == once.count("FPN")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "no '<!-- table"),
        ("<!-- table: other -->\n<!-- /table -->", "names no tables; there are: table1_rpn-shapes-quick"),
        (f"<!-- table: {NAME} -->\nnever closed", "must end its line"),
        (f"<!-- table: {NAME} -->\nnever closed\n<!-- table: {NAME} -->\n<!-- /table -->", "must end its line"),
    ],
)
def test_readme_that_cannot_be_filled_is_refused(filled, text, message):
    with pytest.raises(UserError, match=message):
        readme(text, collate(load(filled)))


def test_hostile_names_cannot_close_a_readme_block(runs, put):
    put("<!-- /table --> <!-- table: x -->")
    tables_found = collate(load(runs))
    once = readme(f"<!-- table: {NAME} -->\n<!-- /table -->", tables_found)
    assert readme(once, tables_found) == once


def test_command(filled, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"# x\n<!-- table: {NAME} -->\n<!-- /table -->\n")
    arguments = [str(filled), "--out", str(tmp_path / "out"), "--readme", str(page)]
    assert main([*arguments, "--check"]) == 1
    assert not (tmp_path / "out").exists() and "FPN" not in page.read_text()
    assert main(arguments) == 0
    assert "(c) FPN" in capsys.readouterr().out
    assert "(c) FPN" in page.read_text()
    assert main([*arguments, "--check"]) == 0
    assert main([str(tmp_path / "out" / "ledger.csv"), *arguments[1:], "--check"]) == 0


def test_wrong_input_is_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    readme_file = ["--readme", str(tmp_path / "no.md")]
    cases = [[str(tmp_path / "empty")], [str(tmp_path / "missing")], [str(tmp_path / "empty"), "--check"]]
    for case in [*cases, [*cases[0], *readme_file]]:
        assert main(case) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_missing_readme_is_code_2(filled, tmp_path, capsys):
    assert main([str(filled), "--out", str(tmp_path / "out"), "--readme", str(tmp_path / "no.md")]) == 2
    assert "no.md" in capsys.readouterr().err and not (tmp_path / "out").exists()
