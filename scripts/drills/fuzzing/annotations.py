"""Bad annotation files."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fpn_ablate.utils import rle
from fpn_ablate.utils.errors import UserError
from fuzzing.checks import LONGEST, Lost, check_equal, check_message, run_command
from fuzzing.configs import configuration
from fuzzing.draw import TEXTS, Draw, mutate_bytes, mutate_tree
from fuzzing.valid_set import valid_annotations, write_pictures

LONE = "utf-8", "surrogatepass"  # half characters, of which TEXTS has some, are written as they are


def annotation_bytes(draw: Draw) -> bytes:
    """Draw a file: mostly a valid set with faults in its values, otherwise with faults in its text."""
    tree = valid_annotations()
    for image in tree["images"]:
        if draw.random() < 0.05:
            image["file_name"] = draw.choice(["link.png", "away/outside.png", "pipe.png", "sub", draw.choice(TEXTS)])
    kind = draw.randrange(20)
    if kind < 14:
        return json.dumps(mutate_tree(draw, tree)).encode()
    text = json.dumps(tree, ensure_ascii=draw.random() < 0.5)
    if kind < 16:
        return mutate_bytes(draw, text.encode(*LONE))
    if kind == 16:  # a duplicate key
        key, value = draw.choice([("id", "7"), ("bbox", "[0,0,1,1]"), ("images", "[]"), ("annotations", "[]"), ("name", '"x"')])
        start = draw.choice([n for n, char in enumerate(text) if char == "{"])
        return f'{text[: start + 1]}"{key}": {value}, {text[start + 1 :]}'.encode(*LONE)
    if kind == 17:
        codec = draw.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1", "utf-7", "cp500"])
        return text.replace("bee", draw.choice(["bée", "bee"])).encode(codec, "backslashreplace")
    if kind == 18:  # deep nesting in place of a value
        depth = draw.choice([300, 900, 985, 995, 3000, 100_000])
        nesting = "[" * depth + "]" * depth if draw.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth
        return text.replace(draw.choice(['"bee"', "12.5", "[1, 2, 3, 4]", "3", "2026", '"a.jpg"']), nesting, 1).encode(*LONE)
    count = draw.choice([1, 30_000])  # the same fault many times
    fault = draw.choice(["5", '{"id": 1}', "[]", '{"id":1,"image_id":1,"category_id":1,"bbox":[0,0,-1,5]}', "9" * 5000, "null"])
    return text.replace('"annotations": [', '"annotations": [' + f"{fault}," * count).encode(*LONE)


class Annotations:
    """Try a data set: it is refused with a message, or accepted with every entry of its file."""

    how = "mutated COCO files (types, numbers, keys, nesting, text, bytes), through the data set, the doctor and its command"

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, write_pictures(folder)
        self.file, self.refusal, self.masks = folder / "instances.json", "", False

    def case(self, draw: Draw) -> str:
        from fpn_ablate.cli.main import main
        from fpn_ablate.data.checks.examine import examine

        self.file.write_bytes(annotation_bytes(draw))
        self.masks = draw.random() < 0.5
        report = examine(self.file, self.images, masks=self.masks)
        for finding in report.findings:
            check_message(str(finding))
        accepted = [self._is_accepted(mode, report) for mode in ("error", "clip", "drop")]
        # The depth that json can read depends on the depth of its caller: a file at that limit may be readable in one place.
        if accepted[0] != report.sound and "recursion" not in self.refusal:
            raise Lost(f"sound by the doctor: {report.sound}, accepted: {accepted[0]} ({self.refusal})")
        if draw.random() < 0.2:
            options = ["--masks"] * self.masks
            code, text = run_command(lambda: main(["doctor", str(self.file), str(self.images), *options]))
            check_equal(code, 0 if report.sound else 1, "the doctor's exit code")
            check_message(text)
        if draw.random() < 0.05:
            self._examine_splits()
        return "accepted" if accepted[0] else "repaired" if any(accepted) else "refused"

    def _is_accepted(self, mode: str, report: Any) -> bool:
        from fpn_ablate.data.coco import CocoDataset

        try:
            dataset = CocoDataset(self.file, self.images, "set", invalid=mode, masks=self.masks)
        except UserError as error:
            check_message(str(error))
            self.refusal = str(error)
            return False
        duplicates: list[str] = []
        raw = json.loads(self.file.read_text("utf-8-sig"), object_pairs_hook=lambda pairs: unique_pairs(pairs, duplicates))
        check_equal(duplicates, [], "duplicate keys")
        truth = dataset.coco()
        dropped = sum(dataset.repairs.get(kind, 0) for kind in ("boxes dropped", "objects dropped for their masks"))
        for key in ("images", "categories"):
            expected = {entry["id"]: entry.get("file_name", entry.get("name")) for entry in raw[key]}
            check_equal({e["id"]: e.get("file_name", e.get("name")) for e in truth[key]}, expected, key)
            check_equal(len(truth[key]), len(expected), f"number of {key}")
        check_equal(len(truth["annotations"]) + dropped, len(raw["annotations"]), f"annotations with invalid={mode}")
        if mode == "error":
            annotations = sorted((a["image_id"], a["category_id"], a["bbox"], a["iscrowd"]) for a in truth["annotations"])
            expected = sorted(
                (a["image_id"], a["category_id"], a["bbox"], int(bool(a.get("iscrowd") or a.get("ignore"))))
                for a in raw["annotations"]
            )
            check_equal(annotations, expected, "the annotations")
        check_samples(dataset, len(truth["annotations"]))
        return True

    def _examine_splits(self) -> None:
        from fpn_ablate.cli.doctor_text import show
        from fpn_ablate.doctor.report import describe_data

        split = {"annotations": self.file.name, "images": "images"}
        data = {"name": "coco", "label": None, "root": str(self.folder), "train": split, "val": split, "invalid": "clip",
                "keep_empty": False}  # fmt: skip
        report = describe_data({"fpn": configuration({"data": data})})
        json.dumps(report, ensure_ascii=False, allow_nan=False).encode()  # the file that --json writes
        check_message(run_command(lambda: show(report))[1], 10 * LONGEST)  # 50 findings for each level and split


def unique_pairs(pairs: list[tuple[str, Any]], duplicates: list[str]) -> dict[str, Any]:
    """Return the pairs as a dictionary; extend `duplicates` with its keys if one occurs twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        duplicates.extend(values)
    return values


def check_samples(dataset: Any, objects: int) -> None:
    """Check that all samples can be read and have `objects` objects in all, with boxes and masks in their picture."""
    count = 0
    for n in range(len(dataset)):
        sample = dataset[n]
        height, width = sample.image.shape[:2]
        check_equal((sample.image.dtype, sample.image.shape[2:]), (np.uint8, (3,)), "pixels")
        x0, y0, x1, y1 = sample.boxes.T
        inside = (x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height) & (x1 > x0) & (y1 > y0)
        check_equal(bool(inside.all()), True, f"boxes {sample.boxes.tolist()} in {width}x{height}")
        if dataset.has_masks:
            areas = rle.decode(sample.masks, (height, width)).sum((1, 2))
            check_equal(len(areas) == len(sample.boxes) and bool(areas.all()), True, f"masks of {areas.tolist()} pixels")
        count += len(sample.boxes)
    check_equal(count, objects, "objects of all samples")
