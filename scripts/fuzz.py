"""Bad input of every kind, drawn at random: python scripts/fuzz.py [KIND ...] [--cases N] [--seed S] [--only NUMBER]

Every case must end in something that is taken whole, or in a message for the user (UserError, or the command line's exit code 2).
What counts as lost is: any other exception, more than LIMIT seconds, more than MEMORY of new memory, a message that is empty,
endless or holds control characters, and a silent drop, which each kind looks for in a way of its own: what is taken is compared
with what went in. A case is decided by seed, kind and number alone, and `--only` runs it again.

Writes results/reference/reliability/fuzz_<kind>.json.
"""

import argparse
import contextlib
import copy
import gc
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import yaml
from PIL import Image

from fpn_ablate.errors import UserError
from fpn_ablate.files import write_atomically

LIMIT = 20.0  # seconds a case may take
MEMORY = 4 << 30  # bytes of address space that all cases together may add
LONGEST = 20_000  # characters of a message
OUT = Path(__file__).parents[1] / "results" / "reference" / "reliability"

Draw = random.Random


class Lost(AssertionError):
    """A case that ends in none of the ways allowed."""


class Hang(BaseException):
    """Not an Exception: nothing that is tested may catch it."""


# --- what is drawn

TEXTS = [
    *("", " ", "0", "-1", "1e5", "nan", "null", "true", "None", "..", ".", "/", "../../etc/passwd", "/etc/passwd", "a/../../b"),
    *("..\\x.jpg", "C:\\x.jpg", "\\\\host\\x", "a\0b", "\ud800", "\udcff", "\x1b[2J\x1b]0;x\x07", "a\nb", "a\r\nb", "\t=1+1"),
    *("=cmd|' /C calc'!A0", "+1", "-x", "@SUM(A1)", "＝1+1", "x;=1+1", "<script>alert(1)</script>", "</script><img src=x onerror=a>"),
    *("{{ 7*7 }}", "${oc.env:HOME}", "${nope}", "???", "$(id)", "`id`", "; rm -rf x", "\\input{/etc/passwd}", "$\\frac{", "%", "&"),
    *("| a | b |", "[x](javascript:a)", "![x](http://x)", "**x", "[red]x[/red]", "[/]", "é", "日本語", "\u202etxt", "\u2028", "\ufeff"),
    *("\x85", "\xa0x", "a\u0300" * 40, "x" * 300, "x" * 5000, "'; DROP TABLE x;--", "javascript:alert(1)", "data:text/html,x", "%00"),
    *("__proto__", "constructor", "datum.x", "fpn+upsample=bilinear", "con", "a.jpg/", "./a.jpg", "sub//b.png", "A.JPG"),
]  # fmt: skip
NUMBERS = [
    *(0, 1, -1, 2, 3, 255, 65536, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, -(10**30)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -0.001, 1e-320, 1e-9, 1e10, 1.1e10, 1e18, 1e308, -1e308, math.nan, math.inf, -math.inf, 10**400),
]  # fmt: skip


