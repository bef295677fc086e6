"""Training: which images rows see, what stays frozen, and that an interruption changes nothing."""

import hashlib

import pytest
import torch
from settings import JOINT, ROWS, SCRATCH, SHORT
from user_folder import write
from users_network import FILES

from fpn_ablate.config.composition import compose
from fpn_ablate.data.shapes import World, load
from fpn_ablate.engine import train as training
from fpn_ablate.engine.train import autocast, train
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.heads import roi, rpn
from fpn_ablate.model.init import initialise
from fpn_ablate.utils.errors import Diverged
from fpn_ablate.utils.seeding import key, numpy_generator, torch_generator

CPU = torch.device("cpu")
SIX = (*SHORT, "recipe.steps=6")  # few samples, so that chance matters


@pytest.fixture(scope="module")
def pictures():
    return load(World(height=64, width=64, objects=(3, 5), distractors=(0, 2)), 5, 2)[0]


def fresh(cfg, num_classes=1):
    model = build_detector(cfg, num_classes=num_classes)
    initialise(model, cfg.seed)
    return model


def fit(model, cfg, pictures, **arguments):
    train(
        model,
        pictures,
        cfg.recipe,
        CPU,
        seed=cfg.seed,
        steps=cfg.steps,
        workers=cfg.workers,
        log_every=cfg.log.every,
        **arguments,
    )
    return model.state_dict()


def trained(cfg, pictures, **arguments):
    return fit(fresh(cfg), cfg, pictures, **arguments)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Killed(Exception):
    pass


def kill_at(step):
    def report(done, values):
        if done == step:
            raise Killed

    return report


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("killed_at", [3, 5, 6])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(config, pictures, tmp_path, optimizer, killed_at):
    cfg = config(
        *SIX,
        "backbone.weights=pretrain",
        f"recipe.optimizer={{name: {optimizer}, backbone_lr_factor: 0.5}}",
        "recipe.flip=true",
    )
    whole = trained(cfg, pictures, checkpoint=tmp_path / "whole.pt")
    path, seen = tmp_path / "checkpoint.pt", []
    with pytest.raises(Killed):
        trained(cfg, pictures, checkpoint=path, report=kill_at(killed_at))
    torch.manual_seed(99)
    resumed = trained(cfg, pictures, checkpoint=path, report=lambda done, values: seen.append(done))
    assert seen == list(range((killed_at - 1) // 2 * 2 + 1, 7))
    assert equal(resumed, whole)


def test_the_same_cell_twice_is_the_same_and_another_seed_is_not(config, pictures):
    cfg = config(*SIX)
    torch.manual_seed(1)
    first = trained(cfg, pictures)
    torch.manual_seed(2)
    assert equal(first, trained(cfg, pictures))
    assert not equal(first, trained(config(*SIX, "seed=1"), pictures))


def test_workers_change_nothing(config, pictures):
    short = (*SHORT, "recipe.steps=3")
    assert equal(trained(config(*short), pictures), trained(config(*short, "workers=2"), pictures))


def first_ones(labels, count, fraction, generator):
    """Sample without chance: the first positives, then the first negatives."""
    rank = torch.arange(labels.shape[1]) + len(labels[0]) * torch.where(labels == 1, 0, torch.where(labels == 0, 1, 2))
    idxs = rank.argsort(1)[:, :count]
    return idxs, labels.gather(1, idxs) >= 0


def images_seen(model, monkeypatch):
    """A list that receives a hash of each image that the model is trained on."""
    hashes, losses = [], model.losses

    def spy(images, targets, *rest):
        for image, boxes, valid in zip(images, targets.boxes, targets.valid | targets.crowd, strict=True):
            hashes.append(hashlib.sha256(image.numpy().tobytes() + boxes[valid].numpy().tobytes()).hexdigest())
        return losses(images, targets, *rest)

    monkeypatch.setattr(model, "losses", spy)
    return hashes


@pytest.mark.parametrize("task", ["rpn", "faster_rcnn"])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(config, monkeypatch, task):
    """The mean over parts equals that over all images where each image yields its full number of samples."""
    for module in (rpn, roi):
        monkeypatch.setattr(module, "sample", first_ones)
    pictures = load(World(height=64, width=64, objects=(3, 5), distractors=(0, 2)), 6, 1)[0]
    overrides = (f"task={task}",) if task == "rpn" else (*JOINT, "recipe.roi.samples=8")
    step = ("recipe.steps=1", "recipe.roi.steps=1", "recipe.batch_size=6", "recipe.clip_norm=null", "recipe.flip=true")
    images, values = [], []
    for parts in (1, 3):
        cfg = config(*overrides, *step, "backbone.freeze_at=0", "rpn.samples=16", f"recipe.accumulate={parts}")
        model = fresh(cfg, len(pictures.categories))
        images.append(images_seen(model, monkeypatch))
        losses = {}
        fit(model, cfg, pictures, report=lambda done, reported, losses=losses: losses.update(reported))
        values.append({**losses, **{name: p.grad for name, p in model.named_parameters()}})
    assert images[0] == images[1] and len(images[0]) == 6
    for name, value in values[0].items():
        whole, in_parts = torch.as_tensor(value), torch.as_tensor(values[1][name])
        torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()), msg=name)


