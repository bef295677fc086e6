"""Check the overrides of a command line before Hydra reads them."""

import difflib
import re
import shlex
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fpn_ablate.config.validation import keys, unknown_key
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.utils.paths import CLAIMS, CONF, EXPERIMENTS, short_name

# Values that Hydra does not read as the name of a group's file.
NO_NAME = re.compile(r"(?i:null|true|false|nan|[-+]?inf|[-+]?[\d_.]+(e[-+]?\d+)?|[\[{].*)", re.DOTALL)
SHOWING = ("-c", "--cfg", "-i", "--info")  # Hydra's options that print, and run nothing
# Options of which Hydra takes one at most; several end in a traceback.
MODES = ("-m", "--multirun", "-r", "--run", *SHOWING, "-sc", "--shell-completion")


def normalise(arguments: Sequence[str]) -> list[str]:
    """Check the arguments of a run, and put them as Hydra reads them.

    `experiments=table1` is completed to the one file whose name begins so, and `-m` may stand anywhere. Hydra accepts any key
    below a group (see `add_if_missing`): those that do not exist are refused after composition, with the nearest one.

    Raises:
        UserError: a group does not exist, or its file has no name; a value that Hydra cannot read; several of Hydra's modes.
    """
    modes = [argument for argument in arguments if argument.partition("=")[0] in MODES]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)}: give one of them; --cfg job shows one configuration, without -m")
    if {"-sc", "--shell-completion"} & {*modes}:
        return list(arguments)  # install=bash, query=bash: words of Hydra
    known, result = {*(key for key in keys() if "." not in key), "ablation", "hydra"}, []
    groups = {path.parent.name for path in CONF.glob("*/*.yaml")}
    for before, argument in pairwise(["", *arguments]):
        key, equals, value = argument.lstrip("+~").partition("=")
        if not equals and not argument.startswith(("-", "~")) and not before.startswith("-"):
            raise UserError(f"{argument}: neither KEY=VALUE nor a command or file that stands alone")
        if argument.startswith("-") or not equals:
            result.append(argument)
            continue
        key = key.split("@")[0]
        if key in groups and (nameless := [name for name in value.split(",") if NO_NAME.fullmatch(name.strip())]):
            first = min(path.stem for path in (CONF / key).glob("*.yaml"))
            raise UserError(f"{key}={nameless[0]}: give the name of a file in conf/{key}, as {key}={first}")
        if key == "experiments":
            argument = f"+experiments={','.join(_experiment_file(name) for name in value.split(','))}"
        elif re.split("[./]", key)[0] not in known:
            raise UserError(unknown_key(key))
        _check_syntax(argument)
        result.append(add_if_missing(argument))
    # Hydra's parser reads no keys behind an option that stands among them.
    return sorted(result, key=lambda argument: argument not in ("-m", "--multirun"))


def check_files(arguments: Sequence[str], config_dir: Path | None) -> None:
    """Check that the files of groups, as `ablation=NAME,NAME`, exist in conf/ or in `config_dir`, and that the latter are YAML.

    Raises:
        UserError: there is none of a name, with the nearest one; or a file of the user's cannot be read.
    """
    if any("hydra.searchpath" in argument for argument in arguments):  # Hydra looks in more folders
        return
    for argument in arguments:
        group, _, value = argument.lstrip("+").partition("=")
        ours = {"experiments": EXPERIMENTS}.get(group, CONF / group)
        names = [name.strip() for name in value.split(",")]
        # An own group, a timm/MODEL, or Hydra's grammar: not ours to check.
        if "/" in group or not ours.is_dir() or not all(re.fullmatch(r"[\w./][\w./ -]*", name) for name in names):
            continue
        if any(name.startswith("timm/") for name in names):
            continue
        added = config_dir / group if config_dir else ours
        known = {
            path.relative_to(folder).with_suffix("").as_posix(): path
            for folder in (ours, added)
            for path in folder.rglob("*.yaml")
            if path.name != CLAIMS
        }
        for name in names:
            if (stem := name.removesuffix(".yaml")) not in known:
                raise UserError(_no_such_file(group, name, known))
            if added != ours and known[stem].is_relative_to(added):
                check_yaml(known[stem])


