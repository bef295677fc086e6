"""The commands of the tutorials, run one after the other as a reader would, at recipe=smoke."""

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest
from documents import TEXTS, TUTORIALS, quoted, write_files

from fpn_ablate.cli.main import main, split_command
from fpn_ablate.tracking import progress

pytestmark = pytest.mark.slow
# Words of the documents, and what stands for them here. The generated set stands for a data set of the reader's.
STANDS_FOR = {
    "path/to/set": "set",
    "PATH": "set",
    "FOLDER": "exported",
    "ANNOTATIONS": "set/annotations/instances_val.json",
    "IMAGES": "set/images",
    "FILE": "set/annotations/instances_val.json",
    "data=coco2017": "data=coco",
    "gpus=8": "gpus=2",
    "recipe.accumulate=8": "recipe.accumulate=2",
    "jobs=8": "jobs=2",
    "hydra.launcher.n_jobs=8": "hydra.launcher.n_jobs=2",
    "hydra/launcher=slurm": "hydra/launcher=submitit_local",
}
SMALL_SET = ["--train", "8", "--val", "6", "--size", "64"]
NEEDED = {"hydra/launcher=ray": "ray", "hydra/launcher=submitit_local": "submitit", "hydra/sweeper=optuna": "optuna"}


def in_small(arguments: list[str]) -> list[str]:
    """Return the arguments of a run, with which it takes seconds."""
    kept = [argument for argument in arguments if not argument.startswith(("recipe=", "hydra.launcher.partition="))]
    added = ["recipe=smoke", "device=cpu"]
    if any(argument.startswith("+experiments=") for argument in kept):
        added.append("seed=2")
    if not any(argument.startswith(("jobs=", "hydra/launcher=")) for argument in kept):
        added.append("jobs=1")
    if "hydra/sweeper=optuna" in kept:
        added += ["hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    if any(argument.startswith("gpus=") for argument in kept):
        added += ["threads=1"]
    names = {argument.partition("=")[0] for argument in kept}
    return [*kept, *(argument for argument in added if argument.partition("=")[0] not in names)]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's folder: with the files of the tutorials, and a small data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fpn-ablate"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(progress.STEPS, "1")
    monkeypatch.setenv(progress.AT_ONCE, "1")
    write_files(tmp_path)
    assert main(["shapes", "--export", "set", *SMALL_SET]) == 0
    return tmp_path


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_a_tutorials_commands_run(tutorial: str, reader: Path) -> None:
    commands, done = list(dict.fromkeys(quoted(TEXTS[tutorial]))), 0
    for command in commands:
        if "..." in command:
            continue
        words = shlex.split(command)[2:]
        for old, new in STANDS_FOR.items():
            words = [new if word == old else word.replace(f"={old}", f"={new}") if "=" in word else word for word in words]
        name, rest, config_dir = split_command(words)
        if any(importlib.util.find_spec(NEEDED[word]) is None for word in rest if word in NEEDED):
            continue
        arguments = [name, *rest, *(SMALL_SET if name == "shapes" else [])] if name else in_small(rest)
        folder = ["--config-dir", str(config_dir)] if config_dir else []
        try:
            code = main([*arguments, *folder])
        except SystemExit as stop:
            code = stop.code
        assert not code, command
        done += 1
    if not done:
        pytest.skip("needs programs that are not installed")
