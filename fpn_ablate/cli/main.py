"""Choose the command: `python -m fpn_ablate COMMAND ...`; without one, a run or a sweep.

Each command is a module beside this one with `main(arguments, config_dir) -> exit code`. It is imported when it is asked for,
so that neither Hydra nor torch is loaded before the command is known.
"""

import difflib
import io
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path

from fpn_ablate import __version__
from fpn_ablate.utils.console import COMMAND
from fpn_ablate.utils.errors import UserError, printable

COMMANDS = {
    "verify": "show what each row is: anchors, parameters, cost, reach",
    "doctor": "examine a data set before a sweep",
    "report": "make tables, plots and the page from finished runs",
    "pictures": "draw what finished runs detect, side by side",
    "detections": "write the boxes or masks of a finished run in COCO's result format",
    "probe": "show what each feature level of finished runs says about objects",
    "measure": "measure the latency of finished runs again",
    "artifacts": "make the intervals and pictures of finished runs again",
    "weights": "import weights of other programs, and export ours",
    "shapes": "write the generated data set as COCO-format files",
    "replay": "copy finished runs to Weights & Biases",
}
HELP = f"""usage: python -m fpn_ablate [-m] [key=value ...]
       python -m fpn_ablate COMMAND [arguments]

Train one row, or with -m sweep over values that commas separate:
  python -m fpn_ablate ablation=fpn
  python -m fpn_ablate -m ablation=c4,c5,fpn,bottom_up
  python -m fpn_ablate -m +experiments=table1    a table as its file defines it

Commands (COMMAND --help says more):
{chr(10).join(f"  {name:<11} {about}" for name, about in COMMANDS.items())}

Options:
  --config-dir DIR   a folder with rows, parts and tables of your own: DIR/ablation/NAME.yaml
  -m, --multirun     sweep: one run for each combination of values
  --cfg job          print a run's configuration and run nothing
  --hydra-help       list all options of Hydra
  --help, --version"""

# Options of Hydra that take the next word as their value.
_WITH_VALUE = {
    *("--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c", "--info", "-i"),
    "--experimental-rerun",
}
_CONFIG_DIR = ("--config-dir", "-cd")


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line and return its exit code.

    0: done; 1: a row failed, or a check found something; 2: bad input; 130 and 143: interrupted by Ctrl-C or SIGTERM, and the
    same command continues.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of ASCII alone shows \\u2713 for a tick
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ[COMMAND] = f"python -m fpn_ablate {shlex.join(arguments)}".strip()
    command = None
    try:
        _check_working_folder()
        command, rest, config_dir = split_command(arguments)
        if command == "help" or (command is None and {"--help", "-h"} & set(rest)):
            print(HELP)
            return 0
        if command is None and "--version" in rest:
            print(f"fpn_ablate {__version__}")
            return 0
        return import_module(f"fpn_ablate.cli.{command or 'run'}").main(rest, config_dir)
    except (UserError, OSError) as error:
        if command is None and not isinstance(error, UserError):
            raise  # a job's, with HYDRA_FULL_ERROR=1: its traceback was asked for
        print(printable(str(error)), file=sys.stderr)
        return 2


def split_command(arguments: Sequence[str]) -> tuple[str | None, list[str], Path | None]:
    """Split a command line into the command (None: a run), its arguments, and the folder that `--config-dir` names.

    The command is the first word that has no `=` and is no option's value.

    Raises:
        UserError: there is no such command, no such folder, or there are two.
    """
    command, rest, config_dir = None, [], None
    for first, second in pairwise(arguments):
        if "=" in first and first.endswith(",") and not second.startswith("-"):
            raise UserError(f"{first} {second}: write values without spaces: {first}{second}")
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name in _CONFIG_DIR:
            if config_dir:
                raise UserError("--config-dir is given twice; put what both folders hold into one")
            config_dir = _folder(value if equals else next(remaining, ""))
        elif command is None and argument in _WITH_VALUE:
            rest += [argument, *islice(remaining, 1)]
        elif command is None and not argument.startswith(("-", "~")) and not equals:
            command = _command(argument)
        else:
            rest.append(argument)
    return command, rest, config_dir


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the current folder cannot be read ({error.strerror}); cd to one that exists") from None


def _command(name: str) -> str:
    if name in (*COMMANDS, "help"):
        return name
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"{name}: there is no such command.{hint} Commands: {', '.join(COMMANDS)}; a setting is given as key=value")


def _folder(name: str) -> Path:
    if "=" in name and not Path(name).exists():
        raise UserError(f"--config-dir: no folder is named in front of {name}; write --config-dir FOLDER {name}")
    if not name or not Path(name).is_dir():
        raise UserError(f"--config-dir {name or '(nothing)'}: no such folder; give one with your own ablation/NAME.yaml")
    return Path(name).resolve()