def test_the_rate_that_is_trained_with_follows_the_batch(config, pictures):
    rates = []
    for batch in (2, 4):
        cfg = config(*SIX, "recipe.optimizer.lr_batch_size=4", f"recipe.batch_size={batch}")
        trained(cfg, pictures, report=lambda done, values: rates.append(values["lr"]))
    assert [2 * rate for rate in rates[:6]] == pytest.approx(rates[6:])


def what_a_row_sees(cfg, pictures, monkeypatch):
    """Images of all steps, and the seeds of the generators that draw the RPN's and the second stage's samples in each part."""
    model, seeds = fresh(cfg), []
    images, losses = images_seen(model, monkeypatch), model.losses

    def spy(batch, targets, generators, proposals):
        seeds.append((generators("rpn").initial_seed(), generators("roi").initial_seed()))
        return losses(batch, targets, generators, proposals)

    monkeypatch.setattr(model, "losses", spy)
    fit(model, cfg, pictures)
    return images, seeds


def test_rows_at_one_seed_see_the_same_images_in_the_same_order_with_the_same_flips(config, pictures, monkeypatch):
    short = (*SHORT, "recipe.steps=3")
    rows = {row: what_a_row_sees(config(f"ablation={row}", *short), pictures, monkeypatch) for row in ROWS}
    assert len({tuple(images) for images, _ in rows.values()}) == 1
    assert all(seeds == rows["fpn"][1] for _, seeds in rows.values())
    other = what_a_row_sees(config(*short, "seed=1"), pictures, monkeypatch)
    assert other[0] != rows["fpn"][0]
    assert not set(other[1]) & set(rows["fpn"][1])


def test_each_part_of_each_step_draws_samples_of_its_own(config, pictures, monkeypatch):
    """Nothing but seed, step, part and purpose: so it cannot matter which process computes a part, or whether it is resumed."""
    _, seeds = what_a_row_sees(config(*SHORT, "recipe.accumulate=2", "recipe.steps=3"), pictures, monkeypatch)
    assert len(seeds) == 6
    assert len({seed for pair in seeds for seed in pair}) == 12
    _, whole = what_a_row_sees(config(*SHORT, "recipe.steps=3"), pictures, monkeypatch)
    assert whole == seeds[::2]  # a whole batch is part 0


def test_a_checkpoint_holds_no_generator(config, pictures, tmp_path):
    trained(config(*SHORT), pictures, checkpoint=tmp_path / "checkpoint.pt")
    assert training.read_checkpoint(tmp_path / "checkpoint.pt").keys() == {"step", "model", "optimizer"}


@pytest.mark.parametrize("frozen_bn", ["true", "false"])
@pytest.mark.parametrize("freeze_at", [0, 2, 5])
def test_what_is_frozen_stays_bitwise_what_it_was_and_the_rest_moves(config, pictures, frozen_bn, freeze_at):
    cfg = config("recipe.steps=3", f"backbone.freeze_at={freeze_at}", f"backbone.frozen_bn={frozen_bn}", "recipe.batch_size=2")
    model = fresh(cfg)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    fit(model, cfg, pictures)
    still = {n for n, v in model.state_dict().items() if torch.equal(v, before[n])}
    stages = ("stem", "c2", "c3", "c4", "c5")
    frozen = {n for n in before if n.startswith(tuple(f"backbone.stages.{s}." for s in stages[:freeze_at]))}
    statistics = {n for n in before if ".bn" in n or "stem.1." in n or "shortcut.1." in n}
    assert still == (frozen | statistics if frozen_bn == "true" else frozen)


def test_a_model_learns_two_images_by_heart(config, pictures):
    cfg = config(*SCRATCH, "recipe.steps=60", "log.every=1", "recipe.batch_size=2", "recipe.flip=false")
    losses = []
    two = load(World(height=64, width=64, objects=(3, 5), distractors=(0, 2)), 2, 2)[0]
    trained(cfg, two, report=lambda done, values: losses.append(values))
    for name in ("rpn_objectness", "rpn_box"):
        first, last = (sum(v[name] for v in part) / 5 for part in (losses[:5], losses[-5:]))
        assert last < 0.5 * first, name


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_rate_follows_the_schedule_in_the_optimiser_and_in_the_report(config, pictures, monkeypatch, name):
    cfg = config(
        *SIX,
        f"recipe.optimizer.name={name}",
        "recipe.schedule.warmup_steps=2",
        "recipe.schedule.drops=[0.5]",
        "recipe.optimizer.lr=0.001",
    )
    made, reported, used = [], [], []
    build = training.build_optimizer
    monkeypatch.setattr(training, "build_optimizer", lambda *a: made.append(build(*a)) or made[0])

    def report(done, values):
        reported.append(values["lr"])
        used.append({group["lr"] for group in made[0].param_groups})

    trained(cfg, pictures, report=report)
    assert reported == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-4, 1e-4, 1e-4])
    assert used == [{rate} for rate in reported]


