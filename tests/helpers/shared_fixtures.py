"""What several test files share: configurations composed as the command line composes them, and the measuring scripts."""

import copy
import functools
import importlib.util
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose as hydra_compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig
from records import make_record

from fpn_ablate.config import composition
from fpn_ablate.config.composition import compose
from fpn_ablate.config.schema import Config
from fpn_ablate.evaluation import bootstrap
from fpn_ablate.report.formats import plots
from fpn_ablate.report.html import figures, live

os.environ.setdefault(live.SWITCH, "off")  # a page takes seconds; the tests of the page take this back
FACTS: dict[str, Any] = {}  # of rows, by their configuration


@functools.cache
def composed(*overrides: str) -> Config:
    named = any(o.startswith("recipe=") for o in overrides)
    return compose(overrides if named else ("recipe=smoke", *overrides))


@pytest.fixture(scope="session")
def config():
    """`config("ablation=c4", "neck.smooth=none")` -> a validated Config; recipe=smoke unless told otherwise."""
    return composed


@pytest.fixture(scope="session")
def script():
    """`script("benchmarks/speed")` -> scripts/benchmarks/speed.py as a module."""

    def load(name):
        path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """Keep the tests out of the user's cache, in the processes that they start too."""
    os.environ["FPN_ABLATE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_waits_for_the_disk():
    """Check a descriptor in place of flushing it: a tiny run flushes 30 times, which takes as long as its training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: os.fstat(number))
        yield


@pytest.fixture(scope="session", autouse=True)
def few_replicates():
    """Draw 20 bootstrap samples of the images of a run: the usual 400 take a quarter of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "REPLICATES", 20)
        yield


@pytest.fixture(scope="session", autouse=True)
def files_are_read_once():
    """Keep what Hydra reads of the package's own files: every composition reads the same twenty, for a third of its time.

    Each composition gets a copy, since Hydra changes what it gets.
    """
    read, pickled = ConfigRepository.load_config, {}

    def load_config(repository: ConfigRepository, config_path: str) -> ConfigResult | None:
        if any(source.provider == "command-line" for source in repository.get_sources()):
            return read(repository, config_path)
        key = (*(source.path for source in repository.get_sources()), config_path)
        if key not in pickled:
            pickled[key] = pickle.dumps(read(repository, config_path))
        return pickle.loads(pickled[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load_config)
        yield


@pytest.fixture(scope="session", autouse=True)
def files_are_composed_once():
    """Set keys of a composition's groups on a copy of what the groups give, by Hydra's own function.

    Hydra composes the same groups again for every value, which takes a tenth of a second. Files of a test's own are left to it,
    and whatever is more than `group.key=value`.
    """
    parser, bases = OverridesParser.create(), {}

    def compose_groups(config_name: str, overrides: list[str]) -> DictConfig:
        values = [o for o in overrides if re.match(r"\+*(?!hydra\.)\w+(\.\w+)+=", o)]
        groups = tuple(o for o in overrides if o not in values)
        path = GlobalHydra.instance().config_loader().get_search_path().get_path()
        if not values or any(folder.provider == "command-line" for folder in path):
            return hydra_compose(config_name, overrides)
        parsed = parser.parse_overrides(values)
        if any(o.is_sweep_override() for o in parsed):
            return hydra_compose(config_name, overrides)  # refuses them
        if groups not in bases:
            bases[groups] = hydra_compose(config_name, list(groups))
        composed = copy.deepcopy(bases[groups])
        ConfigLoaderImpl._apply_overrides_to_config(parsed, composed)
        return composed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composition, "hydra_compose", compose_groups)
        yield


@pytest.fixture(scope="session", autouse=True)
def unmeasured():
    """Leave out what takes two thirds of a tiny run's time: 35 forward passes, walks through the process's memory.

    The facts of a row, for which it is built a second time, are computed once for the runs that share them. `measured` takes
    this back.
    """
    from fpn_ablate.runs import run as running

    compute = running.row_facts

    def row_facts(cfg: Config) -> Any:
        if cfg.user_parts:  # whose classes a configuration only names
            return compute(cfg)
        key = cfg.model_dump_json(include={"mode", "backbone", "neck", "rpn", "image_pyramid", "task", "recipe"})
        if key not in FACTS:
            FACTS[key] = compute(cfg)
        return FACTS[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "row_facts", row_facts)
        patch.setattr(running, "end_to_end_latency_ms", lambda *_: 1.0)
        patch.setattr(running, "end_to_end_memory_mib", lambda *_: 1)
        patch.setattr(running, "reset_peak_memory", lambda *_: None)
        yield


@pytest.fixture
def measured():
    """Let runs measure their latency and memory."""
    from fpn_ablate.engine import cost
    from fpn_ablate.runs import run as running

    with pytest.MonkeyPatch.context() as patch:
        for name in ("end_to_end_latency_ms", "end_to_end_memory_mib", "reset_peak_memory"):
            patch.setattr(running, name, getattr(cost, name))
        yield


@pytest.fixture(autouse=True)
def without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no plots where commands and sweeps are tested: they take half of a tiny sweep's time. `plotted` takes this back."""
    if request.path.parent.name in ("cli", "runs", "sweep") and "plotted" not in request.fixturenames:
        monkeypatch.setattr(plots, "render", lambda table: {})
        monkeypatch.setattr(figures, "render", lambda table: {})


@pytest.fixture
def plotted() -> None:
    """Let the test's sweeps draw their plots."""


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def put(runs: Path) -> Callable[..., Path]:
    """Write a record where a run would; returns the run's folder."""

    def write(row: str = "fpn", seed: int = 0, folder: str | None = None, **changes: Any) -> Path:
        record = make_record(row, seed, **changes)
        name = folder or f"seed{seed}-{record['fingerprint'][:8]}"
        place = runs / record["table"].replace("/", "_") / record["recipe"] / "x" / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "record.json").write_text(json.dumps(record), encoding="utf-8")
        return place

    return write


@pytest.fixture
def filled(runs: Path, put: Callable[..., Path]) -> Path:
    """A folder with the records of two rows at two seeds."""
    for row in ("c4", "fpn"):
        for seed in range(2):
            put(row, seed)
    return runs


@pytest.fixture(scope="session")
def ours():
    """`ours(3, "backbone=resnet18")` -> our Detector of 3 classes, with random weights."""
    from networks import randomise

    from fpn_ablate.model.build import build_detector

    def build(classes: int, *overrides: str, seed: int = 1, **how: Any) -> torch.nn.Module:
        return randomise(build_detector(composed(*overrides), num_classes=classes, **how), seed)

    return build


@pytest.fixture(scope="session")
def torchvision_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file of a detector of torchvision with ResNet-18 and 3 classes, and its state dict."""
    from networks import torchvision_detector

    path = tmp_path_factory.mktemp("torchvision") / "detector.pth"
    state = torchvision_detector().state_dict()
    torch.save(state, path)
    return path, state
