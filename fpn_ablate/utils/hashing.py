"""Hash values and source code."""

import ast
import hashlib
import json
from functools import lru_cache
from typing import Any

from fpn_ablate.utils.paths import PACKAGE


def digest(value: Any) -> str:
    """Return 16 hex digits of the sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@lru_cache
def code_version(parts: tuple[str, ...]) -> str:
    """Hash the syntax trees of files and folders of the package, without docstrings, comments and formatting."""
    sources = []
    for part in parts:
        files = [PACKAGE / part] if part.endswith(".py") else sorted((PACKAGE / part).rglob("*.py"))
        sources += [(str(f.relative_to(PACKAGE)), _without_docstrings(f.read_text())) for f in files]
    return digest(sources)


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:]
    return ast.dump(tree)
