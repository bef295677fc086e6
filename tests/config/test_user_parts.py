"""Classes of the user's: from where they are loaded, which keys they take, and what is refused in which words."""

import os
import pickle
import re
import sys

import pytest
from user_folder import BLOCKS, write

from fpn_ablate.config import user_parts
from fpn_ablate.config.composition import compose
from fpn_ablate.config.parts import UserBackbone, UserPart
from fpn_ablate.config.rows import compose_rows
from fpn_ablate.config.validation import load_saved_config, validate
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import PACKAGE

SMALL = "channels: 8"


@pytest.fixture
def mine(tmp_path):
    return write(tmp_path / "mine")


@pytest.fixture
def part(mine):
    """`part("necks.PathAggregation", channels=8)` -> a part of the folder `mine`."""

    def make(name, schema=UserPart, below=mine, **keys):
        return schema.model_validate({"class": name, **keys}, context={"config_dir": below})

    return make


def refused(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


def test_a_class_is_constructed_with_what_we_give_and_its_keys_in_its_types(part, config):
    from fpn_ablate.structures.levels import Level

    neck = user_parts.build(part("necks.PathAggregation", channels=8, gain=2, sizes=[1, 2]), "neck", [Level("c2", 4)])
    assert (neck.depth, neck.sizes, [level.name for level in neck.levels]) == (1, (1, 2), ["p2"])
    assert isinstance(neck.gain, float) and neck.gain == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "neck.channels: missing; set neck.channels=..."),
        (
            {"channels": 8, "dept": 3},
            "neck.dept with neck.class=necks.PathAggregation: there is no such key. Did you mean neck.depth? "
            "Allowed in neck: channels, class, depth, gain, kind, sizes",
        ),
        ({"channels": True}, "neck.channels=True: give an integer"),
        ({"channels": "8"}, "neck.channels='8': give an integer"),
        ({"channels": 8.0}, "neck.channels=8.0: give an integer"),
        ({"channels": 8, "gain": True}, "neck.gain=True: give a number"),
        ({"channels": 8, "gain": float("nan")}, "neck.gain=nan: give a finite number"),
        ({"channels": 8, "gain": 1e999}, "neck.gain=inf: give a finite number"),
        ({"channels": 8, "sizes": [1, "x"]}, "neck.sizes.1='x': give an integer"),
        ({"channels": 8, "kind": "c"}, "neck.kind='c': give 'a' or 'b'"),
        ({"channels": 8, "folder": "/"}, "neck.folder with neck.class=necks.PathAggregation: there is no such key"),
    ],
)
def test_a_wrong_key_is_refused_as_strictly_as_a_built_in_ones(part, keys, message):
    assert message in refused(user_parts.typed_arguments, part("necks.PathAggregation", **keys), "neck")


def test_every_problem_of_a_part_is_listed(part):
    lines = refused(user_parts.typed_arguments, part("necks.PathAggregation", depth="x", kinds="a"), "neck").splitlines()
    assert [re.match(r"[\w.]+", line)[0] for line in lines] == ["neck.channels", "neck.depth", "neck.kinds"]


def files(part):
    return {module: file for module, (file, _) in user_parts.sources(part).items()}


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("class Box: pass", "a.Bux", "a.py has no class Bux. Its classes: Box"),
        ("x = 3", "a.x", "{folder}/a.py has no class x. Its classes: none"),
        ("x = 3", "neks.X", "there is no neks.py in {folder}. Its files: a.py, blocks.py, necks.py"),
        ("x = 3", "a.b.X", "there is no a/b.py in {folder}"),
        ("x = 3", "os.system", "there is no os.py in {folder}"),
        ("x = 3\nimport nosuchmodule", "a.A", "{folder}/a.py, line 2: ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("from .nowhere import A", "a.A", "{folder}/a.py, line 1: ModuleNotFoundError: No module named '.nowhere'"),
        ("from .. import A", "a.A", "{folder}/a.py, line 1: ImportError"),
        ("raise SystemExit(3)", "a.A", "{folder}/a.py, line 1: SystemExit: 3"),
        ("x = 3\nclass A: pass(", "a.A", "(invalid syntax (a.py, line 2))"),
        ("x = '\0'", "a.A", "cannot be read as Python"),
        ("import blocks", "a.A", "a.py imports blocks from {folder} by an absolute name: use a relative one, as in from ."),
        ("from torch import nn\nclass A(nn.Module): pass", "a.A", "A takes (*args: Any, **kwargs: Any)"),
        ("from collections import OrderedDict", "a.OrderedDict", "no signature found"),
    ],
)
def test_a_class_that_cannot_be_a_part_is_refused_with_file_and_fix(part, mine, text, name, message):
    write(mine, {"a.py": text})
    said = refused(user_parts.build, part(name), "neck", ())
    assert said.startswith(f"neck.class={name}: ") and message.format(folder=mine) in said


