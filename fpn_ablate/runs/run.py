"""One run, from its configuration to its record: is it known? -> inputs -> build -> train -> predict -> evaluate -> record.

A run finds out itself whether it is finished (then it returns its record), resumable (then it continues from its checkpoint) or
new. So you can start a sweep again at any time, with any launcher. `engine.versions` finds the code that can change a
figure; nothing in this module can.
"""

import shutil
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fpn_ablate.config.schema import Config
from fpn_ablate.config.sources import sources as sources_of
from fpn_ablate.engine import procedures
from fpn_ablate.engine.cost import end_to_end_latency_ms, end_to_end_memory_mib, peak_memory_mib, reset_peak_memory
from fpn_ablate.engine.evaluate import evaluate
from fpn_ablate.engine.inputs import prepare
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.model.summary import row_facts
from fpn_ablate.runs import artifacts, skip, stages
from fpn_ablate.runs.pyramid import inspect_pyramid
from fpn_ablate.runs.ranks import RankGroup
from fpn_ablate.runs.state import Run
from fpn_ablate.store import record
from fpn_ablate.store.layout import REQUIRED, find_run, is_finished, run_lock
from fpn_ablate.tracking.progress import preparing
from fpn_ablate.tracking.wandb_client import wandb_loggers
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import duration, log_line
from fpn_ablate.utils.errors import Diverged, UserError
from fpn_ablate.utils.files import TEMPORARY, refuse_links_out, save_text, write_atomically
from fpn_ablate.utils.locks import Held, exclusive
from fpn_ablate.utils.paths import ARTIFACTS, DETECTIONS, ERROR, MODEL, PROPOSALS, PROPOSED, RECORD, RESAMPLED, THROUGHPUT
from fpn_ablate.utils.threads import num_threads

OPTIONAL = (
    RESAMPLED,
    ARTIFACTS,
    PROPOSED,
    THROUGHPUT,
)  # files beside REQUIRED; missing if the disk was full, or the task has none


def run(cfg: Config, job: int = 0, wait: bool = True) -> dict[str, Any]:
    """Return the record of a run; train and evaluate it first unless it is finished. `job`: its position in the sweep.

    Raises:
        UserError: bad input, before anything is trained. Any other exception leaves a record that says what happened.
        Held: another process works on the run or on what it builds on, and `wait` is False.
    """
    start = time.time()
    with preparing(cfg, job) as report:
        inputs = prepare(cfg, wait, report)
    with RankGroup(cfg, inputs.device) as group:
        outcome = _run(Run(cfg, inputs, job, wait=wait, group=group))
    skip.write_skip_entry(cfg, inputs, outcome["fingerprint"], start)
    return outcome


def run_sources(cfg: Config, job: int = 0) -> None:
    """Carry out what a run builds on: pre-training, and the runs that `config.sources` names, with their proposals.

    Raises:
        Held: another process works on one of the runs. A pre-training by another process, which is short, is waited for.
        As `run`.
    """
    start = time.time()
    with preparing(cfg, job) as report:
        inputs = prepare(cfg, report=report)
    sources = sources_of(cfg)
    with RankGroup(cfg, inputs.device) as group:
        run = Run(cfg, inputs, job, wait=False, group=group)
        with num_threads(run.threads):
            folders = {role: _finish_source(run, source) for role, source in sources.items()}
            context = procedures.RunContext(cfg, inputs, run.folder, run.fingerprint, folders, run.log, run.wait)
            stages.prepare_proposals(context)  # of several ranks, by this one alone
    for source in sources.values():
        skip.write_skip_entry(source, inputs, Run(source, inputs, job, run.threads).fingerprint, start)


def _run(run: Run) -> dict[str, Any]:
    """Return the record of a finished run, copy that of the same run in another table, or carry the run out."""
    cfg = run.cfg
    lock_file = run_lock(cfg.out, run.fingerprint)
    refuse_links_out(cfg.out, run.folder, lock_file)
    with exclusive(lock_file, run.title, run.wait), num_threads(run.threads):
        saved = record.read(run.folder)
        if is_finished(saved, run.fingerprint):
            skip.print_finished(cfg, run.folder)
            _remove_leftovers(run.folder)
            return saved
        cached = find_run(cfg.out, cfg.seed, run.fingerprint)
        return _copy_cached_run(run, cached) if cached else _run_and_record(run)