def anything(draw: Draw, depth: int = 2) -> Any:
    """A value of any type."""
    kind = draw.randrange(9 if depth else 6)
    if kind < 2:
        return draw.choice(NUMBERS)
    if kind < 4:
        return draw.choice(TEXTS)
    if kind < 6:
        return draw.choice([None, True, False, [], {}, [[]], [None], {"": None}])
    if kind < 7:
        return [anything(draw, depth - 1) for _ in range(draw.choice([1, 2, 4, 4, 30]))]
    if kind < 8:
        return {draw.choice(["id", "name", "bbox", draw.choice(TEXTS)]): anything(draw, depth - 1) for _ in range(3)}
    return nested(draw.choice([5, 40, 200, 400]), draw.choice(["list", "dict"]))


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value below `tree`."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def spoilt(draw: Draw, tree: Any) -> Any:
    """A tree of dictionaries and lists with one to four things wrong: types, numbers, keys, nesting, order, repetition."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 1, 2, 2, 4])):
        found = list(places(tree))
        if not found:
            return anything(draw)
        path = draw.choice(found)
        holder, key = at(tree, path[:-1]), path[-1]
        match draw.randrange(11):
            case 0 | 1 | 2 | 3:
                holder[key] = anything(draw)
            case 4:
                del holder[key]
            case 5:
                holder[key] = [holder[key]] if draw.random() < 0.5 else {"x": holder[key]}
            case 6:  # a value from another place
                holder[key] = copy.deepcopy(at(tree, draw.choice(found)))
            case 7 if isinstance(holder, list):
                holder[key:key] = [copy.deepcopy(holder[key])] * draw.choice([1, 1, 2, 50])
            case 8 if isinstance(holder, list):
                draw.shuffle(holder)
            case 9 if isinstance(holder, dict):
                holder[draw.choice([str(key) + "s", str(key).upper(), draw.choice(TEXTS)])] = holder.pop(key)
            case _:
                value = holder[key]
                known = {bool: not value, int: -value if isinstance(value, int) else 0, str: f" {value} "}
                holder[key] = known.get(type(value), draw.choice(NUMBERS))
    return tree


def damaged(draw: Draw, data: bytes) -> bytes:
    """Bytes with one to three things wrong: cut, turned, filled, repeated, put in."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        a = draw.randrange(len(data) + 1)
        b = min(len(data), a + draw.choice([1, 1, 2, 4, 16, 300]))
        rubbish = draw.randbytes(draw.choice([1, 1, 4, 64, 5000]))
        match draw.randrange(9):
            case 0:
                data = data[:a]
            case 1:
                data = data[a:]
            case 2 | 3 | 4:
                data = data[:a] + bytes(byte ^ 1 << draw.randrange(8) for byte in data[a:b]) + data[b:]
            case 5:
                data = data[:a] + bytes([draw.choice([0, 255])]) * (b - a) + data[b:]
            case 6:
                data = data[:a] + data[a:b] * draw.choice([2, 50]) + data[b:]
            case 7:
                data = data[:a] + rubbish + data[a if draw.random() < 0.5 else b :]
            case 8:  # a number that is too large, in either order of bytes
                wide = struct.pack(draw.choice("<>") + draw.choice("IQ"), draw.choice([2**31 - 1, 2**31, 2**32 - 1, 0]))
                data = data[:a] + wide + data[a + len(wide) :]
    return data


# --- what is asked of each case


def told(text: str) -> None:
    """A message is there, can be read by a person, and cannot move the cursor of a terminal."""
    if not text.strip():
        raise Lost("an empty message")
    if len(text) > LONGEST:
        raise Lost(f"a message of {len(text)} characters: {text[:300]}")
    if wrong := {char for char in text if not char.isprintable() and char != "\n"}:
        raise Lost(f"a message with {sorted(map(ascii, wrong))}: {ascii(text[:300])}")


def same(found: Any, expected: Any, what: str) -> None:
    if found != expected:
        raise Lost(f"{what}: {ascii(found)[:300]} in place of {ascii(expected)[:300]}")


