"""Identity of a run: which keys, files and code change it, and which do not."""

import shutil

import pytest
from settings import SCRATCH

from fpn_ablate.config.base import Strict
from fpn_ablate.config.parts import UserPart
from fpn_ablate.config.schema import INCIDENTAL, Config
from fpn_ablate.engine import procedures, versions
from fpn_ablate.model import parts
from fpn_ablate.runs import identity
from fpn_ablate.utils import hashing
from fpn_ablate.utils.imports import imports_of


def leaves(values, prefix=()):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


def changed(cfg: Config, path: tuple[str, ...]) -> Config:
    """The configuration with another value at one key, whether valid or not."""
    model: Strict = cfg
    for part in path[:-1]:
        model = getattr(model, part)
    old = getattr(model, path[-1])
    value = model.model_copy(update={path[-1]: f"another {old}" if isinstance(old, str | None) else ("another", old)})
    for depth in range(len(path) - 2, -1, -1):
        owner = cfg
        for part in path[:depth]:
            owner = getattr(owner, part)
        value = owner.model_copy(update={path[depth]: value})
    return value


def facts(cfg, data="d", weights="w", device="cpu", deterministic=True, bf16=False):
    return identity.fingerprint_inputs(cfg, data, weights, device, deterministic, bf16=bf16)


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize(
    "row",
    [("fpn",), ("c4",), ("fpn", "task=fast_rcnn"), ("c4", "task=faster_rcnn"), ("fpn", "backbone.weights=pretrain")],
)
def test_the_fingerprint_follows_every_key_that_matters_and_no_other(config, row, monkeypatch):
    monkeypatch.setattr(versions, "part_versions", lambda cfg: {})  # there is no part of another name
    cfg = config(f"ablation={row[0]}", *row[1:])
    before = identity.fingerprint(facts(cfg))
    paths = list(leaves(cfg.model_dump()))
    assert len(paths) > 50
    # Of a second stage, and of weights, that this row has not.
    others = [("recipe", "roi")] * (cfg.task.name == "rpn") + [("recipe", "pretrain")] * (cfg.backbone.weights == "shipped")
    for path in paths:
        after = identity.fingerprint(facts(changed(cfg, path)))
        unread = path[0] in INCIDENTAL or path == ("recipe", "name") or path[:2] in others
        assert (after == before) == unread, ".".join(path)


def test_the_fingerprint_follows_data_weights_device_precision_and_code(config, monkeypatch):
    cfg = config()
    before = facts(cfg)
    others = [facts(cfg, data="x"), facts(cfg, weights="x"), facts(cfg, device="gpu"), facts(cfg, deterministic=False)]
    others.append(facts(cfg, bf16=True))
    monkeypatch.setattr(versions, "core_version", lambda: "other")
    others.append(facts(cfg))
    fingerprints = {identity.fingerprint(f) for f in (before, *others)}
    assert len(fingerprints) == 7
    assert len({identity.comparison_key(f, cfg.factors) for f in (before, *others)}) == 7
    monkeypatch.setattr(versions, "part_versions", lambda cfg: {"neck": {"necks.fpn": "other"}})
    assert identity.fingerprint(facts(cfg)) not in fingerprints


def test_threads_are_part_of_a_run_and_not_of_what_rows_share(config):
    cfg = config()
    one, two = (identity.fingerprint_inputs(cfg, "d", "w", "cpu", True, threads=n) for n in (1, 2))
    assert len({identity.fingerprint(f) for f in (one, two, facts(cfg))}) == 3
    assert len({identity.comparison_key(f, cfg.factors) for f in (one, two, facts(cfg))}) == 1


def test_what_is_incidental_is_written_down():
    assert set(INCIDENTAL) >= {"table", "row", "out", "device", "deterministic", "threads", "workers", "log"}
    assert not set(INCIDENTAL) & {"seed", "data", "backbone", "neck", "rpn", "task", "recipe"}


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_a_source_of_proposals_is_the_row_of_table_1(config):
    """Whatever the second stage of the table that asks for it."""
    row = config()
    source = changed(changed(row, ("recipe", "roi", "steps")), ("recipe", "roi", "pooling"))
    assert identity.fingerprint(facts(source)) == identity.fingerprint(facts(row))


