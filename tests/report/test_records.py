"""Records and ledgers: what is read, what is skipped with a reason, and what survives the way to a CSV and back."""

import csv
import itertools
import json
import random
import re
from pathlib import Path

import pandas as pd
import pytest

from fpn_ablate.report.collate.records import decode, encode, load, write_ledger
from fpn_ablate.utils.errors import UserError

AWKWARD = [
    None, True, False, 0, 1, -1, 2**70, 0.1, -1.5, 1e-300, 1.0, [], [1, "a", None], "", " ", "None", "null", "nan",
    "NaN", "true", "True", "1", "1.0", "-1", "007", "1234567890123456", "12e4", "=1+1", " =1+1", "+1", "-x", "@SUM(A1)",
    "\t=1", '"', '"a"', "a,b", "a;b", "a\nb", "a\r\nb", "a\rb", "\x00", "é", "日本", "\ud800", "\u202e", "[1]", "{}",
    "[" * 9999,
]  # fmt: skip


def same(value, other) -> bool:
    return type(value) is type(other) and value == other


def test_every_cell_keeps_its_value_and_type():
    assert [value for value in AWKWARD if not same(decode(encode(value)), value)] == []


def test_no_text_becomes_a_formula_and_no_cell_breaks_its_line():
    for value in AWKWARD:
        cell = encode(value)
        assert not re.search(r"[\x00-\x1f\x7f]", cell)
        if isinstance(value, str):
            assert cell.lstrip()[:1] not in {"=", "+", "-", "@"}


def test_ledger_reads_back_equal(runs, put, tmp_path):
    for seed, value in enumerate(AWKWARD[:-1]):
        put(seed=seed, config={"value": value, "nested": {"deep": value}}, error=value if value is None else str(value))
    put("c4", 0, metrics={"AR100": None, "AR1k": 0.0}, generated=False)
    frame = load(runs)
    write_ledger(frame, tmp_path / "ledger.csv")
    read = load(tmp_path / "ledger.csv")
    pd.testing.assert_frame_equal(read, frame)
    for column in frame:
        assert [type(value) for value in read[column]] == [type(value) for value in frame[column]], column


def test_frame_holds_what_the_file_holds(runs, put):
    folder = put("finest", 3, metrics={"AR1k_s": None})
    content = json.loads((folder / "record.json").read_text())
    (line,) = load(runs).to_dict("records")
    assert line["metrics.AR100"] == content["metrics"]["AR100"]
    assert line["metrics.AR1k_s"] is None
    assert line["verify.anchors"] == 750000 and type(line["verify.anchors"]) is int
    assert line["config.neck.top_down"] is True
    assert runs / line["folder"] == folder


def test_folder_is_the_same_wherever_the_search_begins(runs, put):
    folder = put()
    starts = [runs.parent, runs, runs / "table1_rpn", folder, folder / "record.json"]
    assert len({load(start)["folder"][0] for start in starts}) == 1


def test_ledger_is_byte_stable_and_merges_by_fingerprint(runs, put, tmp_path):
    for row, seed in itertools.product(("fpn", "c4"), range(3)):
        put(row, seed)
    frame, ledger = load(runs), tmp_path / "ledger.csv"
    write_ledger(frame, ledger)
    first = ledger.read_bytes()
    write_ledger(frame.sample(frac=1, random_state=0), ledger)
    assert ledger.read_bytes() == first
    write_ledger(frame[:2], ledger)
    assert ledger.read_bytes() == first
    put("c4", 1, metrics={"AR100": 0.123})
    write_ledger(load(runs), ledger)
    merged = load(ledger)
    assert len(merged) == 6
    assert merged[(merged["row"] == "c4") & (merged["seed"] == 1)]["metrics.AR100"].tolist() == [0.123]
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "ledger.csv"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"format": 1, "table": "tab', "Unterminated"),
        ("", "Expecting value"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, ""),
        (b"\xff\xfe", "utf-8"),
        ({"format": 2}, "format 2"),
        ({"seed": "0"}, "'seed' must be an integer"),
        ({"seed": True}, "'seed' must be an integer"),
        ({"status": "done"}, "'status' must be one of"),
        ({"table": None}, "'table' must be text"),
        ({"generated": None}, "'generated' must be true or false"),
        ({"metrics": {"AR100": "0.5"}}, "'metrics.AR100' must be a finite number"),
        ({"metrics": {"AR100": 1e999}}, "must be a finite number"),
        ({"environment": {"device": ["cpu"]}}, "'environment.device' must be text"),
        ({"environment": {"device": 3}}, "'environment.device' must be text"),
        ({"environment": {"threads": "two"}}, "'environment.threads' must be a finite number or null"),
        ({"environment": {"dirty": []}}, "'environment.dirty' must be one value"),
        ({"metrics": {"AR100": 10**400}}, "'metrics.AR100' must be a finite number"),
        ({"metrics": {"AR100": 1e306}}, "'metrics.AR100' must be a finite number"),  # two of them have no mean
        ({"cost": {"latency_ms": 1.7e308}}, "'cost.latency_ms' must be of numbers up to 1e+30"),
        ({"seed": -(10**400)}, "'seed' must be of numbers up to 1e+30"),
        ({"config": {"steps": [{"a": 10**400}]}}, "'config.steps' must be of numbers up to"),
        ({"cost": {"pretrain_accuracy": "all"}}, "'cost.pretrain_accuracy' must be a finite number"),
        ({"built_on": [["a"]]}, "'built_on' must be pairs of text and number"),
        ({"built_on": 3}, "'built_on' must be pairs of text and number"),
        ({"cost": {"sources_s": "all"}}, "'cost.sources_s' must be a finite number"),
        ('{"format": 1, "a": ' + "[" * 700 + "]" * 700 + "}", "values in too many levels"),
        ({"config": {"factors": "neck"}}, "'config.factors' must be a list of text"),
        ({"config": {"factors": [1]}}, "'config.factors' must be a list of text"),
    ],
)
def test_unreadable_record_is_named_and_the_others_are_read(runs, put, content, reason):
    put("c4")
    bad = put("fpn", folder="seed0-bad")
    file = bad / "record.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    frame = load(runs)
    assert frame["row"].tolist() == ["c4"]
    (message,) = frame.attrs["unreadable"]
    assert "seed0-bad/record.json" in message and reason in message


