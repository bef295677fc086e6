"""Texts of `--help`: a short one, and what there is of rows, tables, recipes and keys, read from the files that define them."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from fpn_ablate.config.comments import GLOBAL, introduction, keys_of
from fpn_ablate.utils.paths import CLAIMS, CONF, EXPERIMENTS, short_name

WIDTH = 80
FIRST_SENTENCE = r"(?<! al)(?<!Sec)(?<!Fig)[.;](?=\s+[A-Z(])"  # where the first sentence of a comment ends
GROUPS = ("backbone", "data", "image_pyramid", "log", "neck", "recipe", "rpn", "task")  # whose choices have keys of their own
TOPICS = ("keys", "rows", "tables", "recipes")
_USAGE = """usage: python -m fpn_ablate [-m] [key=value ...]
       python -m fpn_ablate COMMAND [arguments]

Train detectors with parts of the feature pyramid switched off, and print them
beside the published figures. Without a command: one row, or with -m a sweep.

  python -m fpn_ablate                           the default row, fpn
  python -m fpn_ablate ablation=c4               one row
  python -m fpn_ablate -m ablation=c4,fpn        several rows, side by side
  python -m fpn_ablate -m +experiments=table1    a table as its file defines it
  python -m fpn_ablate verify                    what rows are, untrained

Add to any of them:
  recipe=smoke                 seconds in place of minutes: does it run?
  seed=0,1,2                   with -m: more seeds
  neck.top_down=false          any switch; --help keys lists all
  data=coco data.root=DIR      your own data; `doctor` examines it first
  --config-dir mine            your own parts; `new neck NAME mine/` writes one
The same command again skips finished runs and resumes interrupted ones.
"""
_OPTIONS = """
Options:
  -m, --multirun     sweep: one run for each combination of values
  --config-dir DIR   a folder with rows, parts and tables of your own
  --cfg job          print a run's configuration and run nothing
  -sc install=bash   completion in bash: eval "$(fpn-ablate -sc install=bash)"
  --hydra-help       list all options of Hydra
  --help TOPIC       keys, rows, tables, recipes, a command, or a choice as
                     neck=bifpn
  --help, --version"""


def short(commands: Mapping[str, str]) -> str:
    """Return what `--help` prints."""
    rows = [name for name in names(CONF / "ablation") if "/" not in name]
    groups = sorted({f"{name.split('/')[0]}/..." for name in names(CONF / "ablation") if "/" in name})
    sections = {
        "Rows (ablation=)": [*rows, *groups],
        "Tables (+experiments=)": [short_name(name) for name in names(EXPERIMENTS)],
        "Recipes (recipe=)": [f"{name} (the default)" if name == "quick" else name for name in names(CONF / "recipe")],
    }
    text = _USAGE
    for title, entries in sections.items():
        text += f"\n{title}:\n{_wrapped(', '.join(entries))}\n"
    return f"{text}\nCommands:\n" + "\n".join(f"  {name:<11} {about}" for name, about in commands.items()) + f"\n{_OPTIONS}"


def topic(name: str) -> str:
    """Return what `--help NAME` prints, of a name in TOPICS or GROUPS."""
    if name == "keys":
        return "\n".join(_keys())
    folder, start = {
        "rows": (CONF / "ablation", "ablation="),
        "tables": (EXPERIMENTS, "-m +experiments="),
        "recipes": (CONF / "recipe", "recipe="),
    }.get(name, (CONF / name, f"{name}="))
    lines = []
    for entry in names(folder):
        lines.append(f"{start}{entry}")
        about = introduction(folder / f"{entry}.yaml").partition("\n")[0]
        lines.append(_wrapped(re.split(FIRST_SENTENCE, about)[0].rstrip(".;"), "    "))
    return "\n".join(lines)


def choice(group: str, name: str) -> str | None:
    """Return what `--help GROUP=NAME` prints: what the choice is, and its keys; None if there is none."""
    file = CONF / group / f"{name}.yaml"
    if group not in GROUPS or name not in names(CONF / group):
        return None
    text = file.read_text(encoding="utf-8")
    about, prefix = introduction(file), "" if text.startswith(GLOBAL) else f"{group}."
    lines = [f"{group}={name}", *([_wrapped(about, "    ")] if about else []), *_lines_of(file, prefix, set())]
    for entry in yaml.safe_load(text).get("defaults", []):
        for where, part in entry.items() if isinstance(entry, dict) else ():
            if where.startswith("/"):  # /roi@roi: box, whose keys are task.roi's
                folder, _, below = where[1:].partition("@")
                lines += _lines_of(CONF / folder / f"{part}.yaml", f"{prefix}{below or folder}.", set())
    return "\n".join(lines)


def names(folder: Path) -> list[str]:
    """List the files of a group, without what stands in it for all of them."""
    files = (path for path in folder.rglob("*.yaml") if path.name != CLAIMS)
    return sorted((path.relative_to(folder).with_suffix("").as_posix() for path in files), key=lambda name: ("/" in name, name))


def _wrapped(text: str, indent: str = "  ") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _keys() -> Iterator[str]:
    """Yield a line for each key, with its default and what its file says of it; then the keys of other choices."""
    from fpn_ablate.config.validation import keys

    yield "Every key, with its default. Set it as KEY=VALUE, several values with -m as KEY=A,B."
    listed = set()
    main = CONF / "config.yaml"
    for name in _group_files(main):
        file, prefix = (main, "") if not name else (CONF / f"{name}.yaml", f"{name.split('/')[0]}.")
        yield ""
        if name:
            group = prefix.rstrip(".")
            yield f"{group}={name.split('/')[1]}" + f"   (choices: {', '.join(names(CONF / group))})"
            listed.add(group)
        yield from _lines_of(file, prefix, listed)
    parents = {key.rpartition(".")[0] for key in keys()}
    others = sorted({key for key in keys() if key not in listed | parents and not key.endswith(".name")})
    yield "\nKeys of other choices; --help neck=bifpn, or --help task=mask_rcnn, says what they mean:"
    yield _wrapped(", ".join(others))


def _lines_of(file: Path, prefix: str, listed: set[str]) -> Iterator[str]:
    """Yield the lines of a file's keys that are not in `listed`, and add them to it."""
    for key, value, note in keys_of(file):
        if key.startswith(("defaults", "hydra")) or key == "name" or prefix + key in listed:
            continue
        if value:
            listed.add(prefix + key)
        yield f"  {prefix}{key}" + (f" = {value}" if value else "")
        if note:
            yield _wrapped(note, "      ")


def _group_files(main: Path) -> list[str]:
    """Return '' for the main file, then the files that it takes by default, as neck/fpn; rows and loggers as well."""
    defaults = yaml.safe_load(main.read_text(encoding="utf-8"))["defaults"]
    groups = [f"{group}/{name}" for entry in defaults if isinstance(entry, dict) for group, name in entry.items()]
    return ["", *(group for group in groups if not group.startswith(("override", "ablation", "image_pyramid")))]
