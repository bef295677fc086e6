"""Run a few cases of scripts/drills/fuzz.py, which has thousands, and check that it notices faults."""

import json

import numpy as np
import pytest
from fuzzing.annotations import annotation_bytes
from fuzzing.checks import Hang, Lost, check_message, within
from fuzzing.draw import Draw, nested
from fuzzing.weights import wide_pickle

from fpn_ablate.data.checks import annotations, examine
from fpn_ablate.data.checks.findings import Finding, Findings
from fpn_ablate.engine import fixed_proposals
from fpn_ablate.report.collate import records
from fpn_ablate.utils import files
from fpn_ablate.utils.errors import UserError, printable, short_repr
from fpn_ablate.weights import files as weights_files
from fpn_ablate.weights import unpickle

FEW = {"annotations": 10, "pictures": 30, "configs": 6, "proposals": 20, "weights": 30}
MORE = {"annotations": 300, "pictures": 300, "configs": 300, "commands": 60, "proposals": 300, "weights": 300, "records": 40,
        "names": 40, "tables": 60, "plans": 60, "links": 30}  # fmt: skip


@pytest.fixture(scope="module")
def fuzz(script):
    return script("drills/fuzz")


@pytest.mark.parametrize("kind", FEW)
def test_no_case_is_lost(fuzz, kind):
    outcome = fuzz.try_kind(kind, range(FEW[kind]), seed=1)
    assert outcome.lost == []
    assert sum(outcome.counts.values()) == FEW[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE)
def test_no_case_of_many_is_lost(fuzz, kind):
    assert fuzz.try_kind(kind, range(MORE[kind]), seed=2).lost == []


def test_all_kinds_are_here(fuzz):
    assert set(MORE) == set(fuzz.KINDS) >= set(FEW)


def test_a_case_is_decided_by_seed_kind_and_number():
    first, second, other = (annotation_bytes(Draw(name)) for name in ("0/a/1", "0/a/1", "0/a/2"))
    assert first == second != other


MUTANTS = {
    # Fault of the program: (kind, number of cases among which one must be lost, module, attribute, its replacement)
    "annotations are dropped": ("annotations", 40, annotations, "_faults", lambda *_: []),
    "empty boxes are let through": ("annotations", 60, examine, "is_empty", lambda boxes: boxes[:, 0] < -1e300),
    "boxes outside of pictures are taken": ("proposals", 60, fixed_proposals, "MARGIN", 1e38),
    "tensors are not looked at": ("weights", 150, weights_files, "_tensors", lambda content, *_: content),
    "formulas are written": ("names", 25, records, "FORMULA", records.re.compile("$^")),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_fault_of_the_program_is_noticed(fuzz, monkeypatch, mutant):
    kind, count, place, name, value = MUTANTS[mutant]
    monkeypatch.setattr(place, name, value)
    assert fuzz.try_kind(kind, range(count), seed=0).lost


def test_a_case_that_hangs_or_has_a_bad_message_is_lost():
    with pytest.raises(Hang), within(0.05):
        while True:
            pass
    for text in ("", " \n", "a\x1b[2J", "\u202eabc", "x" * 30_000):
        with pytest.raises(Lost):
            check_message(text)
    check_message("one line\n\tand é")


# --- faults that the fuzz has found


def test_messages_hold_no_control_characters_and_no_half_characters():
    error = UserError("a\x1b[2Jb\n\tc\ud800 é \u202e")
    assert str(error) == "a\\x1b[2Jb\n\tc\\ud800 é \\u202e" == printable(str(error))
    assert "\x1b" not in str(Finding("image-missing", "x\x1b]0;y\x07.jpg", 1, value="no such file"))


def test_a_value_in_a_message_is_short_whatever_it_is():
    for value in ([[1] * 99] * 99, {"a": "x" * 10**6}, 10**4000, nested(5000, "list"), nested(5000, "dict")):
        assert len(short_repr(value)) <= 80
    assert short_repr([5, 6, "10", 12]) == "[5, 6, '10', 12]"


def test_many_findings_are_counted_and_a_file_of_faults_is_left(tmp_path):
    findings = Findings()
    findings.extend(Finding("box-empty", "f", n) for n in range(Findings.LIMIT + 5))
    findings.append(Finding("box-outside", "f"))
    assert len(findings) == Findings.LIMIT + 1 and examine.counts(findings) == {
        "box-empty": Findings.LIMIT + 5,
        "box-outside": 1,
    }
    assert "and 5 more" in str(findings[Findings.LIMIT - 1])
    text = examine.summary(findings, 3)
    assert f"{Findings.LIMIT + 5} box-empty" in text and f"... and {Findings.LIMIT + 3} more" in text
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": [{}], "categories": [{}], "annotations": [5] * (2 * Findings.LIMIT)}))
    _, findings = annotations.read(file)
    assert f"{Findings.LIMIT:,} further entries of `annotations` were not looked at" in "\n".join(map(str, findings))


@pytest.mark.parametrize("width", [1000])
def test_a_dictionary_that_stands_in_many_places_is_read_once(width):
    with within(5):
        content = unpickle.read(wide_pickle(width))
    for _ in range(4):
        assert len(content) == width
        content = content["0007"]
    assert content == {}


def test_an_archive_that_unpacks_to_much_is_refused_and_one_of_proposals_is_not(tmp_path):
    file = tmp_path / "proposals.npz"
    np.savez_compressed(file, train_ids=np.zeros(5_000_000))
    with pytest.raises(ValueError, match="it unpacks to 40,000,"):
        files.refuse_bomb(file, files.MAX_COMPRESSION, 10**6)
    boxes = np.random.default_rng(0).random((20_000, 4), np.float32)
    np.savez_compressed(file, train_ids=np.repeat(np.arange(20), 1000), train_boxes=boxes)
    files.refuse_bomb(file, files.MAX_COMPRESSION, 10**6)


@pytest.mark.parametrize("name", ["run", "../../x", "..", "a/b", "a\\b", ""])
def test_a_name_of_pictures_is_no_path(name):
    assert "/" not in files.safe_name(name) and files.safe_name(name) not in ("..", ".", "")


def test_a_formula_behind_a_semicolon_is_quoted_and_a_row_of_ours_is_not():
    for text in ("x;=1+1", "x; '=1", "＝1+1", "=1", " @x", "-x", "+1"):
        assert records.encode(text).startswith('"') and records.decode(records.encode(text)) == text
    for value, cell in (("fpn+upsample=bilinear", "fpn+upsample=bilinear"), (-5, "-5"), (-0.25, "-0.25"), ("a;b", "a;b")):
        assert records.encode(value) == cell


@pytest.mark.slow
def test_a_hundred_megabytes_of_rubbish(tmp_path):
    """Check that the file is refused within seconds and with a short message."""
    file = tmp_path / "instances.json"
    head = b'{"images": [{}], "categories": [{}], "annotations": ['
    long = [bytes(10**8), b"[" * 10**8, b"9" * 10**8]
    for content in (*long, head + b"5," * (5 * 10**7) + b"5]}", head + b"{}," * (3 * 10**7) + b"1]}"):
        file.write_bytes(content)
        with within(120):
            _, findings = annotations.read(file)
        assert findings and len(findings) < 5 * Findings.LIMIT
        check_message(examine.summary(findings, 10))
