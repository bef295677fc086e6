#!/usr/bin/env python
"""Measure how many photographs a second the loader delivers, where the time goes, and whether that feeds a training.

    python scripts/benchmarks/loader_rate.py ANNOTATIONS IMAGES [--workers 0 1 2] [--sides 800 1333] [--need 36] [--out FILE]

Any COCO-format set of photographs will do; a hundred JPEGs are enough. The stages are timed on one thread, as a worker has one.
Two JPEG decoders, Pillow's and torchvision's on the CPU, are timed from memory, and their pixels are compared. (torchvision
deprecates its decoder from 0.29 on, in favour of torchcodec. Decoding on a GPU is not measured.)
"""

import argparse
import io
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image

from fpn_ablate.data.coco import CocoDataset
from fpn_ablate.data.loader import training_batches
from fpn_ablate.data.transforms import Resize, collate, prepare
from fpn_ablate.runs.environment import device_name
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text

# The paper trained 40,000 and 80,000 steps of 16 images in 8 and 10 hours on 8 GPUs (Sec. 5.1, 5.2): 22 and 36 images a second.
NEED = 36.0


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # as in a worker
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torchvision")
    try:
        data = CocoDataset(options.annotations, options.images, options.images.name, invalid="clip")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    resize = Resize(*options.sides)
    figures: dict[str, Any] = {
        "machine": f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before",
        "versions": f"Pillow {PIL.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}",
        "images": len(data),
        "megapixels each": round(float(data.sizes.prod(axis=1).mean()) / 1e6, 3),
        "sides": options.sides,
    }
    figures |= _stages(data, [options.images / image["file_name"] for image in data.coco()["images"]], resize)
    for workers in options.workers:
        figures[f"images a second, {workers} workers"] = round(_rate(data, workers, resize, options.seconds), 1)
    best = max(value for name, value in figures.items() if name.startswith("images a second"))
    figures["needed"] = options.need
    figures["workers for it, by the stages"] = int(-(-options.need * figures["all of an image (ms)"] // 1000))
    for name, value in figures.items():
        print(f"{name:50} {value}")
    print(f"{'enough' if best >= options.need else 'NOT enough'}: {best} images a second of {options.need:g}")
    if options.out:
        save_text(options.out, json.dumps(figures, indent=1) + "\n")
    return 0


def _stages(data: CocoDataset, files: list[Path], resize: Resize) -> dict[str, Any]:
    """Measure the median milliseconds an image of each stage, and compare both decoders where all files are JPEGs."""
    samples = [data[n] for n in range(len(data))]
    contents = [file.read_bytes() for file in files]
    figures = {
        "file and pixels (ms)": _median(data.__getitem__, range(len(data))),
        "resize, flip (ms)": _median(lambda sample: prepare(sample, resize, flip=True), samples),
        "collate (ms)": _median(lambda items: collate(items), [[prepare(s, resize, flip=False)] for s in samples[:20]]),
    }
    figures["all of an image (ms)"] = round(sum(figures.values()), 2)
    if all(content.startswith(b"\xff\xd8") for content in contents) and hasattr(torchvision.io, "decode_jpeg"):
        pillow_ms, torchvision_ms = _median(_pillow, contents), _median(_torchvision, contents)
        differences = [np.abs(_pillow(c).astype(int) - _torchvision(c).astype(int)) for c in contents]
        figures |= {
            "decoding alone, Pillow (ms)": pillow_ms,
            "decoding alone, torchvision on the CPU (ms)": torchvision_ms,
            "torchvision is faster by": round(pillow_ms / torchvision_ms, 2),
            "greatest difference of a pixel value": max(int(difference.max()) for difference in differences),
            "pixel values that differ (%)": round(100 * float(np.mean([(d > 0).mean() for d in differences])), 3),
        }
    return figures


def _median(function: Callable[[Any], object], inputs: Sequence[Any], repeats: int = 3) -> float:
    """Return the milliseconds a call: the mean over the inputs, the median over the repeats."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for item in inputs:
            function(item)
        times.append(1000 * (time.perf_counter() - began) / len(inputs))
    return round(statistics.median(times), 2)


def _pillow(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def _torchvision(content: bytes) -> np.ndarray:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _rate(data: CocoDataset, workers: int, resize: Resize, seconds: float) -> float:
    """Return the images a second over about `seconds`, measured once all workers deliver."""
    batches = training_batches(
        data, resize=resize, batch_size=4, steps=range(10**6), seed=0, flip=True, workers=workers, group_by_aspect=True
    )
    list(islice(batches, 2 + 4 * workers))
    count, began = 0, time.perf_counter()
    for batch in batches:
        count += len(batch.image_ids)
        if (passed := time.perf_counter() - began) > seconds:
            break
    return count / passed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python scripts/benchmarks/loader_rate.py", description=__doc__.splitlines()[0])
    parser.add_argument("annotations", type=Path, help="instances JSON file")
    parser.add_argument("images", type=Path, help="folder of the photographs")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--sides", type=int, nargs=2, default=[800, 1333], metavar=("SHORT", "MAX"), help="default: 800 1333")
    parser.add_argument(
        "--need", type=float, default=NEED, help="images a second that the training consumes (default: the paper's 36)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="per number of workers (default: 10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
