"""What the README says is so: its set-up commands are CI's, its commands are accepted, its tables come from the ledger."""

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import stat
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path

import matplotlib
import pytest
from fpn_ablate.config.overrides import normalise
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from fpn_ablate.cli.verify import fill_verify_blocks
from fpn_ablate.config.composition import cell_config, register, without_hydra
from fpn_ablate.report import output
from fpn_ablate.report.collate import records
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.formats import figures
from fpn_ablate.report.output import MARKER, readme
from fpn_ablate.utils.paths import CONF
from fpn_ablate.utils.paths import ROOT as SHIPPED

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LEDGER = ROOT / "results" / "reference" / "ledger.csv"
# "`mine/ablation/thin.yaml`:" and the block that follows: files that the reader is told to write.
FILES = dict(re.findall(r"`(\S+\.yaml)`:\n\n```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def quoted() -> list[str]:
    """Every command of the README that starts this project, in a block or within a line; `\\` joins lines."""
    lines = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL))
    parts = [part for line in lines for part in re.split(r"&&|\|\|?|;", line.split(" #")[0])]
    found = [re.search(r"(?:python3? -m (?=fpn_ablate)|^\s*(?:\S*/)?(?=fpn-ablate\b)).*", part) for part in parts]
    return sorted({match[0].strip().removeprefix("python3").removeprefix("python").strip() for match in found if match})


def test_the_first_two_blocks_are_the_main_job_and_the_tests() -> None:
    job, tests = (block.strip() for block in BLOCKS[:2])
    assert "\n" not in job + tests
    assert job.endswith("/python -m fpn_ablate -m ablation=c4,c5,fpn,bottom_up,no_lateral,finest")
    assert tests.endswith("/python -m pytest")


# Stands for python3 and, within the environment that it makes, for python and ruff: writes down how it was called.
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in *"$FAILING"*) [ -n "$FAILING" ] && exit 3;; esac
case "$*" in "-m venv"*)
  mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python"; cp "$0" "${@: -1}/bin/ruff"; echo "${@: -1}" > "$CALLS.environment";;
esac
exit 0
"""


@pytest.mark.parametrize("failing", ["", "venv", "install", "pytest", "check .", "format"])
def test_ci_calls_the_readmes_second_command_in_a_new_environment_and_passes_on_failures(tmp_path: Path, failing: str) -> None:
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python3"
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    calls = tmp_path / "calls"
    variables = {"PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls), "FAILING": failing}
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "run"], env={**os.environ, **variables}, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert (done.returncode == 0) == (failing == "")
    if failing:
        return
    environment = Path((tmp_path / "calls.environment").read_text().strip())
    assert not environment.exists() and not environment.is_relative_to(ROOT)
    expected = [shlex.split(part) for part in BLOCKS[1].replace(".venv", str(environment)).split("&&")]
    called = [line.split(" ") for line in calls.read_text().splitlines()]
    assert called[:3] == [[Path(program).name, *arguments] for program, *arguments in expected]
    assert called[3:] == [["ruff", "check", "."], ["ruff", "format", "--check", "."]]


def choices(override: Override) -> list[str]:
    """`ablation=c4,c5` -> `ablation=c4`, `ablation=c5`."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def searchpath(arguments: list[str], folder: Path) -> list[str]:
    """Take `--config-dir DIR` out of `arguments`; the override that makes Hydra look into that folder below `folder`."""
    if "--config-dir" not in arguments:
        return []
    place = arguments.index("--config-dir")
    _, name = arguments.pop(place), arguments.pop(place)
    for file, text in FILES.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    assert (folder / name).is_dir(), f"the README shows no file in {name}"
    return [f"hydra.searchpath=['file://{SHIPPED}','file://{folder / name}']"]


def check_overrides(arguments: list[str], folder: Path) -> None:
    """Compose and validate each job of a command line, as the sweeper does."""
    register()
    more = searchpath(arguments, folder)
    assert {argument for argument in arguments if argument.startswith("-")} <= {"-m", "--multirun", "--cfg", "--help", "-h"}
    # Launchers are Hydra plugins, and not all of them are installed.
    overrides = [
        o for o in normalise(arguments) if "=" in o and not o.lstrip("+").startswith(("hydra/launcher", "hydra.launcher"))
    ]
    parsed = OverridesParser.create().parse_overrides(overrides)
    assert "-m" in arguments or not any(override.is_sweep_override() for override in parsed)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for job in product(*(choices(override) for override in parsed)):
            composed = compose("config", [*job, *more], return_hydra_config=True)
            own = [override for override in job if not override.startswith("hydra")]
            cell_config(without_hydra(composed), composed.hydra.runtime.choices, own)


@functools.cache
def help_of(module: str, *command: str) -> str:
    """In this process, since another would spend seconds on importing torch."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = [module, *command, "--help"]
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            warnings.simplefilter("ignore")  # that the module is imported already
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    assert not end.value.code
    return printed.getvalue()


def check_options(module: str, arguments: list[str]) -> None:
    """Each --option is one that the help of the module names, or that of its command."""
    options = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    commands = re.search(r"\{([\w,]+)\}", help_of(module))
    command = arguments[:1] if commands and arguments[0] in commands[1].split(",") else []
    assert options <= set(re.findall(r"--[\w-]+", help_of(module, *command)))


@pytest.mark.parametrize("command", quoted())
def test_a_quoted_command_is_accepted(command: str, tmp_path: Path) -> None:
    words = [word for word in shlex.split(command) if word != "..."]
    if words[0].endswith("fpn-ablate"):
        check_overrides(words[1:], tmp_path)
    elif words[1] == "fpn_ablate":
        check_overrides(["-m", *words[3:]] if words[2:3] == ["verify"] else words[2:], tmp_path)
    else:
        check_options(words[1], words[2:])


def test_tables_are_those_of_the_committed_ledger() -> None:
    if not LEDGER.exists():
        pytest.skip("no reference runs yet: results/reference/ledger.csv does not exist")
    assert MARKER.search(TEXT), "the README shows no table"
    assert readme(TEXT, collate(records.load(LEDGER))) == TEXT


def test_all_that_is_committed_is_what_the_ledger_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, verdicts and, where it is the version that drew them, plots."""
    monkeypatch.setattr(figures, "render", lambda _: {})  # not committed
    reference = LEDGER.parent
    tables = collate(records.load(LEDGER))
    for table in tables:
        output.save_table(table, tmp_path)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path.relative_to(reference) for kind in ("tables", "plots") for path in (reference / kind).iterdir()}
    assert made == kept
    locked = re.search(r"^matplotlib==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]
    same = matplotlib.__version__ == locked
    differing = [p for p in sorted(made) if (tmp_path / p).read_bytes() != (reference / p).read_bytes()]
    assert not [path for path in differing if path.parent.name == "tables" or (same and path.suffix == ".svg")]
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert readme(text, tables) == text


def test_costs_are_those_that_verify_counts() -> None:
    assert fill_verify_blocks(TEXT) == TEXT


def test_pictures_and_files_that_are_linked_exist() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", TEXT) + re.findall(r"<img[^>]*\bsrc=\"([^\"]+)\"", TEXT)
    assert not [target for target in targets if "://" not in target and not (ROOT / target).is_file()]


def test_no_path_of_one_machine_is_quoted() -> None:
    assert not re.findall(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt|opt|usr)/\S*", TEXT)