def test_nan_metric_is_undefined(runs, put):
    put(metrics={"AR100": float("nan")})
    assert load(runs)["metrics.AR100"].tolist() == [None]


def test_wrong_paths_and_ledgers_are_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "ragged.csv").write_text('a,b\n1,2,3\n1,2,3,4\n"')
    for name in ("missing", "other.csv", "empty.csv", "ragged.csv"):
        with pytest.raises(UserError, match=name):
            load(tmp_path / name)


def test_ledger_with_an_unreadable_line_is_not_overwritten(runs, put, tmp_path):
    put("fpn")
    put("c4")
    ledger = tmp_path / "ledger.csv"
    write_ledger(load(runs), ledger)
    broken = ledger.read_text().replace("finished,,true", "finito,,true", 1)
    ledger.write_text(broken)
    assert "ledger.csv line 2: key 'status'" in load(ledger).attrs["unreadable"][0]
    with pytest.raises(UserError, match="line 2"):
        write_ledger(load(runs), ledger)
    assert ledger.read_text() == broken


def test_random_text_survives(tmp_path, runs, put):
    draw = random.Random(0)
    alphabet = "=+-@\"',;\n\r\t 01.eE[]{}nulltrue\\|\u00e9"
    texts = ["".join(draw.choices(alphabet, k=draw.randint(0, 8))) for _ in range(300)]
    names = ["traffic.light", "a,b;c", "", " ", ".", "=1+1", "\x1b[31m", "Unnamed: 0", "x", "x.1", *texts]  # of classes
    put(config={f"k{number}": text for number, text in enumerate(texts)}, per_class=dict.fromkeys(names, 0.5))
    write_ledger(load(runs), tmp_path / "ledger.csv")
    (line,) = load(tmp_path / "ledger.csv").to_dict("records")
    assert [line[f"config.k{number}"] for number in range(300)] == texts
    assert {line[f"per_class.{name}"] for name in names} == {0.5}
    with Path(tmp_path / "ledger.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 2


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (
            "run data.root=/home/me/sets/bccd backbone.weights=~/w.pth seed=1,2",
            "run data.root=…/bccd backbone.weights=…/w.pth seed=1,2",
        ),
        ("run 'out=/tmp/a b/x' '~neck.p6' neck.p6=true", "run 'out=…/x' '~neck.p6' neck.p6=true"),
        (
            "FileNotFoundError: [Errno 2] No such file: '/home/me/my sets/1.jpg'",
            "FileNotFoundError: [Errno 2] No such file: '…/1.jpg'",
        ),
        ("/home/me/x.json: broken (see https://hydra.cc/docs)", "…/x.json: broken (see https://hydra.cc/docs)"),
        ("[/home/me/a.jpg, /home/me/b.jpg]", "[…/a.jpg, …/b.jpg]"),
        ("data.root=//host/share/me/set", "data.root=…/set"),
        (r"\\host\share\me\set C:\Users\me\w.pth", "…/set …/w.pth"),
        ("out=~me data.root=~me/sets/a x=../../me/b file:///home/me/c", "out=…/ data.root=…/a x=…/b …/c"),
        ("top / bottom, 1/2 of results/runs/x", "top / bottom, 1/2 of results/runs/x"),
    ],
)
def test_a_ledger_names_no_machines_paths(put, runs, tmp_path, text, kept):
    put(status="failed", error=text, config={"neck": {"table": text, "files": [text]}}, environment={"command": text})
    frame = load(runs.resolve())
    assert frame["error"].tolist() == [kept]
    write_ledger(frame, tmp_path / "ledger.csv")
    assert str(tmp_path) not in (tmp_path / "ledger.csv").read_text()
    (line,) = load(tmp_path / "ledger.csv").to_dict("records")
    written = [line[key] for key in ("error", "environment.command", "config.neck.table", "config.neck.files")]
    assert written == [kept, kept, kept, [kept]]
    write_ledger(load(tmp_path / "ledger.csv"), tmp_path / "ledger.csv")
    assert load(tmp_path / "ledger.csv")["error"].tolist() == [kept]
