"""What is written of a folder of runs, and the tables in a README."""

import pytest

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.formats import tables
from fpn_ablate.report.output import readme, save
from fpn_ablate.utils.errors import UserError

NAME = "table1_rpn-shapes-quick"


def write(source, out, **options):
    frame = load(source)
    made = collate(frame, **options)
    save(made, frame, out)
    return made


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() * (path.suffix != ".pdf") for path in files}


def test_writing_twice_and_from_the_ledger_gives_equal_bytes(filled, tmp_path):
    write(filled, tmp_path / "a")
    first = contents(tmp_path / "a")
    assert set(first) == {f"tables/{NAME}{kind}" for kind in (".md", ".csv", ".tex", "-claims.csv")} | {
        f"plots/{NAME}.png", f"plots/{NAME}.svg", "ledger.csv",
    } | {f"figures/{NAME}-{name}.{kind}" for name in ("effects", "costs") for kind in ("svg", "pdf")}  # fmt: skip
    write(filled, tmp_path / "a")
    assert contents(tmp_path / "a") == first
    write(tmp_path / "a" / "ledger.csv", tmp_path / "b")
    assert contents(tmp_path / "b") == first


def test_twins_stand_side_by_side_in_the_ledger(filled, put, tmp_path):
    """A table of the ledger is that of the runs, which chooses between them."""
    fingerprint = load(filled).query("row == 'fpn' and seed == 0")["fingerprint"].item()
    put("fpn+upsample=nearest", 0, "twin", fingerprint=fingerprint)
    (table,) = write(filled, tmp_path / "out")
    (again,) = collate(load(tmp_path / "out" / "ledger.csv"))
    assert tables.markdown(again) == tables.markdown(table)
    assert len(load(tmp_path / "out" / "ledger.csv")) == 5


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