@pytest.mark.parametrize(
    ("arguments", "body", "message"),
    [
        ("*, depth: int = 1", "pass", "A takes (*, depth: int = 1): write def __init__(self, in_levels, *, KEY: TYPE"),
        ("i, depth: int = 1", "pass", "A takes (i, depth: int = 1): write def __init__(self, in_levels, *"),
        ("i, *more", "pass", "A takes (i, *more): write"),
        ("i, **more", "pass", "A takes (i, **more): write"),
        ("i, *, depth=1", "pass", "A takes (i, *, depth=1): write def __init__(self, in_levels, *, KEY: TYPE"),
        ("i, *, depth: 'Nowhere' = 1", "pass", "an argument of A has a type that no key can have (name 'Nowhere'"),
        ("i, *, depth: type(ast) = 1", "pass", "a.py, line 3: NameError"),
        ("i, *, depth: torch.nn.Module = 1", "pass", "an argument of A has a type that no key can have"),
        ("i", "raise ValueError('why')", "{folder}/a.py, line 3: ValueError: why"),
        ("i", "torch.ones(1, device='meta').item()", "no .item(), no .to()"),
        ("i", "torch.ones(1, device='meta').tolist()", "on torch's meta device, where"),
    ],
)
def test_a_constructor_that_cannot_be_a_parts_is_refused_with_the_fix(part, mine, arguments, body, message):
    write(mine, {"a.py": f"import torch\nclass A:\n    def __init__(self, {arguments}): {body}\n"})
    assert message.format(folder=mine) in refused(user_parts.build, part("a.A"), "neck", ())


@pytest.mark.parametrize("name", ["A", "a..B", "../a.B", "/etc/a.B", "a.B()", ".a.B", "a b.C"])
def test_a_class_is_named_by_its_file_and_name_alone(config, mine, name):
    values = config().model_dump(mode="json") | {"neck": {"class": name}}
    assert "write FILE.CLASS, as necks.PathAggregation" in refused(validate, values, mine)


def test_a_file_outside_the_folder_is_refused(part, mine, tmp_path):
    write(tmp_path, {"outside.py": "class A: pass"})
    (mine / "a.py").symlink_to(tmp_path / "outside.py")
    assert "a.py leads out of" in refused(user_parts.load_class, part("a.A"), "neck")


@pytest.mark.parametrize("package", ["", "__init__.py"], ids=["namespace", "package"])
@pytest.mark.parametrize(
    ("depth", "line"),
    [
        (0, "from blocks import Block"),
        (1, "from mine.blocks import Block"),
        (1, "from mine import blocks"),
        (2, "import above.mine.blocks"),
    ],
)
def test_no_import_of_the_folders_files_escapes_the_digest(part, tmp_path, monkeypatch, package, depth, line):
    folder = tmp_path / "above" / "mine"
    write(folder, {"a.py": f"{line}\nclass A: pass", "blocks.py": "class Block: pass"} | ({package: ""} if package else {}))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend([folder, folder.parent, tmp_path][depth])
    said = refused(files, part("a.A", below=folder))
    assert re.search(r"a.py imports [\w.]+ from .*mine by an absolute name: use a relative one", said)
    assert not {"blocks", "mine", "above"} & set(sys.modules)


