#!/usr/bin/env python
"""Rehearse COCO's size without its pictures: measure indexing, ordering, loading and evaluation on this machine.

    python scripts/benchmarks/rehearse_coco.py [--folder DIR] [--out FILE] [--only STEP ...] [--pycocotools N]

Writes a data set with COCO 2017's numbers of images, objects and categories, an annotation file as large as COCO's, and a few
plain pictures that are hard-linked under 123,287 names. Then runs each step in a process of its own and prints its figures. The
set lies in a temporary folder (0.5 GB), removed at the end; --folder names one to keep and reuse.

Nothing is trained, and the boxes are random, so AP and AR mean nothing here. The pictures are smooth and decode faster than
photographs; scripts/benchmarks/loader_rate.py measures photographs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fpn_ablate.config.schema import Coco, Split
from fpn_ablate.data.coco import CocoDataset, load
from fpn_ablate.data.loader import step_batches, training_batches
from fpn_ablate.data.transforms import Resize, prepare
from fpn_ablate.engine.cost import peak_memory_mib
from fpn_ablate.evaluation.bootstrap import FEW_REPLICATES, bootstrap_indices, bootstrap_metrics
from fpn_ablate.evaluation.coco import DetectionSet, Engine, average_precision, average_recall, evaluator_name
from fpn_ablate.report.collate import records
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.runs.environment import machine
from fpn_ablate.structures.masks import paste
from fpn_ablate.utils.blocks import fill_blocks
from fpn_ablate.utils.files import save_text

CPU = torch.device("cpu")
IMAGES = {"train2017": 118_287, "val2017": 5_000}
OBJECTS = {"train2017": 860_001, "val2017": 36_781}
CATEGORY_IDS = [k for k in range(1, 91) if k not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
# (height, width) -> share of the images, about as in 100 images of val2014; (least, greatest) side -> share of the objects.
SIZES = {(480, 640): 0.38, (427, 640): 0.32, (640, 480): 0.1, (640, 427): 0.1, (375, 500): 0.06, (500, 375): 0.04}
SIDES = {(4, 32): 0.41, (32, 96): 0.34, (96, 400): 0.25}
CROWDS = 0.012
LINKS = 50_000  # hard links to one file; ext4 allows 65,000
BLOCK = "rehearsal"  # of a README
LEDGER = Path(__file__).parents[2] / "results" / "reference" / "ledger.csv"


# The set


def write_set(folder: Path, scale: float) -> None:
    """Write both splits below `folder`, with `scale` times COCO's images and objects. An existing split is kept."""
    for number, split in enumerate(IMAGES):
        file = folder / "annotations" / f"instances_{split}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(number)
            images, objects = (max(1, round(scale * count[split])) for count in (IMAGES, OBJECTS))
            ids = np.sort(rng.choice(600_000, images, replace=False)) + 1
            sizes = np.array(list(SIZES))[rng.choice(len(SIZES), images, p=list(SIZES.values()))]
            _write_pictures(folder / split, ids, sizes)
            with file.open("w") as stream:
                stream.writelines(_instances(ids, sizes, objects, rng))


def _write_pictures(folder: Path, ids: np.ndarray, sizes: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for height, width in SIZES:
        ids_of_size = ids[(sizes == (height, width)).all(axis=1)].tolist()
        for first in range(0, len(ids_of_size), LINKS):
            source, *links = (folder / f"{key:012}.jpg" for key in ids_of_size[first : first + LINKS])
            grey = Image.linear_gradient("L").resize((width, height))
            Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180))).save(source, quality=60)
            for link in links:
                os.link(source, link)


