"""Which of several records stands in a table, and what the footer says of the others."""

import pytest
import yaml

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.utils.errors import UserError

TWIN = "fpn+upsample=nearest"  # the default, spelled out


def table_of(runs, **options):
    (table,) = collate(load(runs), **options)
    return table


def values(table):
    """{(row, seed): AR@100 in percent} of what is shown."""
    shown = {(row.row, seed): value for row in table.rows for seed, value in row.cells["AR100"].values.items()}
    return {key: round(value, 6) for key, value in shown.items()}


def left_out(table):
    return [text for label, text in table.footer if label == "left out"]


def neck(channels):
    return {"neck": {"channels": channels}}


def test_one_experiment_counts_under_each_of_its_names(runs, put):
    for seed in (0, 1):
        put("fpn", seed, fingerprint=f"f{seed}", finished="2026-01-01T00:00:00Z", metrics={"AR100": 0.3})
        put(TWIN, seed, f"twin{seed}", fingerprint=f"f{seed}", finished="2026-01-02T00:00:00Z", metrics={"AR100": 0.3})
    put("c4", metrics={"AR100": 0.2})
    table = table_of(runs)
    assert values(table) == {("fpn", 0): 30, ("fpn", 1): 30, (TWIN, 0): 30, (TWIN, 1): 30, ("c4", 0): 20}
    assert not left_out(table) and dict(table.footer)["same runs"] == f"fpn = {TWIN}"
    assert dict(table.footer)["cost"].startswith("3 runs: training 4 min")


def test_a_row_keeps_all_its_seeds_where_one_of_them_has_another_name_too(runs, put):
    for name, seeds in (("nearest", (0, 1)), ("bilinear", (0, 1)), ("fpn", (0,))):
        for seed in seeds:
            put(name, seed, f"{name}{seed}", fingerprint=f"{'f' if name == 'fpn' else name}{seed}".replace("nearest", "f"))
    assert set(values(table_of(runs))) == {("fpn", 0), *((row, seed) for row in ("nearest", "bilinear") for seed in (0, 1))}


def test_names_that_a_definition_puts_into_one_row_are_one_row_with_one_record_a_seed(runs, put, tmp_path):
    report = {"title": "t", "facts": [], "metrics": [{"key": "AR100"}], "rows": [{"row": ["new", "old"]}]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"table": "mine", "report": report}))
    for seed in (0, 1):
        put("old", seed, f"old{seed}", table="mine", fingerprint=f"f{seed}", finished="2026-01-02T00:00:00Z")
        put("new", seed, table="mine", fingerprint=f"f{seed}", finished="2026-01-03T00:00:00Z")
    table = table_of(runs, experiments=[tmp_path])
    assert set(values(table)) == {("new", 0), ("new", 1)}
    assert left_out(table) == ["row 'old', seeds 0, 1: the same experiment as row 'new'"]


def test_of_an_edited_row_the_newest_finished_stands(runs, put):
    put("mine", fingerprint="1", finished="2026-01-01T00:00:00Z", config=neck(32), metrics={"AR100": 0.1})
    put("mine", fingerprint="2", finished="2026-01-02T00:00:00Z", config=neck(64), metrics={"AR100": 0.2})
    put("mine", fingerprint="3", finished="2026-01-03T00:00:00Z", config=neck(96), status="failed")
    table = table_of(runs)
    assert values(table) == {("mine", 0): 20}
    assert left_out(table) == [
        "row 'mine', seed 0: not the newest finished: neck.channels 32, here 64",
        "row 'mine', seed 0: not the newest finished: neck.channels 96, here 64",
    ]


def test_seeds_of_an_edited_row_are_not_averaged_with_those_before_the_edit(runs, put):
    for seed in (0, 1):
        put("mine", seed, fingerprint=f"old{seed}", finished="2026-01-01T00:00:00Z", config=neck(32))
    put("mine", 0, fingerprint="new", finished="2026-01-02T00:00:00Z", config=neck(64), metrics={"AR100": 0.2})
    table = table_of(runs)
    assert values(table) == {("mine", 0): 20}
    assert left_out(table) == ["row 'mine', seeds 0, 1: not the newest finished: neck.channels 32, here 64"]


def test_a_copied_folder_is_one_record(runs, put):
    put("fpn", folder="a", metrics={"AR100": 0.2})
    put("fpn", folder="b", metrics={"AR100": 0.2})
    table = table_of(runs)
    assert values(table) == {("fpn", 0): 20}
    assert left_out(table) == ["row 'fpn', seed 0: not the newest finished: other threads, or a key that they do not hold"]


def test_the_rpn_is_no_declared_factor(runs, put):
    put("fpn", setting="a", fingerprint="1", config={"rpn": {"samples": 256}}, finished="2026-01-01T00:00:00Z")
    put("fpn", setting="b", fingerprint="2", config={"rpn": {"samples": 64}}, finished="2026-01-02T00:00:00Z")
    assert left_out(table_of(runs)) == ["1 record of another setting: rpn.samples 256, here 64"]


