"""What is refused, or put right, in the arguments of a run before Hydra reads them."""

import re
import shlex

import pytest

from fpn_ablate.config.overrides import check_files, normalise, refuse_sweeps
from fpn_ablate.utils.errors import UserError


@pytest.mark.parametrize("typed", ["+experiments=table1", "experiments=table1", "experiments=table1_rpn"])
def test_an_experiment_is_known_by_the_beginning_of_its_name(typed):
    assert normalise([typed]) == ["+experiments=table1_rpn"]


def test_a_beginning_that_several_names_have_is_refused():
    with pytest.raises(
        UserError, match="which of table1_rpn, table2_fast_rcnn, table3_faster_rcnn, table4_systems, table5_sharing"
    ):
        normalise(["+experiments=table"])


@pytest.mark.parametrize("option", ["-m", "--multirun"])
def test_a_sweep_may_be_asked_for_anywhere(option):
    for typed in (["recipe=smoke", option, "seed=1,2"], ["recipe=smoke", "seed=1,2", option]):
        assert normalise(typed) == [option, "recipe=smoke", "seed=1,2"]


def test_several_values_without_a_sweep_are_refused():
    with pytest.raises(UserError, match=r"^ablation=fpn,c4: several values are a sweep; add -m"):
        refuse_sweeps(["seed=1", "ablation=fpn,c4"])
    with pytest.raises(UserError, match=r"^a=0,01: several values .* -m a=0,01 \.\.\.; a fraction has a point: a=0\.01$"):
        refuse_sweeps(["++a=0,01"])
    with pytest.raises(UserError, match=r"^\+experiments=table1_rpn: a table is a sweep; add -m"):
        refuse_sweeps(["seed=1", "+experiments=table1_rpn"])
    refuse_sweeps(["factors=[neck,backbone]", "+experiments=table1_rpn", "--cfg", "job"])
    refuse_sweeps(["seed=1,2", "+experiments=table1_rpn", "hydra.mode=MULTIRUN"])
    with pytest.raises(UserError, match=r"^ablation=fpn,c4: several values are a sweep; --cfg shows one configuration$"):
        refuse_sweeps(["--cfg", "job", "+experiments=table1_rpn", "ablation=fpn,c4"])  # which no -m would mend