def _instances(ids: np.ndarray, sizes: np.ndarray, objects: int, rng: np.random.Generator) -> Iterator[str]:
    """Yield the annotation file in pieces. Each object has a polygon, since polygons are most of COCO's bytes."""
    yield '{"info": {}, "images": ['
    rows = zip(ids.tolist(), sizes.tolist(), strict=True)
    yield ", ".join(f'{{"id": {k}, "file_name": "{k:012}.jpg", "height": {h}, "width": {w}}}' for k, (h, w) in rows)
    names = ", ".join(f'{{"id": {key}, "name": "category {key}", "supercategory": "any"}}' for key in CATEGORY_IDS)
    yield f'], "categories": [{names}], "annotations": [\n'
    crowds = rng.random(objects) < CROWDS
    # A few images have many objects, and a few categories have most objects.
    image = np.sort(rng.choice(len(ids), objects, p=_shares(rng.gamma(0.8, size=len(ids)))))
    category = rng.choice(CATEGORY_IDS, objects, p=_shares(1 / np.arange(2, len(CATEGORY_IDS) + 2)))
    x, y, w, h = _boxes(sizes[image], rng).T
    h[: 2 * (objects > 10_000)] = 0  # as two boxes of train2017 have
    outlines = [_outline(rng) for _ in range(100)]
    columns = (ids[image], category, x, y, w, h, np.round(w * h * 0.6, 3), crowds.astype(int))
    for n, (key, kind, *box, area, crowd) in enumerate(zip(*(column.tolist() for column in columns), strict=True), start=1):
        polygon = (outlines[n % 100] * box[2:] + box[:2]).round(2).ravel().tolist()
        yield (
            f'{"," if n > 1 else ""}{{"segmentation": [{polygon}], "area": {area}, "iscrowd": {crowd}, '
            f'"image_id": {key}, "bbox": {box}, "category_id": {kind}, "id": {n}}}\n'
        )
    yield "]}"


def _outline(rng: np.random.Generator) -> np.ndarray:
    """Draw a star-shaped outline of 23 points, as many as a polygon of COCO has, that fills 0..1 x 0..1: (23, 2)."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 23))
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.6, 1, (23, 1))
    return (points - points.min(0)) / np.ptp(points, axis=0)


def _shares(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def _boxes(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw boxes (M, 4) as x, y, width, height within images of `sizes` (M, 2), with COCO's mix of sides."""
    low, high = np.array(list(SIDES))[rng.choice(len(SIDES), len(sizes), p=list(SIDES.values()))].T
    side = low * (high / low) ** rng.random(len(sizes))
    stretch = np.exp(rng.normal(0, 0.3, len(sizes)))
    extent = np.minimum(np.stack([side * stretch, side / stretch], axis=1), sizes[:, ::-1] - 1)
    corner = rng.random((len(sizes), 2)) * (sizes[:, ::-1] - extent)
    return np.round(np.concatenate([corner, extent], axis=1), 2)


