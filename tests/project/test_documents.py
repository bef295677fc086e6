"""What the documents say is so: set-up commands are CI's, commands are accepted, links hold, tables come from the ledger."""

import contextlib
import functools
import io
import json
import os
import re
import shlex
import stat
import subprocess
from itertools import product
from pathlib import Path

import matplotlib
import pytest
from documents import FILES, ROOT, TEXTS, TUTORIALS, anchors, blocks, links, quoted, write_files
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from fpn_ablate.cli.main import COMMANDS, main, split_command
from fpn_ablate.cli.verify import fill_verify_blocks
from fpn_ablate.config.composition import cell_config, register, without_hydra
from fpn_ablate.config.overrides import normalise
from fpn_ablate.config.rows import compose_rows
from fpn_ablate.report import output
from fpn_ablate.report.collate import records
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.table import Table
from fpn_ablate.report.formats import plots
from fpn_ablate.report.formats.tables import markdown
from fpn_ablate.report.html import figures
from fpn_ablate.report.output import readme
from fpn_ablate.sweep.checks import check_parts
from fpn_ablate.utils.paths import CONF
from fpn_ablate.utils.paths import ROOT as SHIPPED

LEDGER = ROOT / "results" / "reference" / "ledger.csv"
README = TEXTS["README.md"]
COMMANDS_QUOTED = sorted({command for text in TEXTS.values() for command in quoted(text)})


def test_the_readme_is_short_and_the_documents_are_read() -> None:
    assert len(README.splitlines()) <= 150
    assert len(TUTORIALS) > 8 and len(FILES) > 3
    assert sum(len(links(text)) for text in TEXTS.values()) > 100 and len(COMMANDS_QUOTED) > 60


def test_the_first_two_blocks_are_the_main_job_and_the_tests() -> None:
    job, tests = (block.strip() for block in blocks(README)[:2])
    assert "\n" not in job + tests
    assert job.endswith("/python -m fpn_ablate -m ablation=fpn,bottom_up,no_lateral,finest,c5,c4")
    assert tests.endswith("/python -m pytest")


# Stands for python3 and, within the environment that it makes, for python and the linters: writes down how it was called.
STUB = """#!/usr/bin/env bash
call="$(basename "$0") $*"
echo "$call" >> "$CALLS"
case "$call" in *"$FAILING"*) [ -n "$FAILING" ] && exit 3;; esac
case "$*" in "-m venv"*)
  mkdir -p "${@: -1}/bin"
  for program in python mkdocs ruff lint-imports; do cp "$0" "${@: -1}/bin/$program"; done
  echo "${@: -1}" > "$CALLS.environment";;
esac
exit 0
"""


@pytest.mark.parametrize("failing", ["", "venv", "install", "pytest", "mkdocs", "check .", "format", "lint-imports"])
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
    expected = [shlex.split(part) for part in blocks(README)[1].replace(".venv", str(environment)).split("&&")]
    called = [line.split(" ") for line in calls.read_text().splitlines()]
    assert called[:3] == [[Path(program).name, *arguments] for program, *arguments in expected]
    assert called[3][:5] == ["mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml"]
    assert called[4:] == [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["lint-imports", "--no-cache"]]


