"""Load the classes of a user's parts from the folder that `--config-dir` names, check their keys and construct them.

A class is loaded by its file, in a package of its own whose name no installed module has: neither `sys.path` nor the working
directory is searched. torch is imported only by the user's files.
"""

import importlib
import importlib.util
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import ExecutionLoader
from importlib.machinery import ModuleSpec, PathFinder
from inspect import Parameter
from pathlib import Path
from types import SimpleNamespace
from typing import (
    Any,
    NotRequired,  # that of `typing` lacks what pydantic needs before Python 3.12
)

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic.errors import PydanticUserError
from typing_extensions import TypedDict

from fpn_ablate.config.parts import UserPart
from fpn_ablate.config.validation import explain, no_such_key
from fpn_ablate.utils.errors import UserError, first_line, raising_line
from fpn_ablate.utils.hashing import digest, without_docstrings
from fpn_ablate.utils.imports import closure, imports_of

# What a constructor is given before the keys, by the part's dotted key.
POSITIONAL = {
    "neck": ("in_levels",),
    "task.proposals.neck": ("in_levels",),
    "backbone": (),
    "task.roi.head": ("in_channels", "resolution"),
    "rpn.head": ("channels", "num_anchors"),
}
_ROOT = "_fpn_ablate_user"  # the first part of the names of the packages, and the folder's name in `closure`
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


def build(part: UserPart, key: str, *positional: Any) -> Any:
    """Construct a user's part: its class gets the positional arguments that `POSITIONAL` names, then the keys by name.

    Raises:
        UserError: as `typed_arguments`, or the constructor raises an error.
    """
    arguments, cls = typed_arguments(part, key), load_class(part, key)
    with _as_user_error(part, key):
        return cls(*positional, **arguments)


def load_class(part: UserPart, key: str) -> type:
    """Import a user's class from the folder of `--config-dir`, once a part: an edit during a run does not mix two versions.

    Raises:
        UserError: there is no such folder on this command line, no such file or class, or the file cannot be imported.
    """
    if part._loaded:
        return part._loaded[0]
    module_name, _, name = part.class_.rpartition(".")
    texts = sources(part, key)
    package = f"{_ROOT}_{digest([part.folder, texts])}"
    _finder.modules |= {f"{package}.{module}".removesuffix(".__init__"): source for module, source in texts.items()}
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    with _as_user_error(part, key):
        module = importlib.import_module(f"{package}.{module_name}")
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        classes = [n for n, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__]
        there = ", ".join(classes) or "none"
        raise UserError(f"{_where(part, key)}: {module.__file__} has no class {name}. Its classes: {there}")
    part._loaded = cls, texts
    return cls


def typed_arguments(part: UserPart, key: str) -> dict[str, Any]:
    """Check the keys of a part against the keyword-only arguments of its class, and convert them to the arguments' types.

    Returns:
        The given keys; the class has defaults for the others. Lists become tuples where the class wants tuples.

    Raises:
        UserError: as `load_class`; a key is unknown, missing or of a wrong type; or the constructor does not fit. Every problem
            is listed, one a line.
    """
    keys, names = _keys_of(part, key, load_class(part, key))
    try:
        return keys.validate_json(json.dumps(part.arguments))  # strict, but a list may be a tuple
    except ValidationError as error:
        problems = error.errors()
    except ValueError as error:
        raise UserError(f"{_where(part, key)}: its keys cannot be read ({first_line(error)})") from None
    allowed = [*(field.alias or name for name, field in type(part).model_fields.items()), *names]
    lines = []
    for problem in problems:
        name, *location = problem["loc"]
        if problem["type"] == "extra_forbidden" and not location:
            lines.append(no_such_key(f"{key}.{name} with {key}.class={part.class_}", key, name, allowed))
        else:
            lines.append(explain(_dotted(f"{key}.{name}", part.arguments.get(name), location), problem))
    raise UserError("\n".join(dict.fromkeys(lines)))


