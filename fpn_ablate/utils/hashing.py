"""Hash values and source code."""

import ast
import hashlib
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """Return 16 hex digits of the sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@lru_cache
def source_digest(file: Path) -> str:
    """Hash the syntax tree of a Python file, without docstrings, comments and formatting.

    It is cached, since a process runs the code that it has imported, whatever the file holds later.
    """
    return digest(without_docstrings(file.read_text(encoding="utf-8")))


def without_docstrings(source: str) -> str:
    """Return the syntax tree of `source` as text without docstrings, the same in each version of Python as in 3.11."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if getattr(node, "type_params", None) == []:  # which 3.12 has added
            del node.type_params
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:]
    return ast.dump(tree, **({"show_empty": True} if sys.version_info >= (3, 13) else {}))
