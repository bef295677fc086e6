"""Bad input of every kind, drawn at random: python scripts/fuzz.py [KIND ...] [--cases N] [--seed S] [--only NUMBER]

Every case must end in something that is taken whole, or in a message for the user (UserError, or the command line's exit code
2). What counts as lost is: any other exception, more than LIMIT seconds or MEMORY of new memory, a message that is empty,
endless or holds control characters, and a silent drop, which each kind looks for in a way of its own: what is taken is compared
with what went in. A case is decided by seed, kind and number alone, and `--only` runs it again.

Writes results/reference/reliability/fuzz_<kind>.json.
"""

import argparse
import contextlib
import copy
import csv
import gc
import io
import json
import logging
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import unittest.mock
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import yaml
from PIL import Image

from fpn_ablate.errors import UserError
from fpn_ablate.files import save_text
from fpn_ablate.record import machine

LIMIT = 60.0  # seconds a case may take
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
    *("=cmd|' /C calc'!A0", "+1", "-x", "@SUM(A1)", "＝1+1", "x;=1+1", "<script>alert(1)</script>"),
    *("</script><img src=x onerror=a>", "datum.y", "[[x]]"),
    *("{{ 7*7 }}", "${oc.env:HOME}", "${nope}", "???", "$(id)", "`id`", "; rm -rf x", "\\input{/etc/passwd}",),
    *("$\\frac{", "%", "&"),
    *("| a | b |", "[x](javascript:a)", "![x](http://x)", "**x", "[red]x[/red]", "[/]", "é", "日本語", "\u202etxt"),
    *("\u2028", "\ufeff"),
    *("\x85", "\xa0x", "a\u0300" * 40, "x" * 300, "x" * 5000, "'; DROP TABLE x;--", "javascript:alert(1)",),
    *("data:text/html,x", "%00"),
    *("__proto__", "constructor", "datum.x", "fpn+upsample=bilinear", "con", "a.jpg/", "./a.jpg", "sub//b.png", "A.JPG"),
]  # fmt: skip
NUMBERS = [
    *(0, 1, -1, 2, 3, 255, 65536, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, -(10**30)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -0.001, 1e-320, 1e-9, 1e10, 1.1e10, 1e18, 1e308, -1e308, math.nan, math.inf, -math.inf),
    10**400,
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
                holder[key] = (
                    f" {value} " if isinstance(value, str) else not value if isinstance(value, bool) else draw.choice(NUMBERS)
                )
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


def told(text: str, longest: int = LONGEST) -> None:
    """A message is there, can be read by a person, and cannot move the cursor of a terminal."""
    if not text.strip():
        raise Lost("an empty message")
    if len(text) > longest:
        raise Lost(f"a message of {len(text)} characters: {text[:300]}")
    if wrong := {char for char in text if not char.isprintable() and char not in "\n\t"}:
        raise Lost(f"a message with {sorted(map(ascii, wrong))}: {text[:300]!a}")


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
    boxes = [
        (1, 3, [5, 6, 10, 12.5]),
        (1, 1, [0, 0, 60, 40]),
        (2, 3, [1, 2, 3, 4]),
        (2, 1, [20, 10, 30, 20]),
        (3, 1, [1, 1, 9, 9]),
    ]
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
        # How deep json goes depends on how deep it is called: a file at that very limit is read from one place alone.
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
        told(command(lambda: show(report))[1], 10 * LONGEST)  # 50 findings of each level and split


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


# --- pictures

MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "PA", "I;16", "I", "F", "HSV", "LAB")
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "SGI", "EPS", "PDF", "DDS")
STRANGE = [
    *(b"", b"\0", b"<!doctype html><html><body>404</body></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a"),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 30\n%%EndComments\n(x) run\n%%EOF\n",
    *(b"P6 99999 99999 255\n", b"BM" + bytes(60)),
    *(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"PK\3\4"),
    *(b"RIFF\0\0\0\0WEBPVP8 ", b"\xff\xd8\xff"),
    b"\x89PNG\r\n\x1a\n",
]  # fmt: skip