def choices(override: Override) -> list[str]:
    """`ablation=c4,c5` -> `ablation=c4`, `ablation=c5`."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if override.is_interval_sweep():  # of a search
        return [f"{override.get_key_element()}={end}" for end in (override.value().start, override.value().end)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def own_folder(folder: Path, name: str) -> Path:
    """The folder of `--config-dir NAME`, with the files that the documents tell their reader to write, below `folder`."""
    write_files(folder)
    if not (folder / "mine" / "my_neck.py").exists():  # those of `new` in the tutorial
        main(["new", "neck", "my_neck", str(folder / "mine")])
    assert (folder / name).is_dir(), f"the documents show no file in {name}"
    return folder / name


def check_run(arguments: list[str], config_dir: Path | None) -> None:
    """Compose and validate each job of a command line, as the sweeper does."""
    register()
    more = [f"hydra.searchpath=['file://{SHIPPED}','file://{config_dir}']"] if config_dir else []
    assert {argument for argument in arguments if argument.startswith("-")} <= {"-m", "--multirun", "--cfg"}
    # Launchers are Hydra plugins, and not all of them are installed.
    overrides = [
        o for o in normalise(arguments) if "=" in o and not o.lstrip("+").startswith(("hydra/launcher", "hydra.launcher"))
    ]
    parsed = OverridesParser.create().parse_overrides(overrides)
    assert "-m" in arguments or not any(override.is_sweep_override() for override in parsed)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for job in product(*(choices(override)[: 1 if override.key_or_group == "seed" else None] for override in parsed)):
            composed = compose("config", [*job, *more], return_hydra_config=True)
            overrides_of_job = [override for override in job if not override.startswith("hydra")]
            check_parts(cell_config(without_hydra(composed), composed.hydra.runtime.choices, overrides_of_job, config_dir))


@functools.cache
def options_of(*command: str) -> set[str]:
    """The options in the help of a command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert not end.value.code
    return set(re.findall(r"--[\w-]+", printed.getvalue()))


def check_command(name: str, arguments: list[str], config_dir: Path | None) -> None:
    """Each --option is one that the command's help names; key=value are those of a run."""
    options = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    assert options <= options_of(name, *(arguments[:1] if name == "weights" else []))
    if name in ("verify", "doctor"):
        overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
        check_rows(tuple(sorted(overrides)), config_dir)


@functools.cache
def check_rows(overrides: tuple[str, ...], config_dir: Path | None) -> None:
    for cfg in compose_rows(overrides, config_dir):
        check_parts(cfg)


@pytest.mark.parametrize("command", COMMANDS_QUOTED)
def test_a_quoted_command_is_accepted(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in shlex.split(command) if word != "..."]
    arguments = words[1:] if words[0].endswith("fpn-ablate") else words[2:]
    if "--config-dir" in arguments:
        own_folder(tmp_path, arguments[arguments.index("--config-dir") + 1])
        monkeypatch.chdir(tmp_path)
    if arguments[:1] == ["--help"]:
        assert main(arguments) == 0
        return
    name, arguments, config_dir = split_command(arguments)
    if name:
        check_command(name, arguments, config_dir)
    else:
        check_run(arguments, config_dir)


def test_every_command_is_mentioned() -> None:
    others = ("--config-dir", "--help")
    plain = (command for command in COMMANDS_QUOTED if not any(option in command for option in others))
    named = {split_command(shlex.split(command)[2:])[0] for command in plain}
    assert set(COMMANDS) <= named


