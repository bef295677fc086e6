"""The command line: `python -m fpn_ablate [-m] key=value ...`, and `python -m fpn_ablate verify|doctor [key=value ...]`."""

import argparse
import json
import multiprocessing
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fpn_ablate import finished, jobs, stopping, timm_configs
from fpn_ablate.console import say
from fpn_ablate.errors import UserError, first_line, printable
from fpn_ablate.files import save_text
from fpn_ablate.paths import CLAIMS, CONF, EXPERIMENTS, PLUGINS, ROOT
from fpn_ablate.plan import COMMAND
from fpn_ablate.schema import TASKS, Config
from fpn_ablate.sweep import cell_config, publish, refusal, refuse_unwritable, unpublished
from fpn_ablate.validation import keys, unknown_key

if TYPE_CHECKING:
    from fpn_ablate.verify import RowFacts

# What stands where a group's file is to be named, and Hydra reads as another thing than a text.
NO_NAME = re.compile(r"(?i:null|true|false|nan|[-+]?inf|[-+]?[\d_.]+(e[-+]?\d+)?|[\[{].*)", re.DOTALL)

# Options of which Hydra takes one, and ends in a traceback where there are more.
MODES = {"--multirun": "-m", "--run": "-r", "--cfg": "-c", "--info": "-i", "--shell-completion": "-sc"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one cell, a sweep, the verifier or the data doctor; returns the exit code.

    2: bad input; 1: a row has failed; 130, 143: interrupted by Ctrl-C or SIGTERM, and the same command goes on.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    aside = {"verify": _verify, "doctor": _doctor}.get(arguments[0] if arguments else "")
    os.environ[COMMAND] = f"python -m fpn_ablate {shlex.join(arguments)}".strip()
    try:
        arguments = normalise(arguments[1:] if aside else arguments)
        _introduce()
        if aside:
            return aside(arguments)
    except (UserError, CompactHydraException) as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    sys.argv[1:] = arguments
    unpublished.clear()
    try:
        with stopping.listening(), stopping.meant():
            _job()
    except KeyboardInterrupt as stop:
        say("interrupted; the same command goes on from where it was", sys.stderr)
        return getattr(stop, "code", 130)
    return int(bool(unpublished))  # rows are finished; their tables are made by the same command, or by fpn_ablate.report


def _introduce() -> None:
    """Make the sweeper, the configurations of timm and the resolver of conf/config.yaml known to Hydra."""
    if str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))
    timm_configs.register()
    OmegaConf.register_new_resolver("fpn_ablate_root", lambda: f"file://{ROOT}", replace=True)


def normalise(arguments: Sequence[str]) -> list[str]:
    """Refuse keys that do not exist, let `experiments=table1` stand for the one file whose name begins so, and `-m` anywhere.

    Hydra itself would advise `+neck.topdown=true` for a misspelt key, which it accepts and nothing reads.
    """
    _refuse_several_modes(arguments)
    variant = _task(arguments)
    known, result = {*keys(variant=variant), "ablation"}, []
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    for argument in arguments:
        key, equals, value = argument.lstrip("+~").partition("=")
        if argument.startswith("-") or not equals:
            result.append(argument)
            continue
        key = key.split("@")[0]
        if key in groups and (wrong := [name for name in value.split(",") if NO_NAME.fullmatch(name.strip())]):
            raise UserError(f"{key}={wrong[0]}: give the name of a file in conf/{key}, as {_first_file(key)}")
        if key == "experiments":
            argument = f"+experiments={','.join(_experiment(name) for name in value.split(','))}"
        elif key not in known and not key.startswith(("hydra.", "hydra/")):
            others = [f"task={name}" for name in TASKS if key in keys(variant=name)]
            raise UserError(f"{key} goes with {' or '.join(others)}, not with task={variant}" if others else unknown_key(key))
        result.append(argument)
    # Hydra's parser knows no more keys behind an option that stands among them.
    return sorted(result, key=lambda argument: MODES.get(argument, argument) != "-m")


