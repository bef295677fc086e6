"""Between Hydra and a run: what a composed job means, and what is shown when jobs are over."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fpn_ablate import finished, plan, report, stopping, unchanged
from fpn_ablate.console import say
from fpn_ablate.errors import UserError, first_line
from fpn_ablate.files import MODEL, PICTURES, clear_leftovers, unwritable
from fpn_ablate.locks import cell_lock, lock, only_one
from fpn_ablate.paths import EXPERIMENTS
from fpn_ablate.report import live
from fpn_ablate.report.records import flatten, under
from fpn_ablate.report.tables import show
from fpn_ablate.schema import INCIDENTAL, Coco, Config, TimmBackbone
from fpn_ablate.validation import keys, unknown_key, validate

# The table that shows a task, or a training of Faster R-CNN, where none is named; of any other its own name.
TABLES = {"rpn": "table1_rpn", "fast_rcnn": "table2_fast_rcnn", "separate": "table3_faster_rcnn"}
# Overrides that do not make another recipe: what names the row, the data and the place has a name of its own.
_NAMED_ELSEWHERE = (
    *("ablation", "seed", "recipe", "data", "data.root", "data.label", "task", "task.training", "experiments", "mode"),
)
_PLACES = ("data.train.", "data.val.")
ROOM = 2**16  # bytes that must be free: what a row writes before its weights
# Where factors lie. Data and recipe name a table of their own.
_MODEL = ("backbone", "neck", "head", "task")


def cell_config(composed: DictConfig, choices: dict[str, Any], overrides: Sequence[str]) -> Config:
    """What Hydra composed for a job, as a validated `Config` that knows its row's and its recipe's name.

    The row is called after its file in conf/ablation, and after the factors that the command line, or the sweep of an
    experiment's file, adds to it; the recipe after all other keys: `fpn+upsample=bilinear`, `quick+steps=100`.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:  # a `${...}` that leads nowhere, or to itself
        raise UserError(f"{error.full_key}: {first_line(error)}") from None
    assert isinstance(values, dict)
    values.pop("report", None)  # how a table looks is not the run's business
    values.pop("hydra", None)
    parts = (o.lstrip("+~").split("=", 1) for o in overrides if "=" in o)
    pairs = sorted((key, _as_named(key, value)) for key, value in parts)
    for group in ("ablation", "task", "recipe"):
        if not (values | {"ablation": choices.get("ablation")}).get(group):
            raise UserError(f"{group}: missing; give {group}=...")
    if not isinstance(name := values["recipe"].get("name"), str):
        raise UserError(f"recipe.name={name!r}: must be a text, after which tables are called")
    row, recipe = [str(choices["ablation"])], [name]
    factors = declared_factors(values.get("factors"))
    task = values["task"]
    if values.get("mode") == "evaluate":
        factors = values["factors"] = [*factors, "weights"]  # a table of files, or of one file's network under several switches
        values["table"] = values["table"] or f"evaluated_{task.get('name')}"
        if "training" in task:
            task["training"] = "joint"  # however it was trained, it is one network now, whose RPN makes its proposals
    for key, value in pairs:
        group = key.split(".")[0]
        if under(key, factors):
            row.append(f"{key.removeprefix('neck.').removeprefix('task.')}={value}")
        elif not (key in _NAMED_ELSEWHERE or group in (*INCIDENTAL, "hydra") or "/" in key or key.startswith(_PLACES)):
            recipe.append(f"{key.removeprefix('recipe.')}={value}")
    asked = str(task.get("training", task.get("name")))
    values["table"] = values["table"] or TABLES.get(asked, asked)
    values["row"] = "+".join(row)
    values["recipe"]["name"] = "+".join(recipe)
    cfg = validate(values)
    if isinstance(cfg.backbone, TimmBackbone):
        from fpn_ablate.model import timm_backbone  # seconds, with torch and timm

        timm_backbone.check(cfg.backbone.model)
    return cfg


def _as_named(key: str, value: str) -> str:
    """What an override adds to a name. A path is named by its last part: records travel, folders do not."""
    if key == "backbone":  # timm/resnet50 is no path, and not resnet50
        return value
    folder, _, name = value.rstrip("/").rpartition("/")
    if name == MODEL:  # every run's weights are called so
        name = folder.rpartition("/")[2] or name
    return {"True": "true", "False": "false"}.get(name, name)  # Hydra writes the jobs of a sweep so


