"""Claims, their verdicts, the A/A control and the best cells, from records as runs leave them."""

import numpy as np
import pytest
import yaml

from fpn_ablate.report.collate.cells import Cell, contrast, subtract_metric
from fpn_ablate.report.collate.claims import load_claims
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.compare import Comparison
from fpn_ablate.report.collate.definition import find_definition
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.formats import tables as formats
from fpn_ablate.report.formats.grid import WITHIN_NOISE, grid
from fpn_ablate.store.bootstrap_store import save
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import EXPERIMENTS, RESAMPLED

pytestmark = pytest.mark.usefixtures("three_seeds")

ROWS = {"c4": 0.45, "c5": 0.26, "fpn": 0.60, "bottom_up": 0.46, "no_lateral": 0.40, "finest": 0.55}


@pytest.fixture
def table(runs, put):
    """Table 1 as ROWS say, 4 seeds that differ by tenths of a point; `change(row, seed) -> AR100` replaces a value."""

    def make(change=lambda row, seed: None, seeds=range(2, 6), extra=()):
        for row, seed in [*((row, seed) for row in ROWS for seed in seeds), *extra]:
            value = change(row, seed)
            value = ROWS[row] + 0.001 * ((3 * seed + len(row)) % 4) if value is None else value
            put(row, seed, metrics={"AR100": value, "AR1k": value + 0.1, "AR1k_s": value})
        (made,) = collate(load(runs))
        return made

    return make


def verdict_of(table, words, metric="AR100"):
    (found,) = [v for v in table.verdicts if v.claim.text == words and v.claim.metric == metric]
    return found


GAIN = "FPN raises RPN's recall over the C4 baseline"
SAME = "without the top-down path the pyramid is about on par with the C4 baseline"


@pytest.mark.parametrize(
    ("words", "values", "verdict"),
    [
        (GAIN, {}, "supported"),
        (GAIN, {"c4": lambda seed: 0.9}, "contradicted"),
        (GAIN, {"c4": lambda seed: 0.5 + 0.1 * (-1) ** seed}, "inconclusive"),  # a wide spread
        (SAME, {"c4": lambda seed: 0.45 + 0.0002 * (seed % 2), "bottom_up": lambda seed: 0.455}, "supported"),
        (SAME, {"bottom_up": lambda seed: 0.55}, "contradicted"),
    ],
)
def test_a_claim_is_judged_by_the_difference_of_its_rows(table, put, words, values, verdict):
    put("c4", 9, status="diverged", error="x")  # no seed of the difference
    put("fpn", 9)
    found = verdict_of(table(lambda row, seed: values[row](seed) if row in values else None), words)
    assert found.verdict == verdict and found.contrast.ours.n == 3 and found.available == 4
    assert verdict != "inconclusive" or found.seeds_needed > 3
    if words == GAIN and not values:
        assert found.contrast.ours.mean == pytest.approx(15, abs=0.3)
        assert found.contrast.published == pytest.approx(44.0 - 36.1)


def test_rows_that_learned_next_to_nothing_are_not_about_the_same(table):
    made = table(lambda row, seed: 0.02 + 0.0001 * ((3 * seed + len(row)) % 4))
    for words in ("C5 has no advantage over C4 as a single map", SAME):
        found = verdict_of(made, words)
        assert found.verdict == "inconclusive" and "next to nothing" in found.reason


def test_one_seed_decides_nothing(table):
    made = table(seeds=[2])
    assert {(v.verdict, v.reason) for v in made.verdicts} == {("not judged yet", "1 seed, 3 planned")}
    assert not made.best


@pytest.mark.slow
def test_more_seeds_than_there_are_would_tell_where_a_claim_is_open(table):
    """Also where it is the correction for the other claims that leaves it open."""
    for spread in np.linspace(0.005, 0.1, 20):
        made = table(lambda row, seed, spread=spread: 0.5 + spread * (-1) ** seed if row == "c4" else None)
        for found in made.verdicts:
            if found.verdict == "inconclusive":
                assert found.seeds_needed in (None, *(3 * 2**k for k in range(1, 9)))


