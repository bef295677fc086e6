"""Provide the pictures of a split as a `DetectionDataset`."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fpn_ablate.data.shapes import cache
from fpn_ablate.data.shapes.cache import to_sample
from fpn_ablate.data.shapes.render import render
from fpn_ablate.data.shapes.world import HUES, RENDERER, World
from fpn_ablate.structures.batch import Sample
from fpn_ablate.utils import rle, signals


class ShapesDataset:
    """A split of `size` pictures, each rendered at its first use unless the disk's cache holds the split (`cache`)."""

    generated = True
    has_masks = True
    name = "shapes"

    def __init__(self, world: World, split: str, size: int) -> None:
        self.world, self.split, self.size = world, split, size
        self.categories: Sequence[dict[str, Any]] = [{"id": k + 1, "name": hue} for k, hue in enumerate(HUES)]
        self.image_ids = list(range(1, size + 1))
        self.sizes = np.tile(np.array([[world.height, world.width]], np.int64), (size, 1))
        self.area_bounds = (world.bounds[0] ** 2, world.bounds[1] ** 2)
        facts = json.dumps([RENDERER, asdict(world), split, size], sort_keys=True)
        self.digest = self.box_digest = hashlib.sha256(facts.encode()).hexdigest()

    def __len__(self) -> int:
        return self.size

    @cached_property
    def _samples(self) -> dict[int, Sample]:
        """Pictures by position, as far as they are rendered."""
        return self._cached()

    def _cached(self) -> dict[int, Sample]:
        return dict(enumerate(cache.read(self.digest, self.world.height, self.world.width)))

    def __getitem__(self, index: int) -> Sample:
        if index not in self._samples:
            self._samples[index] = render_sample(self.world, self.split, index)
        return self._samples[index]

    def render_all(self, processes: int) -> None:
        """Render all pictures now, so that no training step waits for them, and cache them on the disk."""
        if len(self._samples) < self.size:
            with cache.rendering():
                self._samples.update(self._cached())  # by a process that this one has waited for
                if len(self._samples) < self.size:
                    self._render_missing(processes)
                    cache.write(self.digest, [self[index] for index in range(self.size)])
                    self._samples.update(self._cached())  # shared between processes, unlike those just rendered

    def _render_missing(self, processes: int) -> None:
        """Render what is missing, in several processes; one process renders a picture when it is asked for."""
        missing = [index for index in range(self.size) if index not in self._samples]
        if processes > 1:
            # The processes get positions; their collation step renders.
            loader = DataLoader(
                missing,
                batch_size=None,
                num_workers=min(processes, len(missing)),
                collate_fn=partial(render_sample, self.world, self.split),
                generator=torch.Generator(),  # otherwise the loader draws a number from the global one
                worker_init_fn=signals.outlive_signals,
            )
            self._samples.update(zip(missing, loader, strict=True))

    def coco(self) -> dict[str, Any]:
        """Return COCO instances; `segmentation` and `area` are of visible pixels, as in COCO."""
        return self._ground_truth

    @cached_property
    def _ground_truth(self) -> dict[str, Any]:
        images, annotations = [], []
        for index, image_id in enumerate(self.image_ids):
            images.append(image_entry(self.world, image_id))
            annotations += annotations_of(self[index], len(annotations) + 1)
        return {"images": images, "annotations": annotations, "categories": list(self.categories)}


def render_sample(world: World, split: str, index: int) -> Sample:
    """Render picture `index` of a split as a sample."""
    picture = render(world, split, index)
    return to_sample(index, picture.image, picture.boxes, picture.labels, rle.encode(picture.masks))


def image_entry(world: World, image_id: int) -> dict[str, Any]:
    """Return a picture's entry in `images` of a COCO file."""
    return {"id": image_id, "file_name": f"{image_id:06d}.png", "height": world.height, "width": world.width}


def annotations_of(sample: Sample, first_id: int) -> list[dict[str, Any]]:
    """Return the entries of a picture's objects in `annotations` of a COCO file."""
    size, masks = sample.image.shape[:2], sample.masks or ()
    areas, segmentations = rle.areas(masks, size), rle.coco_objects(masks, size)
    return [
        {
            "id": first_id + i,
            "image_id": sample.image_id,
            "category_id": int(sample.labels[i]),
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "area": float(areas[i]),
            "iscrowd": 0,
            "segmentation": segmentations[i],
        }
        for i, (x0, y0, x1, y1) in enumerate(sample.boxes)
    ]


@lru_cache(maxsize=4)
def load(world: World, train_images: int, val_images: int) -> tuple[ShapesDataset, ShapesDataset]:
    """Return training and validation split, cached in the process: the rows of a sweep render each picture once."""
    return ShapesDataset(world, "train", train_images), ShapesDataset(world, "val", val_images)