@pytest.mark.parametrize("switch", ["recipe.clip_norm=0.001", "recipe.flip=false", "recipe.optimizer.lr=0.01"])
def test_switches_of_the_recipe_make_a_difference(config, pictures, switch):
    short = (*SHORT, "recipe.steps=3", "recipe.optimizer.name=sgd")
    assert not equal(trained(config(*short), pictures), trained(config(*short, switch), pictures))


def test_the_gradient_is_clipped_to_its_norm(config, pictures):
    """One SGD step without momentum or decay moves the weights by rate x clipped gradient."""
    cfg = config(
        *SIX,
        "recipe.steps=1",
        "recipe.optimizer={name: sgd, lr: 1.0, momentum: 0.0, weight_decay: 0.0}",
        "recipe.schedule.warmup_steps=0",
        "recipe.clip_norm=0.001",
    )
    model = fresh(cfg)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit(model, cfg, pictures)
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in model.named_parameters()])
    assert float(moved.norm()) == pytest.approx(0.001, rel=0.02)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("overrides", [(), (*JOINT, "ablation=c4"), ("backbone=five", *SCRATCH)])
def test_the_backbone_is_trained_at_its_own_rate(pictures, tmp_path, name, overrides):
    """A user's too, and conv5 where it is the box head: it starts from the same weights."""
    mine, moved = write(tmp_path, FILES), {}
    for factor in (1.0, 0.25):
        optimizer = f"recipe.optimizer={{name: {name}, lr: 0.01, backbone_lr_factor: {factor}}}"
        cfg = compose([*SIX, *overrides, "backbone.weights=pretrain", "recipe.steps=1", "recipe.roi.steps=1", optimizer], mine)
        model = fresh(cfg, len(pictures.categories))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        fit(model, cfg, pictures)
        moved[factor] = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    slow = {n for n in before if n.startswith(("backbone.", "roi.box_head.stage."))}
    assert all(moved[1.0][n].abs().sum() > 0 for n in before)
    for n in before:
        torch.testing.assert_close(moved[0.25][n], moved[1.0][n] * (0.25 if n in slow else 1.0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["rpn_objectness", "rpn_box"])
def test_a_loss_that_is_not_finite_stops_with_step_name_and_images(config, pictures, monkeypatch, name, bad):
    cfg = config(*SIX, "log.every=100")
    model, calls = fresh(cfg), []
    losses = model.losses

    def fail_in_step_3(*arguments):
        calls.append(1)
        values = losses(*arguments)
        return {**values, name: values[name] * bad} if len(calls) == 4 else values

    monkeypatch.setattr(model, "losses", fail_in_step_3)
    with pytest.raises(Diverged, match=rf"diverged at step 3: {name} is (nan|inf).*images \[\d, \d\]"):
        fit(model, cfg, pictures)
    assert len(calls) == 4
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("amx", [False, True])
def test_a_cpu_computes_in_bf16_if_it_has_amx_and_the_recipe_wants_it(amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    assert (autocast(True, CPU)._enabled, autocast(False, CPU)._enabled) == (amx, False)


def test_a_training_in_bf16_resumes_to_the_same_bits(config, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "uses_bf16", lambda wanted, device: wanted)
    cfg = config("recipe.bf16=true", *SIX)
    whole = trained(cfg, pictures)
    assert not equal(whole, trained(config("recipe.bf16=false", *SIX), pictures))
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        trained(cfg, pictures, checkpoint=checkpoint, report=kill_at(4))
    assert equal(whole, trained(cfg, pictures, checkpoint=checkpoint))


def test_generators_are_keyed_by_their_purpose():
    keys = {key(*parts) for parts in ((0, "order", 1), (0, "order", 11), (0, "flip", 1), (1, "order", 1), (0, "or", "der", 1))}
    assert len(keys) == 5
    assert all(0 <= k < 2**63 for k in keys)
    assert torch_generator(0, "a").initial_seed() == torch_generator(0, "a").initial_seed() == key(0, "a")
    assert numpy_generator(0, "a").random() == numpy_generator(0, "a").random() != numpy_generator(1, "a").random()