def test_an_effect_on_one_metric_beyond_that_on_another(runs, put):
    for seed in range(1, 4):
        for row, small in (("c4", 0.2), ("fpn", 0.5 + 0.001 * seed)):
            put(row, seed, metrics={"AR1k": 0.4 if row == "c4" else 0.5, "AR1k_s": small})
    (made,) = collate(load(runs))
    found = verdict_of(made, "FPN raises recall on small objects more than on all", "AR1k_s")
    assert found.contrast.ours.mean == pytest.approx(20.2) and found.verdict == "supported"
    assert found.contrast.published == pytest.approx(12.9 - 8.0)


def test_nothing_is_supported_where_nothing_was_compared(runs, put):
    for seed in range(3):
        put("fpn", seed)
    put("c4", 9)
    (made,) = collate(load(runs))
    assert {v.verdict for v in made.verdicts} == {"no result"}
    assert all(v.p is None for v in made.verdicts)


def test_a_single_claim_is_judged_by_the_95_percent_interval(runs, put, tmp_path):
    """Its p-value is below 0.05 where the interval excludes the bound: it is of both sides."""
    (tmp_path / "own.yaml").write_text(
        "table: mine\nreport: {title: t, facts: [], metrics: [{key: AP}], rows: [{row: a}, {row: b}]}\n"
    )
    (tmp_path / "claims.yaml").write_text("claims: [{table: mine, claim: b, metrics: [AP], plus: [b], minus: [a], above: 0}]\n")
    for seed, (a, b) in enumerate([(0.50, 0.531), (0.50, 0.510), (0.51, 0.533)]):
        put("a", seed, table="mine", metrics={"AP": a})
        put("b", seed, table="mine", metrics={"AP": b})
    (made,) = collate(load(runs), experiments=[tmp_path])
    (found,) = made.verdicts
    assert found.p == pytest.approx(2 * found.contrast.ours.p_above(0.0))
    assert 0.025 < found.contrast.ours.p_above(0.0) < 0.05 and found.verdict == "inconclusive"


def test_a_difference_of_metrics_is_paired_within_a_run_and_that_is_no_merit_of_the_pairing_of_rows():
    generator = np.random.default_rng(0)
    cells = {}
    for row in ("c4", "fpn"):
        first = dict(enumerate(generator.normal(50, 5, 8)))
        cells[row] = subtract_metric(Cell({s: v + generator.normal(0, 0.1) for s, v in first.items()}, 3.0), Cell(first, 1.0))
    found = contrast([cells["fpn"]], [cells["c4"]], range(8))
    assert abs(found.variance_removed) < 0.9 and found.published == 0.0


def test_holm_takes_the_number_of_claims_into_account(table):
    made = table()
    p = {v.claim.text + v.claim.metric: v.p for v in made.verdicts}
    single = verdict_of(made, GAIN)
    assert len(p) > 10 and single.p > 2 * single.contrast.ours.p_above(0.0)


def test_rows_that_stand_for_different_ones_of_their_names_are_not_compared(runs, put):
    """Else the difference would be that of the backbones."""
    words = "sharing features is a small gain (the shallower backbone)"
    for seed in range(3):
        for row, value in (("fpn+backbone=small+training=four_step", 0.6), ("fpn+backbone=resnet50+training=separate", 0.3)):
            put(row, seed, table="table5_sharing", metrics={"AP": value + 0.001 * seed})
    (made,) = collate(load(runs))
    assert verdict_of(made, words, "AP").verdict == "no result"


def test_every_claim_of_ours_names_rows_and_metrics_of_its_table():
    claims = load_claims([EXPERIMENTS])
    assert {"table1_rpn", "table2_fast_rcnn", "table3_faster_rcnn", "table5_sharing"} <= {c.table for c in claims}
    definitions = {table: find_definition(table, ()) for table in {claim.table for claim in claims}}
    for claim in claims:
        definition = definitions[claim.table]
        rows = {spec.names[0]: spec for spec in definition.rows}
        metrics = {metric.key for metric in definition.metrics}
        assert {*claim.plus, *claim.minus} <= set(rows), claim
        assert {claim.metric, claim.less or claim.metric} <= metrics, claim
        published = all(claim.metric in rows[name].published for name in (*claim.plus, *claim.minus))
        # Published without figures of these rows: the claim says where.
        places = ("(Sec. ", "(SSD, ", "(RetinaNet, ", "(EfficientDet, ", "(maskrcnn-benchmark)", "(later code bases)")
        in_prose = any(place in claim.text for place in places)
        assert (published or in_prose) is not claim.ours, claim


