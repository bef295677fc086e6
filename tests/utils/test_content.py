"""Digests of files: equal content alone is equal, wherever it lies; the cache never hides another content."""

import os
import shutil

import pytest

from fpn_ablate.utils import content
from fpn_ablate.utils.errors import UserError


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three files that are old enough to be cached, in a cache of their own."""
    monkeypatch.setenv("FPN_ABLATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "RECENT", -60)
    (tmp_path / "set").mkdir()
    for n in range(3):
        (tmp_path / "set" / f"{n}.bmp").write_bytes(bytes([n]) * 100_000)
    return sorted(map(str, (tmp_path / "set").iterdir()))


def overwrite(path, at):
    """Change one byte in place; the size and the time that its writer can choose stay."""
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("whole", [True, False])
def test_content_decides_and_place_does_not(files, tmp_path, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(content, "WHOLE", 1000)
    first = content.content_digest(files, "set")
    assert first[1] == (content.CONTENT if whole else content.SAMPLES)
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert content.content_digest([path.replace("/set/", "/copy/") for path in files], "set") == first
    assert content.content_digest(files[::-1], "set") != first
    digests = {first}
    for at in (0, 99_999, 50_000):
        overwrite(files[1], at)
        digests.add(content.content_digest(files, "set"))
    assert len(digests) == (4 if whole else 3)  # the middle is not in the sample


def test_unchanged_files_are_not_read_again(files, monkeypatch):
    first = content.content_digest(files, "set")
    monkeypatch.setattr(content, "_digests", lambda *_: pytest.fail("read again"))
    assert content.content_digest(files, "set") == first


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"stamps": 3}', b"\xff", None])
def test_a_cache_that_cannot_be_used_is_done_without(files, tmp_path, damage):
    first = content.content_digest(files, "set")
    (cached,) = (tmp_path / "cache").iterdir()
    if damage is None:
        cached.unlink()
        (tmp_path / "cache").rmdir()
        (tmp_path / "cache").write_text("no folder")
    else:
        cached.write_bytes(damage)
    assert content.content_digest(files, "set") == first


def test_files_changed_just_now_are_not_cached(files, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("FPN_ABLATE_CACHE", str(tmp_path / "cache"))
    content.content_digest(files, "set")
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_gone_is_named(files):
    os.unlink(files[2])
    with pytest.raises(UserError, match=r"2\.bmp: cannot be read"):
        content.content_digest(files, "set")