@pytest.mark.parametrize("arguments", [["-m", "--cfg", "job"], ["--cfg=job", "seed=1,2", "--multirun"], ["-m", "-c", "job"]])
def test_what_hydra_does_one_at_a_time_is_asked_for_one_at_a_time(arguments):
    with pytest.raises(UserError, match=r"^-\S+ and -\S+: give one of them"):
        normalise(arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("+experiment=table1", "experiment: there is no such key. Did you mean experiments?"),
        ("nek.top_down=false", "nek.top_down: there is no such key. Did you mean neck.top_down?"),
        ("recpie.steps=3", "recpie.steps: there is no such key. Did you mean recipe.steps?"),
        ("head.samples=3", "head.samples: there is no such key"),
        ("+row=mine", "row: there is no such key"),
        ("report.title=x", "report.title: there is no such key"),
        ("neck=null", "neck=null: give the name of a file in conf/neck, as neck=bifpn"),
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
        (["data.root=set"], "It goes with data=coco"),
        (["task=faster_rcnn", "task.trainin=joint"], "Did you mean task.training?"),
        (["recipe.step=3"], "Did you mean recipe.steps?"),
        (["neck.class=necks.Mine"], "neck.class=necks.Mine: say where its file lies, with --config-dir FOLDER"),
    ],
)
def test_they_are_refused_after_composition_with_the_nearest(config, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config(*overrides)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "Hard Hat (1)",
            "data=v2",
            "#1",
            "it's",
            "a[1]",
            "x{y}",
            "a!b",
            "a&b",
            "x;y",
            "~tmp",
            "réseau",
            "日本語",
            'a"b',
            "a(b",
        ),
        *("epoch=3-step=10.ckpt", "/sets/Hard Hat (1)/images"),
    ],
)
def test_a_value_that_hydra_does_not_read_is_refused_with_the_way_to_quote_it(config, value):
    with pytest.raises(UserError, match=r"^data\.root=.*: Hydra does not read this value as it is; quote it .*: \S") as refused:
        normalise([f"data.root={value}"])
    (advised,) = shlex.split(str(refused.value).rpartition("for Hydra too: ")[2])
    assert config("data=coco", advised).data.root == value


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("ablation=c4,", "ablation=c4,: a value is missing beside a comma; write values without spaces, as KEY=A,B"),
        ("seed=0,,1", "seed=0,,1: a value is missing beside a comma; write values without spaces, as KEY=A,B"),
        ("factors=[neck", "factors=[neck: cannot be read as key=value; a list is written as 'KEY=[A,B]'"),
    ],
)
def test_a_list_that_does_not_end_is_refused(argument, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        normalise([argument])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "ablation=fpn,fnp",
            "ablation=fnp: there is no such file. Did you mean ablation=fpn? Else a file of your own: --config-dir ",
        ),
        ("ablation=fpn c4", "ablation=fpn c4: there is no such file. Separate names by commas, without spaces: fpn,c4"),
        ("recipe=quik", "recipe=quik: there is no such file. Did you mean recipe=quick?"),
        ("recipe=my.yaml", "FOLDER with recipe/my.yaml"),
        (
            "data=bccd/images",
            "data=bccd/images: there is no such file. There are coco, coco2017, shapes; a data set of your own: data=coco ",
        ),
        *(
            (
                f"data={path}",
                f"data={path}: this takes the name of a file, not a path; a data set of your own: data=coco data.root=FOLDER",
            )
            for path in ("/sets/bccd", "./bccd", "../bccd")
        ),
        (
            "recipe=./my.yaml",
            "recipe=./my.yaml: this takes the name of a file, not a path; a file of your own: --config-dir FOLDER with "
            "recipe/NAME.yaml",
        ),
        (
            "task=xyz",
            "task=xyz: there is no such file. There are fast_rcnn, faster_rcnn, fcos, mask_rcnn, retinanet, rpn, ",
        ),
        ("+experiments=tabel1_rpn", "experiments=tabel1_rpn: there is no such file. Did you mean experiments=table1_rpn?"),
        ("+experiments=table7", "experiments=table7: there is no such file. There are backbones, "),
        ("ablation=mein", "ablation=mein: there is no such file. Did you mean ablation=mine?"),
    ],
)
def test_a_file_that_does_not_exist_is_refused_with_the_nearest(tmp_path, argument, message):
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "mine.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=re.escape(message)):
        check_files([argument], tmp_path)
    check_files(["ablation=mine,fpn", "backbone=timm/a.b", "hydra/launcher=x", "seed=3", "ablation=glob(*)", "~neck"], tmp_path)
    check_files([argument, "hydra.searchpath=[x]"], tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"neck: {upsample: [bilinear\n", ", line 2: cannot be read as YAML (expected ',' or ']'"),
        (b"a: 1\nneck: !!python/object/apply:os.system [x]\n", ", line 2: cannot be read as YAML (could not determine"),
        (b"a: \0", ": cannot be read as YAML (unacceptable character #x0000"),
        (b"a: \xff", ": cannot be read as YAML ('utf-8' codec can't decode"),
    ],
)
def test_a_row_file_that_is_no_yaml_is_named_with_the_line(tmp_path, content, reason):
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "mine.yaml").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"mine.yaml{reason}")):
        check_files(["ablation=mine"], tmp_path)
    check_files(["ablation=fpn"], tmp_path)


def test_a_file_of_ones_own_may_have_a_space_in_its_name(tmp_path):
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "my row.yaml").write_text("# @package _global_\nneck: {upsample: bilinear}\n")
    check_files(["ablation=my row,fpn"], tmp_path)


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("ablation=retinanet/focl", "retinanet/focal"),
        ("recipe=quik", "quick"),
        ("+experiments=neck", "necks"),
        ("+experiments=tabel2", "table2"),
    ],
)
def test_a_misspelt_file_is_refused_with_the_nearest_one(typed, near):
    key, _, name = typed.lstrip("+").partition("=")
    with pytest.raises(UserError, match=rf"^{key}={name}: there is no such file\. Did you mean {key}={near}\?"):
        check_files([typed], None)
