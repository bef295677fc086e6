"""The generated set as files that any COCO code base reads, and as a sheet of examples."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fpn_ablate.data.shapes.dataset import ShapesDataset, annotations_of, image_entry
from fpn_ablate.data.shapes.render import render
from fpn_ablate.data.shapes.world import World


def export(world: World, sizes: dict[str, int], folder: Path) -> None:
    """Write `annotations/instances_<split>.json` with RLE masks and `<split>/*.png`, readable by any COCO code base."""
    from PIL import Image
    from pycocotools import mask as rle

    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        dataset = ShapesDataset(world, split, size)
        (folder / split).mkdir(exist_ok=True)
        truth: dict[str, Any] = {"images": [], "annotations": [], "categories": list(dataset.categories)}
        for index, image_id in enumerate(dataset.image_ids):
            picture = render(world, split, index)
            entry = image_entry(world, image_id)
            Image.fromarray(picture.image).save(folder / split / entry["file_name"])
            rows = annotations_of(
                image_id, picture.boxes, picture.labels, picture.masks.sum((1, 2)), len(truth["annotations"]) + 1
            )
            for row, mask in zip(rows, picture.masks, strict=True):
                code = rle.encode(np.asfortranarray(mask))
                row["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
            truth["images"].append(entry)
            truth["annotations"] += rows
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))


def contact_sheet(world: World, path: Path, columns: int = 3, rows: int = 1, scale: int = 2) -> None:
    """Examples from the validation split, enlarged, with the boxes of their objects."""
    from PIL import Image, ImageDraw

    gap = 6
    height, width = world.height * scale, world.width * scale
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index in range(columns * rows):
        picture = render(world, "val", index)
        image = Image.fromarray(picture.image).resize((width, height), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(image)
        for box in picture.boxes:
            pen.rectangle([float(edge) * scale for edge in box], outline="white", width=2)
        sheet.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
