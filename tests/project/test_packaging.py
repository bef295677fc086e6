"""The package as others get it: sdist, wheel, editable install, checkout, console script; what it declares; its lock."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# From pre-training to tables and page, with hardly any pictures.
SMOKE = ["recipe=smoke", "recipe.eval_images=2", "recipe.pretrain.steps=1", "data.train_images=4", "threads=1", "jobs=1"]


def files_under(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def build(source: Path, target: Path, *options: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return importlib.metadata.PathDistribution(zipfile.Path(archive, name.rsplit("/", 1)[0] + "/")).metadata


class Environment:
    """A virtual environment that borrows the heavy dependencies of the running one, but not the project."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.folder, self.bin = folder, folder / "bin"
        # Of a folder named in a .pth file no .pth files are read: an editable install of the project is not seen.
        borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "borrowed.pth").write_text("\n".join(borrowed))

    def install(self, *what: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.folder), "install", "--no-deps", "--no-index"]
        done = subprocess.run([*pip, "--no-build-isolation", *what], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, program: str, arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess:
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FPN_ABLATE"))}
        outside["FPN_ABLATE_CACHE"] = os.environ["FPN_ABLATE_CACHE"]  # not the user's
        command = [str(self.bin / program), *arguments]
        done = subprocess.run(command, cwd=cwd, env=outside, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("wheel") / "venv")
    environment.install(str(wheel))
    return environment


def records(results: Path) -> dict[str, dict]:
    return {record["row"]: record for record in map(json.loads, (path.read_text() for path in results.rglob("record.json")))}


WHERE = "import fpn_ablate, fpn_ablate.utils.paths as p; print(fpn_ablate.__file__); print(p.CONF); print(p.EXPERIMENTS)"


def test_the_wheel_holds_the_package_with_its_configuration_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT).as_posix() for path in files_under(ROOT / "fpn_ablate")}
    beside = {f"fpn_ablate/{path.relative_to(ROOT)}" for name in ("conf", "experiments") for path in files_under(ROOT / name)}
    assert names == package | beside
    assert {"fpn_ablate/conf/config.yaml", "fpn_ablate/sweep/sweeper.py"} <= names


def test_a_wheel_built_from_the_sdist_is_the_one_built_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    build(ROOT, tmp_path, "--wheel")
    contents = []
    for path in (wheel, next(tmp_path.glob("*.whl"))):
        with zipfile.ZipFile(path) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    assert contents[0] == contents[1]


