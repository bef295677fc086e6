"""Schedules as pure functions, and what the optimiser touches."""

import itertools
import math

import pytest
import torch
from torch import nn

from fpn_ablate.config.schema import Optimizer, Schedule
from fpn_ablate.engine.optim import base_learning_rate, build_optimizer, learning_rate_factor, set_learning_rate


def schedule(name="step", warmup_steps=0, drops=(0.5, 0.75)):
    return Schedule(name=name, warmup_steps=warmup_steps, drops=drops)


def test_steps_drop_tenfold_at_shares_of_all_steps():
    factors = [learning_rate_factor(step, 40, schedule()) for step in range(40)]
    assert factors == pytest.approx([1.0] * 20 + [0.1] * 10 + [0.01] * 10)


def test_the_papers_schedule():
    """0.02 for 30k iterations, 0.002 for 10k (Sec. 5.1)."""
    paper = schedule(drops=(0.75,))
    assert [0.02 * learning_rate_factor(s, 40000, paper) for s in (0, 29999, 30000, 39999)] == pytest.approx(
        [0.02, 0.02, 0.002, 0.002]
    )


@pytest.mark.parametrize("name", ["step", "cosine"])
def test_warm_up_rises_in_a_straight_line_from_a_third(name):
    plain = [learning_rate_factor(s, 1000, schedule(name, 0)) for s in range(20)]
    warm = [learning_rate_factor(s, 1000, schedule(name, 10)) for s in range(20)]
    expected = [1 / 3 + 2 / 3 * min(s, 10) / 10 for s in range(20)]
    assert [w / p for w, p in zip(warm, plain, strict=True)] == pytest.approx(expected)


def test_cosine_falls_from_1_towards_0():
    factors = [learning_rate_factor(s, 100, schedule("cosine")) for s in range(101)]
    assert factors[0] == 1
    assert factors[50] == pytest.approx(0.5)
    assert factors[25] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factors[100] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(factors))


def test_a_run_shorter_than_its_warm_up():
    assert [learning_rate_factor(s, 2, schedule(warmup_steps=10, drops=())) for s in (0, 1)] == pytest.approx([1 / 3, 0.4])


def settings(name, **changes):
    return Optimizer(**{"name": name, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "lr_batch_size": None, **changes})


def model():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


def test_sgd_is_the_papers():
    group = build_optimizer(model(), settings("sgd")).param_groups
    assert len(group) == 1
    assert (group[0]["lr"], group[0]["momentum"], group[0]["weight_decay"]) == (0.1, 0.9, 0.01)


def test_adamw_spares_biases_and_norms_from_decay():
    net = model()
    groups = build_optimizer(net, settings("adamw")).param_groups
    assert [g["weight_decay"] for g in groups] == [0.01, 0.0]
    assert [id(p) for p in groups[0]["params"]] == [id(net[2].weight)]


@pytest.mark.parametrize("factor", [1.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_is_frozen_is_not_touched_and_what_is_not_is(name, factor):
    net = model()
    before = {k: v.clone() for k, v in net.named_parameters()}
    optimizer = build_optimizer(net, settings(name, backbone_lr_factor=factor), net[:2])
    net(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert {k for k, v in net.named_parameters() if not torch.equal(v, before[k])} == {
        k for k in before if not k.startswith("0.")
    }


def test_the_rate_is_set_in_every_group():
    optimizer = build_optimizer(model(), settings("adamw"))
    set_learning_rate(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5]


def stepped(name, factor, rate):
    """The layers' weights and biases after a step from 0 at `rate`, the first two layers the backbone."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = build_optimizer(net, settings(name, backbone_lr_factor=factor), net[:2])
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.zero_()
        p.grad = torch.randn(p.shape, generator=generator)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    return [torch.cat([p.detach().flatten() for p in layer.parameters()]) for layer in net]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_backbones_rate_is_its_factor_times_that_of_the_others(name):
    slow, fast = stepped(name, 0.1, 0.5), stepped(name, 1.0, 0.5)
    assert all(map(torch.equal, slow, [*stepped(name, 1.0, 0.5 * 0.1)[:2], fast[2]]))
    assert all(map(torch.equal, stepped(name, 0.25, 0.5), [0.25 * fast[0], 0.25 * fast[1], fast[2]]))
    assert all(layer.abs().min() > 0 for layer in slow)


def test_a_factor_of_1_leaves_the_groups_as_they_are_without_a_backbone():
    """Their order is that in which the norm of the gradient is summed: another would change its last bits."""
    net = model()
    alone, with_backbone = (build_optimizer(net, settings("adamw"), backbone).param_groups for backbone in ([], net[:2]))
    assert [list(map(id, g["params"])) for g in with_backbone] == [list(map(id, g["params"])) for g in alone]


def test_the_rate_follows_the_batch_only_where_it_belongs_to_one():
    of_16 = settings("sgd", lr=0.02, lr_batch_size=16)
    assert [base_learning_rate(of_16, batch) for batch in (1, 8, 16, 32)] == pytest.approx([0.00125, 0.01, 0.02, 0.04])
    assert [base_learning_rate(settings("sgd"), batch) for batch in (1, 16)] == [0.1, 0.1]
