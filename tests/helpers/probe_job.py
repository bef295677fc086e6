"""A job of a sweep that trains nothing: it writes down where it runs, or fails as FPN_ABLATE_PROBE says for its row."""

import json
import os
import signal
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fpn_ablate.sweep.jobs import job_scope


def run(composed: DictConfig) -> float:
    row = HydraConfig.get().runtime.choices.ablation
    fault = dict(pair.split(":") for pair in os.environ.get("FPN_ABLATE_PROBE", "").split()).get(row)
    with job_scope(composed.on_failure):
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "failed":
            raise ValueError(f"{row} has failed")
        names = ("FPN_ABLATE", "OMP_", "SECRET", "WANDB_")
        variables = {name: value for name, value in os.environ.items() if name.startswith(names)}
        Path(composed.out, f"{row}.json").write_text(json.dumps({"folder": os.getcwd(), "variables": variables}))
    return 1.0
