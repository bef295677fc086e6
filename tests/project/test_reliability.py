"""Check that the page of the drills matches their files."""

import json

import pytest

from fpn_ablate.utils.errors import UserError

GOOD = {"fault": "SIGKILL | rain", "tries": 1200, "lost": 0, "how": "looked", "command": "x", "machine": {}}


def test_the_committed_page_is_what_the_committed_outcomes_make(script):
    assert script("drills/reliability").main(["--check"]) == 0


def test_the_page_has_a_line_for_each_outcome(script, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    (tmp_path / "b.json").write_text(json.dumps(GOOD | {"fault": "fire\nand\nwater", "lost": 2, "more": 1}))
    lines = script("drills/reliability").page(tmp_path).splitlines()[-2:]
    assert lines == [
        "| SIGKILL \\| rain | 1,200 | 0 | looked ([file](reference/reliability/a.json)) |",
        "| fire and water | 1,200 | 2 | looked ([file](reference/reliability/b.json)) |",
    ]


@pytest.mark.parametrize("text", ["{", "[]", json.dumps(GOOD | {"lost": "0"}), json.dumps({"fault": "x"})])
def test_a_file_that_is_no_outcome_is_named(script, tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=r"bad\.json: "):
        script("drills/reliability").page(tmp_path)