def _refuse_several_modes(arguments: Sequence[str]) -> None:
    options = (argument.partition("=")[0] for argument in arguments)
    given = {MODES.get(option, option) for option in options} & set(MODES.values())
    if len(given) > 1:
        names = " and ".join(sorted(name for name, short in MODES.items() if short in given))
        raise UserError(f"{names}: give one of them; --cfg job shows one configuration, without -m")


def _first_file(group: str) -> str:
    return f"{group}={min(path.stem for path in Path(CONF, group).glob('*.yaml'))}"


def _task(arguments: Sequence[str]) -> str | None:
    """The task that is asked for; None where a file, ours or the user's, may choose it."""
    given = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments)
    chosen_elsewhere = {"experiments", "--config-dir", "-cd", "--config-name", "-cn"} & set(given)
    return None if chosen_elsewhere else given.get("task", "rpn")


def _experiment(name: str) -> str:
    found = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if path.name != CLAIMS)
    matches = [name] if name in found else [stem for stem in found if stem.startswith(name)]
    if len(matches) > 1:
        raise UserError(f"experiments={name}: which of {', '.join(matches)}?")
    return matches[0] if matches else name  # Hydra knows more folders (--config-dir), and lists what there is


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def _job(composed: DictConfig) -> None:
    """What Hydra calls for a cell; everything heavy is imported here, so that a mistyped key, and a cell that is finished, are
    told at once."""
    _usual_processes()
    stopping.listen()  # in a worker of joblib, and in a job of SLURM, for good: its other jobs are not to begin either
    context = HydraConfig.get()
    single = context.mode == RunMode.RUN
    with refusal(leave=single):
        cfg = cell_config(composed, context.runtime.choices, context.overrides.task)
        refuse_unwritable(cfg.out)
        number = 0 if single else context.job.num
        try:
            if not finished.told(cfg):
                with jobs.carried_out(number, cfg.on_failure):
                    from fpn_ablate.run import run  # seconds, which a job that is not to begin any more does not have

                    run(cfg, number)
        finally:
            if single:
                publish([cfg])


