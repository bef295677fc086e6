"""Two-stage procedures: the proposals that they learn from, the parts that they share, and that nothing is trained twice."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from settings import JOINT, SHORT

from fpn_ablate.config.sources import SOURCES, sources
from fpn_ablate.engine import procedures
from fpn_ablate.engine.evaluate import predict
from fpn_ablate.engine.inputs import prepare
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.runs import run as running
from fpn_ablate.runs.restore import restore
from fpn_ablate.runs.state import Run
from fpn_ablate.store.layout import run_folder
from fpn_ablate.utils.errors import Diverged, UserError
from fpn_ablate.utils.paths import PROPOSALS

FAST, SEPARATE = "task=fast_rcnn", "task=faster_rcnn"
FOUR_STEP = ("task=faster_rcnn", "task.training=four_step")


@pytest.fixture
def cell(config, tmp_path):
    def make(*overrides):
        # An untrained network is sure of nothing.
        sure = ["task.roi.score_thresh=0.0"] if any(o.startswith("task=f") for o in overrides) else []
        return config(*SHORT, *overrides, *sure).model_copy(update={"out": str(tmp_path / "results")})

    return make


def folder_of(cfg, outcome):
    return run_folder(cfg, outcome["fingerprint"])


def weights(folder, part=""):
    state = torch.load(folder / "model.pt", weights_only=True)
    return {name: value for name, value in state.items() if name.startswith(part)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def same_detections(a, b):
    x, y = (DetectionSet.load(folder / "detections.npz") for folder in (a, b))
    return all(np.array_equal(getattr(x, f.name), getattr(y, f.name)) for f in dataclasses.fields(x))


def runs(cfg, table="*"):
    """Records of all finished runs of a table."""
    files = sorted(Path(cfg.out, "runs").glob(f"{table}/*/*/*/record.json"))
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture
def trainings(monkeypatch):
    """A list that receives, for each network that is trained, whether it has an RPN and a second stage."""
    networks, train = [], procedures.train

    def spy(model, *rest, **named):
        networks.append((model.rpn is not None, model.roi is not None))
        return train(model, *rest, **named)

    monkeypatch.setattr(procedures, "train", spy)
    return networks


SHARED = {"rpn", "roi"}  # heads of a network whose features both use


@pytest.mark.parametrize(
    ("task", "row", "heads"),
    [
        ((FAST,), "c4", {"roi"}),  # with a pyramid it is compared with separate training below
        ((SEPARATE,), "finest", {"roi"}),
        (JOINT, "c4", SHARED),
        (FOUR_STEP, "c5", SHARED),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (
                ((SEPARATE,), "c5", {"roi"}),
                (JOINT, "fpn", SHARED),
                (JOINT, "finest", SHARED),
                (FOUR_STEP, "c4", SHARED),
            )
        ),
    ],
)
def test_every_task_gives_detections_and_their_figures(cell, task, row, heads):
    cfg = cell(*task, f"ablation={row}")
    outcome = running.run(cfg)
    assert outcome["status"] == "finished"
    metrics = {"AP", "AP50", "AP75", "AP_s", "AP_m", "AP_l", "AR100", "AR100_s", "AR100_m", "AR100_l"}
    assert set(outcome["metrics"]) == metrics
    folder = folder_of(cfg, outcome)
    assert {name.split(".")[0] for name in weights(folder)} - {"backbone", "neck"} == heads
    detections = DetectionSet.load(folder / "detections.npz")
    assert len(detections.boxes) and set(detections.labels) <= set(range(1, len(outcome["per_class"]) + 1))


def test_a_run_measures_its_latency_and_memory(cell, measured):
    cost = running.run(cell("ablation=c5"))["cost"]
    assert 0 < cost["latency_ms"] != 1.0 and cost["peak_memory_mib"] > 100


@pytest.mark.parametrize("fast", [True, False])
def test_without_fast_modules_every_module_is_plain(cell, monkeypatch, fast):
    def train(model, *rest, **named):
        assert any(type(m).__module__.startswith("fpn_ablate.model.ops") for m in model.modules()) == fast
        raise Diverged("before its first step")

    monkeypatch.setattr(procedures, "train", train)
    with pytest.raises(Diverged, match="before its first step"):
        running.run(cell(*JOINT, f"recipe.fast={fast}".lower()))


def test_separate_is_fast_rcnn_on_the_rows_own_proposals(cell):
    fast, separate = cell(FAST, "ablation=fpn"), cell(SEPARATE, "ablation=fpn")
    a, b = running.run(fast), running.run(separate)
    assert a["proposals"]["fingerprint"] == b["proposals"]["fingerprint"]
    assert a["metrics"] == b["metrics"]
    assert equal(weights(folder_of(fast, a)), weights(folder_of(separate, b)))
    assert same_detections(folder_of(fast, a), folder_of(separate, b))


def test_all_rows_of_table_2_learn_from_one_rpn_and_the_rows_of_table_3_from_their_own(cell, trainings):
    two = [running.run(cell(FAST, f"ablation={row}")) for row in ("c4", "fpn", "bottom_up")]
    assert len({outcome["proposals"]["fingerprint"] for outcome in two}) == 1
    assert len({outcome["setting"] for outcome in two}) == 1
    assert trainings == [(True, False)] + [(False, True)] * 3
    three = [running.run(cell(SEPARATE, f"ablation={row}")) for row in ("c4", "fpn")]
    assert len({outcome["proposals"]["fingerprint"] for outcome in three}) == 2
    assert len({outcome["setting"] for outcome in three}) == 1
    assert three[1]["proposals"]["fingerprint"] == two[0]["proposals"]["fingerprint"]


def test_a_row_of_table_1_serves_as_the_source(cell, trainings):
    first = running.run(cell("ablation=fpn"))
    outcome = running.run(cell(FAST, "ablation=c4"))
    assert outcome["proposals"]["fingerprint"] == first["fingerprint"]
    assert trainings == [(True, False), (False, True)]
    assert not runs(cell(), SOURCES)
    assert outcome["built_on"] == [[first["fingerprint"], first["cost"]["train_s"]]]


@pytest.mark.parametrize(
    "task", [JOINT, *(pytest.param(task, marks=pytest.mark.slow) for task in ((), (FAST,), (SEPARATE,), FOUR_STEP))]
)
def test_a_row_tested_on_an_image_pyramid_is_the_trained_row_without_it(cell, trainings, task):
    tested, plain = cell(*task, "ablation=image_pyramid_tested"), cell(*task, "ablation=c4")
    a = running.run(tested)
    before = len(trainings)
    b = running.run(plain)
    assert len(trainings) == before  # it was trained for the other, and is taken over
    folder, other = folder_of(tested, a), folder_of(plain, b)
    assert equal(weights(folder), weights(other)) and not same_detections(folder, other)
    assert (a["cost"]["steps"], a["verify"]["image_pyramid"]) == (0, "0.5, 1, 2") and b["cost"]["steps"] > 0
    assert [b["fingerprint"], b["cost"]["train_s"]] in a["built_on"]
    trained, _, device = restore(folder)
    again = predict(trained.predict, trained.validation, tested.recipe, device, count=3)
    assert np.array_equal(again.boxes, DetectionSet.load(folder / "detections.npz").boxes)
    if task == JOINT:  # as a file of weights, without the run
        evaluated = cell(*task, "ablation=image_pyramid_tested", "mode=evaluate", f"weights={other}")
        assert same_detections(folder, folder_of(evaluated, running.run(evaluated)))


@pytest.mark.parametrize(
    "task", [(), *(pytest.param(task, marks=pytest.mark.slow) for task in (JOINT, (FAST,), (SEPARATE,), FOUR_STEP))]
)
def test_a_row_trained_on_an_image_pyramid_is_another_network(cell, task):
    cfg = cell(*task, "ablation=image_pyramid")
    outcome = running.run(cfg)
    assert outcome["status"] == "finished" and outcome["cost"]["steps"] == cfg.steps > 0
    trained, _, device = restore(folder_of(cfg, outcome))
    again = predict(trained.predict, trained.validation, cfg.recipe, device, count=3)
    assert np.array_equal(again.boxes, DetectionSet.load(folder_of(cfg, outcome) / "detections.npz").boxes)


def together(cells):
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=running.run, args=(cfg,)) for cfg in cells]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0] * len(cells)


def test_jobs_that_start_together_make_the_source_once(cell):
    cells = [cell(FAST, f"ablation={row}") for row in ("c4", "bottom_up")]
    together(cells)
    (source,) = runs(cells[0], SOURCES)
    (dump,) = Path(cells[0].out).rglob(PROPOSALS)
    made = [record["proposals"]["fingerprint"] for record in runs(cells[0]) if record["task"] == "fast_rcnn"]
    assert made == [source["fingerprint"]] * 2
    lines = [json.loads(line)["step"] for line in (dump.parent / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 4]


def test_a_source_that_is_itself_a_row_of_the_table_is_trained_once(cell):
    """Steps 1 and 2 of the four are the row `separate`, and the rows of Table 5 may start together."""
    factors = {"table": "table5_sharing", "factors": ("neck", "task.training")}
    cells = [
        cell(*task).model_copy(update=factors | {"row": f"fpn+training={name}"})
        for name, task in {"four_step": FOUR_STEP, "separate": (SEPARATE,)}.items()
    ]
    together(cells)
    started = {}
    for record in runs(cells[0]):
        started.setdefault(record["fingerprint"], set()).add(record["started"] + str(record["cost"]["train_s"]))
    assert len(started) == 3 and all(len(times) == 1 for times in started.values())  # rpn, separate, four_step
    (rpn,) = [record for record in runs(cells[0]) if record["task"] == "rpn"]
    assert rpn["row"] == "fpn"


def test_the_same_cell_in_another_table_is_taken_over(cell, trainings):
    cfg = cell("ablation=fpn")
    first = running.run(cfg)
    other = cfg.model_copy(update={"table": "upsampling", "row": "fpn+upsample=nearest"})
    second = running.run(other)
    assert len(trainings) == 1
    assert (second["table"], second["row"]) == ("upsampling", "fpn+upsample=nearest")
    named = {"table", "row", "config", "format"}
    assert {k: v for k, v in first.items() if k not in named} == {k: v for k, v in second.items() if k not in named}
    here, there = folder_of(other, second), folder_of(cfg, first)
    assert {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()}
    assert same_detections(here, there) and equal(weights(here), weights(there))
    assert "table: upsampling" in (here / "config.yaml").read_text()
    for folder in (here, there):
        (folder / "model.pt").unlink()  # thinned out: these serve nobody
    running.run(cfg.model_copy(update={"table": "third"}))
    assert len(trainings) == 2


def test_the_file_says_where_it_comes_from_and_belongs_to_its_data(cell, tmp_path):
    running.run(cell(FAST, "ablation=c4"))
    (dump,) = Path(cell().out).rglob(PROPOSALS)
    with np.load(dump) as kept:
        assert str(kept["fingerprint"]) in {record["fingerprint"] for record in runs(cell(), SOURCES)}
        assert str(kept["row"]) == "fpn"
    taken = dump.rename(tmp_path / "taken.npz")
    given = f"task.proposals.file='{taken}'"
    outcome = running.run(cell(FAST, "ablation=c4", given, "seed=7"))  # no RPN is trained: it comes from the file
    assert len(runs(cell(), SOURCES)) == 1
    assert outcome["proposals"]["row"] == "fpn"
    with pytest.raises(UserError, match=r"taken\.npz.*other train data"):
        running.run(cell(FAST, "ablation=c4", given, "data.seed=1"))


def changed(path, other, **arrays):
    with np.load(path) as kept:
        np.savez(other, **(dict(kept) | arrays))
    return other


def test_what_a_file_must_not_hold_is_refused_before_anything_is_trained(cell, tmp_path, trainings):
    running.run(cell(FAST, "ablation=c4"))
    (dump,) = Path(cell().out).rglob(PROPOSALS)
    with np.load(dump) as kept:
        boxes, ids, images = kept["val_boxes"], kept["val_ids"], kept["val_images"]
    nan, flipped = boxes.copy(), boxes.copy()
    nan[1, 0] = np.nan
    flipped[2] = flipped[2, [2, 1, 0, 3]] + [1, 0, 0, 0]
    faults = {
        "box 1 of val_boxes, of image [0-9]+, is \\[nan": {"val_boxes": nan},
        "box 2 of val_boxes": {"val_boxes": flipped},
        "entries for": {"val_ids": ids[1:]},
        r"val_boxes holds float32 of shape \([0-9]+, 3\)": {"val_boxes": boxes[:, :3]},
        "val_boxes holds <U": {"val_boxes": boxes.astype(str)},
        "val_ids holds float64": {"val_ids": ids.astype(float)},
        "it lacks 1 of the 3 val images": {"val_images": images[1:]},
    }
    before = len(trainings)
    for message, arrays in faults.items():
        path = changed(dump, tmp_path / "bad.npz", **arrays)
        with pytest.raises(UserError, match=rf"bad\.npz: .*{message}.*leave out task\.proposals\.file="):
            running.run(cell(FAST, f"task.proposals.file='{path}'"))
    assert len(trainings) == before and len(runs(cell(), "table2_fast_rcnn")) == 1
    np.save(tmp_path / "array.npy", boxes)
    with pytest.raises(UserError, match=r"array\.npy: not a file of proposals"):
        running.run(cell(FAST, f"task.proposals.file='{tmp_path}/array.npy'"))


def test_a_row_is_not_charged_with_what_it_builds_on(cell, monkeypatch):
    """Nor is its progress logged before that is there."""
    events, train, opened = [], procedures.train, running.Run.open_loggers

    def spy(model, *rest, **named):
        events.append("train rpn" if model.rpn else "train roi")
        return train(model, *rest, **named)

    monkeypatch.setattr(procedures, "train", spy)
    monkeypatch.setattr(running, "reset_peak_memory", lambda device: events.append("reset"))
    monkeypatch.setattr(running.Run, "open_loggers", lambda self: (events.append(f"open {self.cfg.task.name}"), opened(self)))
    propose = procedures.FixedProposals.from_rpn
    monkeypatch.setattr(procedures.FixedProposals, "from_rpn", lambda *args: (events.append("propose"), propose(*args))[1])
    running.run(cell(FAST, "ablation=c4"))
    assert events == ["open rpn", "reset", "train rpn", "open fast_rcnn", "propose", "reset", "train roi"]


def test_a_source_that_diverges_is_named(cell, monkeypatch):
    def diverge(*_, **__):
        raise Diverged("diverged at step 1: rpn_box is nan")

    monkeypatch.setattr(procedures, "train", diverge)
    cfg = cell(FAST, "ablation=c4")
    with pytest.raises(Diverged, match=r"row fpn, which it builds on \(.*sources.*\), diverged at step 1"):
        running.run(cfg)
    assert {record["row"]: record["status"] for record in runs(cfg)} == {"fpn": "diverged", "c4": "diverged"}


def test_a_source_whose_weights_are_gone_or_damaged(cell, trainings):
    cfg = cell(FAST, "ablation=c4")
    first = running.run(cfg)
    (source,) = (path.parent for path in Path(cfg.out).rglob(f"{SOURCES}/**/model.pt"))
    (source / "model.pt").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match=r"model\.pt: cannot be read .*; remove its folder"):
        running.run(cell(FAST, "ablation=bottom_up"))
    (source / "model.pt").unlink()
    again = running.run(cell(FAST, "ablation=fpn"))
    assert again["proposals"] == first["proposals"] and (source / "model.pt").exists()
    assert [rpn for rpn, _ in trainings] == [True, False, True, False]
    folder = folder_of(cfg, first)
    assert running.run(cfg)["finished"] == first["finished"]  # a row that is finished stays so
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_source_that_another_sweep_ends_just_now_is_not_made_again(cell, trainings, monkeypatch):
    first = running.run(cell(FAST, "ablation=c4"))
    find = running.find_run
    monkeypatch.setattr(running, "find_run", lambda *run: monkeypatch.setattr(running, "find_run", find))  # not yet there
    again = running.run(cell(FAST, "ablation=bottom_up"))
    assert again["proposals"] == first["proposals"]
    assert [rpn for rpn, _ in trainings] == [True, False, False]


def test_the_source_is_called_after_its_neck(cell):
    def source(*overrides):
        return sources(cell(FAST, *overrides))["rpn"].row

    assert source() == "fpn"
    assert source("task.proposals.neck.top_down=false") == "bottom_up"
    assert source("task.proposals.neck.lateral=false", "task.proposals.neck.output=p2") == "no_lateral+output=p2"
    assert source("neck@task.proposals.neck=single_level") == "c4"


def test_another_file_is_another_cell(cell, tmp_path):
    running.run(cell(FAST, "ablation=c4"))
    (dump,) = Path(cell().out).rglob(PROPOSALS)
    with np.load(dump) as kept:
        other = changed(dump, tmp_path / "other.npz", val_boxes=kept["val_boxes"] + 1)
    cells = [cell(FAST, "ablation=c4", f"task.proposals.file='{path}'") for path in (dump, other)]
    assert len({Run(cfg, prepare(cfg), 0).fingerprint for cfg in cells}) == 2


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04cut off"])
def test_a_damaged_file_is_refused_by_name(cell, tmp_path, content):
    (tmp_path / "broken.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.npz: not a file of proposals"):
        running.run(cell(FAST, f"task.proposals.file='{tmp_path}/broken.npz'"))
    with pytest.raises(UserError, match=r"nowhere\.npz"):
        running.run(cell(FAST, f"task.proposals.file='{tmp_path}/nowhere.npz'"))


def test_four_steps_share_the_trunk_of_the_second(cell):
    cfg = cell(*FOUR_STEP)
    outcome = running.run(cfg)
    separate = cell(SEPARATE)
    second = folder_of(separate, running.run(separate))
    shared = folder_of(cfg, outcome)
    for part in ("backbone.", "neck."):
        of_fourth, of_second = weights(shared, part), weights(second, part)
        # A frozen batch norm counts no batches.
        assert of_fourth and all(torch.equal(of_fourth[name], of_second[name]) for name in of_fourth)
    assert not equal(weights(shared, "roi."), weights(second, "roi."))  # trained again
    rpn, fast = sorted(runs(cfg, SOURCES), key=lambda record: record["task"] != "rpn")
    assert rpn["task"] == "rpn" and fast["fingerprint"] == json.loads((second / "record.json").read_text())["fingerprint"]
    (first,) = Path(cfg.out, "runs").glob(f"{SOURCES}/*/*/*-{rpn['fingerprint'][:8]}")
    assert not equal(weights(shared, "rpn."), weights(first, "rpn."))


@pytest.mark.parametrize(
    "interrupted_at", [pytest.param(3, marks=pytest.mark.slow), 5, pytest.param(7, marks=pytest.mark.slow)]
)
def test_an_interrupted_four_step_cell_goes_on_to_the_same_end(cell, tmp_path, monkeypatch, interrupted_at):
    """Ctrl-C in step 3 of 4 of either stage, after the checkpoint of its second, and before the later stage has one."""
    cfg = cell(*FOUR_STEP)
    whole_cfg = cfg.model_copy(update={"out": str(tmp_path / "whole")})
    whole = running.run(whole_cfg)
    log = running.Run.log

    def interrupt(self, step, values):
        log(self, step, values)
        if self.cfg.task.name == "faster_rcnn" and self.cfg.task.training == "four_step" and step == interrupted_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            running.run(cfg)
    outcome = running.run(cfg)
    a, b = folder_of(cfg, outcome), folder_of(whole_cfg, whole)
    assert outcome["metrics"] == whole["metrics"]
    assert equal(weights(a), weights(b)) and same_detections(a, b)
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())