def bomb(draw: Draw) -> bytes:
    """A PNG of a few hundred bytes that claims to be up to 60,000 pixels high and wide."""
    side = struct.pack(">II", draw.choice([30_000, 60_000, 2**31 - 1]), draw.choice([1, 30_000, 60_000]))
    header = b"IHDR" + side + bytes([8, draw.choice([0, 2]), 0, 0, 0])
    chunks = [header, b"IDAT" + zlib.compress(bytes(draw.choice([10, 100_000]))), b"IEND"]
    if draw.random() < 0.3:  # a text that unpacks to 60 MB
        chunks.insert(1, b"zTXtx\0\0" + zlib.compress(bytes(60_000_000), 1))
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def picture_bytes(draw: Draw) -> tuple[bytes, tuple[int, int]]:
    """A file in any mode and format, perhaps damaged, and its (width, height)."""
    size = draw.choice([(1, 1), (20, 30), (20, 30), (33, 17), (1, 300), (300, 1), (30_000, 1), (30_000, 40), (3, 20_000)])
    if draw.random() < 0.12:
        return (draw.choice(STRANGE) if draw.random() < 0.7 else bomb(draw)), size
    small = Image.frombytes("RGB", (8, 8), draw.randbytes(192))
    image = small.resize(size, Image.Resampling.NEAREST)
    with contextlib.suppress(ValueError):  # not every mode can be had from RGB
        image = image.convert(draw.choice(MODES))
    stream, options = io.BytesIO(), {}
    form = draw.choice(FORMATS if draw.random() < 0.5 else FORMATS[:5])
    if draw.random() < 0.15 and form in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"save_all": True, "append_images": [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)] * 3}
    if draw.random() < 0.3 and form in ("JPEG", "PNG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[274] = draw.choice([0, 1, 2, 3, 5, 6, 7, 8, 9, 65535])
        options["exif"] = exif
    try:
        image.save(stream, form, **options)
    except Exception:  # a mode that the format lacks, or a side that it cannot have
        stream = io.BytesIO()
        image.convert("RGB").save(stream, "PNG")
    data = stream.getvalue()
    return (damaged(draw, data) if draw.random() < 0.4 else data), size


class Pictures:
    """A picture is refused with a message, or gives pixels of the size that was annotated."""

    how = "pictures in 14 modes and 15 formats, damaged, truncated, huge, misnamed, animated, rotated, and what is no picture"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir()

    def case(self, draw: Draw) -> str:
        from fpn_ablate.data import doctor
        from fpn_ablate.data.coco import CocoDataset
        from fpn_ablate.data.transforms import prepare

        data, (width, height) = picture_bytes(draw)
        name = draw.choice(["a.jpg", "a.png", "a", "a.gif", "a.eps", "a.txt"])
        (self.folder / "images" / name).write_bytes(data)
        width, height = draw.choice([(width, height)] * 6 + [(height, width), (width + 1, height), (1, 1), (10**9, 10**9)])
        entry = {"id": 1, "file_name": name, "width": width, "height": height}
        rows = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, width, height], "area": 1, "iscrowd": 0}]
        file = self.folder / "instances.json"
        file.write_text(json.dumps({"images": [entry], "annotations": rows, "categories": CATEGORIES}))
        report = doctor.examine(file, self.folder / "images")
        for finding in report.findings:
            told(str(finding))
        try:
            with no_process():
                dataset = CocoDataset(file, self.folder / "images", "set")
        except UserError as error:
            told(str(error))
            same(report.sound, False, "refused what is sound")
            return "refused"
        try:
            with no_process():
                sample = dataset[0]
        except UserError as error:  # damage in the middle, which the quick look does not see
            told(str(error))
            return "refused when read"
        same((sample.image.shape, sample.image.dtype), ((height, width, 3), np.uint8), "pixels")
        item = prepare(sample, 128, 256, True)
        same(min(item.image.shape[1:]) >= 1 and max(item.image.shape[1:]) <= 256, True, "the input's size")
        return "taken"


@contextlib.contextmanager
def no_process() -> Iterator[None]:
    """Lost where a process would be started, as Pillow does for PostScript."""

    def refuse(*arguments: Any, **_: Any) -> None:
        raise Hang(f"a process would be started: {arguments}")

    old, subprocess.Popen.__init__ = subprocess.Popen.__init__, refuse
    try:
        yield
    finally:
        subprocess.Popen.__init__ = old


# --- configurations, and the command line

BASES = [
    ("recipe=smoke",),
    ("recipe=smoke", "task=fast_rcnn"),
    ("recipe=smoke", "task=faster_rcnn", "backbone=resnet18", "backbone.weights=imagenet"),
    ("recipe=smoke", "data=coco", "data.root=nowhere"),
    ("recipe=smoke", "neck=single_level", "backbone=mobilenet_v2"),
    ("recipe=paper2017", "task=faster_rcnn", "task.training=joint"),
]
EXTREMES = [
    1,
    2,
    7,
    31,
    32,
    1000,
    4096,
    8192,
    65_536,
    10**6,
    10**9,
    10**18,
    1e-30,
    1e-6,
    1e-3,
    0.5,
    0.999,
    1.0,
    1e3,
    1e6,
    1e30,
    1e300,
]