def _run_and_record(run: Run) -> dict[str, Any]:
    """Train and evaluate; write a record whatever happens."""
    run.started, begun = record.now(), time.monotonic()
    status, error, results = "interrupted", None, {}
    try:
        for leftover in (*run.folder.glob(TEMPORARY), run.folder / PROPOSALS):  # of a killed process; of other weights
            leftover.unlink(missing_ok=True)
        run.write_config()
        run.resumed_at = procedures.logged_steps(run.folder, run.cfg)
        # The record that a killed process leaves.
        unfinished = {"status": "running", "error": None, "metrics": {}, "cost": {"resumed_at": run.resumed_at}}
        record.write(run.folder, run.describe() | unfinished)
        results = _train_and_evaluate(run)
        status = "finished"
    except Diverged as problem:
        status, error = "diverged", str(problem)
        raise
    except Held:
        raise  # the record says "interrupted": the run continues once the lock is free
    except Exception as problem:
        signals.raise_if_stopped()  # the same signal may have killed the loader's workers
        status, error = "failed", f"{type(problem).__name__}: {problem}"
        text = traceback.format_exc()
        with suppress(UserError):
            save_text(run.folder / ERROR, text)
            problem.add_note(f"traceback of {run.title}: {run.folder / ERROR}")  # other processes get the message alone
        raise
    finally:
        with signals.defer_interrupts():
            outcome = {**run.describe(), "status": status, "error": error, "metrics": {}, **results, "finished": record.now()}
            _write_outcome(run, outcome)
    _remove_leftovers(run.folder)
    _print_summary(run, outcome, time.monotonic() - begun)
    signals.raise_if_stopped()
    return outcome


