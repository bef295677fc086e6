"""What several test files share: configurations composed as the command line composes them, and the measuring scripts."""

import dataclasses
import functools
import importlib.util
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig
from records import make_record

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
def groups_are_composed_once():
    """Keep what Hydra makes of the same choices of groups, which takes a tenth of a second, and give each composition a copy.

    Values are set on the copy by Hydra's own code. With files of a test's own (`--config-dir`) nothing is kept.
    """
    read, kept = ConfigRepository.load_config, {}
    list_files, merge = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list

    def once(repository: IConfigRepository, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        sources = repository.get_sources()
        if any(source.provider == "command-line" for source in sources):
            return make()
        key = (*(source.path for source in sources), *key)
        if key not in kept:
            kept[key] = pickle.dumps(make())
        return pickle.loads(kept[key])

    def load_config(repository: ConfigRepository, config_path: str) -> ConfigResult | None:
        return once(repository, (config_path,), lambda: read(repository, config_path))

    def create_defaults_list(
        repo: IConfigRepository, config_name: str, overrides_list: list[Override], **how: bool
    ) -> DefaultsList:
        single = [o for o in overrides_list if not o.is_sweep_override()]
        values = [o for o in single if not repo.group_exists(o.key_or_group)]
        choices = [o for o in single if o not in values]
        key = (config_name, *(o.input_line for o in choices), *how.items())
        listed = once(repo, key, lambda: list_files(repo, config_name, choices, **how))
        return dataclasses.replace(listed, config_overrides=values)

    def compose_files(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        return once(repo, (*map(repr, defaults),), lambda: merge(self, defaults, repo))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load_config)
        patch.setattr(config_loader_impl, "create_defaults_list", create_defaults_list)
        patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", compose_files)
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
