"""Our sweeper for Optuna where Hydra looks for plugins; see fpn_ablate_sweeper.py beside it."""

from fpn_ablate.sweep import optuna


class OptunaSweeper(optuna.OptunaSweeper):
    """A subclass, since Hydra registers a class under the module that defines it."""