def declared_factors(declared: Any) -> list[str]:
    """The factors, or UserError if one of them is no key, or one in which the rows of a table cannot differ."""
    factors = [item for item in declared if isinstance(item, str)] if isinstance(declared, list) else []
    for factor in factors:
        if factor not in set(keys()):
            raise UserError(f"factors: {unknown_key(factor)}")
        if factor.split(".")[0] not in _MODEL:
            raise UserError(f"factors: {factor} cannot be one. Allowed: {', '.join(_MODEL)}, and the keys in them")
    return factors


def data_name(cfg: Config) -> str:
    """The data set's name in tables: `shapes`, or the label or folder of a COCO-format set."""
    return (cfg.data.label or Path(cfg.data.root).expanduser().resolve().name) if isinstance(cfg.data, Coco) else cfg.data.name


def refuse_unwritable(out: str) -> None:
    """UserError if runs cannot be written below `out`, or there is no room for the least of them."""
    try:
        runs = Path(out, "runs")
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs) as file:
            file.write(bytes(ROOM))
            file.flush()
            os.fsync(file.fileno())  # a network disk tells of a quota no earlier
    except OSError as error:
        raise UserError(f"out={unwritable(Path(out), error)}, out=FOLDER") from None


def announce(cells: Iterable[Config]) -> None:
    """Leave word of a sweep that starts, and have its page written while it runs. Raises nothing."""
    from fpn_ablate import identity

    cells = list(cells)
    for out in sorted({cfg.out for cfg in cells}):
        with _warning(f"no page of how far the sweep below {out} is"):
            own = [cfg for cfg in cells if cfg.out == out]
            names = [(cfg.table, cfg.recipe.name, data_name(cfg), cfg.row, cfg.seed, cfg.steps) for cfg in own]
            plan.write(Path(out, "runs"), [plan.Cell(*cell) for cell in names], identity.code_version())
            if live.wanted():
                live.start(Path(out), _experiments())
                say(f"the sweep in a browser: {Path(out, live.NAME)}")


def mark_killed(cfg: Config, error: str) -> None:
    """Say in its record that a cell has failed whose process is gone, which could not. Raises nothing."""
    from fpn_ablate import identity, record

    def of_this_code() -> dict[str, Any] | None:
        known = record.read(folder) or {}
        return known if (known.get("status"), known.get("code")) == ("running", identity.code_version()) else None

    with _warning(f"no word of {cfg.row} seed {cfg.seed} in its record"):
        for folder in finished.cell_folder(cfg, "").parent.glob(f"seed{cfg.seed}-*"):
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
    stopping.hurry_no_more()
    cells = list(cells)
    unpublished.clear()
    for out in sorted({cfg.out for cfg in cells}):
        with _warning(f"no table of {out}", unpublished):
            plan.end(Path(out, "runs"))
            if Path(out, "runs").is_dir() and stopping.asked() != signal.SIGTERM:
                # Another sweep that ends now would write a ledger without what this one has added.
                with only_one(Path(out, "runs", plan.FOLDER, ".locks", "tables"), f"the tables of {out}"):
                    places = [Path(out, name) for name in ("", "tables", "plots", "figures", "backbones")]
                    clear_leftovers([*places, *Path(out, "runs", PICTURES).glob("*")])
                    _publish([cfg for cfg in cells if cfg.out == out], Path(out))


def _publish(cells: list[Config], out: Path) -> None:
    runs, experiments = out / "runs", _experiments()
    state = unchanged.state(runs, experiments)  # before it is read: what changes in between is not in the tables
    frame, errors = report.load(runs), []
    only = {(cfg.table, cfg.recipe.name, data_name(cfg)) for cfg in cells}
    settings = settings_of(cells, frame.to_dict("records"))
    made_from = state and unchanged.digest([state, sorted(only), sorted(settings), live.wanted()])
    tables = report.collate(frame, only, experiments, settings, errors)
    for table in tables:
        with _warning(f"{table.name} is not shown", unpublished):
            show(table)
    for error in errors:
        say(f"error: {error}", sys.stderr)
    if unchanged.is_written(runs, made_from):
        say(f"written before, and as it was: {', '.join(table.name for table in tables)} in {out}")
        return
    written, before = [], len(unpublished)
    for table in tables:
        with _warning(f"{table.name} is not written", unpublished):
            written += report.save_table(table, out)
            say(f"written: {Path(out, 'tables', table.name)}.md .csv .tex, {Path(out, 'plots', table.name)}.png .svg")
    with _warning(f"{out / 'ledger.csv'} is not written", unpublished):
        report.write_ledger(frame, out / "ledger.csv")
        written.append(out / "ledger.csv")
    with _warning(f"{out / live.NAME} is not written", unpublished):
        if live.wanted() and (page := live.write(runs, out, experiments, first=tables)):
            written.append(page)
            say(f"written: {page}")
    if len(unpublished) == before:
        unchanged.leave(runs, made_from, written)


