"""Check the overrides of a command line before Hydra reads them."""

import re
from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.config.factors import under
from fpn_ablate.config.schema import TASKS
from fpn_ablate.config.user_parts import POSITIONAL
from fpn_ablate.config.validation import keys, unknown_key
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import CLAIMS, CONF, EXPERIMENTS

# Values that Hydra does not read as the name of a group's file.
NO_NAME = re.compile(r"(?i:null|true|false|nan|[-+]?inf|[-+]?[\d_.]+(e[-+]?\d+)?|[\[{].*)", re.DOTALL)
# Options of which Hydra takes one at most; several end in a traceback.
MODES = ("-m", "--multirun", "-r", "--run", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")


def normalise(arguments: Sequence[str], config_dir: Path | None = None) -> list[str]:
    """Check the arguments of a run, and put them as Hydra reads them.

    Unknown keys are refused here: for a misspelt one Hydra would advise `+neck.topdown=true`, which it accepts and nothing
    reads. `experiments=table1` is completed to the one file whose name begins so, and `-m` may stand anywhere. With a
    `config_dir`, keys of parts that may be the user's are checked after composition instead (`user_parts.check_keys`).

    Raises:
        UserError: a key does not exist, or does not go with the task; a group's file has no name; several of Hydra's modes.
    """
    modes = [argument for argument in arguments if argument.partition("=")[0] in MODES]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)}: give one of them; --cfg job shows one configuration, without -m")
    variant = None if config_dir else _task_of(arguments)
    valid_keys, result = {*keys(variant=variant), "ablation"}, []
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    for argument in arguments:
        key, equals, value = argument.lstrip("+~").partition("=")
        if argument.startswith("-") or not equals:
            result.append(argument)
            continue
        key = key.split("@")[0]
        if key in groups and (nameless := [name for name in value.split(",") if NO_NAME.fullmatch(name.strip())]):
            raise UserError(f"{key}={nameless[0]}: give the name of a file in conf/{key}, as {_first_file(key)}")
        if key == "experiments":
            argument = f"+experiments={','.join(_experiment_file(name) for name in value.split(','))}"
        elif config_dir and _is_of_part(key):
            argument = add_if_missing(argument)
        elif _is_of_part(key) and key.endswith(".class"):
            raise UserError(f"{key}={value}: say where its file lies, with --config-dir FOLDER")
        elif key not in valid_keys and not key.startswith(("hydra.", "hydra/")):
            others = [f"task={name}" for name in TASKS if key in keys(variant=name)]
            raise UserError(f"{key} goes with {' or '.join(others)}, not with task={variant}" if others else unknown_key(key))
        result.append(argument)
    # Hydra's parser reads no keys behind an option that stands among them.
    return sorted(result, key=lambda argument: argument not in ("-m", "--multirun"))


def add_if_missing(override: str) -> str:
    """Let an override of a part's key also add the key, which the file of a user's part may omit: `++neck.depth=3`."""
    return f"++{override}" if _is_of_part(override.partition("=")[0]) else override


def _is_of_part(key: str) -> bool:
    """Return True if a key, without `+` or `~` in front, lies in a part that can be the user's."""
    return key not in POSITIONAL and under(key, POSITIONAL)


def _first_file(group: str) -> str:
    return f"{group}={min(path.stem for path in Path(CONF, group).glob('*.yaml'))}"


def _task_of(arguments: Sequence[str]) -> str | None:
    """Return the task; None where a file may choose it."""
    given = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments)
    chosen_elsewhere = {"experiments", "--config-name", "-cn"} & set(given)
    return None if chosen_elsewhere else given.get("task", "rpn")


def _experiment_file(name: str) -> str:
    files = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if path.name != CLAIMS)
    matches = [name] if name in files else [stem for stem in files if stem.startswith(name)]
    if len(matches) > 1:
        raise UserError(f"experiments={name}: which of {', '.join(matches)}?")
    return matches[0] if matches else name  # Hydra searches more folders (--config-dir), and lists what there is
