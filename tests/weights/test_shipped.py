"""The weights that come with the package: the file that its description is of, what a run makes of it, and how it is made."""

import hashlib
import json
import shutil
import time
from dataclasses import asdict

import pytest
import safetensors.torch
import torch
from settings import SHORT

from fpn_ablate.data.shapes import RENDERER
from fpn_ablate.engine import inputs, pretrain
from fpn_ablate.model.build import build_backbone
from fpn_ablate.runs import run as running
from fpn_ablate.runs import skip
from fpn_ablate.runs.state import Run
from fpn_ablate.store.layout import run_folder
from fpn_ablate.utils import stamps
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights import shipped
from fpn_ablate.weights.backbone import backbone_weights
from fpn_ablate.weights.files import read, write_safetensors

FILE = shipped.SHIPPED / "small.safetensors"
FACTS = json.loads(FILE.with_suffix(".json").read_text())


@pytest.fixture
def cell(config, tmp_path):
    """`cell("shipped", ...)` -> the configuration of a run of seconds that starts from these weights."""
    short = [override for override in SHORT if not override.startswith("backbone.")]

    def make(weights, *overrides):
        cfg = config(*short, f"backbone.weights={weights}", *overrides)
        return cfg.model_copy(update={"out": str(tmp_path / "results")})

    return make


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the shipped files, which stands for them."""
    shutil.copytree(shipped.SHIPPED, tmp_path / "shipped")
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped" / FILE.name


def describe(file):
    """Make the description that of the file as it is now."""
    facts = FACTS | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    file.with_suffix(".json").write_text(json.dumps(facts))


def test_the_description_is_of_the_file_and_of_the_default_recipe(config):
    """If the recipe, the world or RENDERER has changed: `python scripts/shipped_weights.py` makes both files anew."""
    assert FACTS["sha256"] == hashlib.sha256(FILE.read_bytes()).hexdigest()
    cfg = config("recipe=quick")
    assert cfg.backbone.weights == config().backbone.weights == "shipped"
    assert FACTS["recipe"] == cfg.recipe.pretrain.model_dump()
    world = asdict(pretrain._world(inputs.world(cfg.data, cfg.recipe.short_side), cfg.recipe.pretrain))
    assert FACTS["world"] == json.loads(json.dumps(world))
    assert FACTS["renderer"] == RENDERER
    assert 1 / 12 < FACTS["accuracy"] < 1 and FACTS["threads"] >= 1 and FACTS["torch"]


def without_accuracy(file):
    file.with_suffix(".json").write_text(json.dumps({key: value for key, value in FACTS.items() if key != "accuracy"}))


def swapped(file):
    file.write_bytes(safetensors.torch.save({"a": torch.zeros(3)}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (swapped, r"its sha256 is \w+, not \w+"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"its sha256 is \w+, not \w+"),
        (lambda file: file.unlink(), "missing or not readable"),
        (lambda file: file.with_suffix(".json").unlink(), "missing or not readable"),
        (lambda file: file.with_suffix(".json").write_text("{}"), "missing or not readable"),
        (without_accuracy, r"missing or not readable \('accuracy'\)"),
    ],
    ids=["swapped", "short", "absent", "undescribed", "empty description", "no accuracy"],
)
def test_a_file_that_is_not_the_one_described_is_refused(copied, cell, damage, reason):
    damage(copied)
    with pytest.raises(UserError, match=rf"backbone.weights=shipped: \S+small.safetensors: {reason}.*weights=pretrain"):
        inputs.prepare(cell("shipped"))


def test_weights_of_another_network_are_listed(copied, config, cell):
    write_safetensors(copied, build_backbone(config("backbone=small_deep").backbone).state_dict(), {})
    describe(copied)
    with pytest.raises(UserError, match=r"small.safetensors does not fit backbone=small: .* missing .* unexpected"):
        inputs.prepare(cell("shipped"))


def test_a_run_from_shipped_weights_is_that_from_the_same_weights_elsewhere(cell, monkeypatch):
    """From a file that the user names, and from the cache of pre-training where that holds the same bits."""

    def cached(backbone, recipe, world, path, *_):
        torch.save(read(FILE).tensors, path)
        path.with_suffix(".json").write_text(json.dumps({"accuracy": 0.5, "seconds": 7.0}))

    monkeypatch.setattr(pretrain, "_train", cached)
    results = {}
    for weights in ("shipped", FILE, "pretrain"):
        cfg = cell(weights, "backbone.freeze_at=2", "backbone.frozen_bn=true")
        outcome = running.run(cfg)
        model = torch.load(run_folder(cfg, outcome["fingerprint"]) / "model.pt", weights_only=True)
        results[weights] = outcome, model
    (first, model), *others = results.values()
    for outcome, other in others:
        assert first["metrics"] == outcome["metrics"] and first["weights"] == outcome["weights"]
        assert list(model) == list(other) and all(torch.equal(model[name], other[name]) for name in model)
    costs = [[outcome["cost"][key] for key in ("pretrain_s", "pretrain_accuracy")] for outcome, _ in results.values()]
    assert costs == [[0.0, FACTS["accuracy"]], [0.0, None], [7.0, 0.5]]
    assert len({outcome["fingerprint"] for outcome, _ in results.values()}) == 3


def test_the_network_starts_from_the_shipped_tensors_whatever_the_data(cell):
    tensors = read(FILE).tensors
    for data in ("data.noise=1", "data.seed=3"):
        cfg = cell("shipped", data)
        state = backbone_weights(cfg.backbone, inputs.prepare(cfg).pretrained.path)
        assert all(torch.equal(state[name], tensors[name]) for name in build_backbone(cfg.backbone).state_dict())


def test_other_shipped_weights_are_another_run(copied, cell):
    cfg = cell("shipped")
    before = Run(cfg, inputs.prepare(cfg), 0).fingerprint
    tensors = read(copied).tensors
    write_safetensors(copied, tensors | {"stages.stem.1.bias": tensors["stages.stem.1.bias"] + 1}, {})
    describe(copied)
    assert Run(cfg, inputs.prepare(cfg), 0).fingerprint != before


def test_weights_written_again_during_a_run_or_after_it_are_no_reason_to_skip_it(copied, cell):
    cfg, start = cell("shipped"), time.time()
    loaded, fingerprint = inputs.prepare(cfg), running.run(cfg)["fingerprint"]
    skip.write_skip_entry(cfg, loaded, fingerprint, time.time() + 60)  # as if they were old
    assert skip.finished_record(cfg)
    copied.write_bytes(copied.read_bytes())
    stamps.stamp_of.cache_clear()  # as in another process
    assert skip.finished_record(cfg) is None
    entry = run_folder(cfg, fingerprint) / "skip.json"
    entry.unlink()
    skip.write_skip_entry(cfg, loaded, fingerprint, start)
    assert not entry.exists()


def test_the_command_writes_what_is_read(script, tmp_path, monkeypatch, cell):
    """In two steps; the folder may be that of the package."""
    monkeypatch.setattr(pretrain, "HELD_OUT", 8)
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    short = ("recipe.short_side=64", *(f"recipe.pretrain.{key}" for key in ("steps=2", "batch_size=4", "side=32")))
    made = script("shipped_weights").make(tmp_path, short)
    assert shipped.find_shipped("small")[0] == made == tmp_path / FILE.name
    facts = json.loads(made.with_suffix(".json").read_text())
    assert facts.keys() == FACTS.keys() and (facts["recipe"]["steps"], facts["world"]["reference"]) == (2, 64)
    state = backbone_weights(cell("shipped").backbone, made)
    assert not torch.equal(state["stages.stem.0.weight"], read(FILE).tensors["stages.stem.0.weight"])


@pytest.mark.slow
def test_the_command_makes_them_anew(script, tmp_path):
    """The bits depend on the processor and torch's version, the accuracy hardly."""
    made = script("shipped_weights").make(tmp_path)
    facts, tensors = json.loads(made.with_suffix(".json").read_text()), read(made).tensors
    assert (facts["recipe"], facts["world"], facts["threads"]) == (FACTS["recipe"], FACTS["world"], FACTS["threads"])
    assert facts["sha256"] == hashlib.sha256(made.read_bytes()).hexdigest()
    assert facts["accuracy"] == pytest.approx(FACTS["accuracy"], abs=0.015)
    assert {name: value.shape for name, value in tensors.items()} == {n: v.shape for n, v in read(FILE).tensors.items()}
