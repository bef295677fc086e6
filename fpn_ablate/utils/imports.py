"""Follow the imports of Python files without running them."""

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path


def closure(
    modules: Iterable[str], roots: Mapping[str, Path], skip: Callable[[str], bool] = lambda module: False
) -> dict[str, Path]:
    """Return {module: file} of `modules` and all that they import, with their packages, lazy and type-only imports.

    Args:
        modules: dotted names.
        roots: the folder of each top-level package to follow, as {"fpn_ablate": PACKAGE}. Other packages are left out.
        skip: modules to leave out, with what only they import.

    Raises:
        SyntaxError, UnicodeDecodeError: a file is not Python.
    """
    files: dict[str, Path] = {}
    pending = list(modules)
    while pending:
        module = pending.pop()
        file = _file_of(module, roots)
        if file and module not in files and not skip(module):
            files[module] = file
            pending += [*imports_of(file, module), module.rpartition(".")[0]]  # a module's package runs before it
    return files


def imports_of(file: Path, module: str, text: str | None = None) -> Iterator[str]:
    """Yield the dotted names that a file imports, as `module`; of `from a import b` both `a` and `a.b`.

    Args:
        text: of the file, if it was read before.
    """
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    yield from _imported(file.read_text(encoding="utf-8") if text is None else text, package, str(file))


@lru_cache(maxsize=1024)  # each row of a sweep follows the imports of its parts, through the same files
def _imported(text: str, package: str, filename: str) -> tuple[str, ...]:
    return tuple(_imported_names(ast.parse(text, filename=filename), package))


def _imported_names(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _file_of(module: str, roots: Mapping[str, Path]) -> Path | None:
    top, *rest = module.split(".")
    if top not in roots:
        return None
    base = roots[top].joinpath(*rest)
    candidates = [base / "__init__.py", *([base.with_name(f"{base.name}.py")] if rest else [])]
    return next((file for file in candidates if file.is_file()), None)
