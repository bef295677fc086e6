"""`python -m fpn_ablate report`: tables, page and README from the command line, and its exit codes."""

import pytest

from fpn_ablate.report import output
from fpn_ablate.report.collate import records
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.html import live
from fpn_ablate.store import plan
from fpn_ablate.utils.locks import is_free
from fpn_ablate.utils.paths import EXPERIMENTS

NAME = "table1_rpn-shapes-quick"


def test_the_table_is_shown_written_and_put_into_a_readme(cli, filled, tmp_path):
    page, out = tmp_path / "README.md", tmp_path / "out"
    page.write_text(f"# x\n<!-- table: {NAME} -->\n<!-- /table -->\n")
    options = ["--out", out, "--readme", page]
    assert cli("report", filled, *options, "--check")[0] == 1
    assert not out.exists() and "FPN" not in page.read_text()
    code, shown, _ = cli("report", filled, *options)
    assert code == 0 and "(c) FPN" in shown and "(c) FPN" in page.read_text()
    for source in (filled, out / "ledger.csv"):
        assert cli("report", source, *options, "--check")[0] == 0


def test_a_wrong_definition_costs_its_own_table_alone(cli, filled, put, tmp_path):
    put(table="mine", fingerprint="m")
    (tmp_path / "mine.yaml").write_text("table: mine\nreport: {tittle: x}\n")
    out = tmp_path / "out"
    code, shown, err = cli("report", filled, "--out", out, "--experiments", tmp_path)
    assert code == 2 and "(c) FPN" in shown
    assert err.startswith("error: ") and "mine.yaml: report" in err
    assert {path.stem for path in (out / "tables").iterdir()} == {NAME, f"{NAME}-claims"}
    assert len(load(out / "ledger.csv")) == 5


def test_definitions_of_a_folder_of_ones_own_are_found(cli, put, runs, mine, tmp_path):
    put(table="mine", metrics={"AR100": 0.5})
    (mine / "experiments").mkdir()
    (mine / "experiments" / "mine.yaml").write_text(
        "table: mine\nreport: {title: A title of mine, facts: [], metrics: [{key: AR100}]}\n"
    )
    assert "A title of mine" not in cli("report", runs, "--out", tmp_path / "out")[1]
    code, shown, _ = cli("report", runs, "--out", tmp_path / "out", "--config-dir", mine)
    assert code == 0 and "A title of mine" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "no records found in empty"),
        (["missing"], "missing"),
        (["empty", "--check"], "--check needs --readme"),
        (["empty", "--readme", "no.md"], "no records found in empty"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(cli, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    code, shown, err = cli("report", *arguments)
    assert (code, shown, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_readme_that_is_not_there_is_told_before_anything_is_written(cli, filled, tmp_path):
    code, _, err = cli("report", filled, "--out", tmp_path / "out", "--readme", "no.md")
    assert code == 2 and "no.md" in err and not (tmp_path / "out").exists()


def test_tables_may_be_chosen_and_the_page_shows_them_alone(cli, put, runs, tmp_path, monkeypatch):
    monkeypatch.delenv(live.SWITCH, raising=False)
    monkeypatch.setattr(output, "save_table", lambda *_: None)  # its plots take seconds
    put("c4", 2)
    put("own", 2, table="own")
    page = tmp_path / "report.html"
    code, shown, _ = cli("report", runs, "--out", tmp_path)
    assert code == 0 and "own-shapes-quick" in shown
    assert 'id="t2"' in page.read_text()
    assert cli("report", runs, "--out", tmp_path, "--table", "own")[0] == 0
    assert 'id="t2"' not in page.read_text()
    code, _, err = cli("report", runs, "--out", tmp_path, "--table", "none")
    assert code == 2 and "there are own-shapes-quick" in err


def test_a_folder_that_is_named_twice_has_its_claims_judged_once(cli, filled, tmp_path):
    """As the process that keeps the page does, which is given all folders of the sweep."""
    texts = []
    for options in ([], ["--experiments", EXPERIMENTS]):
        assert cli("report", filled, "--out", tmp_path, *options)[0] == 0
        texts.append((tmp_path / "tables" / f"{NAME}-claims.csv").read_text())
    assert texts[0] == texts[1]


def test_records_are_read_and_written_by_one_at_a_time(cli, filled, tmp_path, monkeypatch):
    held = []

    def watched(function):
        def call(*arguments):
            held.append(not is_free(tmp_path / "runs" / plan.PLANS / ".locks" / "tables"))
            return function(*arguments)

        return call

    monkeypatch.setattr(records, "load", watched(records.load))
    monkeypatch.setattr(output, "save", watched(lambda *_: None))
    for out in (tmp_path, tmp_path / "elsewhere"):
        assert cli("report", filled, "--out", out)[0] == 0
    assert held == [True, True, False, False] and not (tmp_path / "elsewhere").exists()
