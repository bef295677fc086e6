"""What a definition can say beyond rows and columns: published rows, alternative names, effects, columns from elsewhere."""

import math

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from scipy import stats
from test_tables import csv_lines, printed

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.formats import plots, tables
from fpn_ablate.report.formats.grid import grid
from fpn_ablate.report.html import page
from fpn_ablate.utils.errors import UserError

PAPER = {"reference": "Table 3", "data": "COCO minival"}


@pytest.fixture
def table_of(runs, tmp_path):
    """`table_of(rows=[...])` -> the table "mine" of what lies in `runs`, by a definition with these keys."""

    def make(seeds_planned=None, **report):
        report = {"title": "t", "facts": [], "metrics": [{"key": "AP"}], "paper": PAPER} | report
        sweep = {"hydra": {"sweeper": {"params": {"seed": seeds_planned}}}} if seeds_planned else {}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"table": "mine", "report": report, **sweep}))
        (table,) = collate(load(runs), experiments=[tmp_path])
        return table

    return make


@pytest.fixture
def ap(put):
    """`ap("fpn", 30.0, 32.0)` leaves finished records of the row with that AP, for seeds 0, 1, ..."""

    def leave(row, *values, **changes):
        for seed, value in enumerate(values):
            put(row, seed, table="mine", metrics={"AP": None if value is None else value / 100}, **changes)

    return leave


def every_format(table):
    texts = {"md": tables.markdown(table), "tex": tables.latex(table), "csv": tables.csv_text(table)}
    return texts | {"terminal": printed(table, 200)}


def state_of(table):
    return [(row.row, row.state, [round(v, 6) for v in row.cells["AP"].values.values()]) for row in table.rows]


QUOTED = {"row": "he", "letter": "*", "label": "He et al.", "published_only": True, "published": {"AP": 26.3, "head": "conv5"}}
HEAD = [{"key": "head", "from": "verify.head"}]


def test_a_row_that_is_published_only_has_one_line_the_papers(ap, table_of):
    ap("fpn", 30.0)
    table = table_of(facts=HEAD, rows=[QUOTED, {"row": "fpn", "published": {"AP": 33.9}}])
    lines = grid(table).lines
    assert [line.kind for line in lines] == ["published", "ours", "paper"]
    assert lines[0].cells == ("(*) He et al., paper: COCO minival, published only", "conv5", "", "26.3")
    for kind, text in every_format(table).items():
        assert text.count("He et al.") == text.count("26.3") == 1, kind
        assert "not run" not in text and "conv5" in text, kind
    (line,) = [line for line in csv_lines(table) if line["letter"] == "*"]
    assert (line["state"], line["n"], line["mean"], line["published"], line["difference"]) == (
        "published only",
        0,
        None,
        26.3,
        None,
    )


def test_a_row_that_is_published_only_is_a_hollow_mark_in_the_plot(ap, table_of):
    ap("fpn", 30.0)
    panel = plots.draw(table_of(rows=[QUOTED | {"published": {"AP": 26.3}}, {"row": "fpn"}])).axes[0]
    points = {(float(x), round(float(y))) for line in panel.lines for x, y in zip(*line.get_data(), strict=True)}
    assert points == {(26.3, 0), (30.0, 1)}
    assert [text.get_text() for text in panel.texts] == []
    assert [label.get_text() for label in panel.get_yticklabels()] == ["(*) He et al.", "fpn"]


def test_a_row_of_ours_with_the_name_of_a_published_one_is_shown_below(ap, table_of):
    ap("he", 30.0)
    assert state_of(table_of(facts=HEAD, rows=[QUOTED])) == [
        ("he (published only)", "published only", []),
        ("he", "finished", [30.0]),
    ]


def test_of_several_names_the_first_with_records_stands(ap, table_of):
    rows = [{"row": ["a", "b", "c"], "published": {"AP": 1.0}}]
    ap("other", 30.0)
    assert state_of(table_of(rows=rows)) == [("a", "not run", []), ("other", "finished", [30.0])]
    ap("c", 30.0)
    assert state_of(table_of(rows=rows))[0] == ("c", "finished", [30.0])
    ap("b", 20.0)
    assert state_of(table_of(rows=rows))[:2] == [("b", "finished", [20.0]), ("c", "finished", [30.0])]
    assert [row.published for row in table_of(rows=rows).rows] == [{"AP": 1.0}, {}, {}]


