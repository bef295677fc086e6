"""Recompute the committed tables from the ledger and the replicates beside it, with NumPy and SciPy alone.

Nothing of the report is used: files are read with `csv`, and formulas are written a second time, from their description in
docs/pages/statistics.md. A table that was typed, or a slip in the report's arithmetic, shows up here.
"""

import csv
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import optimize, stats

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results" / "reference"
CLAIMS = sorted(REFERENCE.glob("tables/*-claims.csv"))
TABLES = sorted(set(REFERENCE.glob("tables/*.csv")) - set(CLAIMS))
STEP, UNDEFINED = 1 / 50_000, 65_535  # of the 16-bit replicates
COSTS = {"latency": "cost.latency_ms", "memory": "cost.peak_memory_mib", "gflops": "verify.gflops"}
COSTS |= {"test_memory": "cost.test_memory_mib", "gflops": "verify.gflops"}


def lines(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def definition(table):
    """Effects and baseline of a table's definition, and the seeds that it plans."""
    content = yaml.safe_load((ROOT / "experiments" / f"{table}.yaml").read_text())
    report, seeds = content["report"], str(content["hydra"]["sweeper"]["params"]["seed"]).split(",")
    return report.get("effects", []), report.get("baseline", "fpn"), len(seeds)


@functools.cache
def runs():
    """{(table, recipe, data, setting): {(row, seed): (line of the ledger, replicates)}} of finished runs."""
    tables = {}
    with np.load(REFERENCE / "resampled.npz") as replicates:
        for line in lines(REFERENCE / "ledger.csv"):
            fingerprint = line["fingerprint"].strip('"')  # of one such as 724678e925223751, which is not to be read as a number
            packed = replicates[fingerprint] if fingerprint in replicates.files else None
            if line["status"] == "finished":
                key = tuple(line[name] for name in ("table", "recipe", "data", "setting"))
                tables.setdefault(key, {})[line["row"], int(line["seed"])] = line, packed
    return tables


@functools.cache
def instead(table):
    """{metric: the one that is read in its place from records that have it} of a table's columns."""
    content = yaml.safe_load((ROOT / "experiments" / f"{table}.yaml").read_text())
    return {metric["key"]: metric["instead"] for metric in content["report"].get("metrics", []) if "instead" in metric}


def in_record(run, metric):
    other = instead(run[0]["table"]).get(metric)
    return other if other and run[0][f"metrics.{other}"] else metric


def value(run, metric):
    metric = in_record(run, metric)
    text = run[0][COSTS.get(metric, f"metrics.{metric}")]
    return None if text == "" else float(text) * (1 if metric in COSTS else 100)


def draws(run, metric):
    """(B,) in percent, or None."""
    metric = in_record(run, metric)
    if run[1] is None or metric not in run[1].dtype.names:
        return None
    packed = run[1][metric]
    return np.where(packed == UNDEFINED, np.nan, packed * STEP * 100)


def interval(values, drawn):
    """Mean and half-width of a 95 % interval: variance of the seeds, plus that of the images beyond what the seeds contain."""
    n, mean = len(values), math.fsum(values) / len(values)
    seeds = np.var(values, ddof=1) / n if n > 1 else 0.0
    images = None
    if drawn:
        table = np.array(drawn)
        table = table[:, ~np.isnan(table).any(axis=0)]
        images = np.var(table.mean(axis=0), ddof=1)
        if len(table) > 1:  # two-way layout without repetition: the residual mean square, over the seeds
            residual = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
            images -= np.sum(residual**2) / ((len(table) - 1) * (table.shape[1] - 1)) / len(table)
        images = max(images, 0.0)
    if n < 2 and images is None:
        return mean, None, math.inf
    error = math.sqrt(seeds + (images or 0.0))
    df = (n - 1) * (error**2 / seeds) ** (0.5 if n == 2 else 1) if seeds else math.inf
    return mean, error, df


def p_above(values, drawn, bound):
    """One-sided p-value of a mean above `bound`: p for which the distance is the root of t^2 seeds + z^2 images."""
    mean, error, _ = interval(values, drawn)
    n, distance = len(values), mean - bound
    if error < 1e-12:  # as of GFLOPs, which are the same for every seed
        return float(distance <= 0)
    seeds = np.var(values, ddof=1) / n
    images = error**2 - seeds

    def excess(score):
        p = stats.norm.sf(score)
        return math.sqrt(stats.t.isf(p, n - 1) ** 2 * seeds + score**2 * max(images, 0.0)) - abs(distance)

    p = stats.norm.sf(optimize.brentq(excess, 0, 36, xtol=1e-13))
    return p if distance > 0 else 1 - p


def contrast(table, plus, minus, metric, less=None, scale=1.0):
    """Mean of the rows `plus` minus mean of the rows `minus`, by seed and by draw; `less`: minus the same of another metric."""
    sides = [(scale / len(plus), row) for row in plus] + [(-scale / len(minus), row) for row in minus]
    terms = [(w, row, metric) for w, row in sides] + [(-w, row, less) for w, row in sides if less]
    seeds = sorted(set.intersection(*({seed for row, seed in table if row == name} for _, name, _ in terms)))
    seeds = [seed for seed in seeds if all(value(table[row, seed], m) is not None for _, row, m in terms)]
    values = [sum(w * value(table[row, seed], m) for w, row, m in terms) for seed in seeds]
    drawn = [[(w, draws(table[row, seed], m)) for w, row, m in terms] for seed in seeds]
    return values, [sum(w * d for w, d in each) for each in drawn if all(d is not None for _, d in each)]


def holm(p_values):
    order = np.argsort(p_values, kind="stable")
    steps = np.array(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def close(text, number):
    return (text == "" and number is None) or float(text) == pytest.approx(number, rel=1e-9, abs=1e-9)


def assert_estimate(line, values, drawn):
    """Check n, mean and interval of a line, and return mean, standard error and degrees of freedom."""
    mean, error, df = interval(values, drawn)
    half = None if error is None else stats.t.ppf(0.975, df) * error
    assert int(line["n"]) == len(values) and close(line["mean"], mean)
    assert close(line["low"], None if half is None else mean - half)
    assert close(line["high"], None if half is None else mean + half)
    return mean, error, df


def ratio(table, plus, minus, metric):
    """Logarithms of the quotients of two rows' costs, by seed; no draw of the images changes a cost."""
    ((more,), (less,)) = plus, minus
    seeds = sorted({seed for row, seed in table if row == more} & {seed for row, seed in table if row == less})
    return [math.log(value(table[more, seed], metric) / value(table[less, seed], metric)) for seed in seeds], []


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem[:40])
def test_means_intervals_and_differences_are_the_ledgers(file):
    checked, p_values = 0, {}
    for line in lines(file):
        table = runs().get(tuple(line[name] for name in ("table", "recipe", "data", "setting")), {})
        seeds = [int(key.removeprefix("seed_")) for key in line if key.startswith("seed_") and line[key] != ""]
        if line["state"] == "effect" and line["metric"] not in COSTS:
            effects, baseline, planned = definition(line["table"])
            sides = dict(zip(("plus", "minus"), ([row] for row in line["label"].split(" − ")), strict=False))
            effect = next((effect for effect in effects if effect.pop("title") == line["label"]), sides)
            values, drawn = contrast(table, metric=line["metric"], **effect)
            if len(effect["plus"]) == len(effect["minus"]) == 1 and [baseline] in effect.values():
                p = 2 * min(sf := p_above(values, drawn, 0.0), 1 - sf) / 0.8 if len(values) == planned > 1 else None
                p_values.setdefault(line["metric"], []).append((line["p_holm"], p))
            else:
                assert line["p_holm"] == ""
            if not values:
                assert line["mean"] == ""
                continue
        elif seeds:
            selected = [table[line["row"], seed] for seed in seeds]
            values = [value(run, line["metric"]) for run in selected]
            drawn = [d for run in selected if (d := draws(run, line["metric"])) is not None]
        else:
            assert line["mean"] == ""
            continue
        assert all(close(line[f"seed_{seed}"], v) for seed, v in zip(seeds, values, strict=True))
        mean, *_ = assert_estimate(line, values, drawn)
        assert close(line["std"], np.std(values, ddof=1) if len(values) > 1 else None)
        assert line["state"] == "effect" or not line["published"] or close(line["difference"], mean - float(line["published"]))
        checked += 1
    assert checked
    for pairs in p_values.values():
        for (text, own), p in zip(pairs, holm([1.0 if own is None else min(1.0, own) for _, own in pairs]), strict=True):
            assert text == "" if own is None else float(text) == pytest.approx(p, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("file", CLAIMS, ids=lambda file: file.stem[:40])
def test_claims_and_verdicts_are_the_ledgers(file):
    setting = lines(file.with_name(file.name.replace("-claims", "")))[0]["setting"]  # the claims name none
    tested = []
    for line in lines(file):
        table = runs()[line["table"], line["recipe"], line["data"], setting]
        plus, minus, metric = line["plus"].split(), line["minus"].split(), line["metric"]
        above, below = (float(line[side]) if line[side] else None for side in ("above", "below"))
        if line["verdict"] == "no result":
            assert any(row not in {name for name, _ in table} for row in plus + minus)
            continue
        if line["ratio"] == "true":
            values, drawn = ratio(table, plus, minus, metric)
            above, below = (None if bound is None else math.log(bound) for bound in (above, below))
            line |= {key: line[key] and math.log(float(line[key])) for key in ("mean", "low", "high")}
        else:
            values, drawn = contrast(table, plus, minus, metric, line["less"])
        assert_estimate(line, values, drawn)
        _, _, planned = definition(line["table"])
        if int(line["n"]) < planned:
            assert (line["verdict"], line["p_holm"], line["look"]) == ("not judged yet", "1.0", "")
            tested.append((line, 1.0, ""))
            continue
        assert int(line["n"]) == planned and line["look"] == "1"
        seeds = {seed for _, seed in table}
        means = [np.mean([value(table[row, s], metric) for s in seeds if (row, s) in table]) for row in plus + minus]
        if line["n"] == "1" or min(means) < 5 * max(abs(bound) for bound in (above, below) if bound is not None):
            assert (line["verdict"], line["p_holm"]) == ("inconclusive", "1.0")
            continue
        above_p, below_p = (None if b is None else p_above(values, drawn, b) for b in (above, below))
        true = max(p for p in (above_p, below_p and 1 - below_p) if p is not None)
        false = min(p for p in (above_p and 1 - above_p, below_p) if p is not None)
        decided = "supported" if true < false else "contradicted"
        tested.append((line, min(1.0, 2 * min(true, false) / 0.8), decided))  # the first look has 4 of the 5 %
    for p, (line, _, decided) in zip(holm([p for _, p, _ in tested]), tested, strict=True):
        assert float(line["p_holm"]) == pytest.approx(p, rel=1e-6, abs=1e-12)
        assert not decided or line["verdict"] == ("inconclusive" if p >= 0.05 else decided)
