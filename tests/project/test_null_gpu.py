"""Run GPU tests on a CUDA device that computes nothing: crashes, waits and wrong devices show without a GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

HELPERS = Path(__file__).parents[1] / "helpers"
DEVICE = HELPERS / "null_cuda" / "device.c"
# Not cuDNN: its own library answers what version it is.
STUBBED = re.compile(r"(__cuda|cuda|cublas|cu(?!File)[A-Z])\w+")
# Left out: tests that compare values, for time the other rows, and segment proposals, where a region's number chooses its MLP:
# on a device that computes no numbers none is chosen.
CHOSEN = "(fpn or pinned or often or bit_for_bit or bf16) and not segments"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build for CPUs"),
    pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="gcc or nm is missing"),
]


@pytest.fixture
def device(tmp_path):
    """Compile the device: the functions of device.c, and for all others that torch imports one that returns 0."""
    libraries = [*Path(torch.__file__).parent.glob("lib/*.so"), *Path(torchvision.__file__).parent.glob("_C*.so")]
    listing = subprocess.run(["nm", "-D", "--undefined-only", *libraries], capture_output=True, text=True, check=True).stdout
    imported = {match[0] for word in listing.split() if (match := STUBBED.match(word))}
    defined = set(re.findall(r"(\w+)\(", DEVICE.read_text()))
    stubs, library = tmp_path / "stubs.c", tmp_path / "libcuda.so.1"  # torch opens the driver by this name
    stubs.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(imported - defined)))
    subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", DEVICE, stubs, "-o", library], check=True)
    return library


def test_the_gpu_tests_that_compare_no_values_pass_on_a_device_that_computes_nothing(device):
    tests = [str(Path(__file__).with_name("test_gpu.py")), "-m", "gpu", "-k", CHOSEN, "-n", "0"]
    path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"LD_PRELOAD": str(device), "PYTHONPATH": path}
    # torch counts GPUs by this before it asks the device. A compiled function would call Triton, which opens the real driver.
    environment |= {"CUDA_VISIBLE_DEVICES": "0", "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "null_cuda.plugin", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