def command(call: Callable[[], int | None]) -> tuple[int | None, str]:
    """Exit code and all output of a command line in this process."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            code = call()
        except SystemExit as stop:
            code = stop.code
    return code, stream.getvalue()


# --- annotations

CATEGORIES = [{"id": 3, "name": "bee"}, {"id": 1, "name": "ant"}]
PICTURES = {"a.jpg": (40, 60), "sub/b.png": (50, 50), "c.png": (30, 20)}  # height, width


def whole_set() -> dict[str, Any]:
    """A sound annotation file of three pictures."""
    images = [{"id": n, "file_name": name, "height": h, "width": w} for n, (name, (h, w)) in enumerate(PICTURES.items(), 1)]
    boxes = [(1, 3, [5, 6, 10, 12.5]), (1, 1, [0, 0, 60, 40]), (2, 3, [1, 2, 3, 4]), (2, 1, [20, 10, 30, 20]), (3, 1, [1, 1, 9, 9])]
    rows = [
        {"id": 10 + n, "image_id": image, "category_id": kind, "bbox": box, "area": box[2] * box[3], "iscrowd": int(n == 3),
         "segmentation": [[1, 2, 3, 4, 5, 6]]}
        for n, (image, kind, box) in enumerate(boxes)
    ]  # fmt: skip
    return {"info": {"year": 2026}, "images": images, "annotations": rows, "categories": CATEGORIES}


def put_pictures(folder: Path) -> Path:
    """The pictures of `whole_set`, with one more outside of their folder, and links out of it."""
    images = folder / "images"
    (images / "sub").mkdir(parents=True)
    for n, (name, (height, width)) in enumerate(PICTURES.items()):
        pixels = np.random.default_rng(n).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name)
    shutil.copy(images / "c.png", folder / "outside.png")
    (images / "link.png").symlink_to("../outside.png")
    (images / "away").symlink_to("..")
    os.mkfifo(images / "pipe.png")
    return images


def annotation_bytes(draw: Draw) -> bytes:
    """A file: mostly a spoilt set, otherwise text that is spoilt as text."""
    tree = whole_set()
    for image in tree["images"]:
        if draw.random() < 0.05:
            image["file_name"] = draw.choice(["link.png", "away/outside.png", "pipe.png", "sub", draw.choice(TEXTS)])
    kind = draw.randrange(20)
    if kind < 14:
        return json.dumps(spoilt(draw, tree)).encode()
    text = json.dumps(tree, ensure_ascii=draw.random() < 0.5)
    if kind < 16:
        return damaged(draw, text.encode())
    if kind == 16:  # a key that stands twice
        key, value = draw.choice([("id", "7"), ("bbox", "[0,0,1,1]"), ("images", "[]"), ("annotations", "[]"), ("name", '"x"')])
        start = draw.choice([n for n, char in enumerate(text) if char == "{"])
        return f'{text[: start + 1]}"{key}": {value}, {text[start + 1 :]}'.encode()
    if kind == 17:
        codec = draw.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1", "utf-7", "cp500"])
        return text.replace("bee", draw.choice(["bée", "bee"])).encode(codec)
    if kind == 18:  # deep nesting in the place of a value
        depth = draw.choice([300, 900, 985, 995, 3000, 100_000])
        deep = "[" * depth + "]" * depth if draw.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth
        return text.replace(draw.choice(['"bee"', "12.5", "[1, 2, 3, 4]", "3", "2026", '"a.jpg"']), deep, 1).encode()
    many = draw.choice([1, 30_000])  # the same fault many times
    fault = draw.choice(["5", '{"id": 1}', "[]", '{"id":1,"image_id":1,"category_id":1,"bbox":[0,0,-1,5]}', "9" * 5000, "null"])
    return text.replace('"annotations": [', '"annotations": [' + f"{fault}," * many).encode()


class Annotations:
    """A set is refused with a message, or taken with every entry that its file has."""

    how = "mutated COCO files (types, numbers, keys, nesting, text, bytes), through the data set, the doctor and its command"

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, put_pictures(folder)
        self.file, self.refusal = folder / "instances.json", ""

    def case(self, draw: Draw) -> str:
        from fpn_ablate.data import doctor

        self.file.write_bytes(annotation_bytes(draw))
        report = doctor.examine(self.file, self.images)
        for finding in report.findings:
            told(str(finding))
        outcomes = [self._taken(mode, report) for mode in ("error", "clip", "drop")]
        # How deep json goes depends on how deep it is called: a file at that very limit is read from one place and not the other.
        if outcomes[0] != report.sound and "recursion" not in self.refusal:
            raise Lost(f"sound by the doctor: {report.sound}, taken: {outcomes[0]} ({self.refusal})")
        if draw.random() < 0.2:
            code, text = command(lambda: doctor.main([str(self.file), str(self.images)]))
            same(code, 0 if report.sound else 1, "the doctor's exit code")
            told(text)
        if draw.random() < 0.05:
            self._examined()
        return "taken" if outcomes[0] else "mended" if any(outcomes) else "refused"

    def _taken(self, mode: str, report: Any) -> bool:
        from fpn_ablate.data.coco import CocoDataset

        try:
            dataset = CocoDataset(self.file, self.images, "set", invalid=mode)
        except UserError as error:
            told(str(error))
            self.refusal = str(error)
            return False
        twice: list[str] = []
        raw = json.loads(self.file.read_text("utf-8-sig"), object_pairs_hook=lambda pairs: once(pairs, twice))
        same(twice, [], "keys that stand twice")
        truth, dropped = dataset.coco(), dataset.repairs.get("boxes dropped", 0)
        for key in ("images", "categories"):
            expected = {entry["id"]: entry.get("file_name", entry.get("name")) for entry in raw[key]}
            same({e["id"]: e.get("file_name", e.get("name")) for e in truth[key]}, expected, key)
            same(len(truth[key]), len(raw[key]), f"number of {key}")
        same(len(truth["annotations"]) + dropped, len(raw["annotations"]), f"annotations with invalid={mode}")
        if mode == "error":
            found = sorted((a["image_id"], a["category_id"], a["bbox"], a["iscrowd"]) for a in truth["annotations"])
            expected = sorted(
                (a["image_id"], a["category_id"], a["bbox"], int(bool(a.get("iscrowd")))) for a in raw["annotations"]
            )
            same(found, expected, "the annotations")
        sound_samples(dataset, len(truth["annotations"]))
        return True

    def _examined(self) -> None:
        from fpn_ablate.doctor import examine
        from fpn_ablate.doctor.text import show

        split = {"annotations": self.file.name, "images": "images"}
        data = {"name": "coco", "label": None, "root": str(self.folder), "train": split, "val": split, "invalid": "clip",
                "keep_empty": False}  # fmt: skip
        report = examine({"fpn": configuration({"data": data})})
        json.dumps(report, ensure_ascii=False, allow_nan=False).encode()  # the file that --json writes
        told(command(lambda: show(report))[1])


def once(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice.extend(found)
    return found


def sound_samples(dataset: Any, objects: int) -> None:
    """Every sample can be had, all their objects together are `objects`, and each box lies in its picture."""
    seen = 0
    for n in range(len(dataset)):
        sample = dataset[n]
        height, width = sample.image.shape[:2]
        same((sample.image.dtype, sample.image.shape[2:]), (np.uint8, (3,)), "pixels")
        x0, y0, x1, y1 = sample.boxes.T
        inside = (x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height) & (x1 > x0) & (y1 > y0)
        same(bool(inside.all()), True, f"boxes {sample.boxes.tolist()} in {width}x{height}")
        seen += len(sample.boxes)
    same(seen, objects, "objects of all samples")


def configuration(changes: dict[str, Any] | None = None, *overrides: str) -> Any:
    """A composed configuration, with groups replaced."""
    from fpn_ablate.validation import validate

    return validate({**composed(overrides or ("recipe=smoke",)), **(changes or {})})


_COMPOSED: dict[tuple[str, ...], dict[str, Any]] = {}


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir

    from fpn_ablate.__main__ import _introduce
    from fpn_ablate.paths import CONF
    from fpn_ablate.sweep import cell_config

    key = tuple(overrides)
    if key not in _COMPOSED:
        _introduce()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = cell_config(compose("config", list(key)), {"ablation": "fpn"}, key)
        _COMPOSED[key] = cfg.model_dump(mode="json")
    return copy.deepcopy(_COMPOSED[key])


# --- all of them

KINDS: dict[str, Callable[[Path], Any]] = {"annotations": Annotations}


@dataclass
class Outcome:
    """What became of the cases of a kind."""

    counts: Counter = field(default_factory=Counter)
    lost: list[tuple[int, str]] = field(default_factory=list)  # number of the case, what was wrong


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Hang where it takes longer."""

    def over(_: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s, in {''.join(traceback.format_stack(frame)[-3:])}")

    old = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def try_kind(name: str, numbers: Sequence[int], seed: int) -> Outcome:
    """Run the cases of a kind with these numbers."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = KINDS[name](Path(folder))
        for number in numbers:
            try:
                with within(LIMIT):
                    outcome.counts[kind.case(Draw(f"{seed}/{name}/{number}"))] += 1
            except UserError as error:
                outcome.counts["refused"] += 1
                with contextlib.suppress(Lost):
                    told(str(error))
                    continue
                outcome.lost.append((number, f"a message that cannot be shown: {ascii(str(error))[:300]}"))
            except (Exception, Hang) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                at = f"{Path(where.filename).name}:{where.lineno}"
                outcome.lost.append((number, f"{type(error).__name__} at {at}: {ascii(str(error))[:400]}"))
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--cases", type=int, default=2000, help="of each kind (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the one case of this number, with its traceback")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the JSON files (default {OUT})")
    given = parser.parse_args()
    limit_memory()
    if given.only is not None:
        (name,) = given.kinds
        with tempfile.TemporaryDirectory() as folder, within(LIMIT):
            print(KINDS[name](Path(folder)).case(Draw(f"{given.seed}/{name}/{given.only}")))
        return 0
    lost = 0
    for name in given.kinds or KINDS:
        begun = time.monotonic()
        outcome = try_kind(name, range(given.cases), given.seed)
        seconds, peak = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        ways = ", ".join(f"{count} {what}" for what, count in sorted(outcome.counts.items()))
        print(f"{name}: {given.cases} cases, {ways}; lost {len(outcome.lost)}; {seconds:.0f} s, peak {peak:.0f} MiB", flush=True)
        for number, what in outcome.lost[:20]:
            print(f"  {name} --only {number}: {what}", flush=True)
        how = f"{KINDS[name].how}; {ways}; python scripts/fuzz.py {name} --cases {given.cases} --seed {given.seed}"
        content = {"fault": f"bad input: {name}", "tries": given.cases, "lost": len(outcome.lost), "how": how}
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(given.out / f"fuzz_{name}.json", lambda path, text=text: path.write_text(text))
        lost += len(outcome.lost)
    return int(lost > 0)


def limit_memory() -> None:
    """What takes more than MEMORY beyond what the program itself does fails with a MemoryError."""
    import torch  # so that its own is not counted

    torch.set_num_threads(1)
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())
