"""Identity of a run: which keys, files and code change it, and which do not."""

import shutil

import pytest
from settings import SCRATCH

from fpn_ablate.config.schema import INCIDENTAL, Config, Strict
from fpn_ablate.engine import pretrain
from fpn_ablate.runs import identity
from fpn_ablate.sweep.checks import HydraUserError, reject_duplicate_rows
from fpn_ablate.utils import hashing


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


def facts(cfg, data="d", weights="w", device="cpu", deterministic=True):
    return identity.fingerprint_inputs(cfg, data, weights, device, deterministic)


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("row", [("fpn",), ("c4",), ("fpn", "task=fast_rcnn"), ("c4", "task=faster_rcnn")])
def test_the_fingerprint_follows_every_key_that_matters_and_no_other(config, row):
    cfg = config(f"ablation={row[0]}", *row[1:])
    before = identity.fingerprint(facts(cfg))
    paths = list(leaves(cfg.model_dump()))
    assert len(paths) > 50
    for path in paths:
        after = identity.fingerprint(facts(changed(cfg, path)))
        unread = path[0] in INCIDENTAL or path == ("recipe", "name") or (path[:2] == ("recipe", "roi") and len(row) == 1)
        assert (after == before) == unread, ".".join(path)


def test_the_fingerprint_follows_data_weights_device_and_code(config, monkeypatch):
    cfg = config()
    before = facts(cfg)
    others = [facts(cfg, data="x"), facts(cfg, weights="x"), facts(cfg, device="gpu"), facts(cfg, deterministic=False)]
    monkeypatch.setattr(identity, "core_version", lambda: "other")
    others.append(facts(cfg))
    fingerprints = {identity.fingerprint(f) for f in (before, *others)}
    assert len(fingerprints) == 6
    assert len({identity.comparison_key(f, cfg.factors) for f in (before, *others)}) == 6


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


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package whose files a test may edit."""
    copy = tmp_path / "fpn_ablate"
    shutil.copytree(hashing.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(hashing, "PACKAGE", copy)
    yield copy
    hashing.code_version.cache_clear()


def version():
    hashing.code_version.cache_clear()
    return identity.core_version()


def test_comments_docstrings_and_formatting_are_no_new_version(package):
    before = version()
    file = package / "model" / "necks" / "fpn.py"
    text = file.read_text()
    edited = text.replace('"""Feature pyramid network:', '"""Something else:').replace(
        "\nLAZY_RATIO", "\n# A comment.\nLAZY_RATIO"
    )
    assert edited.count("Something else") == edited.count("A comment") == 1
    file.write_text(edited + "\n\n\n")
    assert version() == before


@pytest.mark.parametrize(
    "name",
    [
        *("model/necks/fpn.py", "model/heads/rpn.py", "model/optimise.py", "data/loader.py", "data/proposals.py"),
        *("engine/evaluate.py", "engine/inputs.py", "engine/optim.py", "engine/pretrain.py", "engine/procedures.py"),
        *("engine/train.py", "evaluation/coco.py", "utils/seeding.py", "weights/backbone.py"),
    ],
)
def test_code_of_the_core_is_a_new_version(package, name):
    before = version()
    file = package / name
    file.write_text(file.read_text() + "\nANOTHER = 1\n")
    assert version() != before


@pytest.mark.parametrize(
    "name",
    ["report/formats/tables.py", "runs/run.py", "tracking/loggers.py", "sweep/publish.py", "cli/run.py", "engine/cost.py"],
)
def test_code_around_it_is_not(package, name):
    before = version()
    file = package / name
    file.write_text(file.read_text() + "\nANOTHER = 1\n")
    assert version() == before


@pytest.mark.parametrize("part", sorted({*identity.CORE, *pretrain.PARTS}))
def test_each_part_of_the_core_has_code(part):
    """A folder that has moved would be hashed as an empty one."""
    path = hashing.PACKAGE / part
    assert path.is_file() or any(path.glob("*.py"))


def test_two_rows_that_are_one_configuration_are_refused(config):
    fpn, same = config(), config("neck.top_down=true")
    assert fpn.row != same.row
    with pytest.raises(HydraUserError, match=r"rows fpn and fpn\+top_down=true are the same configuration"):
        reject_duplicate_rows([fpn, config("ablation=c4"), same])
    reject_duplicate_rows([fpn, config("seed=1"), config("ablation=c4"), fpn])
