"""Records as a run would leave them, where a run would leave them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished import make_record


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def put(runs: Path) -> Callable[..., Path]:
    """Write a record where a run would; returns the run's folder."""

    def write(row: str = "fpn", seed: int = 0, folder: str | None = None, **changes: Any) -> Path:
        record = make_record(row, seed, **changes)
        name = folder or f"seed{seed}-{record['fingerprint'][:8]}"
        place = runs / record["table"].replace("/", "_") / record["recipe"] / "x" / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "record.json").write_text(json.dumps(record), encoding="utf-8")
        return place

    return write
