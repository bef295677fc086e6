"""Read records of runs into a data frame, and read and write the ledger: the same records in one CSV file for git.

One line of the frame is one `record.json`, flattened with dots (`metrics.AR100`, `config.neck.top_down`). All columns
have dtype object: pandas would otherwise turn integers in a column with missing values into floats, and None into NaN.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from fpn_ablate.config.factors import flatten
from fpn_ablate.store.bootstrap_store import Replicates
from fpn_ablate.store.layout import run_lock
from fpn_ablate.store.record import FORMAT
from fpn_ablate.utils.errors import UserError, short_repr
from fpn_ablate.utils.files import safe_name, save_text
from fpn_ablate.utils.locks import is_free
from fpn_ablate.utils.numbers import LARGEST, is_finite
from fpn_ablate.utils.paths import RECORD, RESAMPLED, without_folders

# What a spreadsheet takes for the beginning of a formula; in many countries a semicolon separates the cells.
FORMULA = re.compile(r"(^|;)[\s\"']*[=+\-@＝＋－＠]")
STATUSES = ("finished", "failed", "diverged", "interrupted", "running")
TEXT_KEYS = ("table", "recipe", "data", "row", "setting", "fingerprint")
# Keys, and beginnings of keys, that hold a number if anything. What a column shows of other keys is n/a where it is no number.
NUMBERS = ("metrics.", "cost.pretrain_accuracy", "cost.sources_s", "environment.threads")
# Keys that hold text if anything.
ENVIRONMENT = tuple(f"environment.{key}" for key in ("command", "commit", "device", "evaluator", "python", "torch", "version"))
# Keys that are never lists.
SINGLE_KEYS = ("code", "weights", "task", "error", "started", "finished", "deterministic", "bf16", "config.backbone.weights")
# The first columns, in this order; records are sorted by them.
LEADING = ("table", "recipe", "data", "row", "seed", "setting", "fingerprint", "folder", "status", "error", "generated")


def load(paths: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """Read records from folders of runs (searched at any depth), single record files and ledgers.

    Files that cannot be read are skipped; `frame.attrs["unreadable"]` lists them as `file: reason`.
    `frame.attrs["replicates"]` has the runs' metrics on bootstrap images, `frame.attrs["folders"]` the folders of the runs on
    this disk ({(table, fingerprint): folder}).

    Raises:
        UserError: a path does not exist, or a ledger is not a CSV file.
    """
    records: dict[tuple, dict[str, Any]] = {}
    unreadable: list[str] = []
    replicates, folders = Replicates({}), {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if path.suffix == ".csv" and path.is_file():
            files, results = [], _read_ledger(path)
            replicates |= Replicates.beside(path)
        elif path.exists():
            files, root = (sorted(path.rglob(RECORD)), path) if path.is_dir() else ([path], path.parent)
            results = [_read_record(file, root) for file in files]
        else:
            raise UserError(f"{path}: no such folder or file; give a folder of runs, as results/runs, or a ledger.csv")
        for result in results:
            if isinstance(result, str):
                unreadable.append(result)
            else:
                records[result["table"], result["fingerprint"], result["folder"]] = result
        runs = [(result, file.parent) for result, file in zip(results, files, strict=False) if not isinstance(result, str)]
        folders |= {(record["table"], record["fingerprint"]): folder for record, folder in runs}
        replicates |= Replicates.of_runs((record["fingerprint"], folder) for record, folder in runs)
    frame = _frame(records.values())
    frame.attrs["replicates"], frame.attrs["folders"] = replicates, folders
    frame.attrs["unreadable"] = sorted(unreadable)
    return frame


def write_ledger(frame: pd.DataFrame, path: str | Path) -> None:
    """Merge `frame` into the ledger at `path`, and its replicates into `resampled.npz` beside it.

    A record replaces the one with the same table, fingerprint and row. Equal records give equal bytes, in any order.

    Raises:
        UserError: the ledger at `path` has lines that cannot be read.
    """
    path = Path(path)
    merged: dict[tuple, dict[str, Any]] = {}
    old = load(path) if path.exists() else _frame([])
    if old.attrs.get("unreadable"):
        lines = "; ".join(old.attrs["unreadable"])
        raise UserError(f"{path}: has lines that cannot be read and would be lost ({lines}); fix or remove them first")
    for record in [*old.to_dict("records"), *frame.to_dict("records")]:
        # A ledger is made to be published: it must not contain paths of a machine.
        record |= {key: without_folders(value) for key, value in record.items() if key not in LEADING or key == "error"}
        merged[record["table"], record["fingerprint"], record["row"]] = {k: v for k, v in record.items() if k != "live"}
    ledger = _frame(merged.values())
    save_text(path, to_csv(ledger.columns, ledger.itertuples(index=False, name=None)))
    replicates = old.attrs.get("replicates", Replicates({})) | frame.attrs.get("replicates", Replicates({}))
    replicates.write(path.with_name(RESAMPLED), ledger["fingerprint"])


def factors_of(record: dict[str, Any]) -> tuple[str, ...]:
    """Return the dotted keys in which the rows of a record's table may differ; `neck` for records of older versions."""
    return tuple(record.get("config.factors") or ("neck",))


