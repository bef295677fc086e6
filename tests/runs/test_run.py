"""A run from its configuration to its record: skipped when finished, resumed when not, recorded whatever happens."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from settings import SHORT

from fpn_ablate.cli.shapes import main as export_shapes
from fpn_ablate.config.validation import validate
from fpn_ablate.data.shapes import dataset
from fpn_ablate.engine import evaluate, inputs, pretrain, procedures
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.report.collate.health import state
from fpn_ablate.runs import run as running
from fpn_ablate.runs import state as run_state
from fpn_ablate.store import record
from fpn_ablate.store.layout import run_folder
from fpn_ablate.utils import signals
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import RECORD


@pytest.fixture
def cell(config, tmp_path):
    def make(*overrides):
        return config(*SHORT, *overrides).model_copy(update={"out": str(tmp_path / "results")})

    return make


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A finished run: its configuration, record and folder."""
    cfg = config(*SHORT).model_copy(update={"out": str(tmp_path_factory.mktemp("results"))})
    outcome = running.run(cfg)
    return cfg, outcome, run_folder(cfg, outcome["fingerprint"])


def training_is_forbidden(*arguments, **named):
    raise AssertionError("something was trained")


def raising(error):
    def train(*arguments, **named):
        raise error

    return train


def test_a_killed_process_leaves_a_record_that_says_it_had_begun(cell, monkeypatch):
    """Nothing can be written by a process that is gone, so it is written before."""
    seen = []
    monkeypatch.setattr(running, "_train_and_evaluate", lambda run: seen.append(record.read(run.folder)) or {})
    running.run(cell("seed=11"))
    assert (seen[0]["status"], seen[0]["row"], seen[0]["metrics"]) == ("running", "fpn", {})


def test_rows_that_stand_on_one_rpn_take_its_number_of_threads(cell, monkeypatch):
    """So does a run that another table has; with torch's own choice both would be trained again."""
    for module in (inputs, run_state):
        monkeypatch.setattr(module, "default_threads", lambda: 2)
    threads = []
    for overrides in (("threads=1",), ("table=other",), ("task=fast_rcnn",)):
        cfg = cell("seed=13", *overrides)
        run = run_state.Run(cfg, inputs.prepare(cfg), 0)
        threads.append(run.threads)
        record.write(run.folder, run.describe() | {"environment": {"threads": run.threads}, "status": "finished"})
    torch.set_num_threads(1)
    assert threads == [1, 1, 1]


def test_runs_in_bf16_and_in_fp32_are_two_and_not_compared(cell, monkeypatch):
    described = {}
    for wanted, amx in product((False, True), repeat=2):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_bf16": amx}, raising=False)
        cfg = cell("seed=14", f"recipe.bf16={str(wanted).lower()}")
        described[wanted, amx] = run_state.Run(cfg, inputs.prepare(cfg), 0).describe()
    assert [key for key, run in described.items() if run["bf16"]] == [(True, True)]
    for key in ("fingerprint", "setting"):
        assert described[False, False][key] == described[False, True][key]
        assert described[True, False][key] != described[True, True][key]


def test_a_run_goes_on_with_the_threads_that_it_began_with(cell, monkeypatch):
    """And a finished one is skipped; another number that is asked for is another run, comparable with the first."""
    seen = []

    def train(run):
        seen.append((run.threads, torch.get_num_threads(), run.folder))
        if len(seen) == 1:
            raise KeyboardInterrupt
        return {}

    def start(own, *overrides):
        for module in (inputs, run_state):
            monkeypatch.setattr(module, "default_threads", lambda: own)
        return running.run(cell("seed=12", *overrides))

    monkeypatch.setattr(running, "_train_and_evaluate", train)
    with pytest.raises(KeyboardInterrupt):
        start(2)
    first = start(1)
    assert seen == [(2, 2, seen[0][2])] * 2 and first["environment"]["threads"] == 2
    assert start(1)["fingerprint"] == start(1, "threads=2")["fingerprint"] == first["fingerprint"] and len(seen) == 2
    other = start(1, "threads=1")
    assert seen[2][:2] == (1, 1) and seen[2][2] != seen[0][2]
    assert other["setting"] == first["setting"]
    assert start(1)["fingerprint"] == other["fingerprint"]  # of two, that with torch's own choice
    assert start(3)["fingerprint"] in (first["fingerprint"], other["fingerprint"]) and len(seen) == 3
    torch.set_num_threads(1)


