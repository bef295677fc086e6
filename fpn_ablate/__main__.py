"""The command line: `python -m fpn_ablate [-m] key=value ...`, and `python -m fpn_ablate verify [key=value ...]`."""

import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fpn_ablate.errors import UserError
from fpn_ablate.paths import CONF, EXPERIMENTS, PLUGINS, ROOT
from fpn_ablate.schema import keys, unknown_key
from fpn_ablate.sweep import cell_config, publish, refusal, refuse_unwritable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one cell, a sweep, or the verifier; returns the exit code (2: bad input)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verifying = arguments[:1] == ["verify"]
    try:
        arguments = normalise(arguments[1:] if verifying else arguments)
        _introduce()
        if verifying:
            return _verify(arguments)
    except (UserError, CompactHydraException) as error:
        print(error, file=sys.stderr)
        return 2
    sys.argv[1:] = arguments
    _job()
    return 0


def _introduce() -> None:
    """Make the sweeper and the resolver of conf/config.yaml known to Hydra."""
    if str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))
    OmegaConf.register_new_resolver("fpn_ablate_root", lambda: f"file://{ROOT}", replace=True)


def normalise(arguments: Sequence[str]) -> list[str]:
    """Refuse keys that do not exist, and let `experiments=table1` stand for the one file whose name begins so.

    Hydra itself would advise `+neck.topdown=true` for a misspelt key, which it accepts and nothing reads.
    """
    known, result = {*keys(), "ablation"}, []
    for argument in arguments:
        key, equals, value = argument.lstrip("+~").partition("=")
        if argument.startswith("-") or not equals:
            result.append(argument)
            continue
        key = key.split("@")[0]
        if key == "experiments":
            argument = f"+experiments={','.join(_experiment(name) for name in value.split(','))}"
        elif key not in known and not key.startswith(("hydra.", "hydra/")):
            raise UserError(unknown_key(key))
        result.append(argument)
    return result


def _experiment(name: str) -> str:
    found = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
    matches = [name] if name in found else [stem for stem in found if stem.startswith(name)]
    if len(matches) > 1:
        raise UserError(f"experiments={name}: which of {', '.join(matches)}?")
    return matches[0] if matches else name  # Hydra knows more folders (--config-dir), and lists what there is


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def _job(composed: DictConfig) -> None:
    """What Hydra calls for a cell; everything heavy is imported here, so that a mistyped key is told at once."""
    from fpn_ablate.run import run

    _usual_processes()
    context = HydraConfig.get()
    with refusal():
        cfg = cell_config(composed, context.runtime.choices, context.overrides.task)
        refuse_unwritable(cfg.out)
        single = context.mode == RunMode.RUN
        try:
            run(cfg, 0 if single else context.job.num)
        finally:
            if single:
                publish([cfg])


def _usual_processes() -> None:
    """Start processes in the platform's way: joblib's launcher leaves loky's in its workers, where torch's loader fails."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method(None, force=True)


def _verify(overrides: list[str]) -> int:
    """Print what each row of conf/ablation is, before anything is trained."""
    from hydra import compose, initialize_config_dir
    from rich.console import Console
    from rich.table import Table

    from fpn_ablate.verify import PAPER_SIZE, row_facts

    rows = sorted(path.stem for path in Path(CONF, "ablation").glob("*.yaml"))
    chosen = [o.split("=", 1)[1].split(",") for o in overrides if o.startswith("ablation=")]
    overrides = [o for o in overrides if not o.startswith("ablation=")]
    table = Table(title=f"Rows, one image of {PAPER_SIZE[0]} x {PAPER_SIZE[1]} pixels")
    for column in (
        "row",
        "feature",
        "# anchors",
        "lateral?",
        "top-down?",
        "finest level sees",
        "parameters",
        "trained",
        "GFLOPs",
    ):
        table.add_column(column, justify="right" if column in ("# anchors", "parameters", "trained", "GFLOPs") else "left")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for row in chosen[0] if chosen else rows:
            cfg = cell_config(compose("config", [*overrides, f"ablation={row}"]), {"ablation": row}, overrides)
            facts = row_facts(cfg)
            marks = ["✓" if on else "" for on in (facts.lateral, facts.top_down)]
            counts = [f"{facts.params:,}", f"{facts.trained:,}", f"{facts.gflops:,.1f}"]
            table.add_row(cfg.row, facts.feature, f"{facts.anchors:,}", *marks, " ".join(facts.reach), *counts)
    Console(width=max(120, Console().width)).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
