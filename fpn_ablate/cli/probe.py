"""Read off each pyramid level whether there is an object: `python -m fpn_ablate probe RUN RUN`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fpn_ablate.cli.parser import command_parser
from fpn_ablate.utils.console import literal
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text

ABOUT = """Show how much each feature level of finished runs says about objects. A linear classifier of its features, fitted on
training pictures, is measured on validation pictures: is here an object, or background (on the generated set a distractor)? Of
which category is it? Balanced accuracy in percent by the object's size, with half of its 95 % interval over pictures."""
QUESTIONS = {"object": "object?", "category": "category"}


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Print the table.

    Raises:
        UserError: bad arguments, or as `runs.probe.probe_runs`.
    """
    parser = command_parser("probe", ABOUT)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--pictures", type=int, default=200, help="pictures of each split (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - prints them instead of the table")
    options = parser.parse_args(arguments)
    if options.pictures < 1:
        parser.error("--pictures is at least 1")
    if options.json is not None and not Path(options.json).name:
        raise UserError(f"--json {options.json!r}: give the name of a file, or - for standard output")

    from fpn_ablate.runs.probe import probe_runs  # loads torch, which takes seconds

    report = probe_runs(options.runs, options.pictures, config_dir)
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    if options.json == "-":
        print(text, end="")
        return 0
    show(report)
    if options.json:
        save_text(Path(options.json), text)
    return 0


def show(report: Mapping[str, Any]) -> None:
    """Print one line for each level and run, finest level first, so that the runs stand below each other."""
    runs, sizes, pictures = report["runs"], report["objects"]["val"], report["pictures"]
    questions = [question for question in QUESTIONS if question == "object" or report["categories"] > 1]
    names = _names(runs)
    by_level = [(level, run, name) for run, name in zip(runs, names, strict=True) for level in run["levels"]]
    by_level.sort(key=lambda line: (int(line[0][1:]), line[0]))
    any_level = next(iter(runs[0]["levels"].values()))  # all are measured on the same places, and of the same classes
    measured = {(question, size): any_level[size][question] for question in questions for size in sizes}
    table = Table("level", "row", box=box.ASCII, padding=0, show_edge=False)
    for question, size in measured:
        table.add_column(f"{QUESTIONS[question]}\n{size}", justify="right")
    table.add_row("", "by chance", *(f"{100 / cell['classes']:.3g}" if cell else "n/a" for cell in measured.values()))
    for level, run, name in by_level:
        cells = [_cell(run["levels"][level][size][question]) for question, size in measured]
        table.add_row(f"{level} ({run['features'][level]})", literal(name), *cells)
    console = Console(highlight=False)
    data = literal(report["data"]) + " (generated)" * report["generated"]
    rare = {
        size: sizes[size] - cell["places"] for (question, size), cell in measured.items() if question == "category" and cell
    }
    left_out = f"; of too rare a category, and not asked for it: {_counts(rare)}" * any(rare.values())
    lines = (
        f"{data}: fitted on {pictures['train']} training, measured on {pictures['val']} validation pictures",
        f"objects: {_counts(sizes)}{left_out}",
        f"background: {report['background']}",
        "balanced accuracy in %; in brackets: features of the level",
        *(literal(f"{name}: {run['folder']}") for name, run in zip(names, runs, strict=True) if "#" in name),
    )
    for line in lines:
        console.print(line, soft_wrap=True)
    console.print(table)


def _names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return rows, with the seed if there are several, and with the run's position if two would have one name."""
    several = len({run["seed"] for run in runs}) > 1
    names = [run["row"] + f" seed {run['seed']}" * several for run in runs]
    return [name + f" #{n}" * (names.count(name) > 1) for n, name in enumerate(names, start=1)]


def _counts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {size}" for size, number in sizes.items())


def _cell(accuracy: Mapping[str, float] | None) -> str:
    if accuracy is None:
        return "n/a"
    return f"{100 * accuracy['value']:.1f}±{50 * (accuracy['high'] - accuracy['low']):.1f}"
