"""Load the classes of a user's parts from the folder that `--config-dir` names, check their keys and construct them.

A class is loaded by its file, in a package of its own whose name no installed module has: neither `sys.path` nor the working
directory is searched. torch is imported only by the user's files.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
import traceback
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from inspect import Parameter
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.errors import PydanticUserError

from fpn_ablate.config.schema import Config, UserPart
from fpn_ablate.config.validation import explain, no_such_key
from fpn_ablate.utils.errors import UserError, first_line, short_repr
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
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def build(part: UserPart, key: str, *positional: Any) -> Any:
    """Construct a user's part.

    Args:
        key: the part's dotted key, as `neck`.
        positional: what the constructor gets before the keys (`POSITIONAL`).

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
    modules = files(part, key)
    package, content = f"{_ROOT}_{_loaded_digest(part, modules)}", content_digest(part)
    _finder.packages[package] = modules
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    try:
        with _as_user_error(part, key):
            module = importlib.import_module(f"{package}.{module_name}")
    except BaseException:
        for imported in [m for m in sys.modules if m == package or m.startswith(f"{package}.")]:
            del sys.modules[imported]  # half of it
        raise
    cls, file = getattr(module, name, None), modules[module_name]
    if cls is None:
        classes = [n for n, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__]
        raise UserError(f"{_where(part, key)}: {file} has no class {name}.{_nearest(name, classes)}")
    if not isinstance(cls, type):
        raise UserError(f"{_where(part, key)}: {name} in {file} is no class; name one")
    part._loaded = cls, content
    return cls


def typed_arguments(part: UserPart, key: str) -> dict[str, Any]:
    """Check the keys of a part against the keyword-only arguments of its class, and convert them to the arguments' types.

    Returns:
        The given keys; the class has defaults for the others. Lists become tuples where the class wants tuples.

    Raises:
        UserError: as `load_class`; a key is unknown, missing or of a wrong type; or the constructor does not fit. Every problem
            is listed, one a line.
    """
    types, required = _signature(part, key, load_class(part, key))
    problems = [f"{key}.{name}: missing; set {key}.{name}=..." for name in required if name not in part.arguments]
    converted = {}
    for name, value in part.arguments.items():
        if name not in types:
            allowed = ["class", *(field for field in type(part).model_fields if field != "class_"), *types]
            problems.append(no_such_key(f"{key}.{name} with {key}.class={part.class_}", key, name, allowed))
            continue
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            problems.append(f"{key}.{name}={short_repr(value)}: input should be made of finite numbers, texts, lists and keys")
            continue
        try:
            converted[name] = types[name].model_validate_json(f'{{"value": {text}}}').value
        except ValidationError as error:
            problems += [explain(_dotted(f"{key}.{name}", value, e["loc"][1:]), e) for e in error.errors()]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return converted


def check_keys(cfg: Config) -> None:
    """Import the classes of a configuration's user parts, and check their keys.

    Raises:
        UserError: as `typed_arguments`, of all parts.
    """
    problems = []
    for key, part in cfg.user_parts.items():
        try:
            typed_arguments(part, key)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def files(part: UserPart, key: str = "") -> dict[str, Path]:
    """Return {module below the folder: file} of a part's class and of all that it imports from the folder. None is imported.

    Raises:
        UserError: no folder is given; a file is missing, is no Python or lies elsewhere; or it imports another by an absolute
            name.
    """
    where, module = _where(part, key), part.class_.rpartition(".")[0]
    if part.folder is None:
        raise UserError(f"{where}: say where its file lies, with --config-dir FOLDER: {module.replace('.', '/')}.py in it")
    folder = part.folder.resolve()
    try:
        modules = closure([f"{_ROOT}.{module}"], {_ROOT: folder})
        imported = {name: set(imports_of(file, name)) for name, file in modules.items()}
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        if isinstance(error, SyntaxError) and error.lineno:
            raise UserError(f"{where}: {error.filename}, line {error.lineno}: {error.msg}") from None
        raise UserError(f"{where}: a file in {folder} cannot be read as Python ({first_line(error)})") from None
    if f"{_ROOT}.{module}" not in modules:
        there = sorted(file.stem for file in folder.glob("*.py"))
        raise UserError(f"{where}: there is no {module.replace('.', '/')}.py in {folder}.{_nearest(module, there)}")
    for name, file in modules.items():
        if not file.resolve().is_relative_to(folder):
            raise UserError(f"{where}: {file} leads out of {folder}; put the file itself there")
        for top in sorted({other.split(".")[0] for other in imported[name]} - {_ROOT}):
            if _is_sibling(top, folder):
                raise UserError(f"{where}: {file} imports {top}, which lies beside it: write from .{top} import ...")
    return {name.removeprefix(f"{_ROOT}.") if name != _ROOT else "__init__": file for name, file in modules.items()}


def content_digest(part: UserPart) -> str:
    """Hash the code of a part's files, without docstrings, comments and formatting; once its class is loaded, as it was then.

    Raises:
        UserError: as `files`.
    """
    if part._loaded:
        return part._loaded[1]
    return digest(sorted((name, without_docstrings(file.read_text(encoding="utf-8"))) for name, file in files(part).items()))


