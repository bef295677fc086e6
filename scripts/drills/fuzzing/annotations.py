"""Annotation files."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fpn_ablate.utils.errors import UserError
from fuzzing.checks import LONGEST, Lost, command, same, told
from fuzzing.configs import configuration
from fuzzing.draw import TEXTS, Draw, damaged, spoilt
from fuzzing.sound_set import put_pictures, whole_set


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
        from fpn_ablate.cli.main import main
        from fpn_ablate.data.checks.examine import examine

        self.file.write_bytes(annotation_bytes(draw))
        report = examine(self.file, self.images)
        for finding in report.findings:
            told(str(finding))
        outcomes = [self._taken(mode, report) for mode in ("error", "clip", "drop")]
        # How deep json goes depends on how deep it is called: a file at that very limit is read from one place alone.
        if outcomes[0] != report.sound and "recursion" not in self.refusal:
            raise Lost(f"sound by the doctor: {report.sound}, taken: {outcomes[0]} ({self.refusal})")
        if draw.random() < 0.2:
            code, text = command(lambda: main(["doctor", str(self.file), str(self.images)]))
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
        from fpn_ablate.cli.doctor_text import show
        from fpn_ablate.doctor.report import examine

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
