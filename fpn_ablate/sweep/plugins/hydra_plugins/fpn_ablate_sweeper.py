"""Our sweeper where Hydra looks for plugins. Only the sweep's own process has this folder on its path: no job imports it."""

from fpn_ablate.sweep import sweeper


class TableSweeper(sweeper.TableSweeper):
    """A subclass, since Hydra registers a class under the module that defines it."""
