"""Overrides that several test files share."""

ROWS = ("c4", "c5", "fpn", "bottom_up", "no_lateral", "finest")  # of Table 1
JOINT = ("task=faster_rcnn", "task.training=joint")
# A backbone that needs no pre-training; every part of it is trained.
SCRATCH = ("backbone.weights=none", "backbone.freeze_at=0", "backbone.frozen_bn=false")
# The shortest training that there is: two steps of two images.
TINY = (
    "recipe=smoke",
    *SCRATCH,
    *("recipe.steps=2", "recipe.batch_size=2", "recipe.eval_images=2", "data.train_images=2", "device=cpu", "jobs=1"),
)
# Four steps, with a checkpoint after the second.
SHORT = (
    *TINY,
    *("recipe.steps=4", "recipe.roi.steps=4", "recipe.checkpoint_every=2", "recipe.eval_images=3", "data.train_images=4"),
    *("rpn.samples=16", "log.every=1"),
)
