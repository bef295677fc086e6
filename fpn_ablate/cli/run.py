"""Run one cell, or with `-m` a sweep: hand the arguments to Hydra once they are checked."""

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra

from fpn_ablate.config.overrides import check_files, normalise, refuse_sweeps
from fpn_ablate.sweep.jobs import run_job
from fpn_ablate.sweep.plugin import register
from fpn_ablate.sweep.publish import publish_other_sweeps, unpublished
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_words
from fpn_ablate.utils.paths import CONF
from fpn_ablate.utils.world import launched_rank


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Run the job or the sweep; see `cli.main.main` for exit codes.

    Raises:
        UserError: a key or a value does not exist.
    """
    launched = launched_rank()
    if launched is None:
        return _run(arguments, config_dir)
    # The first process reads the command, and the others follow it. Both modules take seconds to import.
    if launched.rank:
        from fpn_ablate.runs.follow import follow

        return follow()
    given = any(argument.startswith("gpus=") for argument in arguments)
    try:
        return _run([*arguments, *([] if given else [f"gpus={launched.size}"])], config_dir)
    finally:
        from fpn_ablate.runs.ranks import dismiss

        dismiss()


def _run(arguments: Sequence[str], config_dir: Path | None) -> int:
    folder = ["--config-dir", str(config_dir)] if config_dir else []
    overrides = normalise(arguments)
    check_files(overrides, config_dir)
    if not {"-m", "--multirun"} & set(arguments):
        refuse_sweeps(overrides)
    sys.argv[1:] = [*overrides, *folder]
    if "-sc" in arguments or "--shell-completion" in arguments:
        sys.argv[0] = "fpn-ablate"  # Hydra's completion is for a command of one word
    register()
    unpublished.clear()
    try:
        with signals.handling_signals(), signals.reraise_as_stopped():
            try:
                hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(run_job)()
            finally:
                publish_other_sweeps()
    except KeyboardInterrupt as stop:
        text = "interrupted; the same command continues, each unfinished run from its last checkpoint"
        log_words(text, stream=sys.stderr)
        return getattr(stop, "code", 130)
    return int(bool(unpublished))  # rows are finished; the same command, or `report`, makes their tables
