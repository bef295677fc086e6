"""Run scripts/download_coco.sh against a server of small zips: it resumes, and unpacks complete zips only."""

import hashlib
import http.server
import io
import os
import shlex
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "download_coco.sh"
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "curl", "unzip", "md5sum"))), reason="bash, curl, unzip or md5sum is missing"
)
COUNTS = {"train2017": 3, "val2017": 2}


def zipped(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def originals():
    names = [f"annotations/{kind}_{split}.json" for kind in ("instances", "captions") for split in COUNTS]
    images = {split: {f"{split}/{n:012}.jpg": os.urandom(5000) for n in range(count)} for split, count in COUNTS.items()}
    return {
        "annotations/annotations_trainval2017.zip": zipped(dict.fromkeys(names, "{}")),
        "zips/val2017.zip": zipped(images["val2017"]),
        "zips/train2017.zip": zipped(images["train2017"]),
    }


class Server(http.server.ThreadingHTTPServer):
    """Serve `files` and ranges of them; break off after `cut` bytes of a body if that is set."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.cut = originals(), [], None


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=")
        path, start = self.path.lstrip("/"), int(asked.split("-")[0])
        self.server.asked.append((path, start))
        whole = self.server.files.get(path)
        self.send_response(404 if whole is None else 206 if start else 200)
        body = (whole or b"")[start:]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{start + len(body)}")
        self.end_headers()
        self.wfile.write(body[: self.server.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def script(server, tmp_path):
    """Return a function: arguments -> exit code, stdout, stderr of the script with the server's sizes and sums."""
    rows = [
        f"{path} {len(data)} {hashlib.md5(data).hexdigest()} 20000 {COUNTS.get(Path(path).stem, 0)}"
        for path, data in server.files.items()
    ]
    environment = {
        **os.environ,
        "COCO_BASE_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "COCO_PARTS": "\n".join(rows),
        "PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}",
    }

    def run(*arguments):
        command = ["bash", str(SCRIPT), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
        return done.returncode, done.stdout, done.stderr

    return run


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


COMPLETE = sorted(
    [f"annotations/instances_{split}.json" for split in COUNTS]
    + [f"{split}/{n:012}.jpg" for split, count in COUNTS.items() for n in range(count)]
)


def test_all_is_unpacked_checked_and_the_zips_are_gone(script, server, tmp_path):
    code, printed, said = script("--yes", tmp_path / "a folder")
    assert code == 0, said
    assert contents(tmp_path / "a folder") == COMPLETE
    assert "CC BY 4.0" in said and "Flickr" in said
    assert "trainval35k" in printed and "minival" in printed
    command = shlex.split(printed.splitlines()[-1])
    assert command[:3] == ["python", "-m", "fpn_ablate"] and command[-1] == f"data.root={tmp_path / 'a folder'}"
    server.asked.clear()
    assert script(tmp_path / "a folder")[:2] == (0, printed)  # again: nothing to do, so nothing to accept
    assert server.asked == []


def test_the_command_at_the_end_is_one_that_the_program_takes(script, tmp_path, config):
    _, printed, _ = script("--yes", tmp_path)
    data = config(*shlex.split(printed.splitlines()[-1])[3:]).data
    assert (data.name, data.label, data.root) == ("coco", "coco2017", str(tmp_path))
    for split in (data.train, data.val):
        assert (tmp_path / split.annotations).is_file() and (tmp_path / split.images).is_dir()


def test_a_broken_connection_is_gone_on_from(script, server, tmp_path):
    server.cut = 4000  # less than the images' zips
    code, _, said = script("--yes", "--keep-zips", tmp_path)
    assert code == 1 and "val2017.zip: curl ended with code 18. Fix: run the same command again" in said
    assert (tmp_path / "val2017.zip.part").stat().st_size == 4000
    server.cut = None
    server.asked.clear()
    code, _, said = script("--yes", "--keep-zips", tmp_path)
    assert code == 0, said
    assert server.asked == [("zips/val2017.zip", 4000), ("zips/train2017.zip", 0)]
    assert contents(tmp_path) == sorted([*COMPLETE, *(Path(path).name for path in server.files)])


def test_a_zip_that_is_not_the_original_is_not_unpacked(script, server, tmp_path):
    path = "zips/val2017.zip"
    good = server.files[path]
    server.files[path] = good[:3000] + bytes([good[3000] ^ 1]) + good[3001:]
    code, _, said = script("--yes", tmp_path)
    assert code == 1 and "val2017.zip is damaged" in said and "Fix: remove it" in said
    assert not (tmp_path / "val2017").exists()
    server.files[path] = good
    assert script("--yes", tmp_path)[0] == 1  # it is not fetched over what may have taken hours
    (tmp_path / "val2017.zip").unlink()
    assert script("--yes", tmp_path)[0] == 0 and contents(tmp_path) == COMPLETE


def test_a_zip_longer_or_missing_on_the_server_is_refused(script, server, tmp_path):
    server.files["zips/train2017.zip"] += b"more"
    code, _, said = script("--yes", tmp_path)
    assert code == 1 and "train2017.zip.part has" in said
    del server.files["zips/train2017.zip"]
    (tmp_path / "train2017.zip.part").unlink()
    code, _, said = script("--yes", tmp_path)
    assert code == 1 and "404" in said and f"{server.server_address[1]}/zips/train2017.zip" in said


def test_an_interrupted_unpacking_is_done_anew(script, tmp_path):
    (tmp_path / ".unpacking" / "train2017").mkdir(parents=True)
    (tmp_path / ".unpacking" / "train2017" / "half.jpg").write_bytes(b"")
    assert script("--yes", tmp_path)[0] == 0 and contents(tmp_path) == COMPLETE


def test_images_that_went_missing_are_noticed(script, tmp_path):
    assert script("--yes", tmp_path)[0] == 0
    next((tmp_path / "train2017").iterdir()).unlink()
    code, _, said = script("--yes", tmp_path)
    assert code == 1 and "holds 2 images, not 3" in said and "Fix: remove it" in said


@pytest.mark.parametrize("option", [None, "--keep-zips"])
def test_the_disk_is_looked_at_first(script, server, tmp_path, option):
    """At the last part: the zip beside what it holds, after the files (and the zips, if kept) of the parts before."""
    sizes = [len(data) for data in server.files.values()]
    needed = 3 * 20_000 + (sum(sizes) if option else sizes[-1]) + 100_000_000
    tools = tmp_path / "tools"
    tools.mkdir()
    for free, expected in ((needed // 1024, 1), (needed // 1024 + 1, 0)):
        (tools / "df").write_text(f"#!/bin/sh\necho header\necho disk 1 1 {free} 1% /\n")
        (tools / "df").chmod(0o755)
        code, _, said = script("--yes", *filter(None, [option]), tmp_path / "set")
        assert code == expected, said
        assert expected == 0 or ("0.1 GB are needed" in said and "Fix: make room" in said and server.asked == [])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "FOLDER is missing"),
        (("--yes",), 2, "FOLDER is missing"),
        (("--force", "x"), 2, "--force: unknown option"),
        (("one", "two"), 2, "two folders: one and two"),
        ((str(SCRIPT),), 1, "cannot be written. Fix: use another folder"),
    ],
)
def test_wrong_arguments_stop_before_anything_is_fetched(script, server, arguments, code, message):
    exit_code, _, said = script(*arguments)
    assert exit_code == code and message in said and server.asked == []


def test_nothing_is_fetched_before_the_terms_are_accepted(script, server, tmp_path):
    code, _, said = script(tmp_path)
    assert code == 1 and "Flickr" in said and "Fix: --yes" in said and server.asked == []
    assert contents(tmp_path) == []


def test_help_is_the_head_of_the_script(script):
    code, printed, _ = script("--help")
    assert code == 0 and "--keep-zips" in printed and "COCO_BASE_URL" in printed and "set -" not in printed