def _usual_processes() -> None:
    """Start processes in the platform's way: joblib's launcher leaves loky's in its workers, where torch's loader fails."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method(None, force=True)


def _verify(arguments: Sequence[str]) -> int:
    """Print what each row of conf/ablation is, before anything is trained."""
    options = _verify_options(arguments)
    if options.readme:
        if not options.readme.is_file():
            raise UserError(f"--readme {options.readme}: no such file")
        text = options.readme.read_text(encoding="utf-8")
        filled = fill_verify_blocks(text)
        save_text(options.readme, filled)
    elif options.markdown:
        print(_markdown(arguments), end="")
    else:
        _print_facts(_facts(options), options.size)
    return 0


def fill_verify_blocks(text: str) -> str:
    """A README's text with what `verify ARGUMENTS --markdown` prints in each block `<!-- verify: ARGUMENTS -->` to
    `<!-- /verify -->`.

    Raises:
        UserError: a block is not closed, or there is none.
    """
    from fpn_ablate.verify import fill

    _introduce()
    return fill(text, lambda arguments: _markdown(normalise(arguments)))


class _Parser(argparse.ArgumentParser):
    """What it complains of is what was typed, or pasted."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _verify_options(arguments: Sequence[str]) -> argparse.Namespace:
    from fpn_ablate.verify import PAPER_SIZE

    parser = _Parser(prog="python -m fpn_ablate verify", description=_verify.__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for a run; ablation=ROW,ROW chooses rows")
    parser.add_argument("--size", type=_size, default=PAPER_SIZE, metavar="HxW", help="of the image (default: 800x1000)")
    parser.add_argument("--markdown", action="store_true", help="print the cost alone, as a Markdown table in GMAC")
    parser.add_argument(
        "--readme", type=Path, help="fill the '<!-- verify: ARGUMENTS -->' blocks of this file with such tables"
    )
    return parser.parse_intermixed_args(arguments)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give height x width in pixels, as 800x1024")
    return int(match[1]), int(match[2])


def _facts(options: argparse.Namespace) -> "dict[str, RowFacts]":
    """Row -> what it is, for the rows that are asked for, or all."""
    from fpn_ablate.verify import row_facts

    return {cfg.row: row_facts(cfg, size=options.size) for cfg in _cells(options.overrides)}


def _cells(arguments: Sequence[str]) -> list[Config]:
    """The rows that are asked for with ablation=ROW,ROW, or all of conf/ablation."""
    from hydra import compose, initialize_config_dir

    rows = sorted(path.stem for path in Path(CONF, "ablation").glob("*.yaml"))
    chosen = [o.split("=", 1)[1].split(",") for o in arguments if o.startswith("ablation=")]
    overrides = [o for o in arguments if not o.startswith("ablation=")]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return [
                cell_config(compose("config", [*overrides, f"ablation={row}"]), {"ablation": row}, overrides)
                for row in (chosen[-1] if chosen else rows)
            ]
    except (TypeError, ValueError, LookupError) as error:  # what Hydra and names make of values of a wrong type
        raise UserError(f"{shlex.join(arguments)}: cannot be read as key=value ({first_line(error)})") from None


def _doctor(arguments: Sequence[str]) -> int:
    """Look over both splits of a data set as a run would see them, before anything is trained. Exit code 0: sound, 1: a
    training would be refused, 2: bad arguments."""
    parser = _Parser(prog="python -m fpn_ablate.data.doctor", description=_doctor.__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for a run; ablation=ROW,ROW chooses rows")
    parser.add_argument("--json", metavar="FILE", help="write the facts there; -: to standard output, in place of the text")
    parser.add_argument("--limit", type=int, default=50, help="findings to print of each split (default 50; 0: all)")
    options = parser.parse_intermixed_args(arguments)
    if options.json is not None and not Path(options.json).name:
        raise UserError(f"--json {options.json!r}: give the name of a file, or - for standard output")
    cells = _cells(options.overrides)

    from fpn_ablate.doctor import examine
    from fpn_ablate.doctor.text import show

    report = examine({cfg.row: cfg for cfg in cells})
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    if options.json == "-":
        print(text, end="")
    else:
        show(report, options.limit)
        if options.json:
            save_text(Path(options.json), text)
    return 0 if report["sound"] else 1


def _markdown(arguments: Sequence[str]) -> str:
    from fpn_ablate.verify import markdown

    options = _verify_options(arguments)
    return markdown(_facts(options), options.size)


def _print_facts(rows: "dict[str, RowFacts]", size: tuple[int, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fpn_ablate.verify import CLASSES, ROIS

    two_stage = any(facts.head for facts in rows.values())
    words = ["row", *(["proposals"] if two_stage else []), "feature", *(["head"] if two_stage else [])]
    words += ["lateral?", "top-down?", "finest level sees"]
    parts = ["backbone", "neck", "rpn", *(["head"] if two_stage else [])]
    title = f"Rows, one image of {size[0]} x {size[1]} pixels"
    table = Table(title=title + (f", {ROIS:,} RoIs, {CLASSES} classes" if two_stage else ""))
    for word in words:
        table.add_column(word)
    for word in [
        "# anchors",
        "parameters",
        "trained",
        *(f"GFLOPs\n{part.replace('rpn', 'RPN')}" for part in [*parts, "total"]),
    ]:
        table.add_column(word, justify="right")
    for row, facts in rows.items():
        marks = ["✓" if on else "" for on in (facts.lateral, facts.top_down)]
        stage = [[facts.proposals], [facts.head]] if two_stage else [[], []]
        gflops = [*(getattr(facts, f"gflops_{part}") for part in parts), facts.gflops]
        counts = [
            *(f"{n:,}" if n else "" for n in (facts.anchors, facts.params, facts.trained)),
            *(f"{x:,.1f}" for x in gflops),
        ]
        table.add_row(row, *stage[0], facts.feature, *stage[1], *marks, " ".join(facts.reach), *counts)
    Console(width=max(180, Console().width)).print(table)


if __name__ == "__main__":
    sys.exit(main())
