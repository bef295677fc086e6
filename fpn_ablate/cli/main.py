"""Choose the command: `python -m fpn_ablate COMMAND ...`; without one, a run or a sweep.

Each command is a module beside this one with `main(arguments, config_dir) -> exit code`. It is imported when it is asked for,
so that neither Hydra nor torch is loaded before the command is known.
"""

import difflib
import io
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path

from fpn_ablate import __version__
from fpn_ablate.cli import help_text
from fpn_ablate.utils.console import COMMAND
from fpn_ablate.utils.errors import UserError, printable
from fpn_ablate.utils.paths import CONF, EXPERIMENTS, short_name

COMMANDS = {
    "verify": "show what each row is: anchors, parameters, cost, maps it reads",
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
    "new": "write a neck, backbone or head of your own to begin with",
    "clean": "remove leftovers, unfinished runs and caches",
}

# Options of Hydra: those that take the next word as their value, and the others.
_WITH_VALUE = {
    *("--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c", "--info", "-i"),
    "--experimental-rerun",
}
_FLAGS = {
    *("--help", "-h", "--version", "--hydra-help", "--run", "-r", "--multirun", "-m", "--resolve"),
    *("--shell-completion", "-sc"),
}
_CONFIG_DIR = ("--config-dir", "-cd")
_HELP = ("--help", "-h", "help")


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
        if len(arguments) == 2 and arguments[0] in _HELP:
            return _help_on(arguments[1])
        command, rest, config_dir = split_command(arguments)
        if command == "help" or (command is None and {"--help", "-h"} & set(rest)):
            print(help_text.short(COMMANDS))
            return 0
        if command is None and "--version" in rest:
            print(f"fpn_ablate {__version__}, torch {version('torch')}, Python {platform.python_version()}")
            return 0
        return import_module(f"fpn_ablate.cli.{command or 'run'}").main(rest, config_dir)
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:  # a run and a sweep save first, and end by themselves
        return 130
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
    _refuse_spaces(arguments)
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
        elif command is None and argument.startswith("-") and name not in (*_WITH_VALUE, *_FLAGS):
            setting = argument.lstrip("-") if equals else f"{name.lstrip('-')}=VALUE"
            near = difflib.get_close_matches(name, (*_CONFIG_DIR, *_WITH_VALUE, *_FLAGS), n=1, cutoff=0.85)
            hint = f"did you mean {near[0]}?" if near else f"a setting has no dashes: {setting}"
            raise UserError(f"{argument}: there is no such option; {hint}")
        else:
            rest.append(argument)
    return command, rest, config_dir


def _refuse_spaces(arguments: Sequence[str]) -> None:
    """Refuse KEY = VALUE, whose parts would be taken for commands. What follows a command, or an option, is its own."""
    for n, word in enumerate(arguments):
        before, behind = arguments[n - 1] if n else "-", arguments[n + 1] if n + 1 < len(arguments) else "-"
        if word in COMMANDS:
            return
        if word.startswith("-") or before in (*_WITH_VALUE, *_CONFIG_DIR):
            continue
        (key, equals, value), setting = word.partition("="), None
        if word.startswith("=") and not before.startswith("-"):
            setting = f"{before}{word}{behind if word == '=' else ''}"
        elif equals and not value and "=" not in behind and not behind.startswith("-") and behind not in COMMANDS:
            setting = f"{word}{behind}"
        elif equals and key != key.strip():
            setting = f"{key.strip()}={value.strip()}"
        if setting:
            raise UserError(f"write KEY=VALUE without spaces: {setting}")


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the current folder cannot be read ({error.strerror}); cd to one that exists") from None


def _help_on(name: str) -> int:
    """Print the help on a topic or a command."""
    if name in (*help_text.TOPICS, *help_text.GROUPS):
        print(help_text.topic(name))
        return 0
    if name in COMMANDS:
        return import_module(f"fpn_ablate.cli.{name}").main(["--help"], None)
    if text := help_text.choice(*name.partition("=")[::2]):
        print(text)
        return 0
    choices = (f"{group}={entry}" for group in help_text.GROUPS for entry in help_text.names(CONF / group))
    listed = {"ablation": ["rows"], "experiments": ["tables"]}.get(name.lstrip("+").partition("=")[0])
    near = listed or difflib.get_close_matches(name, (*COMMANDS, *help_text.TOPICS, *choices), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    topics = ", ".join((*help_text.TOPICS, *help_text.GROUPS, *COMMANDS))
    raise UserError(f"--help {name}: there is no such topic.{hint} Topics: {topics}")


def _command(name: str) -> str:
    if name in (*COMMANDS, "help"):
        return name
    hint = _meant(name)
    raise UserError(f"{name}: there is no such command.{hint} Commands: {', '.join(COMMANDS)}; a setting is given as key=value")


def _meant(name: str) -> str:
    """Guess what a word that is no command stands for: a command, or a row, recipe or table without its key."""
    if near := difflib.get_close_matches(name, COMMANDS, n=1):
        return f" Did you mean {near[0]}?"
    groups = {"ablation=": CONF / "ablation", "recipe=": CONF / "recipe", "-m +experiments=": EXPERIMENTS}
    spelt = {entry: f"{key}{entry}" for key, folder in groups.items() for entry in help_text.names(folder)}
    spelt |= {short_name(entry): whole for entry, whole in spelt.items()}
    near = difflib.get_close_matches(name, spelt, n=1, cutoff=0.75)
    return f" Did you mean {spelt[near[0]]}?" if near else ""


def _folder(name: str) -> Path:
    if "=" in name and not Path(name).exists():
        raise UserError(f"--config-dir: no folder is named in front of {name}; write --config-dir FOLDER {name}")
    if not name or not Path(name).is_dir():
        raise UserError(f"--config-dir {name or '(nothing)'}: no such folder; give one with your own ablation/NAME.yaml")
    return Path(name).resolve()
