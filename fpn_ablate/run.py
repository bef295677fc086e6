"""One cell, from its configuration to its record: seed -> data -> model -> train -> evaluate -> record.

A cell finds out itself whether it is finished (returns its record), resumable (goes on from its checkpoint) or new. So a
sweep can be started again at any time, with any launcher.
"""

import re
import shutil
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock

from fpn_ablate import identity, record, tasks
from fpn_ablate.cost import latency_ms, peak_memory_mib, reset_peak_memory
from fpn_ablate.data.loader import evaluation_batches
from fpn_ablate.errors import Diverged
from fpn_ablate.evaluate import collect, declared_truth
from fpn_ablate.inputs import Inputs, is_deterministic, prepare
from fpn_ablate.metrics import average_precision, average_recall
from fpn_ablate.model import build
from fpn_ablate.schema import Config
from fpn_ablate.sinks import Console, JsonLines, Wandb
from fpn_ablate.train import autocast
from fpn_ablate.verify import row_facts

KEPT = ("metrics.jsonl", "model.pt", "detections.npz")  # beside config.yaml and record.json, of a finished cell


def run(cfg: Config, job: int = 0) -> dict[str, Any]:
    """Carry out a cell and return its record.

    Raises:
        UserError: bad input, before anything is trained. Any other exception leaves a record that says what happened.
    """
    return _run(cfg, prepare(cfg), job)


def _run(cfg: Config, inputs: Inputs, job: int) -> dict[str, Any]:
    facts = _facts(cfg, inputs)
    fingerprint = identity.fingerprint(facts)
    folder = cell_folder(cfg, fingerprint)
    with FileLock(Path(_lock_folder(cfg), fingerprint)):  # one for a cell, whatever tables it stands in
        known = record.read(folder)
        if known and known["status"] == "finished":
            print(f"{cfg.row} seed {cfg.seed}: finished before, {folder}")
            return known
        folder.mkdir(parents=True, exist_ok=True)
        cell = Cell(cfg, inputs, facts, folder, job)
        twin = _finished(cfg, fingerprint)
        return _taken_over(cell, twin) if twin else _recorded(cell)


def _lock_folder(cfg: Config) -> Path:
    folder = Path(cfg.out, "runs", ".locks")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _finished(cfg: Config, fingerprint: str) -> Path | None:
    """The folder of a finished run of a cell, in whatever table it stands."""
    for folder in sorted(Path(cfg.out, "runs").glob(f"*/*/*/seed{cfg.seed}-{fingerprint[:8]}")):
        known = record.read(folder)
        finished = known and known["status"] == "finished" and known["fingerprint"] == fingerprint
        if finished and all((folder / name).exists() for name in KEPT):
            return folder
    return None


def _taken_over(cell: "Cell", twin: Path) -> dict[str, Any]:
    """The same cell in another table: its files and its record, under the names that it has in this one."""
    print(f"{cell.cfg.row} seed {cell.cfg.seed}: the same run as {twin}, taken over")
    for name in KEPT:
        shutil.copyfile(twin / name, cell.folder / name)
    _write_config(cell)
    named = {key: value for key, value in cell.describe().items() if key in ("setting", "table", "recipe", "row", "config")}
    known = (record.read(twin) or {}) | named
    record.write(cell.folder, known)
    return known


def _facts(cfg: Config, inputs: Inputs) -> dict[str, Any]:
    device, data = inputs.device, inputs.training.digest + inputs.validation.digest
    named = (record.device_name(device), is_deterministic(cfg, device))
    proposals = inputs.proposals if cfg.task.name == "fast_rcnn" else None
    return identity.facts(cfg, data, build.digest(inputs.weights), *named, proposals=proposals)