def effects_of(table):
    return {effect.title: (effect.seeds, list(effect.cells["AP"].values.values())) for effect in table.effects}


SUM = [{"title": "e", "plus": ["a", "d"], "minus": ["b", "c"], "scale": 2}]
ABCD = [{"row": name} for name in "abcd"]


def test_an_effect_is_the_difference_of_means_seed_by_seed(ap, table_of):
    """By hand: over its seeds, not of the rows' means."""
    ap("a", 10.0, 20.0)
    ap("b", 11.0, 25.0)
    ap("c", 15.0, 22.0)
    ap("d", 30.0, 24.0)
    main = {"title": "main", "plus": ["c", "d"], "minus": ["a", "b"]}
    table = table_of(rows=ABCD, effects=[main, *SUM])
    seeds, values = effects_of(table)["main"]
    assert seeds == (0, 1) and values == pytest.approx([(15 + 30 - 10 - 11) / 2, (22 + 24 - 20 - 25) / 2])
    assert effects_of(table)["e"][1] == pytest.approx([(30 - 15) - (11 - 10), (24 - 22) - (25 - 20)])
    cell = table.effects[0].cells["AP"].ours
    assert math.isclose(cell.mean, 6.25) and math.isclose(cell.std, math.sqrt(2) * 5.75) and cell.n == 2


def test_the_interaction_of_factors_that_add_up_is_0(ap, table_of):
    for name, value in {"a": 10.0, "b": 10.0 + 3, "c": 10.0 + 7, "d": 10.0 + 3 + 7}.items():
        ap(name, value)
    assert effects_of(table_of(rows=ABCD, effects=SUM))["e"][1] == pytest.approx([0])


def test_an_effect_takes_the_seeds_that_all_its_rows_have_finished(ap, put, table_of):
    ap("a", 10.0, 20.0, 30.0)
    ap("b", 11.0)
    put("b", 1, table="mine", status="failed", error="x")
    put("b", 2, table="mine", metrics={"AP": None})
    effect = {"title": "e", "plus": ["b"], "minus": ["a"]}
    table = table_of(rows=ABCD, effects=[effect, effect | {"title": "none", "plus": ["d"]}])
    assert effects_of(table)["e"] == ((0, 2), [pytest.approx(1), None])
    lines = [line for line in grid(table).lines if line.kind == "effect"]
    assert [line.cells for line in lines] == [("effect, ours: e", "2", "+1.0 (n=1)"), ("effect, ours: none", "0", "no result")]


def test_effects_are_in_every_format_and_marked_as_ours(ap, table_of):
    ap("a", 10.0, 20.0)
    ap("b", 8.0, 12.5)
    effect = {"title": "b - a", "plus": ["b"], "minus": ["a"]}
    table = table_of(rows=ABCD[:2], effects=[effect])
    found = every_format(table)
    plain = {"terminal": "-4.8±34.9", "md": "-4.8 ± 34.9", "tex": r"$-$4.8 $\pm$ 34.9"}
    for kind, text in plain.items():
        assert text in found[kind] and "effect, ours: b - a" in found[kind], kind
    assert [label for label, _ in table.footer].count("effects") == 1
    assert found["tex"].count(r"\midrule") == 2
    *_, line = csv_lines(table)
    assert (line["row"], line["label"], line["state"], line["n"]) == (None, "b - a", "effect", 2)
    assert (line["mean"], line["seed_0"], line["seed_1"]) == (pytest.approx(-4.75), pytest.approx(-2), pytest.approx(-7.5))


def test_no_effect_mixes_rows_that_stand_under_different_names(ap, table_of):
    """Else the difference would be that of the backbones, say, that the names stand for."""
    rows = [{"row": ["a", "a+large"]}, {"row": ["b", "b+large"]}, {"row": "c"}]
    effects = [{"title": "b", "plus": ["b"], "minus": ["a"]}, {"title": "c", "plus": ["c"], "minus": ["b"]}]
    ap("a", 10.0)
    ap("b+large", 20.0)
    ap("c", 25.0)
    table = table_of(rows=rows, effects=effects)
    assert effects_of(table) == {"b": ((), []), "c": ((0,), [pytest.approx(5)])}


