"""Write results/RELIABILITY.md from the drills' outcomes, one JSON file each in results/reference/reliability/ (`save`).

    python scripts/drills/reliability.py            write the page
    python scripts/drills/reliability.py --check    exit code 1 if the page does not match the files

A file: {"fault": str, "tries": int, "lost": int, "how": str, "command": str, "machine": {...}}. `tries` counts how often the
fault struck, `lost` how often it lost something; `how` says what was checked. Further keys are allowed and not shown.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fpn_ablate.runs.environment import environment, machine
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES, PAGE = ROOT / "results" / "reference" / "reliability", ROOT / "results" / "RELIABILITY.md"
KEYS = {"fault": str, "tries": int, "lost": int, "how": str, "command": str, "machine": dict}
HEAD = """# What was lost

Written by `python scripts/drills/reliability.py` from the files in [`reference/reliability/`](reference/reliability).
Each file names the command that made it and the machine. *tries*: how often the fault struck; *lost*: how often something was
lost, that is a result differed, a file was torn, or the sweep did not recover.

| fault | tries | lost | how |
| --- | ---: | ---: | --- |
"""


def save(file: Path, command: str, outcome: dict[str, Any]) -> str:
    """Write the outcome of a drill, with its command, this machine and the commit; return the text."""
    cpu = torch.device("cpu")
    outcome = outcome | {"command": command, "machine": machine(cpu), "commit": environment(cpu)["commit"]}
    text = json.dumps(outcome, indent=1, ensure_ascii=False) + "\n"
    save_text(file, text)
    return text


def read(file: Path) -> dict:
    """Read one outcome. Raises UserError."""
    try:
        outcome = json.loads(file.read_text(encoding="utf-8"))
        wrong_keys = [key for key, kind in KEYS.items() if type(outcome[key]) is not kind]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the outcome of a drill ({type(error).__name__}: {error})") from None
    if wrong_keys:
        raise UserError(f"{file}: values of a wrong type: {', '.join(wrong_keys)}")
    return outcome


def page(folder: Path = OUTCOMES) -> str:
    """Format all outcomes as Markdown, in the order of their files' names. Raises UserError."""
    lines = []
    for file in sorted(folder.glob("*.json")):
        outcome = read(file)
        cells = [
            outcome["fault"],
            f"{outcome['tries']:,}",
            f"{outcome['lost']:,}",
            f"{outcome['how']} ([file](reference/reliability/{file.name}))",
        ]
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |\n")
    return HEAD + "".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page does not match the files")
    options = parser.parse_args(argv)
    try:
        text = page()
        if options.check:
            return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)
        save_text(PAGE, text)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
