"""Check the overrides of a command line before Hydra reads them."""

import re
from collections.abc import Sequence

from fpn_ablate.config.validation import keys, unknown_key
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import CLAIMS, CONF, EXPERIMENTS

# Values that Hydra does not read as the name of a group's file.
NO_NAME = re.compile(r"(?i:null|true|false|nan|[-+]?inf|[-+]?[\d_.]+(e[-+]?\d+)?|[\[{].*)", re.DOTALL)
# Options of which Hydra takes one at most; several end in a traceback.
MODES = ("-m", "--multirun", "-r", "--run", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")


def normalise(arguments: Sequence[str]) -> list[str]:
    """Check the arguments of a run, and put them as Hydra reads them.

    `experiments=table1` is completed to the one file whose name begins so, and `-m` may stand anywhere. Hydra accepts any key
    below a group (see `add_if_missing`): those that do not exist are refused after composition, with the nearest one.

    Raises:
        UserError: a group does not exist, or its file has no name; several of Hydra's modes.
    """
    modes = [argument for argument in arguments if argument.partition("=")[0] in MODES]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)}: give one of them; --cfg job shows one configuration, without -m")
    known, result = {*(key for key in keys() if "." not in key), "ablation", "hydra"}, []
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    for argument in arguments:
        key, equals, value = argument.lstrip("+~").partition("=")
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
        result.append(add_if_missing(argument))
    # Hydra's parser reads no keys behind an option that stands among them.
    return sorted(result, key=lambda argument: argument not in ("-m", "--multirun"))


def add_if_missing(override: str) -> str:
    """Let an override of a key below a group also add the key: `++neck.depth=3`.

    The file of a user's part may omit it. For a misspelt key Hydra would advise `+neck.topdown=true`, which nothing reads.
    """
    key = override.partition("=")[0]
    return f"++{override}" if "." in key and not re.search(r"^[+~]|[@/]|^hydra\.", key) else override


def _experiment_file(name: str) -> str:
    files = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if path.name != CLAIMS)
    matches = [name] if name in files else [stem for stem in files if stem.startswith(name)]
    if len(matches) > 1:
        raise UserError(f"experiments={name}: which of {', '.join(matches)}?")
    return matches[0] if matches else name  # Hydra searches more folders (--config-dir), and lists what there is