# The figures that shared/paper's list of claims gives; they follow from the published tables.
@pytest.mark.parametrize(
    ("table_name", "words", "metric", "effect"),
    [
        ("table1_rpn", GAIN, "AR1k", 8.0),
        ("table1_rpn", "FPN raises recall on small objects more than on all", "AR1k_s", 4.9),
        ("table1_rpn", "C5 has no advantage over C4 as a single map", "AR1k", -3.4),
        ("table1_rpn", "without the top-down path the pyramid is about on par with the C4 baseline", "AR1k", 1.2),
        ("table1_rpn", "without the top-down path the pyramid is behind FPN", "AR1k", -6.8),
        ("table1_rpn", "lateral connections are needed", "AR1k", 10.2),
        ("table1_rpn", "the finest level alone is better than the C4 baseline", "AR1k", 3.0),
        ("table1_rpn", "the finest level alone is worse than the pyramid", "AR1k", -5.0),
        ("table2_fast_rcnn", "FPN raises Fast R-CNN's precision over the C4 baseline", "AP", 2.0),
        ("table2_fast_rcnn", "FPN raises Fast R-CNN's precision over the C4 baseline", "AP_s", 2.1),
        ("table2_fast_rcnn", "FPN is better than C5 with the same head", "AP", 5.1),
        ("table2_fast_rcnn", "removing the top-down path hurts", "AP", -9.0),
        ("table2_fast_rcnn", "the finest level alone is only marginally worse", "AP", -0.5),
        ("table3_faster_rcnn", "FPN raises Faster R-CNN's precision over the C4 baseline", "AP", 2.3),
        ("table3_faster_rcnn", "FPN raises Faster R-CNN's precision over the C4 baseline", "AP50", 3.8),
        ("table5_sharing", "sharing features is a small gain (the shallower backbone)", "AP", 0.4),
        ("table5_sharing", "sharing features is a small gain (the deeper backbone)", "AP", 0.2),
    ],
)
def test_the_paper_itself_says_what_is_claimed(table_name, words, metric, effect):
    definition = find_definition(table_name, ())
    cells = {spec.names[0]: spec.published for spec in definition.rows}
    (claim,) = [c for c in load_claims([EXPERIMENTS]) if (c.table, c.text, c.metric) == (table_name, words, metric)]

    def difference(key):
        plus, minus = ([Cell({}, cells[name][key]) for name in side] for side in (claim.plus, claim.minus))
        return contrast(plus, minus, []).published

    found = difference(metric) - (difference(claim.less) if claim.less else 0.0)
    assert found == pytest.approx(effect)
    assert claim.above < found < claim.below


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ({"above": 2}, "supported"),
        ({"above": 3}, "contradicted"),
        ({"below": 3}, "supported"),
        ({"above": 2, "below": 2.2}, "contradicted"),
        ({"above": 2.5}, "inconclusive"),
    ],
)
def test_a_claim_on_costs_bounds_their_ratio(runs, put, tmp_path, bounds, verdict):
    """Latencies of b are 2.45 to 2.55 times those of a, which differ from seed to seed; another column has replicates."""
    generator = np.random.default_rng(0)
    for seed, factor in enumerate((2.45, 2.5, 2.55)):
        for row, ms in (("a", 100.0 + seed), ("b", factor * (100 + seed))):
            folder = put(row, seed, table="mine", metrics={"AP": 0.4 + 0.01 * seed}, cost={"latency_ms": ms})
            save(folder / RESAMPLED, {"AP": 0.4 + 0.02 * generator.standard_normal(50)})
    definition = {
        **{"title": "Mine", "rows": [{"row": "a"}, {"row": "b"}], "facts": []},
        "metrics": [{"key": "AP"}, {"key": "latency", "from": "cost.latency_ms"}],
    }
    content = {"table": "mine", "report": definition, "hydra": {"sweeper": {"params": {"seed": "0,1,2"}}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    entry = {"table": "mine", "claim": "dear", "metrics": ["latency"], "plus": ["b"], "minus": ["a"], "ratio": True} | bounds
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": [entry]}))
    (made,) = collate(load(runs), experiments=[tmp_path])
    (found,) = made.verdicts
    assert found.verdict == verdict and found.reason is None
    assert found.contrast.shown(found.contrast.ours.mean) == pytest.approx((2.45 * 2.5 * 2.55) ** (1 / 3))
    (printed,) = grid(made).verdicts
    assert printed["ours"].startswith("x 2.50 (2.3") and "x " in printed["claim"]
    (line,) = formats.claims_csv(made).splitlines()[1:]
    assert "latency,,true,b,a," in line and ",2.499" in line


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"above": ...}, "needs 'above' or 'below'"),
        ({"above": 2, "below": 1}, "above < below"),
        ({"above": False}, "above: must be a number, found False"),
        ({"metrics": "AP"}, "metrics must be a list"),
        ({"plus": []}, r"plus: .* found \[\]"),
        ({"abvoe": 0}, "unknown key 'abvoe'"),
        ({"ours": 1}, "ours: .*boolean, found 1"),
        ({"ratio": True}, "a ratio needs bounds above 0"),
        ({"ratio": True, "above": 2, "less": "AR"}, "and no 'less'"),
    ],
)
def test_a_wrong_claim_is_named(tmp_path, change, problem):
    entry = {"table": "t", "claim": "x", "metrics": ["AP"], "plus": ["a"], "minus": ["b"], "above": 0} | change
    entry = {key: value for key, value in entry.items() if value is not ...}
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": [entry]}))
    with pytest.raises(UserError, match=rf"claims\.yaml: claims\[0\].*{problem}"):
        load_claims([tmp_path])