def describe(parts: Mapping[str, UserPart]) -> dict[str, dict[str, str]]:
    """Return what a record says of a run's user parts: {dotted key: {"class": ..., "content": digest}}.

    Raises:
        UserError: as `files`.
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
        if part.folder is None:
            raise UserError(
                f"{source}: its {key} is a class of the user's, {part.class_}: give its folder, --config-dir FOLDER"
            )
        if not isinstance(recorded, dict) or recorded.get(key) != describe({key: part})[key]:
            raise UserError(
                f"{source}: its {key}, {part.class_}, was made from other files than those in {part.folder}: "
                "give the folder as it was, or train the row again"
            )


def folder_of(config_sources: Sequence[Any]) -> Path | None:
    """Return the folder that `--config-dir` names, from `hydra.runtime.config_sources` of a job in any process."""
    return next((Path(source.path) for source in config_sources if source.provider == "command-line"), None)


class _Finder(MetaPathFinder):
    """Find the modules of user parts: the files that `files` lists, and no others."""

    def __init__(self) -> None:
        self.packages: dict[str, dict[str, Path]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, module = fullname.partition(".")
        if package not in self.packages:
            return None
        modules = self.packages[package]
        if file := modules.get(module or "__init__"):
            is_package = file.name == "__init__.py"
            search = [] if is_package else None
            loader = _Source(fullname, str(file))
            return importlib.util.spec_from_file_location(fullname, file, loader=loader, submodule_search_locations=search)
        if not module or any(name.startswith(f"{module}.") for name in modules):
            return ModuleSpec(fullname, None, is_package=True)  # a folder without __init__.py
        return None


_finder = _Finder()


class _Source(SourceFileLoader):
    """Compile the file at each import: cached byte code is as old as a file that was changed within the same second."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _loaded_digest(part: UserPart, modules: Mapping[str, Path]) -> str:
    sha = hashlib.sha256(str(part.folder).encode())
    for name, file in sorted(modules.items()):
        sha.update(f"\0{name}\0".encode() + file.read_bytes())
    return sha.hexdigest()[:16]


def _is_sibling(top: str, folder: Path) -> bool:
    """Return True if a top-level name is a module of the folder and none of an installed package."""
    if not ((folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file()):
        return False
    if top in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    return spec is None or spec.origin is None or Path(spec.origin).resolve().is_relative_to(folder)


def _signature(part: UserPart, key: str, cls: type) -> tuple[dict[str, type[BaseModel]], list[str]]:
    """Return a model of each keyword-only argument, by name, and the names of those without a default."""
    where, given = _where(part, key), POSITIONAL.get(key, ())
    try:
        parameters = inspect.signature(cls).parameters.values()
    except (TypeError, ValueError) as error:  # of a class in C
        raise UserError(f"{where}: its constructor cannot be read ({first_line(error)}); give a class of your own") from None
    name, keywords = cls.__name__, [p for p in parameters if p.kind == Parameter.KEYWORD_ONLY]
    form = f"def __init__({', '.join(['self', *given, '*', 'KEY: TYPE = DEFAULT'])})"
    if any(p.kind == Parameter.VAR_KEYWORD for p in parameters):
        raise UserError(f"{where}: {name} takes **kwargs, so its keys cannot be checked; name each of them: {form}")
    positional = [p.name for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    if len(positional) != len(given) or any(p.kind == Parameter.VAR_POSITIONAL for p in parameters):
        takes = f"({', '.join(positional)})" if positional else "none"
        gives = f"({', '.join(given)})" if given else "none"
        raise UserError(f"{where}: {name} is given {len(given)} positional arguments, {gives}, and takes {takes}: write {form}")
    if taken := [p.name for p in keywords if p.name in type(part).model_fields]:
        raise UserError(f"{where}: {taken[0]} is a key of every {key}, which is not passed on: call the argument otherwise")
    if untyped := [p.name for p in keywords if p.annotation is Parameter.empty]:
        raise UserError(f"{where}: the argument {untyped[0]} of {name} has no type: write {untyped[0]}: int, or its like")
    return (
        {p.name: _model(part, key, cls, p) for p in keywords},
        [p.name for p in keywords if p.default is Parameter.empty],
    )


def _model(part: UserPart, key: str, cls: type, parameter: Parameter) -> type[BaseModel]:
    """Return a model whose field `value` has the argument's type."""
    try:
        holder = SimpleNamespace(__annotations__={"value": parameter.annotation})
        scope = getattr(inspect.unwrap(cls.__init__), "__globals__", {})
        hint = typing.get_type_hints(holder, globalns=scope, include_extras=True)["value"]
        return create_model("Key", __config__=_STRICT, value=(hint, ...))
    except (PydanticUserError, NameError, TypeError, SyntaxError, AttributeError) as error:
        reason = first_line(error).partition(". ")[0]
        raise UserError(
            f"{_where(part, key)}: the argument {parameter.name} of {cls.__name__} has a type that no key can have "
            f"({reason}): use int, float, bool, str, Literal, or tuples, lists or dictionaries of them"
        ) from None


@contextmanager
def _as_user_error(part: UserPart, key: str) -> Iterator[None]:
    """Re-raise an error of the user's code as a UserError with the line of the user's file that raised it."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f for f in frames if part.folder and Path(f.filename).is_relative_to(part.folder.resolve())]
        line = f"{lines[-1].filename}, line {lines[-1].lineno}: " if lines else ""
        text = re.sub(rf"{_ROOT}_\w+", "", first_line(error))
        raise UserError(f"{_where(part, key)}: {line}{type(error).__name__}: {text}") from error


def _dotted(key: str, value: Any, location: Sequence[int | str]) -> str:
    """Extend a key by a location in its value, without the names of types that pydantic puts in between."""
    for step in location:
        with suppress(LookupError, TypeError):
            key, value = f"{key}.{step}", value[step]
    return key


def _where(part: UserPart, key: str) -> str:
    return f"{key + '.' if key else ''}class={part.class_}"


def _nearest(name: str, others: Iterable[str]) -> str:
    others = list(others)
    near = get_close_matches(name, others, n=1)
    return f" Did you mean {near[0]}?" if near else f" There are: {', '.join(others)}" if others else ""
