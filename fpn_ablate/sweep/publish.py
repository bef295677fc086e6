"""Between Hydra and a run: what a composed job means, and what is shown when jobs are over."""

import json
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.global_hydra import GlobalHydra

from fpn_ablate.config.composition import data_name
from fpn_ablate.config.factors import flatten, under
from fpn_ablate.config.schema import INCIDENTAL, Config
from fpn_ablate.report import output
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load, write_ledger
from fpn_ablate.report.formats.tables import show
from fpn_ablate.report.html import live
from fpn_ablate.runs import identity, skip
from fpn_ablate.store import layout, plan, record
from fpn_ablate.store.layout import cell_lock
from fpn_ablate.sweep import up_to_date
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.files import clear_leftovers
from fpn_ablate.utils.locks import exclusive, lock
from fpn_ablate.utils.paths import EXPERIMENTS, PICTURES


def start_progress(cells: Iterable[Config]) -> None:
    """Leave word of a sweep that starts, and have its page written while it runs. Raises nothing."""
    cells = list(cells)
    for out in sorted({cfg.out for cfg in cells}):
        with warn_instead(f"no page of how far the sweep below {out} is"):
            own = [cfg for cfg in cells if cfg.out == out]
            names = [(cfg.table, cfg.recipe.name, data_name(cfg), cfg.row, cfg.seed, cfg.steps) for cfg in own]
            plan.write_plan(Path(out, "runs"), [plan.PlannedRun(*cell) for cell in names], identity.core_version())
            if live.wanted():
                live.start(Path(out), _experiments())
                log_line(f"the sweep in a browser: {Path(out, live.NAME)}")


def mark_killed(cfg: Config, error: str) -> None:
    """Say in its record that a cell has failed whose process is gone, which could not. Raises nothing."""

    def of_this_code() -> dict[str, Any] | None:
        known = record.read(folder) or {}
        return known if (known.get("status"), known.get("code")) == ("running", identity.core_version()) else None

    with warn_instead(f"no word of {cfg.row} seed {cfg.seed} in its record"):
        for folder in layout.cell_folder(cfg, "").parent.glob(f"seed{cfg.seed}-*"):
            # Not if another sweep is at it, which has its lock, or has just ended it.
            if (known := of_this_code()) is not None:
                with suppress(Timeout), lock(cell_lock(cfg.out, known["fingerprint"]), timeout=0):
                    if (known := of_this_code()) is not None:
                        record.write(folder, known | {"status": "failed", "error": error, "finished": record.now()})


def publish(cells: Iterable[Config]) -> None:
    """Print, then write, the tables that these cells belong to, from all records on disk, finished or not.

    Raises nothing: it is called when a sweep ends, whatever ended it; what went wrong stands in `unpublished`. After SIGTERM
    there is no time for it: what sent that kills in a moment.
    """
    signals.cancel_deadline()
    cells = list(cells)
    unpublished.clear()
    for out in sorted({cfg.out for cfg in cells}):
        with warn_instead(f"no table of {out}", unpublished):
            plan.remove_plan(Path(out, "runs"))
            if Path(out, "runs").is_dir() and signals.pending_signal() != signal.SIGTERM:
                # Another sweep that ends now would write a ledger without what this one has added.
                with exclusive(Path(out, "runs", plan.FOLDER, ".locks", "tables"), f"the tables of {out}"):
                    places = [Path(out, name) for name in ("", "tables", "plots", "figures", "backbones")]
                    clear_leftovers([*places, *Path(out, "runs", PICTURES).glob("*")])
                    _publish([cfg for cfg in cells if cfg.out == out], Path(out))


