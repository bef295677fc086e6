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
    ("argument", "message"),
    [
        ("nek.top_down=false", "nek.top_down: there is no such key. Did you mean neck?"),
        ("head.samples=3", "head.samples: there is no such key"),
        ("+row=mine", "row: there is no such key"),
        ("report.title=x", "report.title: there is no such key"),
        ("neck=null", "neck=null: give the name of a file in conf/neck, as neck=fpn"),
        ("neck=[1]", "neck=[1]: give the name of a file in conf/neck"),
        ("task={}", "task={}: give the name of a file in conf/task"),
    ],
)
def test_a_group_or_a_name_in_one_that_cannot_be_is_refused(argument, message):
    with pytest.raises(UserError, match=re.escape(message)):
        normalise(["-m", argument])


@pytest.mark.parametrize("mode", [["-m"], ["--cfg", "job"]])
def test_all_else_stays_as_it_was_typed(mode):
    plain = [*mode, "hydra.verbose=true", "hydra/launcher=joblib", "ablation=fpn", "~neck.p6"]
    assert normalise(plain) == plain


@pytest.mark.parametrize(
    ("typed", "passed"),
    [
        ("neck.depth=3", "++neck.depth=3"),
        ("-m neck.depth=1,2", "-m ++neck.depth=1,2"),
        ("+neck.depth=3", "+neck.depth=3"),
        ("~neck.p6=conv", "~neck.p6=conv"),
        ("task.roi.head.width=64", "++task.roi.head.width=64"),
        ("neck=pan", "neck=pan"),
        ("neck@task.proposals.neck=pan", "neck@task.proposals.neck=pan"),
        ("backbone=timm/a.b", "backbone=timm/a.b"),
        ("seed=3", "seed=3"),
    ],
)
def test_hydra_adds_keys_below_a_group_that_are_missing(typed, passed):
    assert normalise(typed.split()) == passed.split()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["neck.topdown=true"], "neck.topdown with neck=fpn: there is no such key. Did you mean neck.top_down?"),
        (
            ["task.training=joint"],
            "task.training with task=rpn: there is no such key. Allowed in task: name. It",
        ),
        (["task.roi.samples=3"], "It goes with task=fast_rcnn or task=faster_rcnn"),
        (["task=faster_rcnn", "task.trainin=joint"], "Did you mean task.training?"),
        (["recipe.step=3"], "Did you mean recipe.steps?"),
        (["neck.class=necks.Mine"], "neck.class=necks.Mine: say where its file lies, with --config-dir FOLDER"),
    ],
)
def test_they_are_refused_after_composition_with_the_nearest(config, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config(*overrides)
