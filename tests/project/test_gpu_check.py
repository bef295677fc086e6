"""Run scripts/benchmarks/gpu_check.sh with stubs for nvidia-smi, python and timeout."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from fpn_ablate.config.composition import compose

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "gpu_check.sh"
NVIDIA_SMI = '#!/usr/bin/env bash\n[ -z "$NO_GPU" ] && echo "NVIDIA H1"\n'
# Answers the question for CUDA with $NO_CUDA. Logs other calls, fails if they contain $FAILING, and writes the files of a step.
PYTHON = """#!/usr/bin/env bash
[ "$1" != -c ] || exit "${NO_CUDA:-0}"
echo "$*" >> "$CALLS"
case "$*" in *"$FAILING"*) [ -z "$FAILING" ] || exit "${CODE:-3}";; esac
for word in "$@"; do
  case "$word" in
    --junitxml=*) echo report > "${word#*=}";;
    *speed.json) echo '{}' > "$word";;
    out=*) folder="${word#*=}/runs/table1_rpn/gpu/fpn/seed2"; mkdir -p "$folder"
      echo '{"status": "finished"}' > "$folder/record.json"; echo weights > "$folder/model.pt";;
  esac
done
"""
# Logs the grace period and the limit, and runs the command.
TIMEOUT = '#!/usr/bin/env bash\necho "$1 $2" >> "$LIMITS"\nshift 2\nsleep "${PAUSE:-0}"\nexec "$@"\n'


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Return a function that runs a copy of the script, whose results lie in a folder of their own, with the stubs."""
    script = tmp_path / "root" / "scripts" / "benchmarks" / SCRIPT.name
    script.parent.mkdir(parents=True)
    script.write_bytes(SCRIPT.read_bytes())
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in (("nvidia-smi", NVIDIA_SMI), ("python", PYTHON), ("timeout", TIMEOUT)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    for name in ("OUT", "PYTHON"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments, **variables):
        environment = os.environ | {"PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}", "FAILING": "", "NO_GPU": ""}
        environment |= {"CALLS": str(tmp_path / "calls"), "LIMITS": str(tmp_path / "limits"), **variables}
        return subprocess.run(["bash", script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


STEPS = ["-m pytest", "scripts/benchmarks/speed.py", "-m fpn_ablate"]
FILES = ["hardware.txt", "records.tar.gz", "speed.json", "speed.txt", "steps.txt", "table1.txt", "tests.txt", "tests.xml"]


def test_all_steps_leave_their_files_within_ten_minutes(check, tmp_path, script):
    done = check("outcome", PAUSE="0.6")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "outcome").iterdir()) == FILES
    assert lines(tmp_path / "outcome" / "hardware.txt") == ["NVIDIA H1"]
    with tarfile.open(tmp_path / "outcome" / "records.tar.gz") as archive:
        assert [name for name in archive.getnames() if "." in name] == ["runs/table1_rpn/gpu/fpn/seed2/record.json"]
    tests, speed, table = (line.split(" ") for line in lines(tmp_path / "calls"))
    assert tests[:4] == ["-m", "pytest", "-m", "gpu"]
    assert speed[0] == "scripts/benchmarks/speed.py"
    assert script("benchmarks/speed")._parser().parse_args(speed[1:]).out == tmp_path / "outcome" / "speed.json"
    assert table[:5] == ["-m", "fpn_ablate", "-m", "+experiments=table1", "recipe=gpu"]
    assert compose(table[4:]).seed == 2
    assert table[-1] == f"out={tmp_path / 'root' / 'results' / 'gpu' / 'table1'}"
    limits = [[int(word.rpartition("=")[2]) for word in line.split()] for line in lines(tmp_path / "limits")]
    (grace, tests_limit), (_, speed_limit), (_, table_limit) = limits
    # The last step gets the time that is left: here, about a second less than the total. Killed steps leave it some.
    assert table_limit < 570 <= 600 - grace and tests_limit + speed_limit + 2 * grace + 120 < table_limit


@pytest.mark.parametrize(("arguments", "variables", "folder"), [
    ((), {}, "root/results/gpu"),
    ((), {"OUT": "device"}, "device"),
    (("chosen",), {"OUT": "device"}, "chosen"),
])  # fmt: skip
def test_the_folder_is_the_argument_or_out_or_results(check, tmp_path, arguments, variables, folder):
    assert check(*arguments, **variables).returncode == 0
    assert (tmp_path / folder / "tests.xml").exists() and (tmp_path / folder / "records.tar.gz").exists()


@pytest.mark.parametrize("failing", STEPS)
def test_a_failing_step_does_not_stop_the_next(check, tmp_path, failing):
    (tmp_path / "outcome").mkdir()
    (tmp_path / "outcome" / "speed.json").write_text("of an earlier check")
    done = check("outcome", FAILING=failing)
    assert done.returncode == 1
    assert len(lines(tmp_path / "calls")) == 3
    steps = lines(tmp_path / "outcome" / "steps.txt")
    assert [": exit code 3" in step for step in steps[:3]] == [failing == step for step in STEPS]
    assert (tmp_path / "outcome" / "speed.json").exists() == (failing != STEPS[1])
    assert (tmp_path / "outcome" / "hardware.txt").exists()


def test_a_table_that_runs_out_of_time_is_a_failure_only_without_a_row(check, tmp_path):
    assert check("outcome", FAILING=STEPS[2], CODE="124").returncode == 1
    assert check("outcome").returncode == 0
    done = check("outcome", FAILING=STEPS[2], CODE="124")
    assert done.returncode == 0 and "table1: 1 rows finished" in done.stdout
    assert check("outcome", FAILING=STEPS[0], CODE="124").returncode == 1


@pytest.mark.parametrize("variables", [{"NO_GPU": "1"}, {"NO_CUDA": "1"}, {"PYTHON": "no-such-python"}])
def test_without_a_gpu_one_line_refuses_and_nothing_runs(check, tmp_path, variables):
    done = check("outcome", **variables)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("gpu_check.sh: ")
    assert not (tmp_path / "outcome").exists() and not (tmp_path / "calls").exists()


def test_a_folder_that_cannot_be_written_is_refused(check, tmp_path):
    (tmp_path / "file").touch()
    done = check("file/below")
    assert done.returncode == 2 and done.stderr == "gpu_check.sh: file/below cannot be written\n"
