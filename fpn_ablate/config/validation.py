"""Validate a plain dictionary as a `Config`, and list the keys that exist; errors name key, value and fix."""

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fpn_ablate.config.parts import AnyBackbone, BuiltInNeck, UserPart
from fpn_ablate.config.schema import Config
from fpn_ablate.config.tasks import TASKS
from fpn_ablate.utils.errors import UserError, short_repr

# What a value has to be, by pydantic's type of the error; in braces the bound that it broke.
WISHES = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list, as [A,B]"),
    "string_type": "a text",
    "dict_type": "keys with values, as {{A: B}}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}


def load_saved_config(path: Path, config_dir: Path | None = None) -> Config:
    """Read the config.yaml that a run has left.

    Args:
        config_dir: the folder that this command line names for classes of the user's. Without it none of them can be imported.

    Raises:
        UserError: it cannot be read, or is not a configuration of this version.
    """
    try:
        return validate(yaml.safe_load(path.read_text(encoding="utf-8")), config_dir)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, UserError) as error:
        problems = "; ".join(str(error).splitlines()[:3]) or type(error).__name__
        raise UserError(f"{path}: cannot be read as a configuration of this version ({problems})") from None


def validate(values: dict[str, Any], config_dir: Path | None = None) -> Config:
    """Validate a nested dictionary; the arguments of a user's classes are checked by `user_parts.typed_arguments`.

    Args:
        config_dir: the folder of the user's classes.

    Raises:
        UserError: it lists every problem, one a line.
    """
    try:
        return Config.model_validate(values, context={"config_dir": config_dir.resolve() if config_dir else None})
    except ValidationError as error:
        raise UserError("\n".join(_merged(_explain(problem) for problem in error.errors()))) from None


def _merged(lines: Iterable[str]) -> Iterator[str]:
    """Yield messages once; of a value that none of several types fits, what each of them wants in one line."""
    wanted: dict[str, list[str]] = {}
    for line in dict.fromkeys(lines):
        head, same, rest = line.partition(": give ")
        wanted.setdefault(head + same, []).append(rest)
    yield from (head + " or ".join(rests) for head, rests in wanted.items())


def _explain(problem: Any) -> str:
    # pydantic puts the chosen variant of a union into the location: data.shapes.mix is data.mix to the user.
    parts = [part for kind in (BuiltInNeck, AnyBackbone) for part in typing.get_args(kind) if not issubclass(part, UserPart)]
    tags = {"shapes", "coco", "built-in", "user", *TASKS, *(tag for part in parts for tag in _tags(part))}
    group, inner = [str(part) for part in problem["loc"][:1]], [str(part) for part in problem["loc"][1:]]
    inner = [
        part for part in inner if part not in ("bool", "int", "float", "str") and part.replace("_", "").isalnum()
    ]  # of a union
    key = ".".join([*group, *(part for part in inner if part not in tags)])
    if problem["type"] == "extra_forbidden":
        return unknown_key(key, next((part for part in inner if part in tags - {"built-in"}), None))
    if problem["type"] == "string_pattern_mismatch" and key.endswith(".class"):
        return f"{key}={short_repr(problem['input'])}: write FILE.CLASS, as necks.PathAggregation of the file necks.py"
    return explain(key, problem)


def explain(key: str, problem: Any) -> str:
    """Put an error of pydantic into words."""
    if problem["type"] == "value_error":
        return f"{key + ': ' if key else ''}{problem['ctx']['error']}"
    if problem["type"] == "missing":
        return f"{key}: missing; set {key}=..."
    if problem["type"] == "model_type":
        return f"{key}={short_repr(problem['input'])}: this is a group of keys; set them one by one, as {key}.KEY=VALUE"
    return f"{key}={short_repr(problem['input'])}: {_wish(problem)}"


def _wish(problem: Any) -> str:
    """Say what to give in place of a value."""
    message = problem["msg"]
    if problem["type"] in WISHES:
        return f"give {WISHES[problem['type']].format(**problem.get('ctx', {}))}"
    if message.startswith("Input should be "):
        return f"give {message.removeprefix('Input should be ')}"
    return f"{message[0].lower()}{message[1:]}"


def unknown_key(key: str, variant: str | None = None) -> str:
    """Return the message for a key that does not exist, or not with a group's `variant` (neck=fpn), with the nearest one."""
    parent, _, name = key.rpartition(".")
    allowed = sorted({k.rpartition(".")[2] for k in keys(variant=variant) if k.rpartition(".")[0] == parent})
    near: Sequence[str] = ()
    if not allowed:
        allowed = sorted({k.split(".")[0] for k in keys()})
        near = difflib.get_close_matches(key, keys(), n=1, cutoff=0.8)  # recpie.steps
        parent, name = "", key.split(".")[0]
    if not parent:
        allowed += ["ablation", "experiments"]  # groups that leave no key behind
    where = f"{key} with {parent.split('.')[0]}={variant}" if variant and parent else key
    group = key.partition(".")[0]
    models = _options(Config.model_fields[group].annotation) if variant and parent else ()
    variants = (
        TASKS if group == "task" else [tag for model in models if not issubclass(model, UserPart) for tag in _tags(model)]
    )
    others = [f"{group}={other}" for other in variants if variant in variants and key in keys(variant=other)]
    return no_such_key(where, parent, name, allowed, near) + (f". It goes with {' or '.join(others)}" if others else "")


def no_such_key(where: str, parent: str, name: str, allowed: Iterable[str], near: Sequence[str] = ()) -> str:
    """Return the message that `parent` has no key `name`, with the keys that it has and the nearest.

    Args:
        near: the nearest key, if the caller knows it.
    """
    allowed = sorted(allowed)
    near = near or difflib.get_close_matches(name, allowed, n=1, cutoff=0.75)
    hint = f" Did you mean {'.'.join(filter(None, [parent, near[0]]))}?" if near else ""
    return f"{where}: there is no such key.{hint} Allowed{f' in {parent}' if parent else ''}: {', '.join(allowed)}"


def keys(model: type[BaseModel] = Config, prefix: str = "", variant: str | None = None) -> Iterator[str]:
    """Yield every dotted key that a user may set, groups included; of a group's variants all, or `variant` alone."""
    for name, field in model.model_fields.items():
        if model is Config and name == "row":
            continue  # a row is named after its file and the switches added to it
        yield prefix + name
        models = [option for option in _options(field.annotation) if not issubclass(option, UserPart)]
        for option in [m for m in models if len(models) > 1 and variant in _tags(m)] or models:
            yield from keys(option, f"{prefix}{name}.", variant)


def _options(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models of a union, however it is nested."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _options(typing.get_args(annotation)[0])
    elif origin is typing.Union or isinstance(annotation, types.UnionType):
        for option in typing.get_args(annotation):
            yield from _options(option)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the names of a group's variant: `name: Literal["fpn"]`."""
    return typing.get_args(model.model_fields["name"].annotation)