@pytest.mark.parametrize("value", [None, "fast", True, [1], float("inf")])
def test_a_column_may_come_from_any_key_and_only_numbers_count(ap, put, table_of, value):
    ap("fpn", 30.0, 31.0, cost={"latency_ms": 12.25})
    put("fpn", 2, table="mine", metrics={"AP": 0.3}, cost={"latency_ms": value})
    table = table_of(metrics=[{"key": "AP"}, {"key": "latency", "from": "cost.latency_ms", "digits": 2}], rows=[{"row": "fpn"}])
    (line,) = grid(table).lines
    assert line.metrics[1] == "12.25 (n=2)"
    assert [axis.get_title() for axis in plots.draw(table).axes] == ["AP"]


def test_a_column_has_a_scale_and_digits(ap, table_of):
    ap("fpn", 34.0)
    table = table_of(metrics=[{"key": "AP", "scale": 1, "digits": 3}], rows=[{"row": "fpn", "published": {"AP": 0.339}}])
    assert [line.metrics for line in grid(table).lines] == [("0.340",), ("0.339",)]


def test_columns_of_another_file_stand_where_a_file_has_none(ap, table_of, tmp_path):
    columns = {"title": "other", "facts": [{"key": "f", "from": "verify.feature"}], "metrics": [{"key": "AR100"}]}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"table": "other", "report": columns}))
    ap("fpn", 30.0)

    def keys(**own):
        report = {"title": "t", "columns": "base", **own}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"table": "mine", "report": report}))
        (table,) = collate(load(tmp_path / "runs"), experiments=[tmp_path])
        return [column.key for column in (*table.definition.facts, *table.definition.metrics)]

    assert keys() == ["f", "AR100"]
    assert keys(metrics=[{"key": "AP"}]) == ["f", "AP"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"table": "other", "report": {"columns": "base"}}))
    with pytest.raises(
        UserError, match=r"mine\.yaml: report\.columns: .*base\.yaml must have a report with its own facts and metrics"
    ):
        keys()
    (tmp_path / "base.yaml").unlink()
    with pytest.raises(UserError, match=r"mine\.yaml: report\.columns='base': there is no .*base\.yaml and no .*base\.yaml"):
        keys()
    assert "AR1k" in keys(columns="control_daylight")  # one of the package's


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tittle": "x"}, "unknown key 'tittle'; allowed: .*title"),
        ({"metrics": [{"key": "AP", "sacle": 1}]}, r"metrics\[0\].*'sacle'"),
        ({"metrics": [{"key": "AP"}, {"key": "AP"}]}, "'AP' is listed twice"),
        ({"metrics": [{"key": "AP", "from": 3}]}, r"metrics\[0\]\.from: must be text, found 3; put it in quotation marks"),
        ({"facts": [{"key": "a", "from": "b", "style": "bold"}]}, "style: .* found 'bold'"),
        ({"rows": [{"row": []}]}, "at least 1 item"),
        ({"rows": [{"row": False}]}, "quotation marks"),
        ({"rows": [{"row": ["a", False]}]}, "quotation marks"),
        ({"rows": [{"row": ["a", "b"]}, {"row": "b"}]}, "row 'b' is listed twice"),
        ({"rows": [{"row": "a", "published": {"AQ": 1}}]}, "'AQ' is no column of AP"),
        ({"rows": [{"row": "a", "published": {"AP": "36,1"}}]}, "AP must be a number or null, found '36,1'"),
        ({"rows": [{"row": "a", "published": {"AP": 36.1}}], "paper": None}, "names no source"),
        ({"rows": [{"row": "a", "published_only": True}]}, "true only with published values"),
        ({"rows": [{"row": "a", "published_only": "yes", "published": {"AP": 1}}]}, "published_only: .*boolean, found 'yes'"),
        ({"rows": ABCD, "control": {"row": "a", "seeds": ["1"]}}, r"seeds\[0\]: .*integer, found '1'"),
        ({"rows": ABCD, "effects": [{"title": "e", "plus": ["a"]}]}, r"effects\[0\].minus: field required"),
        ({"rows": ABCD, "effects": [{"title": "e", "plus": ["a"], "minus": ["x"]}]}, "unknown row 'x'.* a, b, c, d"),
        ({"rows": ABCD, "effects": [{"title": "e", "plus": ["a"], "minus": []}]}, r"minus: .* found \[\]"),
        ({"rows": ABCD, "effects": [{"title": "e", "plus": "ab", "minus": ["c"]}]}, "plus: .* found 'ab'"),
        ({"facts": HEAD, "rows": [QUOTED, *ABCD], "effects": [{"title": "e", "plus": ["a"], "minus": ["he"]}]}, "'he'"),
        ({"rows": [{"row": ["a", "b"]}], "effects": [{"title": "e", "plus": ["a"], "minus": ["b"]}]}, "unknown row 'b'"),
        ({"rows": ABCD, "effects": [{"title": "e", "plus": ["a"], "minus": ["b"], "scale": "2"}]}, "scale: .* found '2'"),
        ({"rows": ABCD, "control": {"row": "x", "seeds": [1]}}, "control: unknown row 'x'"),
        ({"rows": ABCD, "baseline": "x"}, "baseline: unknown row 'x'"),
    ],
)
def test_a_wrong_definition_is_refused_by_file_and_key(ap, table_of, change, message):
    ap("a", 1.0)
    with pytest.raises(UserError, match=rf"mine\.yaml: report.*{message}"):
        table_of(**change)