def test_a_record_holds_what_tables_need(finished):
    cfg, outcome, folder = finished
    on_disk = json.loads((folder / "record.json").read_text())
    assert on_disk == {"format": 1, **json.loads(json.dumps(outcome))}
    assert (on_disk["status"], on_disk["error"]) == ("finished", None)
    assert (on_disk["table"], on_disk["recipe"][:5], on_disk["row"], on_disk["seed"]) == ("table1_rpn", "smoke", "fpn", 0)
    assert (on_disk["data"], on_disk["generated"], on_disk["task"]) == ("shapes", True, "rpn")
    unread = {key: getattr(cfg.recipe, key).model_dump() for key in ("roi", "pretrain")}
    assert not unread.keys() & on_disk["config"]["recipe"].keys()
    recipe = on_disk["config"]["recipe"] | unread
    assert validate({**on_disk["config"], "recipe": recipe, "out": cfg.out}) == cfg  # a record names no place on a disk
    assert set(on_disk["metrics"]) == {f"{ar}{size}" for ar in ("AR100", "AR1k") for size in ("", "_s", "_m", "_l")}
    assert on_disk["verify"]["anchors"] == 199974
    assert on_disk["images"]["count"] == 3
    assert on_disk["cost"]["steps"] == 4
    assert {"device", "torch", "python", "evaluator", "commit", "dirty", "version"} <= set(on_disk["environment"])
    assert on_disk["started"] <= on_disk["finished"]


def test_a_cells_folder_holds_what_the_design_says(finished):
    cfg, outcome, folder = finished
    assert folder.relative_to(cfg.out).parts[:2] == ("runs", "table1_rpn")
    assert folder.name == f"seed0-{outcome['fingerprint'][:8]}"
    names = {path.name for path in folder.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "detections.npz", "model.pt", "record.json", "skip.json"}
    assert names == expected | {"resampled.npz", "artifacts.npz", "throughput.jsonl"}
    assert validate(yaml.safe_load((folder / "config.yaml").read_text())) == cfg
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert {"rpn_objectness", "rpn_box", "lr"} < set(lines[0])
    assert {k: v for k, v in lines[-1].items() if k != "step"} == {k: v for k, v in outcome["metrics"].items() if v is not None}


def test_saved_detections_give_the_records_recall_through_pycocotools_alone(finished):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    cfg, outcome, folder = finished
    detections = DetectionSet.load(folder / "detections.npz")
    validation = inputs.load_data(cfg.data, cfg.recipe, cfg.mode)[1]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = validation.coco()
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections.coco_results()), "bbox")
        evaluation.params.useCats = 0
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[8] == pytest.approx(outcome["metrics"]["AR100"], abs=1e-6)
    assert set(detections.image_ids.tolist()) <= set(validation.image_ids)


def test_object_sizes_and_images_are_those_of_the_evaluated_set(finished):
    cfg, outcome, _ = finished
    validation = inputs.load_data(cfg.data, cfg.recipe, cfg.mode)[1]
    assert len(validation) == 3
    assert sum(outcome["objects"].values()) >= len(validation.coco()["annotations"])
    areas = ((4, 0), (9, 0), (16, 0), (25, 0), (30, 0), (4, 1))
    truth = {"annotations": [{"bbox": [0, 0, 9, 9], "area": a, "iscrowd": crowd} for a, crowd in areas]}
    assert evaluate.object_sizes(truth, (9, 25)) == {"small": 2, "medium": 3, "large": 2}


