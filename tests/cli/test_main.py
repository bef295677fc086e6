"""The command line: which command it is, its options and its refusals."""

import io
import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch

import fpn_ablate.cli
from fpn_ablate import __version__
from fpn_ablate.cli import help_text
from fpn_ablate.cli.main import COMMANDS, main, split_command
from fpn_ablate.config.validation import keys
from fpn_ablate.runs import environment
from fpn_ablate.store import plan
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.paths import CONF


@pytest.fixture
def called(monkeypatch):
    """Commands that were called, in place of being carried out: (name, arguments, folder of --config-dir)."""
    calls = []
    for name in ("run", *COMMANDS):
        module = import_module(f"fpn_ablate.cli.{name}")
        monkeypatch.setattr(module, "main", lambda rest, folder, name=name: calls.append((name, rest, folder)) or 0)
    return calls


def test_help_of_any_command_needs_no_torch():
    code = f"""
import sys
from fpn_ablate.cli.main import main
for name in {sorted(COMMANDS)}:
    try:
        main([name, "--help"])
    except SystemExit as end:
        assert not end.code, name
    assert "torch" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("line", "command", "rest"),
    [
        ("verify", "verify", []),
        ("verify seed=1 --size 64x64", "verify", ["seed=1", "--size", "64x64"]),
        ("seed=1 verify", "verify", ["seed=1"]),
        ("-m verify", "verify", ["-m"]),
        ("report results/runs", "report", ["results/runs"]),
        ("report measure", "report", ["measure"]),  # a folder of that name
        ("weights import a.pth b.safetensors", "weights", ["import", "a.pth", "b.safetensors"]),
        ("doctor ~neck.p6", "doctor", ["~neck.p6"]),
        ("", "run", []),
        ("ablation=fpn", "run", ["ablation=fpn"]),
        ("-m ablation=fpn,c4", "run", ["-m", "ablation=fpn,c4"]),
        ("ablation=fpn,c4 -m", "run", ["ablation=fpn,c4", "-m"]),
        ("~neck.p6 +experiments=table1", "run", ["~neck.p6", "+experiments=table1"]),
        # The word behind these is their value.
        ("--cfg job", "run", ["--cfg", "job"]),
        ("--cfg=job seed=1", "run", ["--cfg=job", "seed=1"]),
        ("seed=1 -c job", "run", ["seed=1", "-c", "job"]),
        ("--config-name report", "run", ["--config-name", "report"]),
        ("--cfg", "run", ["--cfg"]),  # Hydra says what is missing
    ],
)
def test_the_first_word_that_is_no_setting_and_no_options_value_is_the_command(called, line, command, rest):
    assert main(line.split()) == 0
    assert called == [(command, rest, None)]


@pytest.mark.parametrize("command", ["verify", "run"])
@pytest.mark.parametrize("option", [["--config-dir", "DIR"], ["--config-dir=DIR"], ["-cd", "DIR"], ["-cd=DIR"]])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_folder_of_ones_own_may_stand_anywhere(called, tmp_path, monkeypatch, command, option, place):
    (tmp_path / "DIR").mkdir()
    monkeypatch.chdir(tmp_path)
    words = (["verify"] if command == "verify" else ["seed=2"]) + ["seed=1"]
    assert main([*words[:place], *option, *words[place:]]) == 0
    assert called == [(command, [word for word in words if word != "verify"], (tmp_path / "DIR").resolve())]


@pytest.mark.parametrize(
    "option", [["--config-dir", "nowhere"], ["--config-dir=nowhere"], ["--config-dir"], ["--config-dir", "file"]]
)
@pytest.mark.parametrize("command", [[], ["verify"], ["doctor"], ["report", "."]])
def test_a_folder_of_ones_own_that_is_none_is_refused(cli, called, tmp_path, command, option):
    (tmp_path / "file").touch()
    code, out, err = cli(*command, *option)
    assert (code, out, called) == (2, "", [])
    assert re.match(r"--config-dir (nowhere|file|\(nothing\)): no such folder; give one with", err)


@pytest.mark.parametrize("command", [[], ["verify"]], ids=["run", "verify"])
def test_two_folders_of_ones_own_are_refused(cli, mine, command):
    code, out, err = cli("--config-dir", mine, *command, f"--config-dir={mine}")
    assert (code, out) == (2, "") and err.startswith("--config-dir is given twice")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("reprot", " Did you mean report?"),
        ("verfy", " Did you mean verify?"),
        ("mesure", " Did you mean measure?"),
        ("verfiy", " Did you mean verify?"),
        ("xyzzy", ""),
        ("no_lateral", " Did you mean ablation=no_lateral?"),
        ("table1", " Did you mean -m +experiments=table1_rpn?"),
        ("smok", " Did you mean recipe=smoke?"),
    ],
)
def test_a_misspelt_command_is_refused_with_the_nearest_one(cli, called, typed, hint):
    code, out, err = cli("seed=1", typed, "results/runs")
    assert (code, out, called) == (2, "", [])
    assert err.startswith(f"{typed}: there is no such command.{hint} Commands: ")
    assert all(name in err for name in COMMANDS)


@pytest.mark.parametrize(
    ("typed", "setting"),
    [(["--ablation=fpn"], "ablation=fpn"), (["-ablation=fpn"], "ablation=fpn"), (["-m", "--recipe", "smoke"], "recipe=VALUE")],
)
def test_a_setting_with_dashes_is_refused(cli, called, typed, setting):
    code, out, err = cli(*typed)
    assert (code, out, called) == (2, "", []) and err.endswith(f"there is no such option; a setting has no dashes: {setting}\n")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--config-dr", "mine"], "--config-dr: there is no such option; did you mean --config-dir?"),
        (["--rpn=x"], "--rpn=x: there is no such option; a setting has no dashes: rpn=x"),
        (["recipe.steps", "=3"], "write KEY=VALUE without spaces: recipe.steps=3"),
        (["recipe.steps=", "3"], "write KEY=VALUE without spaces: recipe.steps=3"),
        (["-m", "ablation", "=", "fpn"], "write KEY=VALUE without spaces: ablation=fpn"),
        (["ablation = fpn"], "write KEY=VALUE without spaces: ablation=fpn"),
    ],
)
def test_a_slip_in_an_option_or_with_spaces_is_told(cli, called, typed, message):
    assert cli(*typed) == (2, "", f"{message}\n") and not called


def test_a_slip_in_an_option_of_a_command_is_told(cli):
    assert cli("clean", "--dry-rnu")[2].endswith("unrecognized arguments: --dry-rnu; did you mean --dry-run?\n")


def test_spaces_in_what_is_no_setting_are_kept():
    assert split_command(["artifacts", "a =b", "c=", "d"]) == ("artifacts", ["a =b", "c=", "d"], None)
    words = ["--package", "a =b", "seed=", "log.name=a = b"]
    assert split_command(words)[1] == words


def test_what_was_typed_is_shown_without_the_control_characters_in_it(cli):
    assert cli("re\x1b[2Jport")[2].startswith("re\\x1b[2Jport: there is no such command")


@pytest.mark.parametrize("option", ["--help", "-h", "help"])
def test_the_help_lists_every_command(cli, option):
    code, out, err = cli(option)
    assert (code, err) == (0, "")
    listed = dict(re.findall(r"^ +([a-z]+) {2,}(\S.*)$", out, re.MULTILINE))
    assert COMMANDS.items() <= listed.items()
    assert "--config-dir" in out and "--multirun" in out
    assert all(re.search(rf"\b{name}\b", out) for name in ("no_lateral", "table6", "smoke"))
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("topic", "texts"),
    [
        ("keys", ["neck.upsample = nearest", "(the paper's) | bilinear | deconv", "recipe.steps = 500", "neck.layers"]),
        ("rows", ["ablation=no_lateral", "Table 1 (e): the top-down path from C5 alone", "RoIPool on C4 in place of RoIAlign"]),
        ("tables", ["-m +experiments=table1_rpn", "Table 1 of Feature Pyramid Networks"]),
        ("recipes", ["recipe=paper2017", "The paper's settings (Sec. 5.1 and 5.2) for COCO"]),
        ("report", ["usage: python -m fpn_ablate report "]),
        ("neck", ["neck=yolo", "The paper's neck (Sec. 3)"]),
        ("neck=bifpn", ["Bidirectional pyramid", "neck.layers = 3", "how often the maps are fused, down and up again"]),
    ],
)
def test_a_topic_of_the_help_lists_what_there_is(cli, topic, texts):
    code, out, err = cli("--help", topic)
    assert (code, err) == (0, "") and all(text in out for text in texts), out
    assert cli("help", topic) == (0, out, "")


def test_every_key_that_a_user_may_set_is_in_the_help(cli):
    out = cli("--help", "keys")[1]
    parents = {key.rpartition(".")[0] for key in keys()}
    missing = [key for key in {*keys()} - parents if not key.endswith(".name") and not re.search(rf"(?<![\w.]){key}\b", out)]
    assert not missing


def test_the_help_of_every_choice_names_keys_that_exist():
    choices = [(group, name) for group in help_text.GROUPS for name in help_text.names(CONF / group)]
    named = {key for choice in choices for key in re.findall(r"^  (\S+) =", help_text.choice(*choice), re.MULTILINE)}
    assert "recipe.steps" in named and "task.roi.samples" in named
    assert named <= {*keys()}


@pytest.mark.parametrize(("typed", "near"), [("kyes", "keys"), ("neck=bifp", "neck=bifpn"), ("ablation=c4", "rows")])
def test_a_misspelt_topic_is_refused_with_the_nearest_one(cli, typed, near):
    code, out, err = cli("--help", typed)
    assert (code, out) == (2, "") and err.startswith(f"--help {typed}: there is no such topic. Did you mean {near}?")


def test_the_shell_gets_hydras_completion(cli, monkeypatch):
    code, out, _ = cli("-sc", "install=bash")
    assert code in (0, None) and "complete -o nospace" in out and out.rstrip().endswith("fpn-ablate")
    monkeypatch.setenv("COMP_LINE", "fpn-ablate ablation=no_l")
    assert "ablation=no_lateral" in cli("-sc", "query=bash")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_of_its_own(cli, command):
    code, out, err = cli(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: python -m fpn_ablate {command} ")


def test_every_module_that_is_a_command_is_listed():
    modules = {module.name for module in pkgutil.iter_modules(fpn_ablate.cli.__path__)}
    callable_ = {name for name in modules if hasattr(import_module(f"fpn_ablate.cli.{name}"), "main")}
    assert callable_ - {"main", "run"} == set(COMMANDS)


def test_the_version_is_the_packages(cli):
    code, out, err = cli("--version")
    assert (code, err) == (0, "")
    assert out.startswith(f"fpn_ablate {__version__}, torch {torch.__version__.split('+')[0]}")


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["reprot"], 2), (["report", "no-folder"], 2)])
def test_the_exit_code_is_that_of_the_process(tmp_path, arguments, code):
    done = subprocess.run([sys.executable, "-m", "fpn_ablate", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code
    assert (len(done.stderr.splitlines()), "Traceback" in done.stderr) == (int(code > 0), False)


def test_a_file_that_cannot_be_read_is_a_line_and_no_traceback(cli, called, monkeypatch):
    def fail(rest, folder):
        raise PermissionError(13, "Permission denied", "results/runs")

    monkeypatch.setattr("fpn_ablate.cli.report.main", fail)
    assert cli("report", "results/runs") == (2, "", "[Errno 13] Permission denied: 'results/runs'\n")


def test_what_was_typed_is_in_a_runs_record_and_decides_nothing(cli, monkeypatch):
    monkeypatch.setenv(plan.COMMAND, "")
    assert cli("no.such.key=1 2")[0] == 2
    assert environment.environment(torch.device("cpu"))["command"] == "python -m fpn_ablate 'no.such.key=1 2'"
    monkeypatch.delenv(plan.COMMAND)
    assert "command" not in environment.environment(torch.device("cpu"))


@pytest.mark.parametrize("command", [[], ["-m"], ["verify"]])
def test_a_space_behind_a_comma_is_refused_with_the_line_as_it_should_be(cli, called, command):
    code, out, err = cli(*command, "ablation=c4,", "c5", "seed=1")
    assert (code, out, called) == (2, "", [])
    assert err == "ablation=c4, c5: write values without spaces: ablation=c4,c5\n"


def test_an_option_without_its_folder_is_refused(cli, called):
    code, out, err = cli("--config-dir", "ablation=fpn")
    assert (code, out, called) == (2, "", [])
    assert err == "--config-dir: no folder is named in front of ablation=fpn; write --config-dir FOLDER ablation=fpn\n"


@pytest.mark.parametrize("command", [[], ["verify"]])
def test_a_current_folder_that_is_gone_is_a_line_and_no_traceback(tmp_path, monkeypatch, capsys, command):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr("sys.argv", ["fpn-ablate"])
    assert main(command) == 2
    assert capsys.readouterr() == ("", "the current folder cannot be read (No such file or directory); cd to one that exists\n")


def test_a_terminal_of_ascii_alone_shows_what_it_can(tmp_path):
    command = [sys.executable, "-m", "fpn_ablate", "new", "neck", "mine", "réseau"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "") and "--config-dir r\\xe9seau" in done.stdout
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    log_line("a tick ✓", stream)
    assert stream.buffer.getvalue() == b"a tick \\u2713\n"