def test_the_footer_says_whose_proposals(ap, put, table_of):
    for seed in range(2):
        ap_record = {
            "proposals": {"row": "fpn", "fingerprint": f"{seed}abcdef0123"},
            "cost": {"train_s": 10.0, "sources_s": 30.0},
        }
        put("a", seed, table="mine", **ap_record)
        put("b", seed, table="mine", **ap_record)
    footer = dict(table_of().footer)
    assert footer["proposals"] == "of row fpn's RPN: 0abcdef0 (seed 0), 1abcdef0 (seed 1)"
    assert footer["cost"].endswith("; runs that they stand on 60 s")  # two of 30 s, each named by two rows
    # A newer record names every run below it; one that is a row itself is counted there.
    below = [["0abcdef0123", 30.0], ["1abcdef0123", 30.0], ["x", 15.0]]
    put("e", 0, table="mine", built_on=below, fingerprint="eee")
    put("f", 0, table="mine", built_on=[*below, ["eee", 99.0]])
    assert dict(table_of().footer)["cost"].partition("stand on ")[2].startswith("75 s")
    put("c", 1, table="mine", proposals={"row": "c", "fingerprint": "ffff"})
    put("d", 1, table="mine", proposals={"row": "fpn", "fingerprint": "eeee"})
    assert dict(table_of().footer)["proposals"] == (
        "of row c's RPN: ffff (seed 1); of row fpn's RPN: 0abcdef0 (seed 0), 1abcdef0/eeee (seed 1)"
    )


def test_without_proposals_the_footer_says_nothing(ap, table_of):
    ap("a", 1.0)
    assert not {"proposals", "effects"} & set(dict(table_of().footer))


# Differences from the baseline
def test_every_row_has_its_difference_from_the_baseline_also_one_of_the_users(ap, table_of):
    ap("fpn", 30.0, 31.0, 33.0)
    ap("c4", 20.0, 22.0, 23.5)
    ap("mine", 30.5, 32.5, 34.0)
    ap("other", 30.0, 31.5, 32.0)
    table = table_of(rows=[{"row": "c4"}, {"row": "fpn"}])
    assert [effect.title for effect in table.effects] == ["c4 − fpn", "mine − fpn", "other − fpn"]
    differences = [[-10, -9, -9.5], [0.5, 1.5, 1], [0, 0.5, -1]]
    p = [stats.ttest_1samp(values, 0).pvalue for values in differences]
    order = sorted(range(3), key=lambda k: p[k])
    steps = [min(1, p[k] * (3 - rank)) for rank, k in enumerate(order)]
    holm = {k: max(steps[: rank + 1]) for rank, k in enumerate(order)}
    for k, (effect, values) in enumerate(zip(table.effects, differences, strict=True)):
        cell = effect.cells["AP"]
        assert list(cell.values.values()) == pytest.approx(values)
        assert cell.ours.half_width == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(values))
        assert effect.p["AP"] == pytest.approx(holm[k])
    lines = [line for line in grid(table).lines if line.kind == "effect"]
    assert lines[0].cells == ("c4 − fpn", "3", "-9.5 ± 1.2 (p 0.003)")
    for kind, text in every_format(table).items():
        assert "mine" in text and ("p_holm" if kind == "csv" else "0.003") in text, kind
    text = page.render([table])
    assert "mine − fpn" in text and "p 0.003" in text


