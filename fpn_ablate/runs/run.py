"""One cell, from its configuration to its record: seed -> data -> model -> train -> evaluate -> record.

A cell finds out itself whether it is finished (returns its record), resumable (goes on from its checkpoint) or new. So a
sweep can be started again at any time, with any launcher. Nothing here can change a figure; what can is in identity.CORE.
"""

import shutil
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from fpn_ablate.config.schema import Config, Recipe
from fpn_ablate.engine import procedures
from fpn_ablate.engine.cost import latency_of, peak_memory_mib, reset_peak_memory
from fpn_ablate.engine.evaluate import evaluate, predict
from fpn_ablate.engine.fixed_proposals import FILE as PROPOSALS
from fpn_ablate.engine.inputs import Inputs, is_deterministic, prepare
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.model.summary import row_facts
from fpn_ablate.runs import artifacts, environment, identity, skip
from fpn_ablate.store import record
from fpn_ablate.store.bootstrap_store import RESAMPLED
from fpn_ablate.store.layout import REQUIRED, run_folder, run_lock
from fpn_ablate.store.lookup import find_run, is_finished
from fpn_ablate.tracking.loggers import Console, JsonLines, Logger
from fpn_ablate.tracking.wandb_client import wandb_loggers
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import Diverged, UserError, first_line
from fpn_ablate.utils.files import TEMPORARY, save_text, write_atomically
from fpn_ablate.utils.locks import exclusive
from fpn_ablate.utils.paths import ARTIFACTS, DETECTIONS, METRICS, MODEL, RECORD
from fpn_ablate.weights import backbone

SHOWN = (RESAMPLED, ARTIFACTS)  # beside REQUIRED, unless the disk was full


def run(cfg: Config, job: int = 0) -> dict[str, Any]:
    """Carry out a cell and return its record.

    Raises:
        UserError: bad input, before anything is trained. Any other exception leaves a record that says what happened.
    """
    begun, inputs = time.time(), prepare(cfg)
    known = _run(cfg, inputs, job)
    skip.write_skip_entry(cfg, inputs, known["fingerprint"], begun)
    return known


def _run(cfg: Config, inputs: Inputs, job: int) -> dict[str, Any]:
    facts = _fingerprint_inputs(cfg, inputs)
    run = Run(cfg, inputs, facts, run_folder(cfg, identity.fingerprint(facts)), job)
    # One lock for a cell, whatever tables it stands in.
    with exclusive(run_lock(cfg.out, run.fingerprint), f"{cfg.row} seed {cfg.seed}"):
        known = record.read(run.folder)
        if is_finished(known, run.fingerprint):
            skip.print_finished(cfg, run.folder)
            _remove_leftovers(run.folder)
            return known
        twin = find_run(cfg.out, cfg.seed, run.fingerprint)
        return _copy_cached_run(run, twin) if twin else _run_and_record(run)


def _fingerprint_inputs(cfg: Config, inputs: Inputs) -> dict[str, Any]:
    device, data = inputs.device, inputs.training.digest + inputs.validation.digest
    named = (environment.device_name(device), is_deterministic(cfg.deterministic, device))
    proposals = inputs.proposals_digest if cfg.task.name == "fast_rcnn" else None
    weights = inputs.checkpoint.digest if inputs.checkpoint else backbone.weights_digest(inputs.weights)
    return identity.fingerprint_inputs(cfg, data, weights, *named, proposals=proposals)


