"""Necks of other code bases, where they are installed; a test skips where they are not."""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest


def mmdetection_neck(module: str, name: str) -> type:
    """Return a neck's class of mmdetection 3.3, whose package as a whole wants compiled operators."""
    mmdet, mmcv = pytest.importorskip("mmdet"), pytest.importorskip("mmcv")
    models = Path(mmdet.__file__).parent / "models"
    _empty_package("mmdet.models", models)
    _empty_package("mmdet.models.necks", models / "necks")
    operators = _empty_package("mmcv.ops", Path(mmcv.__file__).parent / "ops")
    vars(operators).update(vars(importlib.import_module("mmcv.ops.merge_cells")))
    return getattr(importlib.import_module(f"mmdet.models.necks.{module}"), name)


def _empty_package(name: str, folder: Path) -> Any:
    """Put a package in place whose modules can be imported one by one."""
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    return sys.modules[name]