@pytest.mark.parametrize("document", TEXTS)
def test_the_files_and_headings_that_are_linked_exist(document: str) -> None:
    folder = (ROOT / document).parent
    for link in links(TEXTS[document]):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        file = (folder / path).resolve() if path else ROOT / document
        assert file.exists(), link
        if anchor and file.name != "switches.md":  # whose headings are made with the site
            assert anchor in anchors(file.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("document", TEXTS)
def test_the_files_that_are_named_exist(document: str) -> None:
    text = re.sub(r"\]\([^)]*\)", "", TEXTS[document])
    paths = re.findall(r"(?<![\w/.])((?:scripts|tests|fpn_ablate|results|conf|experiments|docs)/[\w/.-]*\w)", text)
    written = ("results/runs", "results/tables", "results/plots", "results/figures", "results/report.html", "results/backbones")
    assert not [path for path in paths if not path.startswith((*written, "docs/site/")) and not (ROOT / path).exists()]


@functools.cache  # a second, and two tests read them
def committed_tables() -> list[Table]:
    return collate(records.load(LEDGER))


@pytest.mark.parametrize("document", [name for name, text in TEXTS.items() if "<!-- table: " in text])
def test_tables_are_those_of_the_committed_ledger(document: str) -> None:
    assert readme(TEXTS[document], committed_tables()) == TEXTS[document]


def test_the_readmes_terminal_shows_committed_figures() -> None:
    table = (LEDGER.parent / "tables" / "table1_rpn-shapes-quick.md").read_text(encoding="utf-8").replace(" ± ", "±")
    shown = re.findall(r"[-+]?\d+\.\d(?:±\d+\.\d)?", re.findall(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[1])
    assert len(shown) > 60 and not [figure for figure in shown if figure not in table]


@pytest.mark.parametrize("drawn", ["table1_rpn-shapes-quick", pytest.param("", marks=pytest.mark.slow)])  # a second each
def test_all_that_is_committed_is_what_the_ledger_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: str) -> None:
    """Tables, verdicts and, where it is the version that drew them, plots: all, or those of `drawn` alone."""
    monkeypatch.setattr(figures, "render", lambda _: {})  # not committed
    reference, render = LEDGER.parent, plots.render
    kinds = {path.suffix[1:] for path in (reference / "plots").iterdir()}

    def draw(table: Table) -> dict[str, bytes]:
        if drawn in ("", table.name):
            return render(table)
        return {kind: b"" for kind in kinds if (reference / "plots" / f"{table.name}.{kind}").exists()}

    monkeypatch.setattr(plots, "render", draw)
    tables = committed_tables()
    for table in tables:
        output.save_table(table, tmp_path)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path.relative_to(reference) for kind in ("tables", "plots") for path in (reference / kind).iterdir()}
    assert made == kept
    locked = re.search(r"^matplotlib==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]
    same = matplotlib.__version__ == locked
    differing = [p for p in sorted(made) if (tmp_path / p).read_bytes() != (reference / p).read_bytes()]
    plotted = [path for path in differing if same and path.suffix == ".svg" and drawn in ("", path.stem)]
    assert not [path for path in differing if path.parent.name == "tables"] + plotted


def test_the_longer_trainings_are_what_their_ledger_gives_and_what_the_text_says() -> None:
    folder = LEDGER.parent / "longer"
    made = {f"{table.name}.md": markdown(table) for table in collate(records.load(folder / "ledger.csv"))}
    assert made == {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.md")}
    text = " ".join(TEXTS["results/README.md"].split())
    told = " ".join(re.findall(r"\(#longer-trainings\).*?\. ", text))
    figures = re.findall(r"(\d+\.\d) ± (\d+\.\d)", told)
    in_table = r"(?<![\d.]){} ± {}(?!\d)"
    assert figures and all(re.search(in_table.format(*map(re.escape, pair)), "".join(made.values())) for pair in figures)


def test_what_anchors_cover_is_what_the_doctor_found() -> None:
    rows = json.loads((LEDGER.parent / "doctor-facemask.json").read_text(encoding="utf-8"))["anchors"]
    fpn, c5 = (f"{100 * rows[row]['recall']['small']['iou50']:.0f} %" for row in ("fpn", "c5"))
    text = " ".join(TEXTS["docs/pages/tutorials/own-data.md"].split())
    assert re.findall(r"(\d+ %) of the small ones.*? and (\d+ %) one of `c5`", text) == [(fpn, c5)]


VERIFIED = r"^<!-- verify: .*?^<!-- /verify -->$"


@pytest.mark.parametrize("chosen", [slice(-1, None), pytest.param(slice(-1), marks=pytest.mark.slow)])  # the last takes 2 s
def test_costs_are_those_that_verify_counts(chosen: slice) -> None:
    counted = [block for text in TEXTS.values() for block in re.findall(VERIFIED, text, re.MULTILINE | re.DOTALL)]
    assert len(counted) > 1
    for block in counted[chosen]:
        assert fill_verify_blocks(block) == block


@pytest.mark.parametrize("document", TEXTS)
def test_no_path_of_one_machine_is_quoted(document: str) -> None:
    assert not re.findall(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt|opt|usr)/\S*", TEXTS[document])


def test_the_python_of_the_api_page_runs() -> None:
    api = TEXTS["docs/pages/api.md"]
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", api, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert any(parameter.requires_grad for parameter in names["model"].parameters())
