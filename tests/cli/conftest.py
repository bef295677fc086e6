"""Call the command line in this process."""

import sys
from pathlib import Path

import pytest

from fpn_ablate.cli.main import main
from fpn_ablate.tracking import progress


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """`cli("ablation=c4")` -> (exit code, standard output, standard error), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fpn-ablate"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(progress.STEPS, "")
    monkeypatch.setenv(progress.AT_ONCE, "1")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def mine(tmp_path) -> Path:
    """A folder for --config-dir with one row of the user's, ablation/mine.yaml."""
    folder = tmp_path / "config"
    (folder / "ablation").mkdir(parents=True)
    (folder / "ablation" / "mine.yaml").write_text("# @package _global_\nneck: {upsample: bilinear}\n")
    return folder