def test_the_baseline_can_be_named_and_a_difference_that_the_definition_lists_is_shown_once(ap, table_of):
    for k, name in enumerate("abcd"):
        ap(name, 10.0 + k, 11.0 + 2 * k, 12.0 + k)
    listed = [
        {"title": "a to b", "plus": ["a"], "minus": ["b"]},
        {"title": "half", "plus": ["c"], "minus": ["b"], "scale": 0.5},
    ]
    assert not table_of(rows=ABCD).effects
    table = table_of(rows=ABCD, effects=listed, baseline="b")
    assert [effect.title for effect in table.effects] == ["a to b", "half", "c − b", "d − b"]
    assert [bool(effect.p) for effect in table.effects] == [True, False, True, True]


def test_a_row_without_a_shared_seed_or_with_one_has_no_p_value(ap, put, table_of):
    ap("fpn", 30.0)
    ap("a", 31.0)
    put("b", 5, table="mine", metrics={"AP": 0.3})
    put("c", 0, table="mine", status="failed", error="x")
    table = table_of()
    assert [(e.title, e.seeds, e.p["AP"]) for e in table.effects] == [("a − fpn", (0,), None), ("b − fpn", (), None)]
    assert "p" not in dict(table.footer)


def test_differences_are_tested_at_looks_too(ap, table_of):
    ap("fpn", 30.0, 31.0, 33.0, 30.0)
    ap("mine", 30.5, 32.5, 34.0, 50.0)
    (effect,) = table_of(seeds_planned="0,1,2").effects
    assert effect.p["AP"] == pytest.approx(1.25 * stats.ttest_1samp([0.5, 1.5, 1.0], 0).pvalue)
    assert effect.cells["AP"].ours.n == 4


SEEDS = ("2", "0,1", " 3 , 1,3", "range(3)", "range(2,5)", " range( 2, 8 ,2 )", "range(4,2)", "choice(1,2)")
NO_SEEDS = ("", "a", "1.5", "[0,1]", "range(0,9,0)", "range(1,2,3,4)", "range()", "range(1", "1)", "0,range(2,4)", "0,", [0, 1])


@pytest.mark.parametrize("text", SEEDS)
def test_planned_seeds_are_those_that_hydra_would_sweep_over(table_of, ap, text):
    ap("fpn", 30.0)
    override = OverridesParser.create().parse_override(f"seed={text}")
    expected = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    assert list(table_of(seeds_planned=text).definition.seeds) == list(dict.fromkeys(map(int, expected)))


@pytest.mark.parametrize("value", [*NO_SEEDS, "range(999999999)", "9" * 5000, {"a": 1}, True])
def test_what_is_no_list_of_seeds_plans_none(table_of, ap, value):
    ap("fpn", 30.0)
    assert table_of(seeds_planned=value).definition.seeds == ()


# Seeds that are far apart
@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((44.1, 60.2, 57.3), "fpn AP 44.1, 57.3, 60.2"),
        ((60.0, 61.0, 2.0, 59.0), "fpn AP 2.0, 59.0, 60.0, 61.0"),  # one collapsed
        ((1.0, 3.0, 5.0), None),  # bad throughout
        ((60.0, 64.9, 62.0), None),
        ((80.0, 86.0, 84.0), None),  # 6 points, but 7 % of the mean
        ((44.1,), None),
    ],
)
def test_a_row_whose_seeds_are_far_apart_is_named(ap, table_of, values, text):
    ap("fpn", *values)
    footer = dict(table_of(metrics=[{"key": "AP"}, {"key": "AP_s"}]).footer)
    assert footer.get("seeds far apart") == text
    assert ("draws of one normal distribution" in footer.get("±", "")) is (len(values) > 1)


def test_a_table_that_was_trained_on_its_evaluation_says_so(ap, table_of):
    ap("a", 30.0, 31.0)
    assert "training" not in dict(table_of().footer)
    ap("b", 30.0, images={"count": 4, "digest": "d", "trained_on": True})
    assert dict(table_of().footer)["training"] == "ON THE IMAGES OF THE EVALUATION (1 of 3 runs): figures are too high"