def _no_such_file(group: str, name: str, known: Collection[str]) -> str:
    is_path, stem = name.startswith((".", "/")), name.removesuffix(".yaml")
    own = f"a file of your own: --config-dir FOLDER with {group}/{'NAME' if is_path else stem}.yaml"
    words = stem.split()
    if len(words) > 1 and all(word in known for word in words):
        return f"{group}={name}: there is no such file. Separate names by commas, without spaces: {','.join(words)}"
    if group == "data":
        own = f"a data set of your own: data=coco data.root=FOLDER; {own}"
    if is_path:
        return f"{group}={name}: this takes the name of a file, not a path; {own}"
    shown = [short_name(name) if (EXPERIMENTS / f"{name}.yaml").is_file() else name for name in known]
    near = difflib.get_close_matches(stem, known, n=1) or difflib.get_close_matches(stem, shown, n=1, cutoff=0.8)
    if near and not re.fullmatch(r"table\d+", stem):  # another number is no slip of the pen
        return f"{group}={name}: there is no such file. Did you mean {group}={near[0]}? Else {own}"
    there = ", ".join(sorted(shown, key=lambda name: ("/" in name, name)))
    return f"{group}={name}: there is no such file. There are {there}; {own}"


def check_yaml(file: Path) -> None:
    """Check that OmegaConf reads a file. Raises UserError, which names the line."""
    try:
        OmegaConf.load(file)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{file}{f', line {mark.line + 1}' if mark else ''}: cannot be read as YAML ({reason})") from None


def _check_syntax(argument: str) -> None:
    """Check that Hydra's grammar reads an override.

    Raises:
        UserError: it does not; the message says how to write it.
    """
    key, _, value = argument.partition("=")
    quoted = value.replace('"', '\\"')
    quoted = f'{key}="{quoted}"'
    if _is_readable(argument):
        return
    if ",," in value or value.startswith(",") or value.rstrip().endswith(","):
        raise UserError(f"{argument}: a value is missing beside a comma; write values without spaces, as KEY=A,B")
    if value[:1] in ("[", "{") or not _is_readable(quoted):
        raise UserError(f"{argument}: cannot be read as key=value; a list is written as 'KEY=[A,B]'")
    raise UserError(f"{argument}: Hydra does not read this value as it is; quote it for Hydra too: {shlex.quote(quoted)}")


def refuse_sweeps(overrides: Sequence[str]) -> None:
    """Refuse a table, and several values of a key, in a single run.

    Raises:
        UserError: it says to add -m; or, where a configuration is only shown, to give one value.
    """
    options = {override.partition("=")[0] for override in overrides}
    if options & {"hydra.mode", "+hydra.mode", "++hydra.mode"}:
        return
    showing = options & {*SHOWING}
    for override in overrides:
        if override.startswith("+experiments=") and not showing:
            raise UserError(f"{override}: a table is a sweep; add -m: python -m fpn_ablate -m {override} ...")
        if not override.startswith("-") and "=" in override and _parsed(override).is_sweep_override():
            typed = override.lstrip("+")
            fix = f"{min(showing)} shows one configuration" if showing else f"add -m: python -m fpn_ablate -m {typed} ..."
            fix += f"; a fraction has a point: {typed.replace(',', '.')}" if re.fullmatch(r"[^=]*=0,\d+", typed) else ""
            raise UserError(f"{typed}: several values are a sweep; {fix}")


def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _is_readable(override: str) -> bool:
    try:
        _parsed(override)
    except HydraException:
        return False
    return True


def add_if_missing(override: str) -> str:
    """Let an override of a key below a group also add the key: `++neck.depth=3`.

    The file of a user's part may omit it. For a misspelt key Hydra would advise `+neck.topdown=true`, which nothing reads.
    """
    key = override.partition("=")[0]
    return f"++{override}" if "." in key and not re.search(r"^[+~]|[@/]|^hydra\.", key) else override


def choices(override: str) -> list[str]:
    """Return an override for each value of one with several, as `key=a,b`; otherwise itself."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_choice_sweep():
        return [override]
    return [f"{override.partition('=')[0]}={value}" for value in parsed.sweep_string_iterator()]


def _experiment_file(name: str) -> str:
    files = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if path.name != CLAIMS)
    matches = [name] if name in files else [stem for stem in files if stem.startswith(name)]
    if len(matches) > 1:
        raise UserError(f"experiments={name}: which of {', '.join(matches)}?")
    return matches[0] if matches else name  # Hydra searches more folders (--config-dir), and lists what there is
