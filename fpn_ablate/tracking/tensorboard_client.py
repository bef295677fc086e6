"""Write a run's metrics for TensorBoard: `log=tensorboard`, then `tensorboard --logdir results/runs`."""

import sys
from importlib.util import find_spec
from pathlib import Path

from fpn_ablate.tracking.loggers import RATE
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.utils.files import refuse_links_out

FOLDER = "tensorboard"  # in the folder of a run: TensorBoard names its curves table/recipe/row/seed


def require_tensorboard() -> None:
    """Check that the package is installed, without importing it.

    Raises:
        UserError: it says how to install it.
    """
    if find_spec("tensorboard") is None:
        raise UserError('log=tensorboard needs a package: pip install "fpn-ablate[tensorboard]", or pip install tensorboard')


class TensorBoard:
    """A logger. A failure ends the curves with one line of output, not the run."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        """Begin or continue the events of a run; those after step `resumed_at` are dropped."""
        self._writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            refuse_links_out(folder, folder / FOLDER)
            self._writer = SummaryWriter(str(folder / FOLDER), purge_step=resumed_at + 1 if resumed_at else None)
        except Exception as error:
            self._give_up(error)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log training values under train/, those of the evaluation under evaluation/."""
        if self._writer:
            kind = "train" if RATE in values else "evaluation"
            try:
                for name, value in values.items():
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        if self._writer:
            try:
                self._writer.close()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        log_line(f"warning: no curves for TensorBoard ({type(error).__name__}: {first_line(error)})", sys.stderr)
