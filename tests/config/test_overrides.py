"""What is refused, or put right, in the arguments of a run before Hydra reads them."""

import re

import pytest

from fpn_ablate.config.overrides import normalise
from fpn_ablate.utils.errors import UserError


@pytest.mark.parametrize("typed", ["+experiments=table1", "experiments=table1", "experiments=table1_rpn"])
def test_an_experiment_is_known_by_the_beginning_of_its_name(typed):
    assert normalise([typed]) == ["+experiments=table1_rpn"]


def test_a_beginning_that_several_names_have_is_refused():
    with pytest.raises(UserError, match="which of table1_rpn, table2_fast_rcnn, table3_faster_rcnn, table5_sharing"):
        normalise(["+experiments=table"])


@pytest.mark.parametrize("option", ["-m", "--multirun"])
def test_a_sweep_may_be_asked_for_anywhere(option):
    for typed in (["recipe=smoke", option, "seed=1,2"], ["recipe=smoke", "seed=1,2", option]):
        assert normalise(typed) == [option, "recipe=smoke", "seed=1,2"]


@pytest.mark.parametrize("arguments", [["-m", "--cfg", "job"], ["--cfg=job", "seed=1,2", "--multirun"], ["-m", "-c", "job"]])
def test_what_hydra_does_one_at_a_time_is_asked_for_one_at_a_time(arguments):
    with pytest.raises(UserError, match=r"^-\S+ and -\S+: give one of them"):
        normalise(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "nek.top_down=false"], "nek.top_down: there is no such key. Did you mean neck?"),
        (["task.training=joint"], "task.training goes with task=faster_rcnn, not with task=rpn"),
        (
            ["-m", "task.roi.samples=3", "task=rpn"],
            "task.roi.samples goes with task=fast_rcnn or task=faster_rcnn, not with task=rpn",
        ),
        (["task.trainin=joint"], "Did you mean task.training?"),
        (["head.samples=3"], "head.samples: there is no such key"),
        (["neck.class=necks.Mine"], "neck.class=necks.Mine: say where its file lies, with --config-dir FOLDER"),
    ],
)
def test_a_key_that_does_not_exist_is_refused_with_the_nearest(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        normalise(arguments)


def test_a_file_may_choose_the_task_that_a_key_goes_with(tmp_path):
    assert normalise(["+experiments=table2", "task.roi.samples=3"])[1:] == ["task.roi.samples=3"]
    assert normalise(["task.roi.samples=3"], tmp_path) == ["task.roi.samples=3"]


@pytest.mark.parametrize("mode", [["-m"], ["--cfg", "job"]])
def test_all_else_stays_as_it_was_typed(mode):
    plain = [*mode, "hydra.verbose=true", "hydra/launcher=joblib", "ablation=fpn", "~neck.p6"]
    assert normalise(plain) == plain


@pytest.mark.parametrize(
    ("typed", "passed"),
    [
        ("neck.depth=3", "++neck.depth=3"),
        ("neck.top_down=false", "++neck.top_down=false"),
        ("-m neck.depth=1,2", "-m ++neck.depth=1,2"),
        ("+neck.depth=3", "+neck.depth=3"),
        ("~neck.p6=conv", "~neck.p6=conv"),
        ("task.roi.head.width=64", "++task.roi.head.width=64"),
        ("rpn.head.width=64", "++rpn.head.width=64"),
        ("neck=pan", "neck=pan"),
        ("rpn.samples=8", "rpn.samples=8"),
    ],
)
def test_keys_of_parts_that_may_be_the_users_are_added_where_they_are_missing(tmp_path, typed, passed):
    assert normalise(typed.split(), tmp_path) == passed.split()
    if "depth" in typed or "width" in typed:
        with pytest.raises(UserError, match="there is no such key"):
            normalise(typed.split())


def test_other_keys_are_refused_at_once_with_a_folder_of_ones_own_too(tmp_path):
    for key in ("nek.depth", "rpn.head_width", "recipe.step"):
        with pytest.raises(UserError, match=f"{key}: there is no such key"):
            normalise([f"{key}=1"], tmp_path)