class Configs:
    """A configuration is refused with a message, or stays as it is when it is kept and read again, and has a network."""

    how = "mutated configurations of six tasks through validation.validate; accepted ones are built on the meta device"

    def __init__(self, folder: Path) -> None:
        """Nothing is needed."""

    def case(self, draw: Draw) -> str:
        from fpn_ablate.validation import kept, validate

        values = composed(draw.choice(BASES))
        if draw.random() < 0.4:  # numbers alone, most of them of the right type
            for path in draw.sample([p for p in places(values) if type(at(values, p)) in (int, float)], draw.choice([1, 2, 4])):
                at(values, path[:-1])[path[-1]] = draw.choice(EXTREMES)
        else:
            values = spoilt(draw, values)
        before = shown(values)
        try:
            cfg = (kept if draw.random() < 0.3 else validate)(values)
        except UserError as error:
            told(str(error))
            return "refused"
        again = cfg.model_dump(mode="json")
        json.dumps(again, allow_nan=False)
        same(validate(again) == cfg, True, f"the same when read again: {before}")
        self._built(cfg)
        return "taken"

    def _built(self, cfg: Any) -> None:
        import torch

        from fpn_ablate.inputs import world
        from fpn_ablate.model.build import build_detector
        from fpn_ablate.optim import base_learning_rate

        same(math.isfinite(base_learning_rate(cfg.recipe.optimizer, cfg.recipe.batch_size)), True, "a learning rate")
        world(cfg)
        with torch.device("meta"):
            model = build_detector(cfg, num_classes=3)
        gibibytes = sum(p.numel() for p in model.parameters()) * 4 / 2**30
        same(gibibytes < 64, True, f"parameters of {gibibytes:.0f} GiB")


def shown(value: Any) -> str:
    return repr(value)[:300]


TOKENS = [
    *("=", "", "a=b=c", "~neck", "~x", "+x=1", "++recipe.steps=1", "neck@head=fpn", "data=coco,shapes"),
    *("ablation=c4", "ablation="),
    *("ablation=../x", "ablation=fpn,c4", "recipe=", "recipe=paper2017", "recipe=../../x", "task=joint"),
    *("backbone=timm/x", "[", "'"),
    *("experiments=table1", "+experiments=table1,table2", "experiments=../x", "hydra.run.dir=x",),
    *("hydra/launcher=joblib", "task={"),
    *("--limit", "--limit=x", "--limit=-1", "--json", "--json=-", "--json=.", "--size=0x0", "--markdown", "-m",),
    *("--help", "--nope"),
    *("seed=1,2", "seed=range(1,3)", "seed=choice(1)", "seed=1_000", "seed=0x10",),
    *("data.root=${oc.env:HOME}", "data.root=${nope}"),
    *("data.root=${data.root}", "data.root=???", "recipe=null", "recipe.optimizer=null", "neck={}", "task=null",),
    *("data=null", "seed=~"),
    *("recipe.schedule.drops=[0.5", "recipe.schedule.drops=[]", "head.anchor_sizes={a:1}", "factors=neck",),
    *("factors=[]", "data.label="),
]  # fmt: skip


class Commands:
    """The data doctor's command line ends with its exit codes 0, 1 or 2, and says something."""

    how = "command lines of keys that exist and that do not with values of any type, through the doctor's command"

    def __init__(self, folder: Path) -> None:
        from fpn_ablate.validation import keys

        put_pictures(folder)
        (folder / "instances.json").write_text(json.dumps(whole_set()))
        split = [f"data.{split}.{key}" for split in ("train", "val") for key in ("annotations", "images")]
        self.base = ["recipe=smoke", "data=coco", f"data.root={folder}", f"{split[0]}=instances.json", f"{split[1]}=images",
                     f"{split[2]}=instances.json", f"{split[3]}=images", "ablation=fpn"]  # fmt: skip
        self.keys, self.place = sorted({*keys()}), folder

    def case(self, draw: Draw) -> str:
        from fpn_ablate.__main__ import main as entry

        # No process can be given these characters.
        given = [
            token.translate({0: "", 0xD800: ""}) for token in (self._token(draw) for _ in range(draw.choice([1, 1, 2, 3])))
        ]
        old = Path.cwd()
        os.chdir(self.place)
        try:
            code, text = command(lambda: entry(["doctor", *self.base, *given]))
        finally:
            os.chdir(old)
        told(text)
        same(code in (0, 1, 2), True, f"exit code {code} of {given}")
        return {0: "sound", 1: "refused", 2: "refused"}[code]

    def _token(self, draw: Draw) -> str:
        if draw.random() < 0.4:
            return draw.choice(TOKENS)
        key = draw.choice(self.keys) if draw.random() < 0.9 else draw.choice(TEXTS)
        value = draw.choice(
            [str(draw.choice(EXTREMES)), str(draw.choice(NUMBERS[:-1])), draw.choice(TEXTS), "[1,2]", "{a: 1}", "null"]
        )
        return draw.choice(["", "", "", "+", "++", "~"]) + f"{key}={value}"