def test_a_wrong_file_of_claims_does_not_take_the_tables_away(runs, put, tmp_path):
    put()
    (tmp_path / "claims.yaml").write_text("claims: none\n")
    errors = []
    assert len(collate(load(runs), experiments=[EXPERIMENTS, tmp_path], errors=errors)) == 1
    assert len(errors) == 1 and "must hold a list 'claims'" in errors[0]


def test_claims_of_rows_that_a_users_own_table_lacks_are_not_run(runs, put, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "table: table1_rpn\nreport: {title: t, facts: [], metrics: [{key: AR100}], rows: [{row: fpn}]}\n"
    )
    put()
    (made,) = collate(load(runs), experiments=[EXPERIMENTS, tmp_path])
    assert {v.verdict for v in made.verdicts} == {"no result"}
    assert any(cells["verdict"] == "no result; the table has no row 'c4'" for cells in grid(made).verdicts)


def test_verdicts_stand_in_every_format(table):
    made = table()
    for text in (formats.markdown(made), formats.latex(made), formats.claims_csv(made)):
        assert GAIN in text and "supported" in text
    lines = formats.claims_csv(made).splitlines()
    assert len(lines) == 1 + len(made.verdicts)


# The A/A control: fpn again at seeds 5, 6, 7, which no other row has.
def control_of(table, spread=0.002):
    extra = [("fpn", seed) for seed in (5, 6, 7)]
    return table(lambda row, seed: 0.6 + spread * (seed % 3) if row == "fpn" else None, seeds=(2, 3, 4), extra=extra)


def test_the_control_is_no_part_of_its_row_and_has_a_line_of_its_own(table, put):
    put("c4", 5, status="diverged", error="x")  # of another row: does not end the control
    made = control_of(table)
    assert next(row for row in made.rows if row.row == "fpn").seeds == (2, 3, 4) and made.control.seeds == (5, 6, 7)
    assert [line.label for line in grid(made).lines if line.kind == "control"] == ["FPN again, other seeds (A/A control)"]
    header, *lines = formats.csv_text(made).splitlines()
    assert "seed_7" in header and sum("A/A control, finished" in line for line in lines) == len(made.definition.metrics)
    assert "equal rows stay closer than AR@100" in dict(made.footer)["noise"]
    assert not verdict_of(made, GAIN).contrast.within_noise


