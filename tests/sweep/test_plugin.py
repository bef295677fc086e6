"""The sweeper as a plugin of Hydra: what a job's process needs of it."""

import os
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest

HELPER = Path(__file__).parents[1] / "helpers" / "pickled_job.py"


@pytest.mark.slow
def test_a_fresh_interpreter_reads_what_launchers_send_to_a_job(tmp_path):
    """Without the folder of the plugin on its path, and without torch; it has the folder of `--config-dir`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FPN_ABLATE"))}

    def python(*arguments):
        done = subprocess.run([sys.executable, HELPER, *arguments], cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "a b").mkdir()
    python("write", tmp_path / "job.pickle", "a b")
    names = {argument for _, argument, _ in pickletools.genops((tmp_path / "job.pickle").read_bytes())}
    assert "fpn_ablate.sweep.jobs" in names and "hydra_plugins.fpn_ablate_sweeper" not in names  # modules of what is pickled
    assert python("read", tmp_path / "job.pickle").strip() == f"run_job single_level False {tmp_path / 'a b'}"