def _publish(cells: list[Config], out: Path) -> None:
    runs, experiments = out / "runs", _experiments()
    state = up_to_date.source_digest(runs, experiments)  # before it is read: what changes in between is not in the tables
    frame, errors = load(runs), []
    only = {(cfg.table, cfg.recipe.name, data_name(cfg)) for cfg in cells}
    settings = settings_of(cells, frame.to_dict("records"))
    made_from = state and up_to_date.digest([state, sorted(only), sorted(settings), live.wanted()])
    tables = collate(frame, only, experiments, settings, errors)
    for table in tables:
        with warn_instead(f"{table.name} is not shown", unpublished):
            show(table)
    for error in errors:
        log_line(f"error: {error}", sys.stderr)
    if up_to_date.is_written(runs, made_from):
        log_line(f"written before, and as it was: {', '.join(table.name for table in tables)} in {out}")
        return
    written, before = [], len(unpublished)
    for table in tables:
        with warn_instead(f"{table.name} is not written", unpublished):
            written += output.save_table(table, out)
            log_line(f"written: {Path(out, 'tables', table.name)}.md .csv .tex, {Path(out, 'plots', table.name)}.png .svg")
    with warn_instead(f"{out / 'ledger.csv'} is not written", unpublished):
        write_ledger(frame, out / "ledger.csv")
        written.append(out / "ledger.csv")
    with warn_instead(f"{out / live.NAME} is not written", unpublished):
        if live.wanted() and (page := live.write(runs, out, experiments, first=tables)):
            written.append(page)
            log_line(f"written: {page}")
    if len(unpublished) == before:
        up_to_date.mark_written(runs, made_from, written)


unpublished: list[str] = []  # what the last `publish` of this process could not show or write
_Pair = tuple[Config, dict[str, Any]]  # a cell and a record of it, flat


def settings_of(cells: Iterable[Config], records: list[dict[str, Any]]) -> set[str]:
    """The settings of these cells' own records (flat ones). Cells that share all but the declared factors share a setting.

    Where such cells have records of several (of an older version, of another machine), it is the one of the present code and of
    the device asked for, then the one that has most cells, then the newest.
    """
    found: dict[str, dict[str, list[_Pair]]] = {}
    for cfg in cells:
        wanted = _relevant(flatten({"config": identity.portable(cfg)}))
        shared = {key: value for key, value in wanted.items() if not under(key, cfg.factors, "config.")}
        shared.pop("config.seed")
        place = [cfg.table, cfg.recipe.name, data_name(cfg), cfg.row, cfg.seed]
        for run in records:
            here = [run[key] for key in ("table", "recipe", "data", "row", "seed")] == place
            if here and _relevant(run) == wanted:
                group = found.setdefault(json.dumps([*place[:3], shared], sort_keys=True), {})
                group.setdefault(run["setting"], []).append((cfg, run))

    def rank(pairs: list[_Pair]) -> tuple:
        cfg, run = pairs[0]
        finished = [run for _, run in pairs if run["status"] == "finished"]
        newest = max((str(run.get("finished")) for run in finished), default="")
        return run.get("code") == identity.core_version(), _matches_request(cfg, run), len(finished), newest

    def best(settings: dict[str, list[_Pair]]) -> str:
        names = list(settings)  # of one there is nothing to ask: the version of the code takes a while
        return names[0] if len(names) == 1 else max(names, key=lambda name: (*rank(settings[name]), name))

    return set(map(best, found.values()))


def _relevant(run: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a flat run, without what is absent or decides nothing."""
    config = {key: value for key, value in run.items() if key.startswith("config.") and value is not None}
    return {key: value for key, value in config.items() if key.split(".")[1] not in INCIDENTAL}


def _matches_request(cfg: Config, record: dict[str, Any]) -> bool:
    """Whether a record is of the device, and of the determinism, that a cell asks for."""
    if found := skip.finished_record(cfg):
        return record["fingerprint"] == found["fingerprint"]
    device = cfg.device
    if device == "auto" and "torch" in sys.modules:  # else the runs took place in other processes, perhaps elsewhere
        device = "cuda" if sys.modules["torch"].cuda.is_available() else "cpu"
    kind = "cpu" if str(record.get("environment.device")).startswith("cpu") else "cuda"
    return device in ("auto", kind) and cfg.deterministic in ("auto", record.get("deterministic"))


def _experiments() -> list[Path]:
    """Folders of table definitions: ours, then those of --config-dir and of the search path, which may replace ours."""
    hydra = GlobalHydra.instance()
    sources = hydra.config_loader().get_sources() if hydra.is_initialized() else []
    folders = [Path(source.path, "experiments").resolve() for source in reversed(sources) if source.scheme() == "file"]
    return [EXPERIMENTS, *(f for f in dict.fromkeys(folders) if f.is_dir() and f != EXPERIMENTS.resolve())]


@contextmanager
def warn_instead(what: str, told: list[str] | None = None) -> Iterator[None]:
    """One printed line, which is also added to `told`, in place of an exception."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        line = f"warning: {what}: {text}"
        log_line(line, sys.stderr)
        if told is not None:
            told.append(line)