@dataclass
class Cell:
    """What a running cell holds."""

    cfg: Config
    inputs: Inputs
    facts: dict[str, Any]
    folder: Path
    job: int
    elsewhere: float = 0.0  # seconds that it spent on other cells
    built_on: dict[str, float] = field(default_factory=dict)  # fingerprints of those, with their training time in seconds
    sinks: list[JsonLines | Console | Wandb] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return identity.fingerprint(self.facts)

    def finished(self, cfg: Config) -> Path:
        """The folder of a finished run of another cell on the same inputs, in whatever table it stands; carried out now if
        there is none. Raises what that run raises."""
        began = time.monotonic()
        fingerprint = identity.fingerprint(_facts(cfg, self.inputs))
        folder = _finished(cfg, fingerprint)
        if folder is None:
            _run(cfg, self.inputs, self.job)
            folder = cell_folder(cfg, fingerprint)
        cost = record.read(folder)["cost"]
        self.elsewhere += time.monotonic() - began
        self.built_on[fingerprint] = cost["train_s"] + cost["sources_s"]
        return folder

    def log(self, step: int, values: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.log(step, values)

    def describe(self) -> dict[str, Any]:
        """The part of the record that is known before training."""
        cfg = self.cfg
        return {
            "fingerprint": self.fingerprint,
            "setting": identity.setting(self.facts, self.cfg.factors),
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
            "environment": record.environment(self.inputs.device),
            "deterministic": is_deterministic(cfg, self.inputs.device),
        }


def _recorded(cell: Cell) -> dict[str, Any]:
    """Carry out a cell; whatever happens, a record says so."""
    known = {**cell.describe(), "started": record.now()}
    cell.sinks = _sinks(cell)
    status, error, results = "interrupted", None, {}
    try:
        _write_config(cell)
        results = _carry_out(cell)
        status = "finished"
    except Diverged as problem:
        status, error = "diverged", str(problem)
        raise
    except Exception as problem:
        status, error = "failed", f"{type(problem).__name__}: {problem}"
        (cell.folder / "error.txt").write_text(traceback.format_exc())
        raise
    finally:
        outcome = {**known, "status": status, "error": error, "metrics": {}, **results, "finished": record.now()}
        record.write(cell.folder, outcome)
        for sink in cell.sinks:
            sink.close(exit_code=0 if status == "finished" else 1)
    for name in ("checkpoint.pt", tasks.STEP3, "error.txt"):  # a finished row's weights are in model.pt; an old error is over
        (cell.folder / name).unlink(missing_ok=True)
    return outcome


def _sinks(cell: Cell) -> list[JsonLines | Console | Wandb]:
    cfg, folder = cell.cfg, cell.folder
    sinks: list[JsonLines | Console | Wandb] = [
        JsonLines(folder / "metrics.jsonl", _logged_steps(cfg, folder)),
        Console(cfg, cell.job),
    ]
    if cfg.log.wandb != "off":
        sinks.append(Wandb(cfg, cell.fingerprint, folder))
    return sinks


def _write_config(cell: Cell) -> None:
    (cell.folder / "config.yaml").write_text(yaml.safe_dump(cell.cfg.model_dump(mode="json"), sort_keys=False))


def _carry_out(cell: Cell) -> dict[str, Any]:
    """Train and evaluate; returns the measured part of the record."""
    cfg, (device, training, validation) = cell.cfg, (cell.inputs.device, cell.inputs.training, cell.inputs.validation)
    facts = row_facts(cfg)
    reset_peak_memory(device)
    began = time.monotonic()
    trained = tasks.carry_out(cell)
    ended = time.monotonic()
    record.write_atomically(cell.folder / "model.pt", lambda temporary: torch.save(trained.model.state_dict(), temporary))
    trained.model.eval()
    found = collect(trained.answer, trained.validation, cfg, device, cfg.recipe.eval_images)
    record.write_atomically(cell.folder / "detections.npz", found.save)
    truth = declared_truth(validation, cfg)
    metrics, measured = average_recall(truth, found, validation.area_bounds), {}
    if found.labels is not None:
        metrics = {name: value for name, value in metrics.items() if name.startswith("AR100")}
        precision, per_class = average_precision(truth, found, validation.categories, validation.area_bounds)
        metrics, measured = precision | metrics, {"per_class": per_class, "proposals": trained.proposals}
    cell.log(cfg.steps, {name: value for name, value in metrics.items() if value is not None})
    evaluated = time.monotonic()
    return {
        "verify": facts.to_dict(),
        "metrics": metrics,
        **measured,
        "objects": object_sizes(truth, validation.area_bounds),
        "images": {
            "count": len(truth["images"]),
            "declared": len(validation),
            "digest": identity.digest([image["id"] for image in truth["images"]]),
        },
        "repairs": {"train": getattr(training, "repairs", {}), "val": getattr(validation, "repairs", {})},
        "cost": {
            "pretrain_s": cell.inputs.pretrained.seconds if cell.inputs.pretrained else 0.0,
            "pretrain_accuracy": cell.inputs.pretrained.accuracy if cell.inputs.pretrained else None,
            "train_s": round(ended - began - cell.elsewhere, 1),
            "sources_s": round(sum(cell.built_on.values()), 1),
            "eval_s": round(evaluated - ended, 1),
            "steps": cfg.steps,
            "peak_memory_mib": peak_memory_mib(device),
            "latency_ms": latency_of(trained, cfg, device),
        },
    }


def latency_of(trained: tasks.Trained, cfg: Config, device: torch.device) -> float:
    """Milliseconds for the first image of the validation split alone, from pixels to what the task puts out (Sec. 5.2)."""
    recipe = cfg.recipe
    sides = {"short_side": recipe.short_side, "max_side": recipe.max_side}
    batch = next(evaluation_batches(trained.validation, batch_size=1, count=1, **sides)).to(device)

    @torch.no_grad()
    def once() -> None:
        with autocast(cfg, device):
            trained.whole(batch)

    return round(latency_ms(once, device), 2)


def object_sizes(truth: dict[str, Any], bounds: tuple[float, float]) -> dict[str, int]:
    """Objects by size as COCO's evaluator sorts them (one exactly on a bound counts on both sides); crowds left out."""
    areas = [a.get("area", a["bbox"][2] * a["bbox"][3]) for a in truth["annotations"] if not a.get("iscrowd")]
    low, high = bounds
    return {
        "small": sum(area <= low for area in areas),
        "medium": sum(low <= area <= high for area in areas),
        "large": sum(area >= high for area in areas),
    }


def cell_folder(cfg: Config, fingerprint: str) -> Path:
    """results/runs/<table>/<recipe>/<row>/seed<k>-<fingerprint>: readable, and one cell's own."""
    parts = [safe_name(part) for part in (cfg.table, cfg.recipe.name, cfg.row)]
    return Path(cfg.out, "runs", *parts, f"seed{cfg.seed}-{fingerprint[:8]}")


def safe_name(text: str) -> str:
    """Letters, digits and . _ + - alone, at most 80 of them, never starting with a dot."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).lstrip(".")[:80] or "unnamed"


def _logged_steps(cfg: Config, folder: Path) -> int:
    """The last step whose log line a resumed cell keeps; 0 for a new one."""
    before = cfg.recipe.steps if (folder / tasks.STEP3).exists() else 0
    path = folder / "checkpoint.pt"
    return before + (torch.load(path, weights_only=True, map_location="cpu")["step"] if path.exists() else 0)
