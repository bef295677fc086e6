"""Our launcher for Ray where Hydra looks for plugins; see fpn_ablate_sweeper.py beside it."""

from fpn_ablate.sweep import ray


class RayLauncher(ray.RayLauncher):
    """A subclass, since Hydra registers a class under the module that defines it."""
