"""Generate the built-in data set: no download, any size, the same bytes for the same seed.

Detecting an object in this world takes context, not only contrast. *Things* are discs, squares, diamonds and triangles in one
of three hues, each with one of three marks. A thing is an *object* if hue and mark match the time of day: by day (the lanterns
in the picture are yellow) hue n goes with mark n, by night (they are cyan) with the next mark. A distractor is a thing that
would be an object at the other time. Only the lanterns and the majority of the things show the time, and they take a wide view:
the early stages of a backbone see about forty pixels.

Sizes: the bounds between small, medium and large are COCO's (32 and 96 px), scaled by the short side over 480, the usual short
side of a COCO image. So "small" means the same share of the picture as in COCO.

Export as COCO JSON and PNG: `python -m fpn_ablate shapes --export DIR`.

world.py decides what a picture contains, draw.py paints it, render.py does both, dataset.py provides the splits, export.py
writes them to files.
"""

from fpn_ablate.data.shapes.dataset import ShapesDataset, load
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
]