def time_of(text: Any) -> datetime:
    """Parse a record's ISO time; return the earliest time if `text` is not one."""
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return datetime.min.replace(tzinfo=UTC)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def to_csv(columns: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    """Return CSV text whose cells keep their type (see `encode`)."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([encode(column) for column in columns])
    writer.writerows([encode(value) for value in line] for line in lines)
    return buffer.getvalue()


def encode(value: Any) -> str:
    """Encode a value as a CSV cell that `decode` reads back: JSON, but None is empty and harmless text stays bare.

    Text is written as a JSON string, in quotation marks, if it would be read as another type, has control characters, or
    would be run as a formula by a spreadsheet.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        bare = value.isprintable() and not FORMULA.search(value) and decode(value) == value
        return value if bare else json.dumps(value)
    return json.dumps(value, sort_keys=True)


def decode(cell: str) -> Any:
    """Return the value of a cell written by `encode`."""
    if cell == "":
        return None
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _read_record(file: Path, root: Path) -> dict[str, Any] | str:
    folder = file.parent.relative_to(root)
    place = (folder / file.name).as_posix()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{place}: {without_folders(str(error)) or type(error).__name__}"
    if not isinstance(content, dict):
        return f"{place}: not a JSON object"
    if content.get("format") != FORMAT:
        return f"{place}: format {short_repr(content.get('format'))}, and this version reads format {FORMAT}"
    try:
        record = flatten(content)
        problem = _problem(place, record)
    except RecursionError:
        return f"{place}: values in too many levels"
    record["folder"] = _folder_name(file.parent, folder, content.get("table"))
    record |= {key: without_folders(record[key]) for key in ("error", "environment.command") if key in record}  # on the page
    above = file.parent.resolve().parents
    if record.get("status") == "running" and len(above) > 4:
        lock_file = run_lock(above[4], safe_name(str(record.get("fingerprint"))))
        record["live"] = lock_file.exists() and not is_free(lock_file)
    return problem or record


def _folder_name(folder: Path, relative: Path, table: Any) -> str:
    """Return the folder relative to that of all runs, whatever `relative` starts from: a ledger holds no machine's paths."""
    tail = folder.resolve().parts[-4:]
    if len(tail) == 4 and tail[0] == table:
        return "/".join(tail)
    return relative.as_posix() if relative.parts else folder.resolve().name


def _read_ledger(path: Path) -> list[dict[str, Any] | str]:
    try:
        cells = pd.read_csv(path, dtype=str, keep_default_na=False, na_filter=False, encoding="utf-8")
    except (ValueError, OSError) as error:  # pandas' ParserError and EmptyDataError are ValueErrors
        raise UserError(f"{path}: not a ledger: {str(error).strip()}") from None
    columns = [str(decode(column)) for column in cells.columns]
    missing = [key for key in LEADING if key not in columns]
    if missing:
        raise UserError(f"{path}: not a ledger: it lacks the columns {', '.join(missing)}")
    lines = [dict(zip(columns, map(decode, line), strict=True)) for line in cells.itertuples(index=False, name=None)]
    return [_problem(f"{path.name} line {number}", line) or line for number, line in enumerate(lines, start=2)]


def _problem(name: str, record: dict[str, Any]) -> str | None:
    """Return why a record cannot be used in a table, or None."""
    factors = record.get("config.factors") or []
    checks = [(key, "text", isinstance(record.get(key), str) and record[key] != "") for key in TEXT_KEYS]
    checks += [
        ("status", f"one of {', '.join(STATUSES)}", record.get("status") in STATUSES),
        ("seed", "an integer", type(record.get("seed")) is int),
        ("generated", "true or false", type(record.get("generated")) is bool),
        ("folder", "text or null", record.get("folder") is None or isinstance(record["folder"], str)),
        ("config.factors", "a list of text", isinstance(factors, list) and all(isinstance(item, str) for item in factors)),
        ("built_on", "pairs of text and number", all(map(_is_source, _items(record.get("built_on"))))),
    ]
    for key, value in record.items():
        if key.startswith(NUMBERS):
            checks.append((key, "a finite number or null", value is None or is_finite(value)))
        elif key in ENVIRONMENT:
            checks.append((key, "text", value is None or isinstance(value, str)))
        elif key in SINGLE_KEYS or key.startswith("environment."):
            checks.append((key, "one value", not isinstance(value, list)))
        checks.append((key, f"of numbers up to {LARGEST:g}", not _is_too_large(value)))
    wrong = next(((key, kind) for key, kind, passes in checks if not passes), None)
    return wrong and f"{name}: key '{wrong[0]}' must be {wrong[1]}, found {short_repr(record.get(wrong[0]))}"


def _is_too_large(value: Any) -> bool:
    """Return True if a number, or one in a list or dictionary, is too large for means and charts, which leave infinity out."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (type(value) in (int, float) and LARGEST < abs(value) < math.inf) or any(map(_is_too_large, items))


def _items(value: Any) -> list[Any]:
    """Return a list, an empty one for null, and one with the value itself for anything else."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_source(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and is_finite(pair[1])


def _frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    ordered = sorted(records, key=lambda r: tuple("" if r[key] is None else r[key] for key in LEADING[:8]))
    columns = list(LEADING) + sorted({key for record in ordered for key in record} - set(LEADING))
    return pd.DataFrame([[r.get(c) for c in columns] for r in ordered], columns=columns, dtype=object)
