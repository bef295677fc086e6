"""Publish the tables and the page of a sweep from the records on disk, and its progress while it runs."""

import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.global_hydra import GlobalHydra

from fpn_ablate.config.factors import flatten, under
from fpn_ablate.config.schema import INCIDENTAL, Config
from fpn_ablate.config.validation import load_saved_config
from fpn_ablate.engine import versions
from fpn_ablate.report import output
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.definition import find_definition
from fpn_ablate.report.collate.records import load, write_ledger
from fpn_ablate.report.formats.terminal import show
from fpn_ablate.report.html import live
from fpn_ablate.runs import identity, skip
from fpn_ablate.store import layout, plan, record
from fpn_ablate.store.layout import run_lock
from fpn_ablate.sweep import up_to_date
from fpn_ablate.sweep.announce import announce_sweep
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.files import modified, refuse_links_out
from fpn_ablate.utils.hashing import digest
from fpn_ablate.utils.locks import lock
from fpn_ablate.utils.paths import CONFIG, EXPERIMENTS, RECORD


def start_progress(cells: Iterable[Config], pending: Sequence[Config] = (), at_once: int | None = None) -> None:
    """Write the plan of a sweep that starts, and start the process that keeps its page up to date. Raises nothing.

    Args:
        pending: cells that this batch is about to run, `at_once` of them together; None: not on this machine.
    """
    cells = list(cells)
    with warn_instead("the sweep is not described"):
        if pending:
            announce_sweep(cells, pending, at_once)
    for out in sorted({cfg.out for cfg in cells}):
        with warn_instead(f"no progress page of the sweep below {out}"):
            planned = [
                plan.PlannedRun(cfg.table, cfg.recipe.name, cfg.data_name, cfg.row, cfg.seed, cfg.steps)
                for cfg in cells
                if cfg.out == out
            ]
            plan.write_plan(Path(out, "runs"), planned, versions.core_version())
            if live.is_enabled():
                live.start(Path(out), definition_folders())
                log_line(f"the sweep in a browser: {Path(out, live.NAME)}")


def check_definitions(cells: Iterable[Config]) -> None:
    """Check the user's definitions of the tables of these cells before anything is trained for them.

    Raises:
        UserError: a file is not valid.
    """
    if folders := definition_folders()[1:]:
        for table in sorted({cfg.table for cfg in cells}):
            find_definition(table, (), folders)


def mark_killed(cfg: Config, error: str) -> None:
    """Write into the record of a run whose process was killed that it has failed. Raises nothing."""
    with warn_instead(f"the record of {cfg.row} seed {cfg.seed} does not say that it was killed"):
        for folder, content in _records(cfg):
            refuse_links_out(cfg.out, folder)
            # Another sweep may be working on it, and holds its lock, or may just have finished it.
            with suppress(Timeout), lock(run_lock(cfg.out, content["fingerprint"]), timeout=0):
                content = record.read(folder)
                if content and content.get("status") == "running":
                    record.write(folder, content | {"status": "failed", "error": error, "finished": record.now()})


def _records(cfg: Config) -> list[tuple[Path, dict[str, Any]]]:
    """Read the records of a run of this version of the code, on any data, with their folders."""
    folders = layout.row_folder(cfg).glob(f"seed{cfg.seed}-*")
    records = ((folder, record.read(folder) or {}) for folder in folders)
    return [(folder, content) for folder, content in records if content.get("code") == versions.core_version()]


def publish(cells: Iterable[Config], printed: bool = True, single: bool = False) -> None:
    """Print, then write, the tables that these cells belong to, from all records on disk, finished or not.

    With `printed=False` they are only written; with `single` the cells' rows alone are printed, if they are finished, and
    nothing is done for a cell without a record: its run was refused.

    Raises nothing, since it is called at a sweep's end, whatever ended it; failures are listed in `unpublished`. After SIGTERM
    nothing is published, since whoever sent it kills the process within seconds. The sweep's plan stays, and so the process
    that keeps the page up to date sees that the sweep has ended and writes the last one.
    """
    cells = [cfg for cfg in cells if not single or _records(cfg)]
    unpublished.clear()
    for out in sorted({cfg.out for cfg in cells}):
        if signals.pending_signal() == signal.SIGTERM:
            break
        with warn_instead(f"no tables in {out}", unpublished):
            plan.remove_plan(Path(out, "runs"))
            if Path(out, "runs").is_dir():
                with plan.writing_tables(Path(out)):
                    _publish([cfg for cfg in cells if cfg.out == out], Path(out), printed, single)
    if signals.pending_signal():
        left = [cfg for cfg in cells if not skip.finished_record(cfg)]
        rows = ", ".join(dict.fromkeys(cfg.row for cfg in left)) or "none"
        log_line(f"not finished: {len(left)} of {len(cells)} runs ({rows})", sys.stderr)


other_sweeps: list[tuple[str, float]] = []  # `out` and start of sweeps of this process whose sweeper is not ours