def test_an_environment_in_the_folder_and_this_package_are_imported_by_their_names(part, mine, monkeypatch):
    packages = mine / "env/lib/python3.11/site-packages"
    write(packages, {"installed.py": "x = 1"})
    write(mine, {"types.py": "", "a.py": "import types, installed\nclass A: pass"})
    monkeypatch.syspath_prepend(packages)
    assert set(files(part("a.A"))) == {"a"}
    checkout = PACKAGE.parent  # --config-dir .
    assert "fpn_ablate.config.overrides" in files(part("fpn_ablate.config.overrides.A", below=checkout))


def test_without_a_folder_nothing_is_imported_wherever_the_file_lies(part, mine, monkeypatch):
    monkeypatch.chdir(mine)
    monkeypatch.syspath_prepend(mine)
    said = refused(user_parts.build, part("necks.PathAggregation", below=None, channels=8), "neck", ())
    assert said == "neck.class=necks.PathAggregation: say where its file lies, with --config-dir FOLDER: necks.py in it"
    assert "necks" not in sys.modules


def test_neither_the_path_nor_the_working_directory_is_searched(part, mine, monkeypatch, tmp_path):
    write(tmp_path / "else", {"other.py": "class A: pass", "necks.py": "raise ValueError('the wrong file')"})
    monkeypatch.chdir(tmp_path / "else")
    monkeypatch.syspath_prepend(tmp_path / "else")
    assert "there is no other.py in" in refused(user_parts.load_class, part("other.A"), "neck")
    before = list(sys.path)
    assert user_parts.load_class(part("necks.PathAggregation", channels=8), "neck").__name__ == "PathAggregation"
    assert sys.path == before and "necks" not in sys.modules


def test_a_changed_file_is_loaded_afresh_though_size_and_time_are_the_same(part, mine):
    def load(number):
        write(mine, {"a.py": "from .b import x\nclass A:\n    x = x", "b.py": f"x = {number}"})
        os.utime(mine / "b.py", (10**9, 10**9))
        fresh = part("a.A")
        return user_parts.load_class(fresh, "neck"), user_parts.content_digest(fresh)

    first, again, changed = load(1), load(1), load(2)
    assert first == again and first[1] != changed[1] and (first[0].x, changed[0].x) == (1, 2)
    assert not list(mine.rglob("*.pyc"))


def test_a_run_keeps_to_the_files_that_it_has_loaded(part, mine):
    write(mine, {"a.py": "class A:\n    def later(self):\n        from .b import x\n        return x", "b.py": "x = 1"})
    running = part("a.A")

    def state():
        return user_parts.load_class(running, "neck"), user_parts.content_digest(running), files(running)

    before = state()
    write(mine, {"a.py": "class A(", "b.py": "x = 2"})
    assert state() == before and before[0]().later() == 1
    assert "a.py, line 1" in refused(user_parts.content_digest, part("a.A"))


def test_what_is_imported_is_what_was_hashed(part, mine, monkeypatch):
    """An edit between the two."""
    write(mine, {"a.py": "from . import b\nclass A:\n    x = b.x", "b.py": "x = 1"})
    unchanged, importing = user_parts.content_digest(part("a.A")), user_parts.importlib.import_module
    monkeypatch.setattr(
        user_parts.importlib, "import_module", lambda name: [write(mine, {"b.py": "x = 2"}), importing(name)][1]
    )
    loaded = part("a.A")
    assert user_parts.load_class(loaded, "neck").x == 1 and user_parts.content_digest(loaded) == unchanged


def test_modules_that_were_not_hashed_are_not_imported(part, mine):
    text = "import importlib\nimportlib.import_module('.unused', __package__)\nclass A: pass"
    write(mine, {"pkg/__init__.py": "", "pkg/a.py": text, "pkg/unused.py": ""})
    assert "a.py, line 2: ModuleNotFoundError" in refused(user_parts.load_class, part("pkg.a.A"), "neck")