def test_a_finished_cell_returns_its_record_and_trains_nothing(finished, monkeypatch, capsys):
    cfg, _, folder = finished
    monkeypatch.setattr(procedures, "train", training_is_forbidden)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "skip.json"}
    assert running.run(cfg) == json.loads((folder / "record.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "finished before" in capsys.readouterr().out


def test_a_failed_cell_leaves_a_record_and_the_traceback_and_can_be_done_again(cell, monkeypatch):
    cfg = cell()
    with monkeypatch.context() as patch:
        patch.setattr(procedures, "train", raising(MemoryError("no room")))
        with pytest.raises(MemoryError) as failed:
            running.run(cfg)
    (file,) = Path(cfg.out).rglob("record.json")
    (note,) = pickle.loads(pickle.dumps(failed.value)).__notes__  # as the process of the sweep gets it
    assert note.endswith(str(file.parent / "error.txt"))
    content = json.loads(file.read_text())
    assert (content["status"], content["error"], content["metrics"]) == ("failed", "MemoryError: no room", {})
    assert "no room" in (file.parent / "error.txt").read_text()
    assert "Traceback" in (file.parent / "error.txt").read_text()
    assert running.run(cfg)["status"] == "finished"
    assert json.loads(file.read_text())["error"] is None
    assert not (file.parent / "error.txt").exists()


def test_an_interrupted_cell_says_so_and_goes_on_to_the_same_end(cell, finished, monkeypatch, capfd):
    """Ctrl-C in step 4, after the checkpoint of step 2: weights, proposals and figures are those of a run left alone."""
    cfg, (_, whole, whole_folder) = cell(), finished
    log = running.Run.log

    def interrupt(self, step, values):
        log(self, step, values)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            running.run(cfg)
    (file,) = Path(cfg.out).rglob("record.json")
    assert json.loads(file.read_text())["status"] == "interrupted"
    assert (file.parent / "checkpoint.pt").exists()
    outcome = running.run(cfg)
    assert outcome["fingerprint"] == whole["fingerprint"]
    assert outcome["metrics"] == whole["metrics"]
    assert (outcome["cost"]["resumed_at"], whole["cost"]["resumed_at"]) == (2, 0)  # its times are of the rest
    assert re.search(r"finished in \S+ from step 2 of 4, ", capfd.readouterr().out)
    a, b = (torch.load(folder / "model.pt", weights_only=True) for folder in (file.parent, whole_folder))
    assert all(torch.equal(a[name], b[name]) for name in b)
    x, y = (DetectionSet.load(folder / "detections.npz") for folder in (file.parent, whole_folder))
    assert np.array_equal(x.boxes, y.boxes)
    texts = [(folder / "metrics.jsonl").read_text() for folder in (file.parent, whole_folder)]
    assert texts[0] == texts[1]


def test_missing_weights_are_refused_before_anything_is_written(cell):
    cfg = cell("backbone.weights=nowhere.pth")
    with pytest.raises(UserError, match=r"backbone.weights=nowhere.pth: no such file"):
        running.run(cfg)
    assert not Path(cfg.out).exists()


def test_a_gpu_that_is_not_there_is_refused(cell, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda: torch sees no GPU; use device=cpu or device=auto"):
        running.run(cell().model_copy(update={"device": "cuda"}))
    assert inputs.pick_device("auto").type == "cpu"


def test_a_coco_set_gives_a_record_under_its_own_name(config, tmp_path):
    root = tmp_path / "herbarium"
    export_shapes(["--export", str(root), "--train", "4", "--val", "3", "--size", "64"])
    overrides = [o for o in SHORT if not o.startswith("data.")]
    cfg = config(*overrides, "data=coco", f"data.root={root}").model_copy(update={"out": str(tmp_path / "results")})
    outcome = running.run(cfg)
    assert (outcome["status"], outcome["data"], outcome["generated"]) == ("finished", "herbarium", True)
    assert outcome["images"]["count"] == 3


# ------------------------------------------------------------------------------------------------------------ pre-training


PRETRAINING = ("recipe.pretrain.steps=2", "recipe.pretrain.batch_size=4", "recipe.pretrain.side=32")


def pretrained(cfg, folder):
    pictures = inputs.world(cfg.data, cfg.recipe.short_side)
    return pretrain.load_or_pretrain(cfg.backbone, cfg.recipe.pretrain, pictures, folder, torch.device("cpu"), cfg.workers)


@pytest.fixture(autouse=True, scope="module")
def few_held_out():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "HELD_OUT", 16)
        yield


@pytest.fixture(scope="module")
def backbone(config, tmp_path_factory):
    """A pre-trained backbone: its configuration, the folder of all, and its weights."""
    cfg, folder = config(*PRETRAINING), tmp_path_factory.mktemp("backbones")
    return cfg, folder, pretrained(cfg, folder)


def test_a_backbone_is_pre_trained_once_and_shared(backbone, monkeypatch, config):
    cfg, folder, weights = backbone
    assert 0 <= weights.accuracy <= 1
    assert weights.seconds > 0
    monkeypatch.setattr(pretrain, "_train", training_is_forbidden)
    assert pretrained(cfg, folder) == pretrained(config(*PRETRAINING, "seed=3", "ablation=c4"), folder) == weights


def test_another_world_or_recipe_is_another_backbone(backbone, config):
    _, folder, weights = backbone
    others = (config(*PRETRAINING[1:], "recipe.pretrain.steps=3"), config(*PRETRAINING, "data.noise=1"))
    assert len({weights.path, *(pretrained(cfg, folder).path for cfg in others)}) == 3


def test_pre_training_again_gives_the_same_weights(backbone, tmp_path):
    cfg, _, first = backbone
    torch.manual_seed(5)
    second = pretrained(cfg, tmp_path)
    a, b = (torch.load(weights.path, weights_only=True) for weights in (first, second))
    assert first.path.name == second.path.name
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_pre_training_leaves_the_cores_of_its_workers_to_them(backbone, tmp_path, monkeypatch):
    cfg, _, _ = backbone
    seen, forward = set(), pretrain.Classifier.forward

    def watched(model, images):
        if model.training:
            seen.add(torch.get_num_threads())
        return forward(model, images)

    monkeypatch.setattr(pretrain.Classifier, "forward", watched)
    before = torch.get_num_threads()
    try:
        for threads, workers, expected in ((3, 0, 2), (3, 2, 1), (1, 1, 1)):
            torch.set_num_threads(threads)
            pretrained(cfg.model_copy(update={"workers": workers}), tmp_path / f"{threads}{workers}")
            assert seen == {expected}
            assert torch.get_num_threads() == threads
            seen.clear()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("steps", "ahead"), [(2, 4), (1, 0)])
def test_pictures_are_rendered_ahead_where_training_will_ask_for_all(cell, monkeypatch, steps, ahead):
    cfg = cell(f"recipe.steps={steps}", f"data.seed={77 + steps}", "threads=2")  # a world that no other test has rendered
    before = torch.get_num_threads()
    try:
        prepared = inputs.prepare(cfg)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(dataset, "render_sample", training_is_forbidden)
    assert len(prepared.validation.coco()["images"]) == 3
    rendered = 0
    for index in range(4):
        with contextlib.suppress(AssertionError):
            prepared.training[index]
            rendered += 1
    assert rendered == ahead


def test_a_run_starts_from_the_pre_trained_backbone(backbone, tmp_path, config):
    """All of the backbone is frozen, so the weights at the end are those of the file."""
    _, _, weights = backbone
    overrides = [o for o in SHORT if not o.startswith("backbone.")]
    cfg = config(*overrides, f"backbone.weights={weights.path}", "backbone.freeze_at=5", "ablation=c5")
    running.run(cfg.model_copy(update={"out": str(tmp_path)}))
    (model,) = tmp_path.rglob("model.pt")
    state, start = (torch.load(path, weights_only=True) for path in (model, weights.path))
    end = {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
    assert end
    assert all(torch.equal(value, start[name]) for name, value in end.items())


# ----------------------------------------------------------------------------------------------- faults, and several at once


def test_a_gpu_without_room_for_a_batch_fails_with_the_key_that_makes_batches_smaller(cell, monkeypatch):
    monkeypatch.setattr(procedures, "train", raising(torch.cuda.OutOfMemoryError("Tried to allocate 2 GiB")))
    with pytest.raises(UserError, match=r"^out of memory: set recipe\.accumulate above 1, for all rows: .*Tried"):
        running.run(cfg := cell())
    (file,) = Path(cfg.out).rglob("record.json")
    assert state(json.loads(file.read_text())) == "out of memory"


def test_a_worker_that_loads_images_and_dies_of_the_same_signal_is_no_failure(cell, monkeypatch):
    cfg = cell()

    def killed(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    monkeypatch.setattr(procedures, "train", killed)
    with pytest.raises(signals.Stopped), signals.handling_signals(), signals.between_steps():
        running.run(cfg)
    (file,) = Path(cfg.out).rglob("record.json")
    assert json.loads(file.read_text())["status"] == "interrupted"


def _all(cells, trained):
    def counting(*arguments, **named):
        trained.put(1)
        return train(*arguments, **named)

    train, procedures.train = procedures.train, counting  # in a fork
    for cfg in cells:
        running.run(cfg)


@pytest.fixture(scope="module")
def left_alone(config, tmp_path_factory, script):
    """Three runs, of which two build on the first; and what they leave."""
    fast = ("task=fast_rcnn", "task.roi.score_thresh=0.0")
    cells = [config(*SHORT), *(config(*SHORT, *fast, f"ablation={row}") for row in ("c4", "fpn"))]
    out = tmp_path_factory.mktemp("w")
    for cfg in _below(out, cells):
        running.run(cfg)
    return cells, script("drills/kills").contents(out)


def _below(out, cells):
    return [cfg.model_copy(update={"out": str(out)}) for cfg in cells]


def test_two_sweeps_over_the_same_cells_train_each_once(left_alone, script, tmp_path):
    cells, whole = left_alone
    context = multiprocessing.get_context("fork")
    trained = context.Queue()
    sweeps = [context.Process(target=_all, args=(_below(tmp_path, cells), trained)) for _ in range(2)]
    for sweep in sweeps:
        sweep.start()
    for sweep in sweeps:
        sweep.join(120)
    assert [sweep.exitcode for sweep in sweeps] == [0, 0]
    assert trained.qsize() == 3
    assert script("drills/kills").contents(tmp_path) == whole


@pytest.mark.slow
def test_the_drills_lose_nothing(script, tmp_path):
    for drill, tries in (("chaos", 10), ("together", 1)):
        assert script("drills/kills").main([drill, "--tries", str(tries), "--json", str(tmp_path / f"{drill}.json")]) == 0


@pytest.mark.parametrize("text", ["[1]", "", '{"status": "fin', "[" * 100_000, "null"])
def test_a_record_that_is_none_is_read_as_if_there_were_none(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    assert record.read(tmp_path) is None


def test_what_a_kill_left_beside_a_finished_record_is_gone_after_the_next_start(cell):
    """Such as a temporary file of skip.json, which is written last."""
    cfg = cell()
    folder = run_folder(cfg, running.run(cfg)["fingerprint"])
    leftover = folder / ".skip.json.123-host.json"
    leftover.write_text("{")
    running.run(cfg)
    assert not leftover.exists()