def publish_other_sweeps() -> None:
    """Publish the tables of the runs whose records such a sweep has written: its sweeper does not say which cells it ran."""
    while other_sweeps:
        out, start = other_sweeps.pop()
        cells: list[Config] = []
        files: list[Path] = []
        with warn_instead(f"no tables in {out}", unpublished):
            files = [file for file in Path(out, "runs").glob(f"*/*/*/*/{RECORD}") if modified(file) >= start]
        for file in files:
            with warn_instead(f"{file.parent} is in no table", unpublished):
                cells.append(load_saved_config(file.with_name(CONFIG)))
        publish(cells)


def _publish(cells: list[Config], out: Path, printed: bool, single: bool) -> None:
    runs, experiments = out / "runs", definition_folders()
    state = up_to_date.source_digest(runs, experiments)  # before the records are read, which may change meanwhile
    frame, errors = load(runs), []
    only = {(cfg.table, cfg.recipe.name, cfg.data_name) for cfg in cells}
    settings = settings_of(cells, frame.to_dict("records"))
    sources = state and digest([state, sorted(only), sorted(settings), live.is_enabled()])
    tables = collate(frame, only, experiments, settings, errors)
    for table in tables if printed else ():
        with warn_instead(f"{table.name} is not shown", unpublished):
            rows = {cfg.row for cfg in cells} if single else set()
            needs_figures = single or signals.pending_signal()  # the lines above have said why a row has none
            if not needs_figures or any(row.shown for row in table.rows if row.row in rows or not single):
                show(table, rows=rows, whole=Path(out, "tables", f"{table.name}.md"))
    for error in errors:
        log_line(f"error: {error}", sys.stderr)
    if up_to_date.is_written(runs, sources):
        log_line(f"up to date: {', '.join(table.name for table in tables)} in {out}")
        return
    written, before = [], len(unpublished)
    for table in tables:
        with warn_instead(f"{table.name} is not written", unpublished):
            written += output.save_table(table, out)
            log_line(f"written: {Path(out, 'tables', table.name)}.md .csv .tex")
            log_line(f"         {Path(out, 'plots', table.name)}.png .svg")
    with warn_instead(f"{out / 'ledger.csv'} is not written", unpublished):
        write_ledger(frame, out / "ledger.csv")
        written.append(out / "ledger.csv")
    with warn_instead(f"{out / live.NAME} is not written", unpublished):
        if live.is_enabled() and (page := live.write(runs, out, experiments, tables=tables)):
            written.append(page)
            log_line(f"written: {page}")
    if len(unpublished) == before:
        up_to_date.mark_written(runs, sources, written)


unpublished: list[str] = []  # warnings of the last `publish` of this process


def settings_of(cells: Iterable[Config], records: list[dict[str, Any]]) -> set[str]:
    """Return the settings (`runs.identity.comparison_key`) of these cells' flat `records`.

    Cells that share all but the declared factors share a setting. If they have records of several settings (of an older
    version, of another machine), that of a run which is certainly this cell is taken, then one of this code, of the requested
    device, then of a finished run, then the newest.
    """
    best: dict[str, tuple] = {}
    for cfg in cells:
        config = _relevant(flatten({"config": identity.portable(cfg)}))
        shared = {key: value for key, value in config.items() if not under(key, cfg.factors, "config.")}
        shared.pop("config.seed")
        place = [cfg.table, cfg.recipe.name, cfg.data_name, cfg.row, cfg.seed]
        group = json.dumps([*place[:3], shared], sort_keys=True)
        certain = (skip.finished_record(cfg) or {}).get("fingerprint")
        for run in records:
            if [run[key] for key in ("table", "recipe", "data", "row", "seed")] == place and _relevant(run) == config:
                rank = (
                    *(run["fingerprint"] == certain, run.get("code") == versions.core_version(), _is_requested(cfg, run)),
                    *(run["status"] == "finished", str(run.get("finished")), run["setting"]),
                )
                best[group] = max(best.get(group, rank), rank)
    return {rank[-1] for rank in best.values()}


def _relevant(run: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration in a flat record, without empty and incidental keys."""
    config = {key: value for key, value in run.items() if key.startswith("config.") and value is not None}
    return {key: value for key, value in config.items() if key.split(".")[1] not in INCIDENTAL}


def _is_requested(cfg: Config, record: dict[str, Any]) -> bool:
    """Return True if a record is of the device and the determinism that a cell asks for."""
    kind = "cpu" if str(record.get("environment.device")).startswith("cpu") else "cuda"
    return cfg.device in ("auto", kind) and cfg.deterministic in ("auto", record.get("deterministic"))


def definition_folders() -> list[Path]:
    """List the folders of table definitions: ours, then those of --config-dir and of the search path, which override ours."""
    hydra = GlobalHydra.instance()
    sources = hydra.config_loader().get_sources() if hydra.is_initialized() else []
    folders = [Path(source.path, "experiments").resolve() for source in reversed(sources) if source.scheme() == "file"]
    return [EXPERIMENTS, *(f for f in dict.fromkeys(folders) if f.is_dir() and f != EXPERIMENTS.resolve())]


@contextmanager
def warn_instead(consequence: str, warnings: list[str] | None = None) -> Iterator[None]:
    """Print an exception as a warning in one line, and append that to `warnings`."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        line = f"warning: {consequence}: {text}"
        log_line(line, sys.stderr)
        if warnings is not None:
            warnings.append(line)