# --- proposals


class Proposals:
    """A file is refused with a message, or every box in it is handed out with its picture."""

    how = "mutated proposals.npz (types, shapes, values, keys, bytes, archives that unpack to much), loaded and handed out"

    def __init__(self, folder: Path) -> None:
        from fpn_ablate.data.coco import CocoDataset

        self.file, self.cfg = folder / "proposals.npz", configuration(None, *BASES[1])
        (folder / "instances.json").write_text(json.dumps(whole_set()))
        images = put_pictures(folder)
        self.dataset, self.other = (CocoDataset(folder / "instances.json", images, "set") for _ in range(2))

    def _arrays(self) -> dict[str, Any]:
        ids = np.repeat(np.array(self.dataset.image_ids), 3)
        boxes = np.tile(np.array([[0, 0, 20, 30], [1, 2, 10, 12], [5, 5, 6, 6.5]], np.float32), (3, 1))
        split = {"ids": ids, "boxes": boxes, "images": np.array(self.dataset.image_ids)}
        named = {f"{part}_{name}": array for part in ("train", "val") for name, array in split.items()}
        return named | {"row": "fpn", "fingerprint": "0", "train_data": self.dataset.digest, "val_data": self.dataset.digest}

    def case(self, draw: Draw) -> str:
        from fpn_ablate.data.proposals import WithProposals
        from fpn_ablate.proposals import FixedProposals

        self.file.write_bytes(self._content(draw))
        try:
            found = FixedProposals.load(self.file, self.cfg, (self.dataset, self.other), "leave it out")
            for split in ("train", "val"):
                ids, boxes = getattr(found, f"{split}_ids"), getattr(found, f"{split}_boxes")
                joined = WithProposals(self.dataset, ids, boxes, 1000)
                own = [joined[n] for n in range(len(joined))]
                same(sum(len(sample.proposals) for sample in own), len(boxes), "boxes handed out")
                for sample in own:
                    height, width = sample.image.shape[:2]
                    beyond = np.abs(sample.proposals - np.clip(sample.proposals, 0, [width, height] * 2))
                    same(bool((beyond <= 1).all()), True, f"boxes {sample.proposals.tolist()} in {width}x{height}")
        except UserError as error:
            told(str(error))
            return "refused"
        return "taken"

    def _content(self, draw: Draw) -> bytes:
        arrays, stream = self._arrays(), io.BytesIO()
        for _ in range(draw.choice([0, 1, 1, 2])):
            name = draw.choice(list(arrays))
            arrays[name] = self._other(draw, arrays[name])
            if draw.random() < 0.1:
                del arrays[name]
        (np.savez_compressed if draw.random() < 0.5 else np.savez)(stream, **arrays)
        data = stream.getvalue()
        kind = draw.random()
        if kind < 0.05:
            return draw.choice(
                [b"", b"PK\3\4", b"PK\5\6" + bytes(18), b"\x93NUMPY", pickle.dumps(arrays), data[:100], bytes(1000)]
            )
        if kind < 0.15:
            return archive(draw)
        return damaged(draw, data) if kind < 0.45 else data

    @staticmethod
    def _other(draw: Draw, array: Any) -> Any:
        array = np.asarray(array)
        match draw.randrange(8):
            case 0 if array.dtype.kind in "iuf":
                return array.astype(
                    draw.choice(["f4", "f8", "f2", "u8", "i1", "c8", "S3", "O", "?", ">f4", ">i8"]), casting="unsafe"
                )
            case 1:
                return array.reshape(draw.choice([(-1,), (1, -1), (*array.shape, 1)]))
            case 2 | 3 if array.size and array.dtype.kind in "iuf":
                array, wide = array.copy(), np.iinfo(array.dtype) if array.dtype.kind in "iu" else np.finfo(array.dtype)
                array.flat[draw.randrange(array.size)] = draw.choice([0, 1, 3, 99, wide.max, wide.min])
                return array
            case 4 if array.dtype.kind == "f" and array.size:
                array = array.copy()
                array.flat[draw.randrange(array.size)] = draw.choice([math.nan, math.inf, -1e30, 1e30, 1e5, -3, -0.5])
                return array
            case 5:
                return array[: draw.randrange(4)] if array.ndim else array
            case 6:
                return np.array(draw.choice([0, None, "x", [1, 2], {"a": 1}]), dtype=draw.choice([object, None]))
            case _:
                return np.concatenate([array, array]) if array.ndim else np.array([array, array])