def test_a_file_that_failed_is_imported_anew_once_it_is_right(part, mine):
    write(mine, {"a.py": "from .b import x\nclass A: pass", "b.py": "import nosuchmodule"})
    refused(user_parts.load_class, part("a.A"), "neck")
    write(mine, {"b.py": "x = 1"})
    assert user_parts.load_class(part("a.A"), "neck").__name__ == "A"


def test_files_are_the_class_and_what_it_imports_from_the_folder(part, mine):
    marker = mine / "imported"
    write(
        mine, {"unused.py": "", "pkg/__init__.py": f"open({str(marker)!r}, 'w')", "pkg/a.py": "from . import b", "pkg/b.py": ""}
    )
    assert files(part("necks.PathAggregation")) == {"necks": mine / "necks.py", "blocks": mine / "blocks.py"}
    assert set(files(part("pkg.a.A"))) == {"pkg", "pkg.a", "pkg.b"}
    assert not marker.exists()


def test_the_content_is_that_of_the_code_of_these_files(part, mine):
    def content():
        return user_parts.content_digest(part("necks.PathAggregation"))

    before = content()
    write(mine, {"unused.py": "x = 1", "blocks.py": "# a comment\n" + write(mine).joinpath("blocks.py").read_text()})
    assert content() == before
    write(mine, {"blocks.py": BLOCKS.replace("after, 1)", "after, 1, bias=False)")})
    assert content() != before


def test_a_folder_without_init_may_hold_modules(part, mine):
    write(mine, {"sub/deep.py": "from ..blocks import Block\nclass A(Block): pass"})
    assert user_parts.load_class(part("sub.deep.A"), "neck").__mro__[1].__name__ == "Block"


@pytest.mark.parametrize(
    ("key", "kind", "keys"),
    [
        ("backbone", UserBackbone, {"weights": "pretrain", "freeze_at": 0, "frozen_bn": True}),
        ("task.roi.head", UserPart, {}),
        ("rpn.head", UserPart, {}),
        ("task.proposals.neck", UserPart, {}),
    ],
)
def test_each_kind_gets_its_own_arguments(part, mine, key, kind, keys):
    given = user_parts.POSITIONAL[key]
    signature = ", ".join(["self", *given, "*", "width: int = 1"])
    write(mine, {"a.py": f"class A:\n    def __init__({signature}): self.all = [{', '.join(given)}], width"})
    made = user_parts.build(part("a.A", kind, width=3, **keys), key, *range(len(given)))
    assert made.all == (list(range(len(given))), 3)


def test_a_backbones_argument_cannot_be_called_like_a_key_of_all_backbones(part, mine):
    write(mine, {"a.py": "class A:\n    def __init__(self, *, weights: str = ''): pass"})
    backbone = part("a.A", UserBackbone, weights="pretrain", freeze_at=0, frozen_bn=True)
    assert "weights is a key of every backbone" in refused(user_parts.build, backbone, "backbone")


# Composition.


def test_a_row_with_a_neck_of_ones_own_is_composed_and_its_keys_need_no_plus(mine):
    cfg = compose(["ablation=pan", "recipe=smoke", "neck.depth=3"], mine)
    assert (cfg.row, cfg.neck.arguments) == ("pan+depth=3", {"channels": cfg.recipe.channels, "depth": 3})
    assert list(cfg.user_parts) == ["neck"] and cfg.neck.folder == mine
    assert pickle.loads(pickle.dumps(cfg)).neck.folder == mine