def test_a_file_of_proposals_is_known_by_its_content_not_its_place(config):
    def facts_of(path, digest):
        return identity.fingerprint_inputs(
            config("task=fast_rcnn", f"task.proposals.file={path}"), "d", "w", "cpu", True, digest
        )

    places = ("/here/proposals.npz", "1"), ("there/proposals.npz", "1"), ("/here/proposals.npz", "2")
    original, moved, other = (facts_of(*place) for place in places)
    assert identity.fingerprint(original) == identity.fingerprint(moved) != identity.fingerprint(other)
    assert identity.comparison_key(original, ["neck"]) != identity.comparison_key(other, ["neck"])
    assert "proposals" not in facts(config("task=fast_rcnn"))


@pytest.mark.parametrize("other", [("ablation=c4",), ("ablation=finest",), ("seed=3",), ("neck.upsample=deconv", "seed=1")])
def test_rows_and_seeds_share_a_setting(config, other):
    a, b = facts(config()), facts(config(*other))
    assert identity.comparison_key(a, ["neck"]) == identity.comparison_key(b, ["neck"])
    assert identity.fingerprint(a) != identity.fingerprint(b)


@pytest.mark.parametrize("other", ["recipe.steps=5", "data.noise=1", "backbone.freeze_at=3", "rpn.samples=8", "data.seed=1"])
def test_other_recipes_and_data_are_another_setting(config, other):
    assert identity.comparison_key(facts(config()), ["neck"]) != identity.comparison_key(facts(config(other)), ["neck"])


@pytest.mark.parametrize(
    ("factor", "other"),
    [
        ("backbone", ["backbone=resnet18", *SCRATCH]),
        ("backbone", ["backbone=small_deep"]),  # which is pre-trained, where small's weights are shipped
        ("backbone.freeze_at", ["backbone.freeze_at=1"]),
        ("task.training", ["task.training=joint"]),
        ("rpn.samples", ["rpn.samples=8"]),
        ("neck.upsample", ["neck.upsample=bilinear"]),
    ],
)
def test_rows_that_differ_in_a_declared_factor_share_a_setting_and_no_other_do(config, factor, other):
    task = ("task=faster_rcnn", f"factors=[{factor}]")
    a, b = facts(config(*task)), facts(config(*task, *other))
    assert identity.comparison_key(a, [factor]) == identity.comparison_key(b, [factor])
    for undeclared in ("rpn.nms_thresh", "task.roi", "backbone.frozen_bn", f"{factor}s", factor[:-1]):
        assert identity.comparison_key(a, [undeclared]) != identity.comparison_key(b, [undeclared])


def test_starting_weights_are_no_part_of_the_setting_where_the_backbone_is_a_factor(config):
    a, b = facts(config(), weights="1"), facts(config(), weights="2")
    assert identity.comparison_key(a, ["neck", "backbone"]) == identity.comparison_key(b, ["neck", "backbone"])
    assert identity.comparison_key(a, ["neck", "backbone.freeze_at"]) != identity.comparison_key(
        b, ["neck", "backbone.freeze_at"]
    )
    assert identity.fingerprint(a) != identity.fingerprint(b)