@dataclass
class Run:
    """A cell that is being carried out.

    Attributes:
        built_on: fingerprints of the cells that it stands on, with the training time of each in seconds.
        resumed_at: steps that an earlier start has done, which this one's times do not count.
        retried: what the first attempt died of, and what the second does otherwise, where there is one (`_fitted`).
    """

    cfg: Config
    inputs: Inputs
    facts: dict[str, Any]
    folder: Path
    job: int
    built_on: dict[str, float] = field(default_factory=dict)
    sinks: list[Logger] = field(default_factory=list)
    retried: dict[str, Any] | None = None
    started: str | None = None
    resumed_at: int = 0

    @property
    def fingerprint(self) -> str:
        return identity.fingerprint(self.facts)

    def log(self, step: int, values: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.log(step, values)

    def open_sinks(self) -> None:
        cfg, folder = self.cfg, self.folder
        self.resumed_at = procedures.logged_steps(folder, cfg)
        self.sinks = [JsonLines(folder / METRICS, self.resumed_at), Console(f"{cfg.row} seed {cfg.seed}", cfg.steps, self.job)]
        self.sinks += wandb_loggers(self.describe(), folder, cfg.log.wandb)

    def write_config(self) -> None:
        text = yaml.safe_dump(self.cfg.model_dump(mode="json"), sort_keys=False)
        save_text(self.folder / "config.yaml", text)

    def begin(self) -> None:
        """Write all of the record that a killed process leaves."""
        record.write(self.folder, self.known() | {"status": "running", "error": None, "metrics": {}})

    def known(self) -> dict[str, Any]:
        """The part of the record that is not measured."""
        return {**self.describe(), "started": self.started, **({"retried": self.retried} if self.retried else {})}

    def describe(self) -> dict[str, Any]:
        """The part of the record that is known before training."""
        cfg = self.cfg
        return {
            "fingerprint": self.fingerprint,
            "setting": identity.comparison_key(self.facts, cfg.factors),
            "code": self.facts["code"],
            "weights": self.facts["weights"],
            "table": cfg.table,
            "recipe": cfg.recipe.name,
            "data": self.inputs.validation.name,
            "generated": self.inputs.validation.generated,
            "task": cfg.task.name,
            "row": cfg.row,
            "seed": cfg.seed,
            "config": identity.portable(cfg),
            "environment": environment.environment(self.inputs.device),
            "deterministic": is_deterministic(cfg.deterministic, self.inputs.device),
        }


def _copy_cached_run(run: Run, twin: Path) -> dict[str, Any]:
    """The same cell in another table: its files and its record, under the names that it has in this one."""
    log_line(f"{run.cfg.row} seed {run.cfg.seed}: the same run as {twin}, taken over")
    for name in (*REQUIRED, *(name for name in SHOWN if (twin / name).exists())):
        write_atomically(run.folder / name, partial(shutil.copyfile, twin / name))
    run.write_config()
    named = {key: value for key, value in run.describe().items() if key in ("setting", "table", "recipe", "row", "config")}
    known = (record.read(twin) or {}) | named
    record.write(run.folder, known)
    _remove_leftovers(run.folder)  # of an attempt of its own
    for copy in wandb_loggers(known, run.folder, run.cfg.log.wandb):
        copy.close()
    return known


def _run_and_record(run: Run) -> dict[str, Any]:
    """Carry out a cell; whatever happens, a record says so."""
    run.started = record.now()
    run.retried = (record.read(run.folder) or {}).get("retried")  # its checkpoint is of that attempt
    status, error, results = "interrupted", None, {}
    try:
        for leftover in (*run.folder.glob(TEMPORARY), run.folder / PROPOSALS):  # of a killed process; of other weights
            leftover.unlink(missing_ok=True)
        run.write_config()
        run.begin()
        results = _train_and_evaluate(run)
        status = "finished"
    except Diverged as problem:
        status, error = "diverged", str(problem)
        raise
    except Exception as problem:
        signals.raise_if_stopped()  # the same signal took the processes that load images
        status, error = "failed", f"{type(problem).__name__}: {problem}"
        text = traceback.format_exc()
        with suppress(UserError):
            save_text(run.folder / "error.txt", text)
        raise
    finally:
        with signals.defer_interrupts():
            signals.cancel_deadline()
            outcome = {**run.known(), "status": status, "error": error, "metrics": {}, **results}
            outcome["finished"] = record.now()
            _write_outcome(run, outcome)
    _remove_leftovers(run.folder)
    log_line(f"{run.cfg.row} seed {run.cfg.seed}: finished, {run.folder}")
    signals.raise_if_stopped()
    return outcome


def _remove_leftovers(folder: Path) -> None:
    """A finished row's weights are in model.pt, an old error is over, and a killed process writes no more."""
    for leftover in (*folder.glob(TEMPORARY), *(folder / name for name in (*procedures.TEMPORARY, "error.txt"))):
        leftover.unlink(missing_ok=True)


def _write_outcome(run: Run, outcome: dict[str, Any]) -> None:
    is_finished = outcome["status"] == "finished"
    try:
        record.write(run.folder, outcome)
    except UserError as problem:  # a full disk must not hide what it was that failed
        if is_finished:
            with suppress(UserError):  # the page would show for ever that it is under way
                record.write(run.folder, outcome | {"status": "failed", "error": str(problem), "metrics": {}})
            raise
    finally:
        for sink in run.sinks:
            sink.close(exit_code=0 if is_finished else 1)


def _train_and_evaluate(run: Run) -> dict[str, Any]:
    """Train and evaluate; returns the measured part of the record."""
    cfg, device, training = run.cfg, run.inputs.device, run.inputs.training
    facts = row_facts(cfg)
    sources = {name: _source_folder(run, source) for name, source in procedures.sources(cfg).items()}
    run.open_sinks()
    cell = procedures.RunContext(cfg, run.inputs, run.folder, run.fingerprint, sources, run.log)
    times = [time.monotonic()]
    supply = procedures.prepare_proposals(cell)
    times.append(time.monotonic())
    reset_peak_memory(device)
    trained = _train_with_oom_retry(run, cell, supply)
    times.append(time.monotonic())
    write_atomically(run.folder / MODEL, lambda temporary: torch.save(trained.model.state_dict(), temporary))
    found = predict(trained.predict, trained.validation, cfg.recipe, device, workers=cfg.workers, count=cfg.recipe.eval_images)
    write_atomically(run.folder / DETECTIONS, found.save)
    evaluated = evaluate(found, run.inputs.validation, cfg.recipe.eval_images)
    run.log(cfg.steps, {name: value for name, value in evaluated["metrics"].items() if value is not None})
    times.append(time.monotonic())
    peak = peak_memory_mib(device)  # of the row, not of what the report wants beside its figures
    proposed, trained_for, evaluated_for = (round(b - a, 1) for a, b in pairwise(times))
    pretrained = run.inputs.pretrained
    return {
        "verify": facts.to_dict(),
        **evaluated,
        **_make_artifacts(run, trained, found),
        **({"proposals": trained.proposals} if trained.proposals else {}),
        "repairs": {"train": getattr(training, "repairs", {}), "val": getattr(run.inputs.validation, "repairs", {})},
        "built_on": sorted(map(list, run.built_on.items())),
        "cost": {
            "pretrain_s": pretrained.seconds if pretrained else 0.0,
            "pretrain_accuracy": pretrained.accuracy if pretrained else None,
            "proposals_s": proposed,
            "train_s": trained_for,
            "eval_s": evaluated_for,
            "steps": cfg.steps,
            "resumed_at": run.resumed_at,
            "peak_memory_mib": peak,
            "latency_ms": latency_of(trained, cfg.recipe, device),
        },
    }


def _train_with_oom_retry(run: Run, cell: procedures.RunContext, supply: procedures.ProposalSupply) -> procedures.Trained:
    """The trained row. Where a GPU has no room for a batch, training begins anew, once, on the same images a step in parts."""
    if run.retried:
        cell = _in_parts(cell, run.retried["accumulate"])
    try:
        return procedures.train_or_load(cell, supply)
    except torch.cuda.OutOfMemoryError as error:
        parts = more_parts(cell.cfg.recipe)
        if run.retried or parts is None:
            raise
        reason = first_line(error)
    # Not in the handler: its traceback holds on to what the first attempt had on the GPU.
    log_line(f"{run.cfg.row} seed {run.cfg.seed}: {reason}; again with recipe.accumulate={parts}", sys.stderr)
    for name in procedures.TEMPORARY:  # before the mark: no checkpoint is of both attempts
        (run.folder / name).unlink(missing_ok=True)
    run.retried = {"after": reason, "accumulate": parts}
    run.begin()
    for sink in run.sinks:
        sink.close(exit_code=1)
    run.open_sinks()
    reset_peak_memory(run.inputs.device)
    return procedures.train_or_load(_in_parts(cell, parts), supply)


def _in_parts(cell: procedures.RunContext, parts: int) -> procedures.RunContext:
    recipe = cell.cfg.recipe.model_copy(update={"accumulate": parts})
    return replace(cell, cfg=cell.cfg.model_copy(update={"recipe": recipe}))


def more_parts(recipe: Recipe) -> int | None:
    """Parts of 2 images, as on each of the paper's 8 GPUs, or, where they have no more already, of 1; None if they have 1."""
    images = recipe.batch_size // recipe.accumulate
    smaller = [n for n in (2, 1) if n < images and recipe.batch_size % n == 0]
    return recipe.batch_size // smaller[0] if smaller else None


def _make_artifacts(run: Run, trained: procedures.Trained, found: DetectionSet) -> dict[str, Any]:
    """What a report shows beyond the figures; it can be made later, so nothing in it is a reason to lose the run."""
    try:
        levels = artifacts.activation_maps(trained.model, trained.validation, run.cfg.recipe, run.inputs.device)
        return artifacts.make_artifacts(run.folder, trained.validation, found, run.cfg.recipe.eval_images, levels)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        log_line(f"warning: {reason}; python -m fpn_ablate artifacts {run.folder} makes up for it", sys.stderr)
        return {}


def _source_folder(run: Run, cfg: Config) -> Path:
    """The folder of a finished run of another cell on the same inputs, which is carried out now if there is none."""
    fingerprint = identity.fingerprint(_fingerprint_inputs(cfg, run.inputs))
    folder = find_run(cfg.out, cfg.seed, fingerprint)
    if folder is None:
        folder = run_folder(cfg, fingerprint)
        # Asked for are its weights, which somebody has removed; the record is written after them.
        if is_finished(record.read(folder), fingerprint) and not all((folder / name).exists() for name in REQUIRED):
            (folder / RECORD).unlink()
        try:
            _run(cfg, run.inputs, run.job)
        except Diverged as problem:
            raise Diverged(f"what it builds on, row {cfg.row} in {folder}, {problem}") from None
    known = record.read(folder) or {}
    run.built_on |= dict(known.get("built_on", [])) | {fingerprint: known["cost"]["train_s"]}
    return folder
