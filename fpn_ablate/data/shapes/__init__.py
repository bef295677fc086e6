"""The generated data set: no download, any size, the same bytes for the same seed.

A small world in which finding an object takes meaning, not only contrast. *Things* are discs, squares, diamonds and
triangles in one of three hues, with one of three marks on them. Whether a thing is an *object* depends on how its parts are
combined and on its surroundings: by day (the lanterns in the picture are yellow) a hue goes with the mark of its own number,
by night (they are cyan) with the next one. A distractor is a thing that would be an object at the other time. What tells the
time, the lanterns and the majority of the things, takes a wide view: the early stages of a backbone see some forty pixels.

Sizes: the bounds between small, medium and large are COCO's (32 and 96 px), scaled by the short side over 480, the usual
short side of a COCO image. So "small" means the same share of the picture as it does there.

Export as COCO JSON and PNG: `python -m fpn_ablate shapes --export DIR`.

world.py says what a picture holds, draw.py paints it, dataset.py hands it out, export.py writes it for others.
"""

from fpn_ablate.data.shapes.dataset import ShapesDataset, load, size_counts
from fpn_ablate.data.shapes.render import NUM_KINDS, Picture, classification_picture, render
from fpn_ablate.data.shapes.world import HUES, MARKS, NUM_CLASSES, RENDERER, Thing, World, compose

__all__ = [
    "HUES",
    "MARKS",
    "NUM_CLASSES",
    "NUM_KINDS",
    "RENDERER",
    "Picture",
    "ShapesDataset",
    "Thing",
    "World",
    "classification_picture",
    "compose",
    "load",
    "render",
    "size_counts",
]