def archive(draw: Draw) -> bytes:
    """A zip of one array that says more than it holds, or unpacks to a gigabyte."""
    shape = draw.choice([(10**6, 4), (10**9, 4), (10**12, 4), (-1, 4), (2**62, 4), (0, 4)])
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    text = (
        header if draw.random() < 0.8 else draw.choice(["{", "(" * 3000, "{'descr': __import__('os')}", header * 3])
    ).encode()
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    stream = io.BytesIO()
    method = draw.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(stream, "w", method) as file:
        body = bytes(draw.choice([0, 100, 16_000_000 if method != zipfile.ZIP_STORED else 1000]))
        for name in ("train_ids", "train_boxes", "train_images"):
            file.writestr(f"{name}.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + body)
    data = stream.getvalue()
    return damaged(draw, data) if draw.random() < 0.3 else data


# --- files of weights


class Weights:
    """A file is refused with a message, or gives tensors that hold numbers; nothing in it is run."""

    how = "mutated files of weights (torch, pickle, safetensors: bytes, types, nesting) through the reader and the converter"

    def __init__(self, folder: Path) -> None:
        import torch

        from fpn_ablate.weights.files import write_safetensors

        self.file, self.mark = folder / "weights", folder / "run"
        tensors = {
            "conv1.weight": torch.rand(4, 3, 7, 7),
            "bn1.weight": torch.rand(4),
            "layer1.0.conv1.weight": torch.rand(4, 4, 1, 1),
        }
        self.tree = {"model": {name: value.numpy() for name, value in tensors.items()}, "__author__": "x", "n": [1, {"a": 2.0}]}
        self.whole = []
        for old in (False, True):
            stream = io.BytesIO()
            torch.save({"model": tensors}, stream, _use_new_zipfile_serialization=not old)
            self.whole.append(stream.getvalue())
        write_safetensors(
            self.file, {f"backbone.stages.stem.{n}": value for n, value in enumerate(tensors.values())}, {"row": "fpn"}
        )
        self.whole += [self.file.read_bytes(), *(pickle.dumps(self.tree, protocol) for protocol in (2, 4, 5))]

    def case(self, draw: Draw) -> str:
        import torch

        from fpn_ablate.weights.files import read
        from fpn_ablate.weights.loading import open_weights

        self.file.write_bytes(self._content(draw))
        try:
            stored = read(self.file)
            for name, value in stored.tensors.items():
                same(isinstance(name, str) and (not value.is_floating_point() or bool(torch.isfinite(value).all())), True, name)
            open_weights(self.file)
        except UserError as error:
            told(str(error))
            same(self.mark.exists(), False, "something in the file was run")
            return "refused"
        return "taken"

    def _content(self, draw: Draw) -> bytes:
        import torch

        kind = draw.randrange(10)
        if kind < 6:
            return damaged(draw, draw.choice(self.whole))
        if kind < 8:
            tree = spoilt(draw, self.tree)
            return pickle.dumps(tree, draw.choice([2, 3, 4, 5])) if deep(tree) < 100 else b"\x80\x02" + b"]" * 3000 + b"."
        if kind == 8:
            tensors = spoilt(draw, {"model": {"a.weight": 1, "b": [2]}})
            stream = io.BytesIO()
            torch.save(tensors if deep(tensors) < 100 else Runs(self.mark), stream)
            return stream.getvalue()
        return draw.choice(
            [wide_pickle(draw.choice([3, 40, 1000])), pickle.dumps({"model": {"a": Runs(self.mark)}}, 2), draw.randbytes(500)]
        )


class Runs:
    """Leaves a file where a pickle of it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def wide_pickle(width: int) -> bytes:
    """Dictionaries of dictionaries, each the same one many times: a few kilobytes that stand for width^4 of them."""
    data = b"\x80\x02}q\0"
    for level in range(4):
        keys = b"".join(b"X" + struct.pack("<I", 4) + b"%04d" % n + b"h" + bytes([level]) for n in range(width))
        data += b"0}q" + bytes([level + 1]) + b"(" + keys + b"u"
    return data + b"."


def deep(value: Any) -> int:
    depth, layer = 0, [value]
    while layer := [
        inner
        for item in layer
        for inner in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
    ]:
        depth += 1
    return depth


# --- records, definitions of tables, and names

ROWS = ("c4", "fpn", "fpn+upsample=bilinear")
METRICS = ("AR100", "AR1k", "AR1k_s")


def record(row: str, seed: int) -> dict[str, Any]:
    """What a finished run leaves, as far as tables read it."""
    values = {name: 0.1 + 0.05 * seed + 0.1 * len(row) / (n + 9) for n, name in enumerate(METRICS)}
    return {
        **{"format": 1, "status": "finished", "error": None, "fingerprint": f"{row}-{seed}", "setting": "s"},
        "table": "table1_rpn",
        **{"recipe": "quick", "data": "shapes", "generated": True, "task": "rpn", "row": row, "seed": seed, "draws": "d"},
        "config": {"neck": {"lateral": row != "c4"}, "seed": seed, "factors": ["neck"], "recipe": {"steps": 5}},
        "verify": {"feature": "{Pk}", "anchors": 199974, "lateral": True, "top_down": True, "gflops": 1.5},
        "metrics": values,
        "objects": {"small": 11, "medium": 12, "large": 13},
        "images": {"count": 4, "digest": "1a2b"},
        "repairs": {"train": {"boxes clipped": 2}, "val": {}},
        "cost": {"pretrain_s": 12.0, "train_s": 70.0, "eval_s": 9.0, "steps": 5},
        "environment": {"device": "cpu", "evaluator": "e 1", "commit": "abc", "dirty": False, "command": "x"},
        "by_size": {"edges": [4.0, 8.0], "objects": [0, 1, 2], "AR100": [None, 0.2, 0.3]},
        "pictures": "set",
        **{"started": "2026-11-21T08:00:00+00:00", "finished": f"2026-11-21T09:0{seed}:00+00:00"},
    }  # fmt: skip


def leave(runs: Path, row: str, seed: int, content: Any, names: Sequence[str] = ("ant", "bee")) -> Path:
    """A run's folder with all that the page reads."""
    folder = runs / "table1_rpn" / "quick" / row / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(content))
    ids = np.arange(1, 4)
    levels = {f"level_p{k}": np.full((4, 4), 40 * k, np.uint8) for k in (2, 3)}
    np.savez(folder / "exhibits.npz", image_ids=ids, values=np.array([0.1, 0.5, 0.2]) * len(row), **levels)
    boxes = np.tile(np.array([[4.0, 6.0, 20.0, 30.0]]), (3, 1))
    np.savez(folder / "detections.npz", image_ids=ids, boxes=boxes, scores=np.array([0.9, 0.6, 0.2]))
    lines = [{"step": step, "loss": 1 / step, names[0]: 0.5} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    place = runs / ".pictures" / "set"
    if not place.is_dir():
        place.mkdir(parents=True)
        for image in ids:
            Image.new("RGB", (32, 32), (90, 10 * int(image), 0)).save(place / f"{image}.jpg")
        Image.new("RGB", (32, 32), (255, 0, 0)).save(runs / "secret.jpg")
    images = {str(n): {"width": 32, "height": 32, "objects": [{"bbox": [4, 6, 9, 9], "category": names[n % 2]}]} for n in ids}
    (place / "truth.json").write_text(json.dumps({"categories": list(names), "images": images}))
    return folder


class Written(HTMLParser):
    """The tags of a page with the names of their attributes, and what its blocks of JSON hold."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[tuple[str, ...]] = set()
        self._json = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add((tag, *sorted({name for name, _ in attrs})))
        self._json = tag == "script" and ("type", "application/json") in attrs

    def handle_data(self, data: str) -> None:
        if self._json:
            json.loads(data, parse_constant=float)

    def handle_endtag(self, tag: str) -> None:
        self._json = False


def written(tables_: Any, allowed: set[tuple[str, ...]], width: int = 120) -> None:
    """All that is made of tables is well-formed, and holds no markup, command, formula or control character of a name's."""
    from rich.console import Console

    from fpn_ablate.report import page, tables

    with unittest.mock.patch.object(page, "_vega", lambda: "0"):  # a megabyte that is always the same
        made = page.render(tables_)
    if strange := {tag for tag in Written(made).tags if tag not in allowed}:
        raise Lost(f"the page has {sorted(strange)[:3]}")
    for table in tables_:
        markdown, latex, sheet = tables.markdown(table), tables.latex(table), tables.csv_text(table)
        stream = io.StringIO()
        tables.show(table, Console(file=stream, width=width))
        for text in (markdown, latex, stream.getvalue(), sheet, tables.claims_csv(table) if table.verdicts else "x"):
            plain(text)
        if wrong := re.search(r"<(?!br>)[a-zA-Z/!]|(?<!\\)[`\[]", markdown):
            raise Lost(f"Markdown holds {markdown[wrong.start() : wrong.end() + 40]!a}")
        lines = [line for line in markdown.splitlines() if line.startswith("|")]
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in lines[: 1 + len(table.rows)]}
        same(len(widths), 1, "kinds of lines in a table of Markdown")
        bare = re.sub(r"\\[\\%&$#_{}]", "", latex.split("\n", 1)[1])
        same((bare.count("{"), bare.count("$") % 2), (bare.count("}"), 0), "braces and dollars of LaTeX")
        if foreign := set(re.findall(r"\\[a-zA-Z]+", bare)) - LATEX:
            raise Lost(f"LaTeX holds {foreign}")
        for cell in (cell for line in csv.reader(io.StringIO(sheet)) for cell in line):
            if re.match(r"\s*[=+@＝＋＠－]|\s*-(?![\d.])|.*;\s*[\"']?[=+@-]", cell) and not re.match(r'"', cell):
                raise Lost(f"a formula: {cell[:80]!a}")


