"""Who may import what: data, model and report do not know each other, and heavy or optional packages stay where they belong."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fpn_ablate.utils.paths import PACKAGE

FILES = sorted(path for path in PACKAGE.rglob("*.py") if "conf" not in path.relative_to(PACKAGE).parts)


def name_of(path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path, top_level_only=False) -> set[str]:
    """What a file imports: a for `import a`; a, and a.b, which may be a module or a name in a, for `from a import b`."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.iter_child_nodes(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def users_of(*packages: str, top_level_only=False) -> set[str]:
    return {
        name_of(path)
        for path in FILES
        if any(i == p or i.startswith(p + ".") for i in imports(path, top_level_only) for p in packages)
    }


def test_the_search_finds_something():
    assert len(FILES) > 30
    assert "train.py" in users_of("torch")


def test_hydra_is_known_to_the_command_line_alone():
    own = {"__main__.py", "jobs.py", "sweep.py", "timm_configs.py", "plugins/hydra_plugins/fpn_ablate_sweeper.py"}
    assert users_of("hydra", "omegaconf") == own


def test_timm_is_an_extra_and_imported_when_asked_for():
    assert users_of("timm") == {"model/timm_backbone.py"}
    assert users_of("timm", top_level_only=True) == set()


def test_wandb_is_known_to_the_process_that_copies_alone_and_imported_when_asked_for():
    assert users_of("wandb") == {"wandb_copy.py"}
    assert users_of("wandb", top_level_only=True) == set()


def test_data_and_model_do_not_know_each_other():
    above = ("run", "train", "evaluate", "pretrain", "report", "sweep", "sinks", "record", "doctor")
    assert not {f for f in users_of("fpn_ablate.model") if f.startswith("data/")}
    assert not {f for f in users_of("fpn_ablate.data") if f.startswith("model/")}
    assert not {f for f in users_of(*(f"fpn_ablate.{name}" for name in above)) if f.startswith(("data/", "model/"))}
    # With a run's arguments, `python -m fpn_ablate doctor` hands over to the command line, and only when it is called.
    assert {f for f in users_of("fpn_ablate.cli.run") if f.startswith(("data/", "model/"))} == {"data/doctor.py"}
    assert not {f for f in users_of("fpn_ablate.cli.run", top_level_only=True) if f.startswith(("data/", "model/"))}


def test_the_report_knows_neither_torch_nor_the_rest():
    """What it does know is light: names of keys, and how a file is written."""
    light = tuple(f"fpn_ablate.{name}" for name in ("paths", "errors", "files", "locks", "plan", "replicates", "schema"))
    for path in (p for p in FILES if name_of(p).startswith("report/")):
        own = {i for i in imports(path) if i.startswith("fpn_ablate.") and not i.startswith("fpn_ablate.report")}
        assert all(i.startswith(light) for i in own), path
    assert not {f for f in users_of("torch", "torchvision", "hydra", "omegaconf", "pydantic") if f.startswith("report/")}


@pytest.mark.parametrize(
    "module", ["fpn_ablate.cli.run", "fpn_ablate.report", "fpn_ablate.config.schema", "fpn_ablate.tracking.loggers"]
)
def test_torch_is_not_loaded_before_it_is_needed(module):
    """So that a mistyped key is told at once, and tables need no torch."""
    heavy = {"torch", "torchvision", "wandb", "matplotlib", "scipy", "altair", "vl_convert", "jinja2", "PIL"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_imports_are_acyclic():
    """Packages themselves are left out: `from a import b` of a module b needs b, and a only as its place."""
    modules = {"fpn_ablate." + name_of(path).removesuffix(".py").replace("/", "."): path for path in FILES}
    modules = {name: path for name, path in modules.items() if not name.endswith("__init__")}
    graph = {name: imports(path, top_level_only=True) & set(modules) for name, path in modules.items()}
    assert sum(map(len, graph.values())) > 50
    while leaves := {name for name, used in graph.items() if not used & set(graph)}:
        graph = {name: used for name, used in graph.items() if name not in leaves}
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


def test_weights_know_of_the_rest_the_modules_of_the_model_alone():
    """And of the model only what makes networks reads them."""
    own = set().union(*(imports(path) for path in FILES if name_of(path).startswith("weights/")))
    known = ("fpn_ablate.weights", "fpn_ablate.utils.errors", "fpn_ablate.utils.files", "fpn_ablate.model")
    assert all(i.startswith(known) for i in own if i.startswith("fpn_ablate."))
    assert "fpn_ablate.model.build" not in own
    assert {f for f in users_of("fpn_ablate.weights") if f.startswith("model/")} == {"model/build.py", "model/timm_backbone.py"}
    assert not {f for f in users_of("fpn_ablate.weights") if f.startswith(("data/", "report/"))}


PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not PAGES.exists() or "[madvise]" not in PAGES.read_text(), reason="no huge pages to be had")
@pytest.mark.parametrize(("setting", "large"), [(None, True), ("0", False)])
def test_large_tensors_lie_on_large_pages(setting, large):
    code = (
        "import fpn_ablate, torch; x = torch.ones(2**24)\n"
        "print(sum(int(line.split()[1]) for line in open('/proc/self/smaps') if line.startswith('AnonHugePages')))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"THP_MEM_ALLOC_ENABLE": setting} if setting else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert (int(done.stdout) > 2**15) == large  # of the tensor's 2**16 KiB
