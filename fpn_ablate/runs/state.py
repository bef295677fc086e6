"""State of a run in progress: its identity, its files and its loggers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fpn_ablate.config import user_parts
from fpn_ablate.config.schema import Config
from fpn_ablate.config.sources import sources as sources_of
from fpn_ablate.engine.inputs import Inputs, is_deterministic
from fpn_ablate.model.precision import uses_bf16
from fpn_ablate.runs import environment, identity
from fpn_ablate.runs.ranks import RankGroup
from fpn_ablate.store import record
from fpn_ablate.store.layout import run_folder
from fpn_ablate.store.pace import expected_pace
from fpn_ablate.tracking.loggers import JsonLines, Logger, Throughput
from fpn_ablate.tracking.progress import Progress
from fpn_ablate.tracking.tensorboard_client import TensorBoard, require_tensorboard
from fpn_ablate.tracking.wandb_client import wandb_loggers
from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.paths import CONFIG, METRICS, THROUGHPUT
from fpn_ablate.utils.threads import default_threads
from fpn_ablate.weights import backbone


@dataclass
class Run:
    """A run in progress.

    Attributes:
        job: position of the run in its sweep, for the time left on the console.
        threads: CPU threads; if not given and threads=null, those of an earlier start or of the runs that it builds on, or
            torch's own choice.
        wait: for locks that other processes hold; otherwise `Held` is raised.
        group: the processes that carry it out.
        facts: everything that decides the figures (`identity.fingerprint_inputs`).
        built_on: fingerprint -> training seconds of the runs that it builds on.
        resumed_at: steps that an earlier start has done; the times in the record do not include them.
    """

    cfg: Config
    inputs: Inputs
    job: int
    threads: int | None = None
    wait: bool = True
    group: RankGroup | None = None
    facts: dict[str, Any] = field(init=False)
    folder: Path = field(init=False)
    built_on: dict[str, float] = field(default_factory=dict)
    loggers: list[Logger] = field(default_factory=list)
    progress: Progress | None = None
    started: str | None = None
    resumed_at: int = 0

    def __post_init__(self) -> None:
        cfg, inputs = self.cfg, self.inputs
        if cfg.log.tensorboard:
            require_tensorboard()
        data = "".join(inputs.digests(cfg.task.masks))
        weights = inputs.checkpoint.digest if inputs.checkpoint else backbone.weights_digest(inputs.weights)
        machine = (environment.device_name(inputs.device), is_deterministic(cfg.deterministic, inputs.device))
        facts = identity.fingerprint_inputs(
            cfg, data, weights, *machine, inputs.proposals_digest, bf16=uses_bf16(cfg.recipe.bf16, inputs.device)
        )
        chosen, on_cpu = self.threads or cfg.threads, inputs.device.type == "cpu"
        if on_cpu and not chosen:
            chosen = self._threads_of_earlier_start(facts) or self._threads_of_sources()
        self.threads = chosen or default_threads()
        self.facts = facts | ({"threads": self.threads} if on_cpu else {})
        self.folder = run_folder(self.cfg, self.fingerprint)

    def _threads_of_earlier_start(self, facts: dict[str, Any]) -> int | None:
        """Return the number of threads of a run, in any table, that differs from this one in it alone; None without one.

        That run is then resumed, skipped or copied. One with torch's own choice goes first, then a finished one.
        """
        own, earlier = default_threads(), []
        for folder in sorted(Path(self.cfg.out, "runs").glob(f"*/*/*/seed{self.cfg.seed}-*")):
            content = record.read(folder) or {}
            made_on = content.get("environment")
            number = made_on.get("threads") if isinstance(made_on, dict) else None
            if type(number) is int and content.get("fingerprint") == identity.fingerprint(facts | {"threads": number}):
                earlier.append((number != own, content.get("status") != "finished", number))
        return min(earlier)[-1] if earlier else None

    def _threads_of_sources(self) -> int | None:
        """Return the number of threads of the runs that this one builds on: rows that share an RPN share it whatever it is."""
        return next((Run(source, self.inputs, self.job).threads for source in sources_of(self.cfg).values()), None)

    @property
    def fingerprint(self) -> str:
        return identity.fingerprint(self.facts)

    @property
    def title(self) -> str:
        return f"{self.cfg.row} seed {self.cfg.seed}"

    def describe(self) -> dict[str, Any]:
        """Return the keys of the record that are not measured."""
        cfg = self.cfg
        splits = dict(zip(("train", "val"), self.inputs.splits, strict=True))
        # Generated pictures have no files.
        hashed = {name: split.hashed for name, split in splits.items() if hasattr(split, "hashed")}
        return {
            "fingerprint": self.fingerprint,
            "setting": identity.comparison_key(self.facts, cfg.factors),
            "code": self.facts["code"],
            "parts": {module: sha for files in self.facts["parts"].values() for module, sha in files.items()},
            "weights": self.facts["weights"],
            "table": cfg.table,
            "recipe": cfg.recipe.name,
            "data": self.inputs.validation.name,
            "generated": self.inputs.validation.generated,
            "data_digest": dict(zip(splits, self.inputs.digests(cfg.task.masks), strict=True)),
            **({"data_hash": hashed} if hashed else {}),
            "task": cfg.task.name,
            "row": cfg.row,
            "seed": cfg.seed,
            "config": identity.portable(cfg),
            "environment": environment.environment(self.inputs.device),
            "deterministic": is_deterministic(cfg.deterministic, self.inputs.device),
            "bf16": "bf16" in self.facts,
            **({"user_parts": user_parts.describe(cfg.user_parts)} if cfg.user_parts else {}),
            "started": self.started,
        }

    def write_config(self) -> None:
        """Write config.yaml."""
        save_text(self.folder / CONFIG, yaml.safe_dump(self.cfg.model_dump(mode="json"), sort_keys=False))

    def open_loggers(self) -> None:
        """Open the loggers; they drop lines of steps that the checkpoint does not have."""
        cfg, folder = self.cfg, self.folder
        self.progress = Progress(
            self.title,
            cfg.steps,
            self.job,
            self.resumed_at,
            images=cfg.recipe.batch_size,
            parts=cfg.recipe.accumulate // cfg.gpus,
            expected=expected_pace(cfg),
        )
        self.loggers = [
            JsonLines(folder / METRICS, self.resumed_at),
            Throughput(folder / THROUGHPUT, cfg.recipe.batch_size),
            self.progress,
        ]
        self.loggers += [TensorBoard(folder, self.resumed_at)] if cfg.log.tensorboard else []
        self.loggers += wandb_loggers(self.describe(), folder, cfg.log.wandb)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log named values at a step."""
        for logger in self.loggers:
            logger.log(step, values)