LATEX = {rf"\{name}" for name in (
    *("begin", "end", "centering", "footnotesize", "setlength", "tabcolsep", "caption", "allowbreak"),
    *("resizebox", "ifdim", "width", "linewidth", "else", "fi", "toprule", "midrule", "addlinespace", "textbf", "quad"),
    *("bottomrule", "par", "smallskip"),
    *("scriptsize", "textbackslash", "textasciitilde", "textasciicircum", "textless"),
    *("textgreater", "textbar", "pm", "checkmark", "Delta", "cdot", "dots", "dagger"),
)}  # fmt: skip


def plain(text: str) -> None:
    if wrong := {char for char in text if not char.isprintable() and char not in "\n\t"}:
        raise Lost(f"written: {sorted(map(ascii, wrong))}")
    text.encode()


class Report:
    """What tables, their files and the page are made from: it is left out with a word, refused, or well written."""

    def __init__(self, folder: Path) -> None:
        from fpn_ablate.paths import EXPERIMENTS
        from fpn_ablate.report import collate, load

        self.runs, self.experiments = folder / "runs", EXPERIMENTS
        self.own = folder / "experiments"
        self.own.mkdir()
        for row in ROWS:
            for seed in (2, 3):
                leave(self.runs, row, seed, record(row, seed))
        other = self.runs / "own" / "quick" / "c4" / "seed2"  # a page of several tables has an overview
        other.mkdir(parents=True)
        (other / "record.json").write_text(json.dumps(record("c4", 2) | {"table": "own"}))
        from fpn_ablate.report import page

        with unittest.mock.patch.object(page, "_vega", lambda: "0"):
            self.allowed = Written(page.render(collate(load(self.runs)))).tags
        # Which of these stand on a page depends on what a table has: errors, notes, a best row, one picture or none.
        for tag, *names in list(self.allowed):
            self.allowed |= {(tag, *sorted({*names, more})) for more in ("class", "title", "colspan", "id", "tabindex")}
            self.allowed |= {(tag, *(name for name in names if name != less)) for less in ("class", "title", "colspan")}
        for tag in (
            "p",
            "small",
            "strong",
            "span",
            "i",
            "em",
            "label",
            "select",
            "option",
            "h1",
            "h2",
            "h3",
            "div",
            "ul",
            "li",
            "br",
        ):
            self.allowed |= {(tag,), (tag, "class")}

    def made(self, folders: Sequence[Path] = ()) -> str:
        from fpn_ablate.report import collate, load

        frame = load(self.runs)
        for line in frame.attrs["unreadable"]:
            plain(line)
        errors: list[str] = []
        found = collate(frame, experiments=[self.experiments, *folders], errors=errors, allow_unfair=True)
        for error in errors:
            told(error)
        written(found, self.allowed)
        return "taken" if not errors and not frame.attrs["unreadable"] else "refused"