PAN = """
from fpn_ablate.model.necks.fpn import FPN
from .helper import WIDTH

class PathAggregation(FPN):
    pass
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package whose files a test may edit."""
    copy = tmp_path / "fpn_ablate"
    shutil.copytree(versions.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(versions, "PACKAGE", copy)
    yield copy
    forget()


def forget() -> None:
    """Empty the caches, as another process has them."""
    versions._core.cache_clear()
    hashing.source_digest.cache_clear()


@pytest.fixture
def mine(tmp_path):
    """A user's folder with a neck that imports a helper."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "necks.py").write_text(PAN)
    (folder / "helper.py").write_text("WIDTH = 3\n")
    (folder / "heads.py").write_text("class FourConv: ...\n")
    return folder


@pytest.fixture
def rows(config, mine):
    """Rows by name; `pan` has a user's neck."""
    pan = UserPart.model_validate({"class": "necks.PathAggregation"}, context={"config_dir": mine})
    return {
        "fpn": config(),
        "c4": config("ablation=c4"),
        "c4 of table 2": config("ablation=c4", "task=fast_rcnn"),
        "c4 of table 3": config("ablation=c4", "task=faster_rcnn"),
        "resnet18": config("ablation=c4", "backbone=resnet18", *SCRATCH),
        "pan": config().model_copy(update={"neck": pan}),
        "image pyramid": config("ablation=image_pyramid", "backbone=resnet18", *SCRATCH),
    }


@pytest.fixture
def changed_rows(rows, monkeypatch):
    """`changed_rows()` -> the names of the rows whose fingerprint has changed since the last call."""
    monkeypatch.setattr(versions, "source_digest", lambda file: file.read_text())  # its own test is below
    last = {}

    def names():
        versions._core.cache_clear()
        before = dict(last)
        last.update({row: identity.fingerprint(facts(cfg)) for row, cfg in rows.items()})
        return {row for row in before if before[row] != last[row]}

    names()
    assert len(set(last.values())) == len(rows)
    return names


def edited(file):
    assert file.is_file()
    file.write_text(file.read_text() + "\nANOTHER = 1\n")


def test_an_edit_changes_the_rows_that_use_the_file(package, mine, rows, changed_rows):
    two_stage = {"c4 of table 2", "c4 of table 3"}
    for file, users in {
        # Table 2's proposals come from an FPN, and pan is a subclass of it.
        package / "model/necks/fpn.py": {"fpn", "pan", "c4 of table 2"},
        package / "model/necks/single_level.py": {"c4", *two_stage, "resnet18", "image pyramid"},
        package / "model/backbones/small.py": {*rows} - {"resnet18", "image pyramid"},
        package / "model/backbones/torchvision.py": {"resnet18", "image pyramid"},
        package / "model/detectors/image_pyramid.py": {"image pyramid"},
        package / "model/heads/roi.py": {*rows},
        package / "model/optimise.py": {*rows},
        package / "data/loader.py": {*rows},
        mine / "necks.py": {"pan"},
        mine / "helper.py": {"pan"},
        mine / "heads.py": set(),
    }.items():
        edited(file)
        assert changed_rows() == users, file


def test_lists_schema_summary_and_bookkeeping_change_no_row(package, changed_rows):
    names = [
        *(
            "__init__.py",
            "model/parts.py",
            "model/contracts.py",
            "model/summary.py",
            "config/schema.py",
            "config/validation.py",
        ),
        *("report/formats/tables.py", "runs/run.py", "tracking/loggers.py", "sweep/publish.py", "cli/run.py"),
        *("engine/cost.py", "engine/versions.py", "store/layout.py", "utils/files.py"),
    ]
    for name in names:
        edited(package / name)
    assert changed_rows() == set()


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_a_new_part_changes_no_other_row_and_follows_its_own_imports(package, rows, changed_rows, monkeypatch):
    class Wide:
        __module__ = "fpn_ablate.model.necks.wide"

    (package / "model/necks/wide.py").write_text("from fpn_ablate.model.necks.fpn import FPN\nclass Wide(FPN): ...\n")
    file = package / "model/parts.py"
    text = file.read_text().replace('"single_level": SingleLevel', '"single_level": SingleLevel, "wide": Wide')
    file.write_text(f"from fpn_ablate.model.necks.wide import Wide\n{text}")
    monkeypatch.setitem(parts.NECKS, "wide", Wide)
    assert changed_rows() == set()
    assert "fpn_ablate.model.necks.wide" in versions._listed_modules()
    rows["wide"] = rows["fpn"].model_copy(update={"neck": rows["fpn"].neck.model_copy(update={"name": "wide"})})
    changed_rows()
    edited(package / "model/necks/wide.py")
    assert changed_rows() == {"wide"}
    edited(package / "model/necks/fpn.py")
    assert changed_rows() == {"fpn", "pan", "c4 of table 2", "wide"}


def test_comments_docstrings_and_formatting_are_no_new_version(package, config):
    forget()
    before, file = versions.part_versions(config()), package / "model" / "necks" / "fpn.py"
    text = file.read_text()
    edit = text.replace('"""', '"""Something else. ', 1).replace("\n\n\n", "\n\n\n# A comment.\n\n\n")
    assert edit.count("Something else") == 1 and "# A comment." in edit
    file.write_text(edit)
    forget()
    assert versions.part_versions(config()) == before
    edited(file)
    assert versions.part_versions(config()) == before  # a process runs what it has imported
    forget()
    assert versions.part_versions(config()) != before


def test_the_core_is_what_decides_the_figures_of_all_rows():
    core = {module.removeprefix("fpn_ablate.") for module in versions._core()}
    assert core >= {
        *("data.coco", "data.loader", "data.proposals", "data.shapes", "data.transforms", "evaluation.coco"),
        *("engine.evaluate", "engine.fixed_proposals", "engine.inputs", "engine.optim", "engine.pretrain", "engine.procedures"),
        *("engine.train", "model.anchors", "model.boxes", "model.build", "model.detectors.two_stage", "model.heads.roi"),
        *("model.heads.rpn", "model.init", "model.matching", "model.optimise", "structures.levels", "utils.seeding"),
        *("evaluation.recall", "weights.backbone", "weights.loading"),
    }


def test_no_code_of_the_core_hides_in_the_module_of_a_part():
    """It would count in the rows alone that use the part. Move it to a module of its own, or name the module in CORE."""
    lists = (parts.BACKBONES, parts.NECKS, parts.RPN_HEADS, parts.BOX_HEADS, parts.MASK_HEADS)
    lists += (parts.DENSE_HEADS, parts.DETECTORS)
    modules = {value.__module__ for values in lists for value in values.values()}
    core = set(versions._core())
    assert modules == versions._listed_modules()
    listed = set(imports_of(versions.PACKAGE / "model/parts.py", "fpn_ablate.model.parts"))
    for module, file in versions._core().items():
        if module.startswith("fpn_ablate.weights."):
            continue  # knows the names of a part's tensors, which only the part's rows have
        for name in set(imports_of(file, module)) - listed:
            assert name.rpartition(".")[0] not in modules - core, f"{module} imports {name}"


@pytest.mark.parametrize("task", ["fast_rcnn", "faster_rcnn", "faster_rcnn task.training=four_step"])
def test_a_row_stands_on_the_code_of_the_runs_that_it_builds_on(config, task):
    cfg = config("ablation=c4", *f"task={task}".split())
    sources = procedures.sources(cfg)
    assert sources
    for source in sources.values():
        used, own = versions.part_versions(source).values(), versions.part_versions(cfg).values()
        assert all(files in own for files in used)


def test_the_setting_holds_the_code_of_all_parts_that_are_no_factor(config, monkeypatch):
    def settings():
        return [identity.comparison_key(facts(cfg), ["neck"]) for cfg in (config(), config("ablation=c4", "task=fast_rcnn"))]

    before, real = settings(), versions.source_digest
    monkeypatch.setattr(versions, "source_digest", lambda file: "x" if file.name == "fpn.py" else real(file))
    after = settings()
    assert before[0] == after[0] and before[1] != after[1]  # whose proposals are an FPN's


def test_pretraining_follows_its_code_and_that_of_its_backbone(package, config, monkeypatch):
    monkeypatch.setattr(versions, "source_digest", lambda file: file.read_text())
    backbone = config().backbone
    before = versions.pretraining_version(backbone)
    unused = ("backbones/torchvision.py", "necks/fpn.py", "heads/rpn.py", "heads/box_head.py", "parts.py")
    for name in (*(f"model/{name}" for name in unused), "engine/train.py", "data/coco.py", "weights/backbone.py"):
        edited(package / name)
    assert versions.pretraining_version(backbone) == before
    used = ("data/shapes/world.py", "engine/pretrain.py", "model/backbones/small.py", "model/build.py", "model/init.py")
    for name in (*used, "utils/seeding.py"):
        edited(package / name)
        before, former = versions.pretraining_version(backbone), before
        assert before != former, name