def test_seeds_that_all_rows_have_are_no_control_and_the_footer_says_how_to_run_one(table):
    made = table(seeds=(5, 6, 7))
    assert made.control is None and "ablation=fpn seed=5,6,7" in dict(made.footer)["noise"]


def test_effects_within_the_noise_of_equal_rows_are_marked(table):
    found = verdict_of(control_of(table, spread=0.1), "the finest level alone is worse than the pyramid")
    assert abs(found.contrast.ours.mean) < found.contrast.noise and found.contrast.within_noise


def test_the_noise_is_that_of_what_is_compared(runs, put):
    """Of a metric beyond another it is the spread of that, and of a mean over two rows less than of one."""
    for seed in (2, 3, 4, 5, 6, 7):
        value = 0.5 + 0.05 * (seed % 3)
        for row in ("c4", "fpn", "bottom_up") if seed < 5 else ("fpn",):
            put(row, seed, metrics={"AR1k": value, "AR1k_s": value + 0.001 * (seed % 2)})
    (made,) = collate(load(runs))
    small = verdict_of(made, "FPN raises recall on small objects more than on all", "AR1k_s").contrast.noise
    plain = verdict_of(made, GAIN, "AR1k").contrast.noise
    assert small < 0.1 * plain
    comparison = Comparison(made.definition, {row.row: row for row in made.rows if row.seeds}, made.control)
    of_three = comparison.contrast("AR1k", ["fpn", "c4"], ["bottom_up"]).noise
    assert of_three == pytest.approx(plain * (1.5 / 2) ** 0.5)


def test_a_control_of_a_row_that_stands_under_another_name_takes_no_table_away(runs, put, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "table: mine\nreport: {title: t, facts: [], metrics: [{key: AP}], rows: [{row: [a, a2]}, {row: b}],\n"
        "  control: {row: a, seeds: [5]}}\n"
    )
    put("a2", 0, table="mine", metrics={"AP": 0.5})
    put("b", 0, table="mine", metrics={"AP": 0.4})
    put("a", 5, table="mine", metrics={"AP": 0.5})
    (made,) = collate(load(runs), experiments=[tmp_path])
    assert made.rows[0].row == "a2"


def test_an_effect_line_is_marked_where_it_is_noise(runs, put, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "table: mine\nhydra: {sweeper: {params: {seed: '0,1,2'}}}\n"
        "report: {title: t, facts: [], metrics: [{key: AP}], rows: [{row: a}, {row: b}], control: {row: a, seeds: [5, 6, 7]},\n"
        "  effects: [{title: e, plus: [b], minus: [a]}]}\n"
    )
    for seed in range(3):
        put("a", seed, table="mine", metrics={"AP": 0.5 + 0.1 * seed})
        put("b", seed, table="mine", metrics={"AP": 0.501 + 0.1 * seed})
        put("a", seed + 5, table="mine", metrics={"AP": 0.5 + 0.1 * seed})
    (made,) = collate(load(runs), experiments=[tmp_path])
    (line,) = [line for line in grid(made).lines if line.kind == "effect"]
    assert line.metrics[0].endswith(WITHIN_NOISE)


# Best cells
def test_the_best_cell_is_bold_where_all_differences_say_so(table):
    made = table()
    assert ("fpn", "AR100") in made.best
    bold = [cell for line in formats.markdown(made).splitlines() for cell in line.split(" | ") if cell.startswith("**60.1")]
    assert len(bold) == 2  # AR@100, and AR@1k on small objects, which is the same here


def test_no_cell_is_bold_where_the_second_is_too_close(table):
    made = table(lambda row, seed: 0.6 + 0.01 * ((seed + (row == "finest")) % 2) if row in ("fpn", "finest") else None)
    assert not {name for name, metric in made.best if metric == "AR100"}


@pytest.mark.parametrize(("close", "is_bold"), [(["finest"], True), (["finest", "bottom_up"], False)])
def test_the_more_rows_are_close_the_further_the_best_must_be_ahead(table, close, is_bold):
    made = table(lambda row, seed: 0.6 - 0.005 * (row in close) * (2 + seed % 3) if row in ("fpn", *close) else None)
    assert (("fpn", "AR100") in made.best) == is_bold