def sources(part: UserPart, key: str = "") -> dict[str, tuple[Path, str]]:
    """Return {module below the folder: (file, text)} of a part's class and of all that it imports from the folder.

    None is imported. Once the class is loaded, the texts are those that were.

    Raises:
        UserError: no folder is given; a file is missing, is no Python or lies elsewhere; or it imports another by an absolute
            name.
    """
    if part._loaded:
        return part._loaded[1]
    where, module = _where(part, key), part.class_.rpartition(".")[0]
    if part.folder is None:
        raise UserError(f"{where}: say where its file lies, with --config-dir FOLDER: {module.replace('.', '/')}.py in it")
    folder, texts = part.folder.resolve(), {}
    try:
        for name, file in closure([f"{_ROOT}.{module}"], {_ROOT: folder}).items():
            if not file.resolve().is_relative_to(folder):
                raise UserError(f"{where}: {file} leads out of {folder}; put the file itself there")
            for other in imports_of(file, name):
                if _lies_in(folder, other):
                    fix = "use a relative one, as in from .blocks import Block"
                    raise UserError(f"{where}: {file} imports {other} from {folder} by an absolute name: {fix}")
            texts[name.removeprefix(_ROOT).removeprefix(".") or "__init__"] = file, file.read_text(encoding="utf-8")
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: a file in {folder} cannot be read as Python ({first_line(error)})") from None
    if module not in texts:
        there = ", ".join(sorted(file.name for file in folder.glob("*.py")))
        raise UserError(f"{where}: there is no {module.replace('.', '/')}.py in {folder}. Its files: {there or 'none'}")
    return texts


def content_digest(part: UserPart) -> str:
    """Hash the code of a part's files, without docstrings, comments and formatting; once its class is loaded, as it was then.

    Raises:
        UserError: as `sources`.
    """
    return digest(sorted((module, without_docstrings(text)) for module, (_, text) in sources(part).items()))


def describe(parts: Mapping[str, UserPart]) -> dict[str, dict[str, str]]:
    """Return what a record says of a run's user parts: {dotted key: {"class": ..., "content": digest}}.

    Raises:
        UserError: as `sources`.
    """
    return {key: {"class": part.class_, "content": content_digest(part)} for key, part in parts.items()}


def refuse_changed(parts: Mapping[str, UserPart], record: Mapping[str, Any], source: Path) -> None:
    """Check that the user parts of a finished run are in `--config-dir` as they were when it was made.

    Args:
        record: of the run, with the key `user_parts`, as `describe` returns it.
        source: the run, for messages.

    Raises:
        UserError: there is no --config-dir, or the classes or their files differ.
    """
    recorded = record.get("user_parts")
    for key, part in parts.items():
        if part.folder is None or not isinstance(recorded, dict) or recorded.get(key) != describe({key: part})[key]:
            raise UserError(
                f"{source}: its {key} is a class of the user's, {part.class_}: give --config-dir FOLDER with its files as they "
                "were when the run was made, or train the row again"
            )


def folder_of(config_sources: Sequence[Any]) -> Path | None:
    """Return the folder that `--config-dir` names, from `hydra.runtime.config_sources` of a job in any process."""
    return next((Path(source.path) for source in config_sources if source.provider == "command-line"), None)


def _lies_in(folder: Path, module: str) -> bool:
    """Return True if Python finds, or could only find, a module of this absolute name in the folder."""
    top, *rest = module.split(".")
    if top in (_ROOT, "fpn_ablate"):
        return False
    try:
        spec = importlib.util.find_spec(top) or PathFinder.find_spec(top, [str(folder)])
    except (ImportError, ValueError):
        return False
    places = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.has_location else ())] if spec else []
    for path in (Path(place).resolve().joinpath(*rest) for place in places):
        # An environment in the folder is none of its modules: .venv, python3.11 and site-packages cannot be their names.
        if path.is_relative_to(folder) and all(p.removesuffix(".py").isidentifier() for p in path.relative_to(folder).parts):
            return True
    return False


