"""What a long sweep keeps of the jobs that are over, and whether the drills that measure it would see a leak."""

import mmap

import pytest

from fpn_ablate.cli.main import main
from fpn_ablate.runs import run as running
from fpn_ablate.sweep import jobs


def test_hydra_keeps_no_configuration_of_a_job_that_is_over(tmp_path, monkeypatch, capsys):
    """Two copies a job, until the sweep ends, were most of what a sweep of 200 jobs grew by."""
    kept, launch = [], jobs.RetryingLauncher.launch

    def launched(self, *arguments, **named):
        kept.extend(returns := launch(self, *arguments, **named))
        return returns

    monkeypatch.setattr(jobs.RetryingLauncher, "launch", launched)
    monkeypatch.setattr(running, "run", lambda cfg, job, wait: {"row": cfg.row, "metrics": {}})
    monkeypatch.setattr("sys.argv", ["fpn-ablate"])
    assert main(["-m", "recipe=smoke", "jobs=1", "seed=0,1,2", f"out={tmp_path}"]) == 0
    assert [(job.cfg, job.hydra_cfg, job.return_value) for job in kept] == [(None, None, None)] * 3


@pytest.mark.parametrize(
    ("rss", "files", "constant"),
    [
        (lambda n: 800.0, lambda n: 11, True),
        (lambda n: 800.0 - 100 * (n < 20), lambda n: 11, True),  # at the beginning, caches fill
        (lambda n: 800.0 + n % 7, lambda n: 11, True),  # pages come and go
        (lambda n: 800.0 + 0.1 * n, lambda n: 11, False),
        (lambda n: 800.0, lambda n: 11 + n // 50, False),
    ],
)
def test_the_gauge_tells_growth_from_a_beginning_and_from_noise(script, rss, files, constant):
    gauge = script("drills/memory").Gauge()
    for n in range(200):
        gauge.counts.append(n)
        gauge.rss.append(rss(n))
        gauge.files.append(files(n))
        gauge.threads.append(1)
    assert gauge.is_constant() is constant


def test_the_gauge_sees_what_this_process_holds(script):
    gauge = script("drills/memory").Gauge()
    gauge.read(1)
    held = mmap.mmap(-1, 2**26)  # not from what this process has at hand
    for byte in range(0, len(held), mmap.PAGESIZE):
        held[byte] = 1
    with open("/dev/null"):
        gauge.read(2)
    assert 60 < gauge.rss[1] - gauge.rss[0] < 80
    held.close()
    assert gauge.files[1] - gauge.files[0] == 1


def test_the_drill_of_disks_sees_what_is_not_told_and_what_differs(script, tmp_path):
    drill = script("drills/disk")
    line = "/disk/results/model.pt: cannot be written (No space left on device); make room, then run the same command again"
    assert drill.message_problems(line) == []
    assert drill.message_problems("OSError: [Errno 28] No space left on device") == ["no line names the place and the fix"]
    assert drill.message_problems(f"Traceback (most recent call last):\n{line}") == ["a traceback"]
    code, rest = drill.problems({"row metrics": 1}, tmp_path, 1)
    assert code == "exit code 1" and rest.startswith("not complete (")
