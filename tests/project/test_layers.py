"""The layers of pyproject.toml hold, and would be missed; what is heavy or optional is loaded when it is needed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fpn_ablate.utils.paths import PACKAGE

ROOT = Path(__file__).parents[2]
# As the command lint-imports, of the environment that runs the tests.
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"


def lint(folder: Path) -> subprocess.CompletedProcess:
    """Check the contracts of a folder's pyproject.toml on the package that lies beside it."""
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True)


def test_the_contracts_are_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "layers KEPT" in done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its contracts in a folder of their own."""
    shutil.copytree(PACKAGE, tmp_path / "fpn_ablate", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


LAZY = "\n\ndef planted():\n    {}\n"
TYPE_ONLY = "\n\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    {}\n"


@pytest.mark.parametrize(
    ("contract", "module", "how", "line"),
    [
        ("layers", "utils.console", LAZY, "from fpn_ablate.runs import identity"),
        ("layers", "config.schema", TYPE_ONLY, "from fpn_ablate.engine import inputs"),
        ("layers", "data.loader", LAZY, "from fpn_ablate.model import anchors"),  # side by side
        ("layers", "report.output", LAZY, "from fpn_ablate.model import anchors"),
        ("layers of the model", "model.ops.replace", LAZY, "from fpn_ablate.model import build"),
        ("layers of the report", "report.collate.stats", LAZY, "from fpn_ablate.report.html import page"),
        ("tables need neither torch nor Hydra", "store.record", LAZY, "import torch"),
        ("tables need neither torch nor Hydra", "report.formats.tables", TYPE_ONLY, "import omegaconf"),
        ("no circles", "store.record", LAZY, "from fpn_ablate.store import layout"),
    ],
)
def test_one_import_that_goes_the_wrong_way_breaks_a_contract(
    copy: Path, contract: str, module: str, how: str, line: str
) -> None:
    file = copy / "fpn_ablate" / f"{module.replace('.', '/')}.py"
    file.write_text(file.read_text() + how.format(line))
    done = lint(copy)
    assert done.returncode == 1
    assert f"{contract} BROKEN" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("place", ["misc.py", "model/misc.py", "report/misc.py"])
def test_a_module_that_has_no_layer_is_refused(copy: Path, place: str) -> None:
    (copy / "fpn_ablate" / place).touch()
    done = lint(copy)
    assert done.returncode == 1 and "misc" in done.stdout


def test_the_top_of_the_package_holds_its_entry_points_alone() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 3


def loaded(code: str, *watched: str) -> set[str]:
    """Which of these packages a process has loaded after `code`."""
    code = f"import sys\n{code}\nprint('loaded', *({set(watched)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.splitlines()[-1].split()[1:])


HEAVY = ("torch", "torchvision", "wandb", "matplotlib", "scipy", "vl_convert", "jinja2", "PIL")
CONFIGURATION = ("hydra", "omegaconf", "pydantic")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["reprot"], ["verify", "--config-dir=nowhere"]])
def test_nothing_is_loaded_before_the_command_is_known(arguments: list[str]) -> None:
    assert not loaded(f"from fpn_ablate.cli.main import main\nmain({arguments})", *HEAVY, *CONFIGURATION)


def test_the_report_loads_neither_torch_nor_hydra() -> None:
    code = "from fpn_ablate.cli.main import main\nassert main(['report', 'no-such-folder']) == 2"
    assert not loaded(code, *HEAVY, "hydra", "omegaconf")
    assert not loaded("import fpn_ablate.report.formats.plots, fpn_ablate.report.html.page", "torch", "hydra", "omegaconf")


def test_a_mistyped_key_is_refused_before_torch_is_loaded() -> None:
    code = (
        "from fpn_ablate.cli.main import main\ntry: main(['-m', 'neck.topdown=true,false'])\n"
        "except SystemExit as stop: assert stop.code == 2"
    )
    assert loaded(code, *HEAVY, "hydra") == {"hydra"}


def test_a_light_module_loads_nothing_heavy() -> None:
    """All in one process, as what one of them loads is seen whatever the others do."""
    modules = ("cli.run", "report.output", "config.schema", "tracking.loggers", "store.layout")
    assert not loaded("\n".join(f"import fpn_ablate.{module}" for module in modules), *HEAVY)


@pytest.mark.slow
def test_every_module_can_be_imported_without_timm_and_wandb() -> None:
    """timm is an extra and wandb takes a second to load: both are imported when they are asked for."""
    code = (
        "import pkgutil, importlib, fpn_ablate\n"
        "sys.modules['timm'] = sys.modules['wandb'] = None  # importing them fails\n"
        "names = [m.name for m in pkgutil.walk_packages(fpn_ablate.__path__, 'fpn_ablate.')]\n"
        "for name in names:\n    if not name.endswith('__main__'): importlib.import_module(name)\n"
        "assert len(names) > 100\n"
        "del sys.modules['timm'], sys.modules['wandb']"
    )
    assert loaded(code, "timm", "wandb", "torch") == {"torch"}


PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.slow
@pytest.mark.skipif(not PAGES.exists() or "[madvise]" not in PAGES.read_text(), reason="no huge pages to be had")
@pytest.mark.parametrize(("setting", "large"), [(None, True), ("0", False)])
def test_large_tensors_lie_on_large_pages(setting: str | None, large: bool) -> None:
    code = (
        "import fpn_ablate, torch; x = torch.ones(2**24)\n"
        "areas = open('/proc/self/smaps').read().split('VmFlags:')\n"
        "sizes = [int(area.rpartition('\\nSize:')[2].split()[0]) for area in areas[:-1]]\n"
        "print(max((size for size, flags in zip(sizes, areas[1:]) if 'hg' in flags.splitlines()[0].split()), default=0))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"THP_MEM_ALLOC_ENABLE": setting} if setting else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert (int(done.stdout) >= 2**16) == large  # KiB of the tensor, which the kernel is advised of; it may have none left