def test_the_sdist_holds_no_results_and_no_environment(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        tops = {name.split("/")[1] for name in archive.getnames()}
    generated = {"PKG-INFO", ".gitignore"}
    assert tops - generated == {"fpn_ablate", "conf", "experiments", "pyproject.toml", "README.md", "LICENSE"}


def test_metadata_names_python_versions_licence_and_extras(metadata: Message) -> None:
    versions = SpecifierSet(metadata["Requires-Python"])
    assert [version for version in ("3.10", "3.11", "3.12", "3.13", "3.14") if version in versions] == ["3.11", "3.12", "3.13"]
    assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")
    extras = {"test", "timm", "submitit", "ray", "optuna", "tensorboard", "docs"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def imported(folder: Path, *own: str) -> set[str]:
    """Top-level names of other packages than ours that the sources under `folder` import, anywhere in a file."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(str(node.module).split(".")[0])
    return names - {"fpn_ablate", *own} - set(sys.stdlib_module_names)


def providers(modules: set[str]) -> set[str]:
    known = importlib.metadata.packages_distributions()
    return {canonicalize_name(known[module][0]) for module in modules}


def declared(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    found = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}
    own = found.pop(PROJECT["name"], None)  # an extra that names others
    return found | (declared(*own.extras) if own else {})


def test_everything_imported_is_declared_and_everything_declared_is_imported() -> None:
    absent = {name for name in ("timm", "ray", "optuna") if not importlib.util.find_spec(name)}
    launchers = {"hydra_plugins", "submitit"}  # of several distributions: the launchers of Hydra, which bring submitit
    found = providers(imported(ROOT / "fpn_ablate") - absent - launchers)
    assert found == set(declared("timm", "ray", "optuna")) - absent - {"hydra-joblib-launcher"}
    beside = [path.stem for path in files_under(ROOT / "tests")]  # one test file imports another's helpers by their bare names
    assert providers(imported(ROOT / "tests", "fuzzing", "hooks", "reference", *beside) - launchers) <= set(declared("test"))


def test_the_wheel_is_found_with_its_configuration_inside(installed: Environment, tmp_path: Path) -> None:
    lines = installed.run("python", ["-c", WHERE], tmp_path).stdout.split()
    package = Path(lines[0]).parent
    assert package.is_relative_to(installed.folder.resolve())
    assert lines[1:] == [str(package / "conf"), str(package / "experiments")]


@pytest.fixture(scope="module")
def two_rows(installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An empty folder in which `python -m fpn_ablate` of the wheel has run two rows, and what it printed."""
    folder = tmp_path_factory.mktemp("empty")
    return folder, installed.run("python", ["-m", "fpn_ablate", "-m", "ablation=fpn,c5", *SMOKE], folder).stdout


def test_a_command_of_the_wheel_in_an_empty_folder(installed: Environment, tmp_path: Path) -> None:
    printed = installed.run("python", ["-m", "fpn_ablate", "ablation=c5", "--cfg", "job"], tmp_path).stdout
    assert "level: c5" in printed and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_rows_in_an_empty_folder(two_rows: tuple[Path, str]) -> None:
    folder, printed = two_rows
    found = records(folder / "results")
    assert {row: record["status"] for row, record in found.items()} == {"fpn": "finished", "c5": "finished"}
    assert found["fpn"]["environment"]["commit"] is None
    assert [path.name for path in folder.iterdir()] == ["results"]
    assert "Region proposals (RPN)" in printed and "{Pk}" in printed


@pytest.mark.slow
def test_console_script_and_processes_side_by_side_give_the_same_rows(
    installed: Environment, two_rows: tuple[Path, str], tmp_path: Path
) -> None:
    printed = installed.run("fpn-ablate", ["-m", "ablation=fpn,c5", *SMOKE, "jobs=2"], tmp_path).stdout
    one_by_one, side_by_side = records(two_rows[0] / "results"), records(tmp_path / "results")
    assert side_by_side.keys() == one_by_one.keys()
    for row, record in side_by_side.items():
        assert record["status"] == "finished"
        for part in ("fingerprint", "metrics", "verify", "images"):
            assert record[part] == one_by_one[row][part]
    assert "cost: 2 runs" in printed


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_to_stays_as_it_is(installed: Environment, tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir(mode=0o555)
    installed.run("python", ["-m", "fpn_ablate", "ablation=c5", *SMOKE, f"out={elsewhere}"], here)
    assert records(elsewhere)["c5"]["status"] == "finished"
    assert not list(here.iterdir())  # root may write anywhere: it must not have wanted to


COMPOSED = ["-m", "fpn_ablate", "+experiments=table1_rpn", "ablation=c4", "--cfg", "job"]


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, str]:
    """An environment with an editable install, and what a checkout composed in it before that."""
    bare = Environment(tmp_path_factory.mktemp("editable") / "bare")
    of_checkout = bare.run("python", COMPOSED, ROOT).stdout
    bare.install("-e", str(ROOT))
    return bare, of_checkout


@pytest.mark.slow  # the suite itself runs in an editable install
def test_checkout_and_editable_install_read_the_same_configuration(
    installed: Environment, editable: tuple[Environment, str], tmp_path: Path
) -> None:
    bare, of_checkout = editable
    of_wheel = installed.run("python", COMPOSED, tmp_path).stdout
    assert of_checkout == of_wheel and "single_level" in of_wheel
    assert Path(bare.run("python", ["-c", WHERE], tmp_path).stdout.split()[0]).is_relative_to(ROOT)
    assert bare.run("fpn-ablate", COMPOSED[2:], tmp_path).stdout == of_wheel


@pytest.mark.slow  # as the next one does in an environment of the wheel
@pytest.mark.slow
def test_a_job_of_an_editable_install_runs_in_a_fresh_interpreter(editable: tuple[Environment, str], tmp_path: Path) -> None:
    assert editable[0].run("python", COMPOSED, tmp_path).stdout == editable[1]
    _read_job_in_a_fresh_interpreter(editable[0], tmp_path)


@pytest.mark.slow  # tests/sweep/test_plugin.py: of the checkout
def test_a_job_of_the_wheel_runs_in_a_fresh_interpreter(installed: Environment, tmp_path: Path) -> None:
    _read_job_in_a_fresh_interpreter(installed, tmp_path)


def _read_job_in_a_fresh_interpreter(environment: Environment, folder: Path) -> None:
    """Pickle a job as submitit's and Ray's launchers do; a new process of the same environment must be able to read it."""
    helper, file = str(ROOT / "tests" / "helpers" / "pickled_job.py"), str(folder / "job.pickle")
    environment.run("python", [helper, "write", file], folder)
    assert environment.run("python", [helper, "read", file], folder).stdout.split() == [
        "run_job",
        "single_level",
        "False",
        "None",
    ]


LOCK = (ROOT / "requirements.lock").read_text()


def pins() -> list[tuple[Requirement, str]]:
    """Each requirement of the lock with the text of its hashes."""
    entries = LOCK.replace("\\\n", " ").splitlines()
    split = [entry.partition("--hash=") for entry in entries if entry and not entry.lstrip().startswith("#")]
    return [(Requirement(head), equals + tail) for head, equals, tail in split]


def test_the_lock_holds_names_versions_and_hashes_alone() -> None:
    assert not re.search(r"://|\s@\s|^\s*-(?!-hash=)|--(?!hash=)", LOCK, re.MULTILINE)
    for requirement, hashes in pins():
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
        assert re.fullmatch(r"(--hash=sha256:[0-9a-f]{64}\s*)+", hashes), requirement


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", [("linux", "Linux", "posix"), ("darwin", "Darwin", "posix"), ("win32", "Windows", "nt")])
def test_the_lock_satisfies_what_is_declared(python: str, system: tuple[str, str, str]) -> None:
    names = dict(zip(("sys_platform", "platform_system", "os_name"), system, strict=True))
    here = {"python_version": python, "python_full_version": f"{python}.1", **names}
    held: dict[str, str] = {}
    for requirement, _ in pins():
        if requirement.marker is None or requirement.marker.evaluate(here):
            name = canonicalize_name(requirement.name)
            assert name not in held, f"{name} twice"
            held[name] = next(iter(requirement.specifier)).version
    for name, requirement in declared("test").items():
        assert requirement.specifier.contains(held[name]), requirement
