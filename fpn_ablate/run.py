"""One cell, from its configuration to its record: seed -> data -> model -> train -> evaluate -> record.

A cell finds out itself whether it is finished (returns its record), resumable (goes on from its checkpoint) or new. So a
sweep can be started again at any time, with any launcher.
"""

import re
import resource
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock

from fpn_ablate import identity, record
from fpn_ablate.data import coco, shapes
from fpn_ablate.data.sample import DetectionDataset
from fpn_ablate.errors import Diverged, UserError
from fpn_ablate.evaluate import declared_truth, propose
from fpn_ablate.metrics import average_recall
from fpn_ablate.model import build
from fpn_ablate.pretrain import Pretrained, ensure
from fpn_ablate.schema import Config, Shapes
from fpn_ablate.seeding import set_deterministic
from fpn_ablate.sinks import Console, JsonLines, Wandb
from fpn_ablate.train import train
from fpn_ablate.verify import row_facts


def run(cfg: Config, job: int = 0) -> dict[str, Any]:
    """Carry out a cell and return its record.

    Raises:
        UserError: bad input, before anything is trained. Any other exception leaves a record that says what happened.
    """
    device = pick_device(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    set_deterministic(is_deterministic(cfg, device))
    training, validation = load_data(cfg)
    pretrained = ensure(cfg, world(cfg), Path(cfg.out) / "backbones", device) if _pretrains(cfg) else None
    weights = build.backbone_weights(cfg, pretrained.path if pretrained else None)
    data = training.digest + validation.digest
    facts = identity.facts(cfg, data, build.digest(weights), record.device_name(device), is_deterministic(cfg, device))
    folder = cell_folder(cfg, identity.fingerprint(facts))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        known = record.read(folder)
        if known and known["status"] == "finished":
            print(f"{cfg.row} seed {cfg.seed}: finished before, {folder}")
            return known
        return _recorded(Cell(cfg, device, training, validation, pretrained, weights, facts, folder, job))


@dataclass
class Cell:
    """What a running cell holds."""

    cfg: Config
    device: torch.device
    training: DetectionDataset
    validation: DetectionDataset
    pretrained: Pretrained | None
    weights: dict[str, torch.Tensor] | None
    facts: dict[str, Any]
    folder: Path
    job: int

    def __post_init__(self) -> None:
        lines = JsonLines(self.folder / "metrics.jsonl", resume_from=_checkpoint_step(self.folder))
        self.sinks = [lines, Console(self.cfg, self.job)]
        if self.cfg.log.wandb != "off":
            self.sinks.append(Wandb(self.cfg, self.fingerprint, self.folder))

    @property
    def fingerprint(self) -> str:
        return identity.fingerprint(self.facts)

    def log(self, step: int, values: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.log(step, values)

    def describe(self) -> dict[str, Any]:
        """The part of the record that is known before training."""
        cfg = self.cfg
        return {
            "fingerprint": self.fingerprint,
            "setting": identity.setting(self.facts),
            "code": self.facts["code"],
            "table": cfg.table,
            "recipe": cfg.recipe.name,
            "data": self.validation.name,
            "generated": self.validation.generated,
            "task": cfg.task.name,
            "row": cfg.row,
            "seed": cfg.seed,
            "config": identity.portable(cfg),
            "environment": record.environment(self.device),
            "deterministic": is_deterministic(cfg, self.device),
        }


def _recorded(cell: Cell) -> dict[str, Any]:
    """Carry out a cell; whatever happens, a record says so."""
    known = {**cell.describe(), "started": record.now()}
    status, error, results = "interrupted", None, {}
    try:
        (cell.folder / "config.yaml").write_text(yaml.safe_dump(cell.cfg.model_dump(mode="json"), sort_keys=False))
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
    for name in ("checkpoint.pt", "error.txt"):  # the weights of a finished row are in model.pt; an old error is over
        (cell.folder / name).unlink(missing_ok=True)
    return outcome


def _carry_out(cell: Cell) -> dict[str, Any]:
    """Train, propose, evaluate; returns the measured part of the record."""
    cfg, device = cell.cfg, cell.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    facts = row_facts(cfg)
    model = build.build_detector(cfg)
    build.initialise(model, cfg.seed)
    if cell.weights is not None:
        build.load_backbone(model.backbone, cell.weights)
    model.to(device, memory_format=torch.channels_last)  # a quarter less time a step, on a CPU as well
    began = time.monotonic()
    train(model, cell.training, cfg, device, cell.folder / "checkpoint.pt", cell.log)
    trained = time.monotonic()
    record.write_atomically(cell.folder / "model.pt", lambda temporary: torch.save(model.state_dict(), temporary))
    detections = propose(model, cell.validation, cfg, device)
    record.write_atomically(cell.folder / "detections.npz", detections.save)
    truth = declared_truth(cell.validation, cfg)
    metrics = average_recall(truth, detections, cell.validation.area_bounds)
    cell.log(cfg.recipe.steps, {name: value for name, value in metrics.items() if value is not None})
    return {
        "verify": facts.to_dict(),
        "metrics": metrics,
        "objects": object_sizes(truth, cell.validation.area_bounds),
        "images": {
            "count": len(truth["images"]),
            "declared": len(cell.validation),
            "digest": identity.digest([image["id"] for image in truth["images"]]),
        },
        "repairs": {"train": getattr(cell.training, "repairs", {}), "val": getattr(cell.validation, "repairs", {})},
        "cost": {
            "pretrain_s": cell.pretrained.seconds if cell.pretrained else 0.0,
            "pretrain_accuracy": cell.pretrained.accuracy if cell.pretrained else None,
            "train_s": round(trained - began, 1),
            "eval_s": round(time.monotonic() - trained, 1),
            "steps": cfg.recipe.steps,
            "peak_memory_mib": _peak_memory(device),
        },
    }


def load_data(cfg: Config) -> tuple[DetectionDataset, DetectionDataset]:
    """Training and validation split; broken input is refused here, before anything is trained."""
    if isinstance(cfg.data, Shapes):
        # Rendering is what costs, so pictures that are not evaluated are not part of the set.
        splits = shapes.load(
            world(cfg), cfg.data.train_images, min(cfg.data.val_images, cfg.recipe.eval_images or cfg.data.val_images)
        )
        for split in splits:
            split.render_all(cfg.workers)
        return splits
    return coco.load(cfg.data)


def world(cfg: Config) -> shapes.World:
    """The generated world at the recipe's size. With other data it still serves to pre-train a backbone."""
    side = cfg.recipe.short_side
    if not isinstance(cfg.data, Shapes):
        return shapes.World(height=side, width=side)
    height, width = round(side * max(1, 1 / cfg.data.aspect)), round(side * max(1, cfg.data.aspect))
    numbers = cfg.data.model_dump(exclude={"name", "train_images", "val_images", "aspect"})
    return shapes.World(height=height, width=width, **numbers)


def object_sizes(truth: dict[str, Any], bounds: tuple[float, float]) -> dict[str, int]:
    """Objects by size as COCO's evaluator sorts them (one exactly on a bound counts on both sides); crowds left out."""
    areas = [a.get("area", a["bbox"][2] * a["bbox"][3]) for a in truth["annotations"] if not a.get("iscrowd")]
    low, high = bounds
    return {
        "small": sum(area <= low for area in areas),
        "medium": sum(low <= area <= high for area in areas),
        "large": sum(area >= high for area in areas),
    }


def is_deterministic(cfg: Config, device: torch.device) -> bool:
    """Whether the same seed gives the same bits on this machine."""
    return device.type == "cpu" if cfg.deterministic == "auto" else cfg.deterministic


def pick_device(cfg: Config) -> torch.device:
    if cfg.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU; use device=cpu or device=auto")
    return torch.device(cfg.device)


def cell_folder(cfg: Config, fingerprint: str) -> Path:
    """results/runs/<table>/<recipe>/<row>/seed<k>-<fingerprint>: readable, and one cell's own."""
    parts = [safe_name(part) for part in (cfg.table, cfg.recipe.name, cfg.row)]
    return Path(cfg.out, "runs", *parts, f"seed{cfg.seed}-{fingerprint[:8]}")


def safe_name(text: str) -> str:
    """Letters, digits and . _ + - alone, at most 80 of them, never starting with a dot."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).lstrip(".")[:80] or "unnamed"


def _pretrains(cfg: Config) -> bool:
    return cfg.backbone.weights == "pretrain"


def _checkpoint_step(folder: Path) -> int:
    """The step that a checkpoint holds; 0 without one."""
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True, map_location="cpu")["step"] if path.exists() else 0


def _peak_memory(device: torch.device) -> int:
    """MiB: of the GPU since the run began, or of the whole process since it began (a later row of a sweep includes earlier)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
