"""Latency and peak memory, measured on things of known cost."""

import os
import resource
import time
from types import SimpleNamespace

import pytest
import torch

from fpn_ablate.engine import cost

CPU = torch.device("cpu")


def resettable() -> bool:
    return os.access(cost.CLEAR_REFS, os.W_OK) and "VmHWM" in cost.STATUS.read_text()


def touch(mib: int) -> None:
    torch.ones(mib * 2**18)


def test_latency_is_the_median_of_the_counted_calls_alone():
    durations = iter([0.2, 0.2, 0.02, 0.3, 0.02])  # two to warm up; then a mean of 0.11
    assert 20 <= cost.latency_ms(lambda: time.sleep(next(durations)), CPU, warmup=2, runs=3) < 90
    assert next(durations, None) is None


@pytest.mark.parametrize(("device", "calls"), [("cuda", ["sync", "work", "sync"] * 3), ("cpu", ["work"] * 3)])
def test_latency_waits_for_a_gpu_before_and_after_each_call(monkeypatch, device, calls):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda where: seen.append("sync"))
    cost.latency_ms(lambda: seen.append("work"), torch.device(device), warmup=1, runs=2)
    assert seen == calls


@pytest.mark.skipif(not resettable(), reason="this system cannot reset the peak")
def test_the_peak_of_a_job_does_not_include_the_job_before():
    cost.reset_peak_memory(CPU)
    before = cost.peak_memory_mib(CPU)
    touch(200)
    assert before + 190 < cost.peak_memory_mib(CPU) < before + 260
    cost.reset_peak_memory(CPU)
    assert cost.peak_memory_mib(CPU) < before + 60
    touch(100)
    assert before + 90 < cost.peak_memory_mib(CPU) < before + 160


@pytest.mark.skipif(not resettable(), reason="this system cannot reset the peak")
def test_what_a_job_has_freed_is_not_charged_to_the_next():
    cost.reset_peak_memory(CPU)
    before = cost.peak_memory_mib(CPU)
    pieces = [torch.ones(2**14) for _ in range(200 * 2**4)]  # 64 kB each; the last one keeps the heap from shrinking
    del pieces[:-1]
    assert cost.peak_memory_mib(CPU) > before + 190
    cost.reset_peak_memory(CPU)
    assert cost.peak_memory_mib(CPU) < before + 60


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 2**20), ("linux", 2**10)])
def test_without_proc_the_peak_is_that_of_the_process_so_far(monkeypatch, tmp_path, platform, unit):
    monkeypatch.setattr(cost, "STATUS", tmp_path / "none" / "status")
    monkeypatch.setattr(cost, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(cost.sys, "platform", platform)
    cost.reset_peak_memory(CPU)
    assert cost.peak_memory_mib(CPU) == round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit) > 0


def test_on_a_gpu_torchs_own_counters_are_read_and_reset(monkeypatch):
    peak = {"bytes": 300 * 2**20}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak["bytes"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update(bytes=0))
    gpu = torch.device("cuda")
    assert cost.peak_memory_mib(gpu) == 300
    cost.reset_peak_memory(gpu)
    assert cost.peak_memory_mib(gpu) == 0


@pytest.mark.skipif(not resettable(), reason="this system cannot reset the peak")
def test_the_memory_of_a_test_is_what_one_prediction_takes_beyond_what_is_in_use(config, monkeypatch):
    batch = SimpleNamespace(to=lambda device: batch)
    monkeypatch.setattr(cost, "evaluation_batches", lambda *_, **__: iter([batch]))
    kept = torch.ones(100 * 2**18)
    trained = SimpleNamespace(validation=None, predict_end_to_end=lambda batch: touch(150))
    assert 140 < cost.end_to_end_memory_mib(trained, config().recipe, CPU) < 210
    del kept
