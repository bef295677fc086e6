"""The generated data set: no download, any size, the same bytes for the same seed.

A small world in which finding an object takes meaning, not only contrast. *Things* are discs, squares, diamonds and
triangles in one of three hues, marked with a bar or a post. Whether a thing is an *object* depends on its mark and on its
surroundings: by day (the lanterns in the picture are yellow) things with a bar are objects, by night (they are cyan) those with
a post. All others are distractors, made of the same parts, and in the majority. What tells the time, the lanterns and the
majority's mark, lies farther from most small things than the forty pixels that the early stages of a backbone see.

Sizes: the bounds between small, medium and large are COCO's (32 and 96 px), scaled by the short side over 480, the usual
short side of a COCO image. So "small" means the same share of the picture as it does there.

Export as COCO JSON and PNG: `python -m fpn_ablate.data.shapes --export DIR`.

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