class Records(Report):
    how = "mutated record.json, metrics.jsonl, truth.json and arrays of finished runs, through all tables and the page"

    def case(self, draw: Draw) -> str:
        folder = leave(self.runs, ROWS[1], 2, record(ROWS[1], 2))
        if draw.random() < 0.7:
            (folder / "record.json").write_text(json.dumps(spoilt(draw, record(ROWS[1], 2))))
        else:
            name = draw.choice(["record.json", "metrics.jsonl", "exhibits.npz", "detections.npz", "truth.json", "1.jpg"])
            file = folder / name if (folder / name).exists() else self.runs / ".pictures" / "set" / name
            data = file.read_bytes()
            if name == "truth.json" and draw.random() < 0.7:
                data = json.dumps(spoilt(draw, json.loads(data))).encode()
            elif draw.random() < 0.8:
                data = damaged(draw, data)
            else:
                data = archive(draw) if name.endswith("npz") else draw.choice(STRANGE)
            file.write_bytes(data)
        try:
            return self.made()
        finally:
            shutil.rmtree(self.runs / ".pictures")
            leave(self.runs, ROWS[1], 2, record(ROWS[1], 2))


class Names(Report):
    how = "hostile names of rows, tables, recipes, data, classes, errors, devices: in HTML, LaTeX, CSV, Markdown, terminal"

    def case(self, draw: Draw) -> str:
        names = [text for text in TEXTS if text.strip()]
        content = record(ROWS[1], 2)
        for key in draw.sample(
            ["row", "table", "recipe", "data", "setting", "fingerprint", "error", "draws", "task"], draw.choice([1, 2, 3])
        ):
            content[key] = draw.choice(names)
        content["environment"][draw.choice(["device", "commit", "command", "evaluator"])] = draw.choice(names)
        content["verify"]["feature"] = draw.choice(names)
        content["metrics"][draw.choice(names)] = 0.5
        content["status"] = draw.choice(["finished", "finished", "failed", "diverged"])
        leave(self.runs, ROWS[1], 2, content, (draw.choice(TEXTS), draw.choice(TEXTS)))
        return self.made()


