"""Files are written whole or not at all, with safe names; the first line of an error; the digest of a value."""

import hashlib
from pathlib import Path

import pytest

from fpn_ablate.utils.errors import Diverged, UserError, first_line
from fpn_ablate.utils.files import safe_name, save_text, unreadable, write_atomically
from fpn_ablate.utils.hashing import digest, without_docstrings


@pytest.mark.parametrize(
    "fault", [OSError("disk full"), RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos")]
)
def test_a_file_is_whole_or_not_there(tmp_path, fault):
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def break_off(temporary):
        temporary.write_text("ne")
        raise fault

    with pytest.raises(UserError, match=r"file\.txt: cannot be written .*make room"):
        write_atomically(path, break_off)
    assert path.read_text() == "old"
    with path.open() as reader:  # who has the old one open reads on in it
        write_atomically(path, lambda temporary: temporary.write_text("new"))
        assert (reader.read(), path.read_text()) == ("old", "new")
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path):
    """Also one that bears the name of the temporary, which others on the machine can guess."""
    kept = tmp_path / "kept"
    kept.write_text("kept")
    path, seen = tmp_path / "out" / "file.txt", []
    write_atomically(path, lambda temporary: (seen.append(temporary), temporary.write_text("first")))
    path.unlink()
    path.symlink_to(kept)
    seen[0].symlink_to(kept)
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert (kept.read_text(), path.read_text(), path.is_symlink()) == ("kept", "new", False)


@pytest.mark.parametrize("fault", [None, OSError("disk full")])
def test_a_link_that_is_put_there_during_a_write_is_refused(tmp_path, fault):
    kept, path = tmp_path / "kept", tmp_path / "out" / "file.txt"
    kept.write_text("kept")

    def write(temporary):
        temporary.unlink()
        temporary.symlink_to(kept)
        if fault:
            raise fault

    with pytest.raises(UserError, match=r"file\.txt: cannot be written"):
        write_atomically(path, write)
    assert kept.read_text() == "kept" and list(path.parent.iterdir()) == []


def test_a_text_with_a_name_that_is_no_utf8_is_kept(tmp_path):
    save_text(tmp_path / "error.txt", "é \udcff")
    assert (tmp_path / "error.txt").read_text(encoding="utf-8") == "é \\udcff"


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path):
    write_atomically(tmp_path / "ours", lambda temporary: temporary.write_text("x"))
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("text", "expected"),
    [("fpn+upsample=bilinear", "fpn+upsample-bilinear"), ("../../x", "-..-x"), ("", "unnamed"), ("..", "unnamed")],
)
def test_names_of_folders_stay_inside(text, expected):
    assert safe_name(text) == expected
    assert len(safe_name(text * 100)) <= 80


@pytest.mark.parametrize(
    ("error", "line"), [(UserError("a: broken\nand why"), "a: broken"), (Diverged(""), "Diverged"), (KeyError("x"), "'x'")]
)
def test_an_error_has_a_first_line_in_any_case(error, line):
    assert first_line(error) == line


def test_equal_values_have_one_digest_whatever_the_order_of_their_keys():
    assert digest({"a": 1, "b": [2, None]}) == digest({"b": [2, None], "a": 1})
    assert len({digest(value) for value in ({"a": 1}, {"a": 2}, {"a": 1.5}, [["a", 1]], None)}) == 5
    assert len(digest(None)) == 16


@pytest.mark.parametrize("place", [".", "/", ""])
def test_a_place_without_a_name_is_refused(place):
    with pytest.raises(UserError, match="give the name of a file"):
        save_text(Path(place), "text")


def test_a_run_is_to_be_removed_for_its_content_alone():
    advice = [
        str(unreadable(Path("model.pt"), error, "why")).partition("; ")[2] for error in (OSError(), MemoryError(), ValueError())
    ]
    assert advice == ["", "", "remove its folder to train the run again"]


def test_the_syntax_tree_of_a_source_is_the_same_in_each_python():
    source = 'def f(a, *, b=1) -> int:\n    """Add."""\n    return a + b  # why\n\nclass C: x: int\n'
    assert hashlib.sha256(without_docstrings(source).encode()).hexdigest()[:16] == "b27663a18a21fce3"