# Replicates
def test_intervals_are_over_images_too_where_runs_left_replicates(runs, put):
    generator = np.random.default_rng(0)
    for seed in range(3):
        folder = put(seed=seed, metrics={"AR100": 0.5 + 0.001 * seed})
        save(folder / RESAMPLED, {"AR100": 0.5 + 0.02 * generator.standard_normal(50)})
    (made,) = collate(load(runs))
    cell = next(row for row in made.rows if row.row == "fpn").cells["AR100"]
    assert cell.ours.image_variance > 0 and "seeds and images" in dict(made.footer)["±"]
    for folder in runs.rglob(RESAMPLED):
        folder.write_bytes(b"rubbish")
    (without,) = collate(load(runs))
    cell = next(row for row in without.rows if row.row == "fpn").cells["AR100"]
    assert cell.ours.image_variance is None and cell.ours.mean == pytest.approx(50.1)


def drawn(put, row, seed, value, draws, count=50):
    generator = np.random.default_rng(0)
    folder = put(row, seed, metrics={"AR100": value}, draws=draws)
    save(folder / RESAMPLED, {"AR100": value + 0.02 * generator.standard_normal(count)})


def test_replicates_of_other_draws_are_not_put_together(runs, put):
    for seed in range(3):
        drawn(put, "fpn", seed, 0.5 + 0.001 * seed, "one" if seed else "another")
    (made,) = collate(load(runs))
    assert set(next(row for row in made.rows if row.row == "fpn").cells["AR100"].resampled) == {1, 2}


def test_longer_replicates_are_cut_since_draws_begin_alike(runs, put):
    for seed in range(3):
        drawn(put, "fpn", seed, 0.5, "one", 50 + seed)
    (made,) = collate(load(runs))
    assert {len(v) for v in next(row for row in made.rows if row.row == "fpn").cells["AR100"].resampled.values()} == {50}


def test_a_contrast_that_cannot_see_the_images_is_not_judged_where_others_can(runs, put):
    """A lost file must not turn into a finding."""
    for seed in range(3):
        drawn(put, "c4", seed, 0.3 + 0.001 * seed, "one")
        put("fpn", seed, metrics={"AR100": 0.6 + 0.001 * seed})
    (made,) = collate(load(runs))
    found = verdict_of(made, GAIN)
    assert found.verdict == "inconclusive" and "resampled.npz" in found.reason
    assert not {name for name, metric in made.best if metric == "AR100"}


# Looks
SPREAD = [0.0, 0.02, -0.02, 0.01, -0.01, 0.015, -0.015]


def gain_after(put, runs, count, gains=None, started=str):
    """The verdict on GAIN after seeds 2, 3, 4 and others, `count` in all; the gain of seed k is gains[k - 2]."""
    for seed, gain in list(enumerate(gains or [0.15 + x for x in SPREAD], start=2))[:count]:
        seed += 10 * (seed > 4)  # 5, 6 and 7 are the control's
        put("c4", seed, metrics={"AR100": 0.4, "AR1k": 0.4, "AR1k_s": 0.4})
        times = {"started": f"2026-11-2{started(seed)[-1]}T00:00:00+00:00"}
        put("fpn", seed, metrics={"AR100": 0.4 + gain, "AR1k": 0.4, "AR1k_s": 0.4}, **times)
    (made,) = collate(load(runs))
    return verdict_of(made, GAIN), grid(made).verdicts[1]["verdict"], dict(made.footer)


@pytest.mark.parametrize(
    ("count", "n", "text"),
    [
        (2, 2, "not judged yet; 2 seeds, 3 planned"),
        (3, 3, "supported"),
        (5, 3, "supported; look 1 of 3 seeds"),
        (6, 6, "supported; look 2 of 6 seeds"),
        (7, 6, "supported; look 2 of 6 seeds"),
    ],
)
def test_a_verdict_is_of_the_planned_seeds_and_then_of_twice_as_many(put, runs, count, n, text):
    found, shown, footer = gain_after(put, runs, count)
    assert shown == text and found.contrast.ours.n == n and found.available == count
    assert count == 2 or "tested with the first 3 seeds, again with 6, with 12" in footer["p"]