def test_what_decides_nothing_is_not_named_as_a_difference(runs, put):
    first = {"seed": 0, "threads": 1, "workers": 0, "log": {"wandb": "off"}, "device": "cpu", "row": "fpn"}
    second = {"seed": 1, "threads": 2, "workers": 3, "log": {"wandb": "online"}, "device": "auto", "row": "c4"}
    put("fpn", 0, setting="a", config=first, code="1111", finished="2026-01-01T00:00:00Z")
    put("c4", 1, setting="b", config=second, code="2222", finished="2026-01-02T00:00:00Z")
    assert left_out(table_of(runs)) == ["1 record of another setting: code 1111, here 2222"]


def test_an_asked_for_setting_stands_though_another_is_newer(runs, put):
    put("fpn", setting="a", fingerprint="1", finished="2026-01-01T00:00:00Z", metrics={"AR100": 0.1})
    put("fpn", setting="b", fingerprint="2", finished="2026-01-02T00:00:00Z", metrics={"AR100": 0.2})
    assert values(table_of(runs)) == {("fpn", 0): 20}
    assert values(table_of(runs, settings={"a", "of another table"})) == {("fpn", 0): 10}
    assert values(table_of(runs, settings={"of another table"})) == {("fpn", 0): 20}


def test_several_asked_for_settings_are_unfair_and_the_other_tables_are_made(runs, put):
    put("fpn", setting="a", fingerprint="1")
    put("mine", setting="b", fingerprint="2", config={"recipe": {"steps": 900}, **neck(7)})
    put("fpn", table="other", setting="a", fingerprint="3")
    with pytest.raises(UserError, match=r"recipe\.steps 900 against 500 \(rows fpn \| mine\)") as refusal:
        collate(load(runs), settings={"a", "b"})
    assert "channels" not in str(refusal.value)
    errors = []
    assert [table.key[0] for table in collate(load(runs), settings={"a", "b"}, errors=errors)] == ["other"]
    assert errors == [str(refusal.value)]


FACTORS = ["neck", "backbone", "task.training"]


def two_stage(training="separate", backbone="small", **more):
    return {"factors": FACTORS, "task": {"training": training}, "backbone": {"name": backbone}, **more}


def test_declared_factors_are_those_of_the_records(runs, put):
    """A row's seeds must agree in all of them; what tells two settings apart is none of them."""
    put("mine", 0, finished="2026-01-01T00:00:00Z", config=two_stage("joint"))
    put("mine", 1, finished="2026-01-02T00:00:00Z", config=two_stage("four_step"))
    put("other", 0, setting="b", finished="2026-01-01T00:00:00Z", config=two_stage("joint", "large", tasks={"training": 1}))
    assert left_out(table_of(runs)) == [
        "row 'mine', seed 0: not the newest finished: task.training joint, here four_step",
        "1 record of another setting: tasks.training 1, here unset",
    ]


def test_records_that_do_not_say_their_factors_may_differ_in_the_neck_alone(runs, put):
    put("mine", 0, setting="b", fingerprint="old", finished="2026-01-01T00:00:00Z", config={"backbone": {"name": "large"}})
    put("mine", 0, finished="2026-01-02T00:00:00Z", config={"factors": ["neck"], "backbone": {"name": "small"}})
    assert left_out(table_of(runs)) == ["1 record of another setting: backbone.name large, here small"]


def test_settings_that_differ_in_their_factors_say_so(runs, put):
    put("fpn", setting="a", fingerprint="1", config=two_stage())
    put("mine", setting="b", fingerprint="2", config=two_stage() | {"factors": ["neck"]})
    with pytest.raises(UserError, match=r"than backbone, neck, task.training, so .* factors neck against backbone, neck"):
        collate(load(runs), settings={"a", "b"})


def test_seeds_from_other_starting_weights_are_not_averaged(runs, put):
    put("mine", 0, finished="2026-01-01T00:00:00Z", config=two_stage(), weights="a", metrics={"AR100": 0.1})
    put("mine", 1, finished="2026-01-02T00:00:00Z", config=two_stage(), weights="b", metrics={"AR100": 0.2})
    table = table_of(runs)
    assert values(table) == {("mine", 1): 20}
    assert left_out(table) == ["row 'mine', seed 0: not the newest finished: weights a, here b"]


def test_rows_of_one_table_share_the_code_of_their_parts(runs, put):
    """An edit of fpn.py leaves c4 as it was, and rows made before it must not stand beside those made after it."""
    old, new = ({"parts": {"necks.fpn": sha}, "finished": f"2026-11-2{sha}T00:00:00+00:00"} for sha in "12")
    put("c4", 0, metrics={"AR100": 0.1}, parts={"necks.single_level": "0"})
    put("fpn", 0, metrics={"AR100": 0.3}, **new)
    put("fpn", 1, metrics={"AR100": 0.5}, **old)
    put("bottom_up", 0, **old)
    put("bottom_up", 1, **old)
    table = table_of(runs)
    assert values(table) == {("c4", 0): 10, ("fpn", 0): 30}
    assert left_out(table) == [
        "row 'bottom_up', seeds 0, 1: not the newest code of necks.fpn",
        "row 'fpn', seed 1: not the newest code of necks.fpn",
    ]
