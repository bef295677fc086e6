"""Say what a command is about to do, and about how long that will take."""

from collections.abc import Sequence

from fpn_ablate.config.schema import Config, Shapes
from fpn_ablate.config.sources import sources
from fpn_ablate.engine.versions import core_version
from fpn_ablate.runs.skip import finished_record
from fpn_ablate.store.layout import row_folder
from fpn_ablate.store.pace import expected_pace, needs_pretraining, steps_done
from fpn_ablate.utils.console import about, log_line, log_words


def announce_run(cfg: Config, bare: bool = False) -> None:
    """Print what a single run is. `bare`: the command names none, so say that this is the default, and what else there is."""
    if bare:
        log_line("No row is named: this trains fpn. --help lists rows, tables and commands.")
    what = f"{cfg.steps} steps" if cfg.mode == "train" else f"evaluates {cfg.weights}"
    if done := _steps_done(cfg):
        what = f"continues, about {done} of {cfg.steps} steps done"
    log_words(f"Row {cfg.row} of {cfg.table}, seed {cfg.seed}: {what}, {_time([cfg], 1)}", "  ")
    log_words(f"  {_setting(cfg)}", "  ")
    _warn_of_warmup([cfg])


def announce_sweep(cells: Sequence[Config], pending: Sequence[Config], at_once: int | None) -> None:
    """Print which rows a sweep has yet to run; `at_once`: on this machine, None elsewhere."""
    rows = list(dict.fromkeys(cfg.row for cfg in pending))
    names = ", ".join(rows if len(rows) <= 6 else [*rows[:5], f"{len(rows) - 5} more"])
    seeds = sorted({cfg.seed for cfg in pending})
    count = f"{len(pending)} run{'s' * (len(pending) != 1)}"
    begun = sum(_steps_done(cfg) > 0 for cfg in pending)
    count += f", {begun} begun before" if begun else ""
    count += f", {len(cells) - len(pending)} finished before" if len(cells) > len(pending) else ""
    settings = dict.fromkeys(_setting(cfg) for cfg in pending)
    parallel = f", {at_once} at once" if at_once and at_once > 1 else ""
    time = f", {_time(pending, at_once)}" if at_once else ""
    seed = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    log_words(f"{count}{parallel}{time}: {names}", "  ")
    log_words(f"  {seed}, {' | '.join(settings)}", "  ")
    _warn_of_warmup(pending)


def _setting(cfg: Config) -> str:
    data = "generated data" if isinstance(cfg.data, Shapes) else f"data {cfg.data_name}"
    return f"{data}, recipe {cfg.recipe.name}"


def _warn_of_warmup(cells: Sequence[Config]) -> None:
    """Say so if a row's learning rate never reaches its full value."""
    short = [cfg for cfg in cells if cfg.mode == "train" and 0 < cfg.steps <= cfg.recipe.schedule.warmup_steps]
    if short:
        steps, warmup = short[0].steps, short[0].recipe.schedule.warmup_steps
        log_line(f"  the learning rate stays below its full value: {steps} steps, all of them warm-up")
        log_line(f"  (recipe.schedule.warmup_steps={warmup})")


def _time(cells: Sequence[Config], at_once: int) -> str:
    runs = [*cells, *_unfinished_sources(cells)]
    rows = {row_folder(cfg): cfg for cfg in runs}
    paces = {folder: expected_pace(cfg) for folder, cfg in rows.items()}  # once a row: it looks at all records of the table
    if None in paces.values():
        return "time not known yet"
    total = sum(paces[row_folder(cfg)].seconds(cfg, _steps_done(cfg)) for cfg in runs) / at_once
    return about(total) + (", after pre-training" if any(map(needs_pretraining, cells)) else "")


def _steps_done(cfg: Config) -> int:
    return steps_done(cfg, core_version())


def _unfinished_sources(cells: Sequence[Config]) -> list[Config]:
    """Return the runs that the cells build on and that are not finished, each once: the RPN of Table 2 is that of all rows."""
    found = {(row_folder(run), run.seed): run for cfg in cells for run in sources(cfg).values()}
    unfinished = [run for run in found.values() if not finished_record(run)]
    return unfinished and [*unfinished, *_unfinished_sources(unfinished)]