def _train_and_evaluate(run: Run) -> dict[str, Any]:
    """Train and evaluate; return the measured keys of the record."""
    cfg, inputs, recipe = run.cfg, run.inputs, run.cfg.recipe
    facts = row_facts(cfg)
    sources = {role: _finish_source(run, source) for role, source in sources_of(cfg).items()}
    run.open_loggers()
    ranks = run.group.send(cfg, sources, run.threads, run.facts)
    context = procedures.RunContext(
        cfg, inputs, run.folder, run.fingerprint, sources, run.log, run.wait, ranks, run.progress.advance_part
    )
    times = [time.monotonic()]
    supply = stages.prepare_proposals(context)
    times.append(time.monotonic())
    reset_peak_memory(inputs.device)
    trained = stages.train(context, supply)
    times.append(time.monotonic())
    write_atomically(run.folder / MODEL, lambda temporary: torch.save(trained.model.state_dict(), temporary))
    count = min(recipe.eval_images or sys.maxsize, len(inputs.validation))
    run.progress.begin("evaluating", -(-count // cfg.gpus))
    detections, proposals = stages.test(context, trained, run.progress.advance)
    run.progress.begin("finishing", 0)
    write_atomically(run.folder / DETECTIONS, detections.save)
    if proposals is not None:
        write_atomically(run.folder / PROPOSED, proposals.save)
    evaluated = evaluate(detections, inputs.validation, recipe.eval_images, proposals)
    evaluated["images"] |= {"trained_on": True} if inputs.trains_on_validation else {}
    run.log(cfg.steps, {name: value for name, value in evaluated["metrics"].items() if value is not None})
    times.append(time.monotonic())
    proposals_s, train_s, eval_s = (round(b - a, 1) for a, b in pairwise(times))
    peak = peak_memory_mib(inputs.device)  # before the artifacts, which are no cost of the row
    pretrained = inputs.pretrained
    return {
        "verify": facts.to_dict(),
        **evaluated,
        **_make_artifacts(run, trained, detections, proposals),
        **({"proposals": trained.proposals} if trained.proposals else {}),
        **({"fusion": [list(item) for item in shares.items()]} if (shares := trained.model.neck.fusion_shares) else {}),
        "repairs": {name: getattr(split, "repairs", {}) for name, split in zip(("train", "val"), inputs.splits, strict=True)},
        "built_on": sorted(map(list, run.built_on.items())),
        "cost": {
            "pretrain_s": pretrained.seconds if pretrained else 0.0,
            "pretrain_accuracy": pretrained.accuracy if pretrained else None,
            "proposals_s": proposals_s,
            "train_s": train_s,
            "eval_s": eval_s,
            "steps": cfg.steps,
            "resumed_at": run.resumed_at,
            "peak_memory_mib": peak,
            "latency_ms": end_to_end_latency_ms(trained, recipe, inputs.device),
            "test_memory_mib": end_to_end_memory_mib(trained, recipe, inputs.device),
        },
    }


def _finish_source(run: Run, cfg: Config) -> Path:
    """Return the folder of a run on the same inputs that `run` builds on; carry that run out unless it is finished."""
    source = Run(cfg, run.inputs, run.job, run.threads, run.wait, run.group)
    folder = find_run(cfg.out, cfg.seed, source.fingerprint)
    if folder is None:
        folder = source.folder
        # A finished run whose weights someone has removed is trained again; its new record is written after the weights.
        if is_finished(record.read(folder), source.fingerprint) and not all((folder / name).exists() for name in REQUIRED):
            (folder / RECORD).unlink()
        try:
            _run(source)
        except Diverged as problem:
            raise Diverged(f"row {cfg.row}, which it builds on ({folder}), {problem}") from None
    saved = record.read(folder) or {}
    run.built_on |= dict(saved.get("built_on", [])) | {source.fingerprint: saved["cost"]["train_s"]}
    return folder


def _make_artifacts(
    run: Run, trained: procedures.Trained, detections: DetectionSet, proposals: DetectionSet | None
) -> dict[str, Any]:
    """Make what the report shows beside the figures. A failure costs a warning, not the run: it can be made later."""
    try:
        count = run.cfg.recipe.eval_images
        inspected = inspect_pyramid(trained.model, trained.validation, run.cfg.recipe, run.inputs.device, count)
        return artifacts.make_artifacts(run.folder, trained.validation, detections, count, inspected, proposals)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        log_line(f"warning: {reason}; make it later: python -m fpn_ablate artifacts {run.folder}", sys.stderr)
        return {}


def _copy_cached_run(run: Run, cached: Path) -> dict[str, Any]:
    """Copy the files and the record of the same run in another table, under this table's names."""
    log_line(f"{run.title}: copied from the same run in {cached}")
    for name in (*REQUIRED, *(name for name in OPTIONAL if (cached / name).exists())):
        write_atomically(run.folder / name, partial(shutil.copyfile, cached / name))
    run.write_config()
    names = {key: value for key, value in run.describe().items() if key in ("setting", "table", "recipe", "row", "config")}
    outcome = (record.read(cached) or {}) | names
    record.write(run.folder, outcome)
    _remove_leftovers(run.folder)  # of an earlier attempt in this table
    for logger in wandb_loggers(outcome, run.folder, run.cfg.log.wandb):
        logger.close()
    return outcome


def _write_outcome(run: Run, outcome: dict[str, Any]) -> None:
    """Write the final record and close the loggers."""
    try:
        record.write(run.folder, outcome)
    except UserError as problem:  # a full disk must not hide why the run failed
        if outcome["status"] == "finished":
            with suppress(UserError):  # otherwise the page would show the run as running forever
                record.write(run.folder, outcome | {"status": "failed", "error": str(problem), "metrics": {}})
            raise
    finally:
        for logger in run.loggers:
            logger.close()


def _print_summary(run: Run, outcome: dict[str, Any], seconds: float) -> None:
    """Print a finished run's first figures in a line, and where it is: there too, or where a terminal is narrow below it."""
    figures = {name: value for name, value in outcome["metrics"].items() if value is not None and "_" not in name}
    percent = [f"{name.replace('AR', 'AR@')} {100 * value:.1f}" for name, value in figures.items()]
    since = f" from step {run.resumed_at} of {run.cfg.steps}" if run.resumed_at else ""
    line = ", ".join([f"{run.title}: finished in {duration(seconds)}{since}", *percent[:3]])
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    separator = ", " if len(line) + 2 + len(str(run.folder)) <= width else "\n  "
    log_line(f"{line}{separator}{run.folder}")


def _remove_leftovers(folder: Path) -> None:
    """Remove what a finished run no longer needs: checkpoints, an old error, temporary files of killed processes."""
    temporaries = [file for file in folder.glob(TEMPORARY) if not file.name.startswith(f".{PROPOSALS}")]  # another's lock
    for leftover in (*temporaries, *(folder / name for name in (*procedures.RESUME_FILES, ERROR))):
        leftover.unlink(missing_ok=True)