class _Finder(ExecutionLoader):
    """Find and run the modules that were read, and no others: the texts that were hashed, whatever the files hold by now."""

    def __init__(self) -> None:
        self.modules: dict[str, tuple[Path, str]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname in self.modules:
            file = self.modules[fullname][0]
            # Made by hand: spec_from_file_location gives a package its folder, so that other files of it would be imported.
            spec = ModuleSpec(fullname, self, origin=str(file), is_package=file.name == "__init__.py")
            spec.has_location = True
            return spec
        if any(name.startswith(f"{fullname}.") for name in self.modules):
            return ModuleSpec(fullname, None, is_package=True)  # a folder without __init__.py
        return None

    def get_filename(self, fullname: str) -> str:
        return str(self.modules[fullname][0])

    def get_source(self, fullname: str) -> str:
        return self.modules[fullname][1]


_finder = _Finder()


def _keys_of(part: UserPart, key: str, cls: type) -> tuple[TypeAdapter[dict[str, Any]], list[str]]:
    """Return the type of {name: value} of the keyword-only arguments of a class, and their names."""
    where, given, name = _where(part, key), POSITIONAL[key], cls.__name__
    with _as_user_error(part, key):  # a class in C may have none
        signature = inspect.signature(cls)
    parameters = list(signature.parameters.values())
    keywords = {p.name: p for p in parameters if p.kind == Parameter.KEYWORD_ONLY and p.annotation is not Parameter.empty}
    positional = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    if len(positional) != len(given) or len(positional) + len(keywords) != len(parameters):
        form = f"def __init__({', '.join(['self', *given, '*', 'KEY: TYPE = DEFAULT'])})"
        raise UserError(f"{where}: {name} takes {signature}: write {form}, with every key by its name and with its type")
    if taken := [n for n in keywords if n in type(part).model_fields]:
        raise UserError(f"{where}: {taken[0]} is a key of every {key}, which is not passed on: call the argument otherwise")
    try:
        # Those of the keywords alone: a positional argument's type may be imported for type checkers only.
        holder = SimpleNamespace(__annotations__={n: p.annotation for n, p in keywords.items()})
        scope = getattr(inspect.unwrap(cls.__init__), "__globals__", {})
        hints = typing.get_type_hints(holder, globalns=scope, include_extras=True)
        fields = {n: NotRequired[h] if keywords[n].default is not Parameter.empty else h for n, h in hints.items()}
        return TypeAdapter(with_config(_STRICT)(TypedDict("Keys", fields))), list(keywords)
    except (PydanticUserError, NameError, TypeError, SyntaxError, AttributeError) as error:
        raise UserError(
            f"{where}: an argument of {name} has a type that no key can have ({first_line(error).partition('. ')[0]}): "
            "use int, float, bool, str, Literal, or tuples, lists or dictionaries of them"
        ) from None


@contextmanager
def _as_user_error(part: UserPart, key: str) -> Iterator[None]:
    """Re-raise an error of the user's code as a UserError with the line of the user's file that raised it."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        line = raising_line(error, lambda file: bool(part.folder) and file.is_relative_to(part.folder.resolve()))
        text = re.sub(rf"{_ROOT}_\w+", "", first_line(error))
        raise UserError(f"{_where(part, key)}: {line}{type(error).__name__}: {text}{meta_hint(text)}") from error


def meta_hint(text: str) -> str:
    """Return what to add to an error of torch's that comes of the meta device; "" for any other."""
    hint = ". Parts are checked on torch's meta device, where tensors have no values: no .item(), no .to()"
    return hint if re.search(r"\b(register_)?meta\b", text) else ""


def _dotted(key: str, value: Any, location: Sequence[int | str]) -> str:
    """Extend a key by a location in its value, without the names of types that pydantic puts in between."""
    for step in location:
        with suppress(LookupError, TypeError):
            key, value = f"{key}.{step}", value[step]
    return key


def _where(part: UserPart, key: str) -> str:
    return f"{key + '.' if key else ''}class={part.class_}"