def _detections(data: CocoDataset, each: int, labels: bool) -> DetectionSet:
    """Draw `each` boxes an image: half of them near its objects, half anywhere."""
    rng = np.random.default_rng(each)
    images = len(data)
    boxes = _boxes(np.repeat(data.sizes, each, axis=0), rng).reshape(images, each, 4)
    kinds = rng.integers(1, len(data.categories) + 1, (images, each))
    position = {key: n for n, key in enumerate(data.image_ids)}
    objects_of: dict[int, list[tuple[list[float], int]]] = {}
    for annotation in data.coco()["annotations"]:
        objects_of.setdefault(position[annotation["image_id"]], []).append(
            (annotation["bbox"], data.label_of[annotation["category_id"]])
        )
    for n, objects in objects_of.items():
        object_boxes, label = np.array([box for box, _ in objects]), np.array([label for _, label in objects])
        chosen = rng.integers(0, len(objects), each // 2)
        shift = object_boxes[chosen][:, [2, 3, 2, 3]] * rng.normal(0, 0.15, (each // 2, 4))
        boxes[n, : each // 2] = np.maximum(object_boxes[chosen] + shift, [0, 0, 1, 1])
        kinds[n, : each // 2] = label[chosen]
    boxes = boxes.reshape(-1, 4).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    scores = rng.random(len(boxes), dtype=np.float32)
    ids = np.repeat(np.array(data.image_ids, np.int64), each)
    return DetectionSet(ids, boxes, scores, kinds.reshape(-1) if labels else None)


# The steps


class Clock:
    """Collect named seconds and other figures of a step."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.figures[f"{name} (s)"] = round(time.perf_counter() - began, 2)

    @contextmanager
    def processor(self, name: str) -> Iterator[None]:
        """Count processor seconds: wall times differ by the load of the machine."""
        began = time.process_time()
        yield
        self.figures[f"{name} (processor s)"] = round(time.process_time() - began, 1)


def _splits(folder: Path) -> Coco:
    train, val = (Split(annotations=f"annotations/instances_{split}.json", images=split) for split in IMAGES)
    settings = {"label": "rehearsal", "root": str(folder), "invalid": "drop", "keep_empty": True}
    return Coco(name="coco", train=train, val=val, **settings)


def _val(folder: Path, masks: bool = False) -> CocoDataset:
    settings = {"invalid": "drop", "masks": masks}
    return CocoDataset(folder / _splits(folder).val.annotations, folder / "val2017", "rehearsal", **settings)


def index(folder: Path, clock: Clock, options: argparse.Namespace) -> None:
    """Index both splits with all checks that precede a training."""
    with clock("both splits"):
        train, val = load(_splits(folder))
    clock.figures |= {"images": len(train) + len(val), "repaired": train.repairs | val.repairs}


def index_masks(folder: Path, clock: Clock, options: argparse.Namespace) -> None:
    """Index both splits with masks."""
    with clock("both splits"):
        splits = load(_splits(folder), masks=True)
    masks = [mask for split in splits for mask in split._table.masks]
    clock.figures |= {"masks": len(masks), "their run lengths (MB)": round(sum(map(len, masks)) / 1e6)}
    clock.figures["repaired"] = splits[0].repairs | splits[1].repairs


def order(folder: Path, clock: Clock, options: argparse.Namespace) -> None:
    """Draw the images of 40,000 steps of 16, and the first step of a run resumed near the end."""
    size = round(options.scale * IMAGES["train2017"])
    aspects = np.random.default_rng(0).uniform(0.5, 2, size)
    for name, order_by in (("plain", None), ("by aspect", aspects)):
        with clock(f"40,000 steps, {name}"):
            count = sum(1 for _ in step_batches(size, 16, range(40_000), 0, True, 1, order_by))
        assert count == 40_000
        with clock(f"resumed at 39,000, {name}"):
            next(step_batches(size, 16, range(39_000, 40_000), 0, True, 1, order_by))


def loading(folder: Path, clock: Clock, options: argparse.Namespace) -> None:
    """Load images as training does, at 800 / 1333 px and grouped by aspect, without the first batches."""
    data = _val(folder)
    for workers in (0, 2):
        settings = {"resize": Resize(800, 1333), "batch_size": 4, "workers": workers}
        batches = training_batches(data, **settings, steps=range(154), seed=0, flip=True, group_by_aspect=True)
        list(islice(batches, 4))
        began = time.perf_counter()
        count = sum(len(batch.image_ids) for batch in batches)
        clock.figures[f"images a second, {workers} workers"] = round(count / (time.perf_counter() - began), 1)


def precision(folder: Path, clock: Clock, options: argparse.Namespace) -> None:
    """Evaluate 100 detections an image."""
    data = _val(folder)
    truth, detections = data.coco(), _detections(data, 100, labels=True)
    with clock("AP"):
        metrics, _ = average_precision(truth, detections, data.categories)
    with clock("AR@100"):
        average_recall(truth, detections, limits=(100,))
    clock.figures |= {"boxes": len(detections.scores), "AP of random boxes": round(metrics["AP"], 3)}


def recall(folder: Path, clock: Clock, options: argparse.Namespace) -> None:
    """Evaluate 1,000 proposals an image."""
    data = _val(folder)
    truth, proposals = data.coco(), _detections(data, 1000, labels=False)
    with clock("AR@100 and AR@1k"):
        metrics = average_recall(truth, proposals)
    clock.figures |= {"boxes": len(proposals.scores), "AR@1k of random boxes": round(metrics["AR1k"], 3)}


def rasterise(folder: Path, clock: Clock, options: argparse.Namespace) -> None:
    """Rasterise the masks of 128 regions an image at 28 x 28, as the mask branch is trained on at most."""
    data, rng = _val(folder, masks=True), np.random.default_rng(0)
    items = (prepare(data[n], Resize(800, 1333), flip=True) for n in range(min(200, len(data))))
    images = [(item.masks, item.boxes) for item in items if len(item.boxes)]
    with clock.processor(f"{len(images)} images"):
        for masks, boxes in images:
            objects = torch.from_numpy(rng.integers(0, len(boxes), 128))
            masks.crop(objects, boxes[objects], 28)


def mask_precision(folder: Path, clock: Clock, options: argparse.Namespace) -> None:
    """Paste and evaluate 100 masks an image."""
    data = _val(folder, masks=True)
    truth, detections = data.coco(), _detections(data, 100, labels=True)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    grid = torch.linspace(-1, 1, 28)
    disc = (1.2 - (grid**2 + grid[:, None] ** 2).sqrt()).expand(100, -1, -1)
    masks: list[bytes] = []
    with clock.processor("paste"):
        for first in range(0, len(detections.scores), 100):
            boxes = torch.from_numpy(detections.boxes[first : first + 100])
            masks += paste(disc, boxes, sizes[int(detections.image_ids[first])])
    detections = replace(detections, masks=masks)
    with clock.processor("AP of masks"):
        metrics, _ = average_precision(truth, detections, data.categories, by="segm")
    with clock.processor("AR@100 of masks"):
        average_recall(truth, replace(detections, labels=None), limits=(100,))
    clock.figures |= {"masks": len(masks), "mask_AP of random boxes": round(metrics["AP"], 3)}


def replicates(folder: Path, clock: Clock, options: argparse.Namespace) -> None:
    """Bootstrap the images of one run with detections: 2 and 12 replicates of the 100 that a run makes."""
    data = _val(folder)
    truth, detections = data.coco(), _detections(data, 100, labels=True)
    for count in (2, 12):
        indices = bootstrap_indices(len(data), np.random.default_rng(0), count)
        with clock.processor(f"{count} replicates"):
            bootstrap_metrics(truth, detections, data.categories, data.area_bounds, indices)
    two, twelve = clock.figures.values()
    total = twelve + (FEW_REPLICATES - 12) * (twelve - two) / 10
    clock.figures[f"{FEW_REPLICATES} replicates, EXTRAPOLATED (processor s)"] = round(total)


def tables(folder: Path, clock: Clock, options: argparse.Namespace) -> None:
    """Collate records and replicates of finished runs into the README's tables, whose size does not grow with the images."""
    with clock("read"):
        frame = records.load(LEDGER)
    with clock("tables"):
        collated = collate(frame)
    clock.figures |= {"records": len(frame), "tables made": len(collated)}


def _evaluator_step(engine: Engine, name: str) -> Callable[[Path, Clock, argparse.Namespace], None]:
    """Return a step that evaluates with one of COCO's evaluators, on the first N images."""

    def step(folder: Path, clock: Clock, options: argparse.Namespace) -> None:
        data = _val(folder)
        count = min(options.pycocotools, len(data))
        image_ids = set(data.image_ids[:count])
        truth = data.coco()
        truth["images"] = truth["images"][:count]
        truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in image_ids]
        # Boxes of images that `truth` does not have are ignored.
        detections, proposals = _detections(data, 100, labels=True), _detections(data, 1000, labels=False)
        with clock(f"AP, {count} x 100"):
            metrics, _ = average_precision(truth, detections, data.categories, engine=engine)
        with clock(f"AR, {count} x 1,000"):
            metrics |= average_recall(truth, proposals, engine=engine)
        ours = average_precision(truth, detections, data.categories)[0] | average_recall(truth, proposals)
        assert [name for name in ours if ours[name] is None] == [name for name in metrics if metrics[name] is None]
        clock.figures["greatest difference from ours"] = max(abs(ours[k] - v) for k, v in metrics.items() if v is not None)

    step.__name__, step.__doc__ = name, f"Evaluate 100 detections and 1,000 proposals an image with {engine}, on N images."
    return step


STEPS: dict[str, Callable[[Path, Clock, argparse.Namespace], None]] = {
    step.__name__: step
    for step in (
        *(index, index_masks, order, loading, rasterise, precision, recall, mask_precision, replicates, tables),
        *(_evaluator_step("faster-coco-eval", "faster_coco_eval"), _evaluator_step("pycocotools", "pycocotools")),
    )
}
COMPARED = ("faster_coco_eval", "pycocotools")  # only with --pycocotools


# The command


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.step:
        print(json.dumps(_measure(options)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = (options.folder or Path(temporary)).resolve()
        began = time.perf_counter()
        write_set(options.folder, options.scale)
        bytes_ = sum(file.stat().st_size for file in (options.folder / "annotations").iterdir())
        print(f"set at {options.folder}: {time.perf_counter() - began:.0f} s, annotations {bytes_ / 1e6:.0f} MB", flush=True)
        steps = options.only or [step for step in STEPS if step not in COMPARED or options.pycocotools]
        results = {
            "machine": {**machine(CPU), "evaluator": evaluator_name()},
            "scale": options.scale,
            "steps": {step: _run_step(step, options) for step in steps},
        }
    print(json.dumps(results["machine"]))
    if options.out:
        save_text(options.out, json.dumps(results, indent=1) + "\n")
    if options.readme:
        text = fill_blocks(options.readme.read_text(encoding="utf-8"), BLOCK, lambda _: markdown(results))
        save_text(options.readme, text)
    return int(any("failed" in figures for figures in results["steps"].values()))


def markdown(results: dict[str, Any]) -> str:
    """Format the results of --out as a table for a README."""
    lines = ["| step | wall (s) | processor (s) | peak memory (GiB) | |", "| --- | ---: | ---: | ---: | --- |"]
    general = (
        "whole step (s)",
        "processor time of it (s)",
        "peak memory (GiB)",
        "of it imports (GiB)",
        "load of the machine before",
    )
    for step, figures in results["steps"].items():
        title = (STEPS[step].__doc__ or "").splitlines()[0].rstrip(".")
        details = "; ".join(f"{name}: {value}" for name, value in figures.items() if name not in general)
        lines.append(" | ".join(["| " + title, *(str(figures.get(name, "")) for name in general[:3]), details + " |"]))
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join(lines) + f"\n\nMachine: {machine}.\n"


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    clock, imports = Clock(), _gibibytes()
    began, worked = time.perf_counter(), time.process_time()
    STEPS[options.step](options.folder, clock, options)
    return clock.figures | {
        "whole step (s)": round(time.perf_counter() - began, 1),
        "processor time of it (s)": round(time.process_time() - worked, 1),
        "peak memory (GiB)": _gibibytes(),
        "of it imports (GiB)": imports,
        "load of the machine before": options.load,
    }


def _gibibytes() -> float:
    return round(peak_memory_mib(CPU) / 1024, 2)


def _run_step(step: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a step in a process of its own, so that its peak memory is measured alone."""
    command = [sys.executable, __file__, "--step", step, "--folder", str(options.folder), "--scale", str(options.scale)]
    command += ["--pycocotools", str(options.pycocotools), "--load", str(round(os.getloadavg()[0], 1))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        figures = {"failed": f"code {done.returncode}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}"}
    else:
        figures = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{step}: {(STEPS[step].__doc__ or '').strip()}", flush=True)
    for name, value in figures.items():
        print(f"  {name:45} {value}", flush=True)
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python scripts/benchmarks/rehearse_coco.py", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="write the set here, keep and reuse it (default: a temporary folder)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="update the block '<!-- rehearsal -->' of this file")
    parser.add_argument("--only", choices=STEPS, nargs="+", metavar="STEP", help=f"steps to run, of {', '.join(STEPS)}")
    parser.add_argument(
        "--pycocotools", type=int, default=0, metavar="N", help="also run COCO's evaluators, on N images (5000: 20 min)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of COCO's images, for a trial")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=float, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