class Tables(Report):
    how = (
        "mutated definitions of tables and claims (YAML: types, keys, nesting, aliases, bytes), with the records that they show"
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.texts = {name: (self.experiments / f"{name}.yaml").read_text() for name in ("table1_rpn", "claims")}

    def case(self, draw: Draw) -> str:
        name = draw.choice(list(self.texts))
        text = self.texts[name]
        if draw.random() < 0.7:
            content = yaml.safe_load(text)
            part = content["report"] if "report" in content and draw.random() < 0.8 else content
            part = spoilt(draw, part)
            content = content | {"report": part} if "report" in content and part is not content else part
            data = (yaml.safe_dump(content) if deep(content) < 100 else json.dumps(content)).encode("utf-8", "surrogatepass")
        elif draw.random() < 0.7:
            data = damaged(draw, text.encode())
        else:
            strange = ["a: &a [*a]", "a: !!python/object/apply:os.system ['x']", "a: 2026-13-45", "a: 0x", "[" * 3000,
                       "{" * 3000, "a: !!int x",
                       "? {a: [1]}\n: 2", "\0", "a: !!binary x", "- 1", "a: !!timestamp x", "%YAML 9", "a: b: c",
                       "<<: 1", bombs()]  # fmt: skip
            data = draw.choice([*strange, text + "\n" + draw.choice(strange)]).encode()
        (self.own / f"{name}.yaml").write_bytes(data)
        try:
            return self.made([self.own])
        finally:
            (self.own / f"{name}.yaml").unlink()


def bombs() -> str:
    """Aliases of aliases: a few lines that stand for 9^9 entries."""
    lines = ["table: table1_rpn", "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return "\n".join([*lines, "report: {title: x, facts: *a8, metrics: [], notes: *a8}"])


# --- all of them

KINDS: dict[str, Callable[[Path], Any]] = {
    **{"annotations": Annotations, "pictures": Pictures, "configs": Configs, "commands": Commands},
    **{"proposals": Proposals, "weights": Weights, "records": Records, "names": Names, "tables": Tables},
}


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
    import torch

    limit_memory()
    logging.disable(logging.WARNING)
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
        print(
            f"{name}: {given.cases} cases, {ways}; lost {len(outcome.lost)}; {seconds:.0f} s, peak {peak:.0f} MiB", flush=True
        )
        for number, what in outcome.lost[:20]:
            print(f"  {name} --only {number}: {what}", flush=True)
        content = {
            "fault": f"bad input: {name}",
            "tries": given.cases,
            "lost": len(outcome.lost),
            "how": f"{KINDS[name].how}; {ways}",
            "command": f"python scripts/fuzz.py {name} --cases {given.cases} --seed {given.seed}",
            "machine": machine(torch.device("cpu")),
        }
        text = json.dumps(content, indent=1) + "\n"
        save_text(given.out / f"fuzz_{name}.json", text)
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