def test_a_further_look_costs_ten_times_the_p_value_and_the_first_a_quarter_more(put, runs):
    """Two claims can be tested here; AR@1k has no difference at all."""
    first, *_ = gain_after(put, runs, 3)
    assert first.p == pytest.approx(3 * 2 * 1.25 * first.contrast.ours.p_above(0.0))
    second, *_ = gain_after(put, runs, 6)
    assert second.p == pytest.approx(3 * 2 * 10 * second.contrast.ours.p_above(0.0))


def test_seeds_count_in_the_order_in_which_they_were_started(put, runs):
    gains = [0.1, 0.11, 0.12, 0.2, 0.3, 0.4, 0.5]
    found, *_ = gain_after(put, runs, 7, gains, started=lambda seed: str(28 - seed))
    assert list(found.contrast.values) == [3, 4, 15, 16, 17, 18]  # 2 was started last: seeds that come later change no look


def test_the_advice_names_a_look(table):
    made = table(
        lambda row, seed: 0.5 + 0.01 * (seed - 3) * (row == "fpn") - 0.012 * (row == "c4") if row in ("c4", "fpn") else None
    )
    needed = verdict_of(made, GAIN).seeds_needed
    assert needed in (6, 12, 24, 48, 96)
    assert any(f"inconclusive; {needed} seeds would tell" in cells["verdict"] for cells in grid(made).verdicts)


def test_without_planned_seeds_all_are_one_look_and_the_footer_says_what_that_asks(runs, put, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "table: mine\nreport: {title: t, facts: [], metrics: [{key: AP}], rows: [{row: a}, {row: b}]}\n"
    )
    (tmp_path / "claims.yaml").write_text("claims: [{table: mine, claim: b, metrics: [AP], plus: [b], minus: [a], above: 0}]\n")
    for seed in range(5):
        put("a", seed, table="mine", metrics={"AP": 0.5})
        put("b", seed, table="mine", metrics={"AP": 0.501 + 0.01 * (-1) ** seed})
    (made,) = collate(load(runs), experiments=[tmp_path])
    (found,) = made.verdicts
    assert found.contrast.ours.n == 5 and found.p == pytest.approx(2 * found.contrast.ours.p_above(0.0))
    assert "only if nobody adds seeds after a look" in dict(made.footer)["p"]
    assert "seeds, planned from the start, would tell" in grid(made).verdicts[0]["verdict"]


def test_claims_that_are_not_complete_count_in_the_correction(put, runs):
    """Or a claim would be corrected for fewer while a sweep runs, and lose its verdict when the others are complete."""
    for seed in (2, 3, 4):
        for row in ("c4", "fpn") if seed == 4 else ROWS:
            put(row, seed, metrics={"AR100": ROWS[row] + 0.001 * seed * len(row), "AR1k": 0.5, "AR1k_s": 0.5})
    (made,) = collate(load(runs))
    found = verdict_of(made, GAIN)
    assert found.p == pytest.approx(len(made.verdicts) * 2 * 1.25 * found.contrast.ours.p_above(0.0))


def test_a_folder_that_is_given_twice_counts_once(table, tmp_path):
    """A sweep gives the page's process the folder of definitions that it has anyway."""
    once = table()
    (tmp_path / "link").symlink_to(EXPERIMENTS)
    (twice,) = collate(
        load(tmp_path / "runs"), experiments=[EXPERIMENTS, EXPERIMENTS / ".." / "experiments", tmp_path / "link"]
    )
    assert [(v.claim, v.p) for v in twice.verdicts] == [(v.claim, v.p) for v in once.verdicts]


def test_a_claim_about_a_row_that_the_definition_does_not_list_is_judged(table, put, tmp_path):
    (tmp_path / "claims.yaml").write_text(
        "claims: [{table: table1_rpn, claim: own, metrics: [AR100], plus: [mine], minus: [fpn], above: 0}]\n"
    )
    table()
    for seed in (2, 3, 4):
        put("mine", seed, metrics={"AR100": 0.7 + 0.001 * seed, "AR1k": 0.7, "AR1k_s": 0.7})
    (made,) = collate(load(tmp_path / "runs"), experiments=[EXPERIMENTS, tmp_path])
    assert verdict_of(made, "own").verdict == "supported"