@pytest.mark.parametrize(
    ("overrides", "row"),
    [
        (["neck=pan"], "pan"),
        (["neck=pan", "neck.depth=2"], "pan+depth=2"),
        (["neck=pan", "ablation=fpn"], "fpn+neck=pan"),
        (["ablation=pan"], "pan"),
        (["ablation=pan", "++neck.depth=2"], "pan+depth=2"),
        (["ablation=fpn", "neck.upsample=bilinear"], "fpn+upsample=bilinear"),
    ],
)
def test_rows_have_plain_names(mine, overrides, row):
    assert compose(["recipe=smoke", *overrides], mine).row == row


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ablation=pan", "neck.dept=3"], "neck.dept with neck.class=necks.PathAggregation: there is no such key."),
        (["ablation=fpn", "neck.depth=3"], "neck.depth with neck=fpn: there is no such key. Allowed in neck: channels"),
        (["neck=pam"], "neck/pam"),
        (["ablation=pan", "factors=[nek]"], "factors: nek: there is no such key"),
    ],
)
def test_what_a_row_with_parts_of_ones_own_does_not_have_is_refused(mine, overrides, message):
    assert message in refused(compose, ["recipe=smoke", *overrides], mine)


def test_a_key_of_ones_own_can_be_a_factor(mine):
    assert compose(["recipe=smoke", "ablation=pan", "factors=[neck.depth]", "neck.depth=2"], mine).row == "pan+depth=2"


def test_the_heads_and_the_neck_of_the_proposals_can_be_ones_own(mine):
    write(
        mine,
        {
            "heads.py": "class Box:\n    def __init__(self, in_channels, resolution, *, width: int): pass\n"
            "class RPN:\n    def __init__(self, channels, num_anchors): pass",
            "ablation/heads.yaml": "# @package _global_\nrpn: {head: {class: heads.RPN}}\n"
            "task: {roi: {head: {class: heads.Box, width: 32}}}\n",
        },
    )
    task = ["recipe=smoke", "task=fast_rcnn", "ablation=heads", "neck@task.proposals.neck=pan"]
    cfg = compose([*task, "task.roi.head.width=64"], mine)
    assert set(cfg.user_parts) == {"rpn.head", "task.roi.head", "task.proposals.neck"}
    assert cfg.task.roi.head.arguments == {"width": 64}
    assert "Did you mean task.roi.head.width?" in refused(compose, [*task, "task.roi.head.wdth=64"], mine)
    assert "task.proposals.neck.depth='x'" in refused(compose, [*task, "task.proposals.neck.depth=x"], mine)


def test_a_file_or_record_cannot_name_the_folder(mine, tmp_path, config):
    values = config().model_dump(mode="json")
    values["neck"] = {"class": "necks.PathAggregation", "channels": 8, "_folder": str(mine), "folder": str(mine)}
    assert validate(values).neck.folder is None
    write(tmp_path, {"config.yaml": "x: 1"})
    assert refused(load_saved_config, tmp_path / "config.yaml", mine)
    assert compose_rows(["ablation=fpn", "recipe=smoke"], mine)[0].user_parts == {}


def test_a_saved_configuration_is_bound_to_a_folder_only_where_one_is_given(mine, tmp_path):
    import yaml

    cfg = compose(["ablation=pan", "recipe=smoke"], mine)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    assert load_saved_config(tmp_path / "config.yaml").neck.folder is None
    bound = load_saved_config(tmp_path / "config.yaml", mine)
    assert (bound.model_dump(), bound.neck.folder) == (cfg.model_dump(), mine)
    assert load_saved_config(tmp_path / "config.yaml", mine).neck.folder == mine


def test_a_finished_run_goes_with_the_files_that_it_was_made_from(part, mine, tmp_path):
    parts = {"neck": part("necks.PathAggregation", channels=8)}
    record = {"user_parts": user_parts.describe(parts)}
    user_parts.refuse_changed(parts, record, tmp_path)
    user_parts.refuse_changed({}, {}, tmp_path)
    unbound = {"neck": part("necks.PathAggregation", below=None)}
    assert "its files as they were when the run was made" in refused(user_parts.refuse_changed, unbound, record, tmp_path)
    for other in ({}, {"user_parts": None}, {"user_parts": [1]}, {"user_parts": {"neck": {"class": "necks.PathAggregation"}}}):
        assert "its files as they were when the run was made" in refused(user_parts.refuse_changed, parts, other, tmp_path)
    write(mine, {"blocks.py": BLOCKS + "\n    x = 3\n"})
    assert "its files as they were when the run was made" in refused(user_parts.refuse_changed, parts, record, tmp_path)