unpublished: list[str] = []  # what the last `publish` of this process could not show or write

_Pair = tuple[Config, dict[str, Any]]  # a cell and a record of it, flat


def settings_of(cells: Iterable[Config], records: list[dict[str, Any]]) -> set[str]:
    """The settings of these cells' own records (flat ones). Cells that share all but the declared factors share a setting.

    Where such cells have records of several (of an older version, of another machine), it is the one of the present code and of
    the device asked for, then the one that has most cells, then the newest.
    """
    from fpn_ablate import identity

    found: dict[str, dict[str, list[_Pair]]] = {}
    for cfg in cells:
        wanted = _relevant(flatten({"config": identity.portable(cfg)}))
        shared = {key: value for key, value in wanted.items() if not under(key, cfg.factors, "config.")}
        shared.pop("config.seed")
        place = [cfg.table, cfg.recipe.name, data_name(cfg), cfg.row, cfg.seed]
        for record in records:
            here = [record[key] for key in ("table", "recipe", "data", "row", "seed")] == place
            if here and _relevant(record) == wanted:
                group = found.setdefault(json.dumps([*place[:3], shared], sort_keys=True), {})
                group.setdefault(record["setting"], []).append((cfg, record))

    def rank(pairs: list[_Pair]) -> tuple:
        cfg, record = pairs[0]
        finished = [record for _, record in pairs if record["status"] == "finished"]
        newest = max((str(record.get("finished")) for record in finished), default="")
        return record.get("code") == identity.code_version(), _as_asked(cfg, record), len(finished), newest

    def best(settings: dict[str, list[_Pair]]) -> str:
        names = list(settings)  # of one there is nothing to ask: the version of the code takes a while
        return names[0] if len(names) == 1 else max(names, key=lambda name: (*rank(settings[name]), name))

    return set(map(best, found.values()))


def _relevant(record: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a flat record, without what is absent or decides nothing."""
    config = {key: value for key, value in record.items() if key.startswith("config.") and value is not None}
    return {key: value for key, value in config.items() if key.split(".")[1] not in INCIDENTAL}


def _as_asked(cfg: Config, record: dict[str, Any]) -> bool:
    """Whether a record is of the device, and of the determinism, that a cell asks for."""
    if found := finished.known(cfg):
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
def _warning(what: str, told: list[str] | None = None) -> Iterator[None]:
    """One printed line, which is also added to `told`, in place of an exception."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        line = f"warning: {what}: {text}"
        say(line, sys.stderr)
        if told is not None:
            told.append(line)


def without_hydra(composed: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])


def refuse_twins(cells: Sequence[Config]) -> None:
    """Two rows that are the same configuration would fill two lines with one result."""
    seen: dict[str, Config] = {}
    named: dict[tuple[str, str, str, int], Config] = {}
    for cfg in cells:
        other = named.setdefault((cfg.table, cfg.recipe.name, cfg.row, cfg.seed), cfg)
        if other.weights != cfg.weights:
            raise Refused(f"weights={other.weights} and {cfg.weights} are both the row {cfg.row}: give the files other names")
        twin = seen.setdefault(cfg.model_dump_json(exclude={*INCIDENTAL, "row"}), cfg)
        if twin.row != cfg.row:
            raise Refused(f"rows {twin.row} and {cfg.row} are the same configuration: take one of them out")


class Refused(ConfigCompositionException):
    """A UserError in Hydra's clothes: Hydra prints its message without a traceback."""


@contextmanager
def refusal(leave: bool = False) -> Iterator[None]:
    """Turns a UserError into `Refused`, or, with `leave`, into its message and the exit code 2."""
    try:
        yield
    except UserError as error:
        if leave:
            print(error, file=sys.stderr)
            raise SystemExit(2) from None
        raise Refused(str(error)) from None
