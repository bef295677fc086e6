"""The page: what it holds, what it escapes, and what it does without what it lacks."""

import html
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from artifact_files import NAME, by_size, leave
from records import FACTS, make_record

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load, write_ledger
from fpn_ablate.report.html import gallery, page
from fpn_ablate.report.html.progress import Board, Progress, State
from fpn_ablate.store.layout import run_lock
from fpn_ablate.utils.locks import lock

pytestmark = pytest.mark.usefixtures("three_seeds")

NASTY = "</script><img src=x onerror=alert(1)>"


def rendered(source, **more) -> str:
    return page.render(collate(load(source)), **more)


def text_of(made: str) -> str:
    """What stands between the tags, on one line."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", made, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


@pytest.fixture
def full(put, runs):
    """Two rows and two seeds with all that a run leaves."""
    for row, strength in (("c4", 0.2), ("fpn", 0.9)):
        for seed in (2, 3):
            environment = make_record()["environment"] | {"command": "python -m fpn_ablate -m +experiments=table1 'a=b c'"}
            record = {"by_size": by_size(strength / 2), "pictures": NAME, "environment": environment}
            leave(put(row, seed, **record), strength)
    return runs


def test_the_page_holds_the_table_its_verdicts_charts_pictures_and_runs(full):
    made = rendered(full)
    shown = text_of(made)
    table = collate(load(full))[0]
    row = next(row for row in table.rows if row.row == "fpn")
    assert f"{row.cells['AR100'].ours.mean:.1f} ± {row.cells['AR100'].ours.half_width:.1f}" in shown
    assert "44.0" in shown and "paper: COCO minival (Δ other data)" in shown  # the paper's, of Table 1 (c)
    assert "GENERATED DATA: not comparable with COCO" in shown
    assert shown.count("not run") >= 4, "rows that are not run are holes"
    unjudged = sum(verdict.verdict == "no result" for verdict in table.verdicts)
    assert unjudged and f"No result, as their rows are not run or not healthy at a common seed: {unjudged} claims." in shown
    for heading in ("Verdicts", "Plots", "Image by image", "The pyramid", "Provenance", "The data", "4 runs"):
        assert heading in shown
    for chart in ("Recall against object size", "Learning curves", "Effect sizes", "Cost against accuracy"):
        assert chart in shown
    for chart in ("Errors by kind", "Precision and recall", "Recall by IoU", "Level on which objects are found"):
        assert chart in shown
    assert "python -m fpn_ablate -m +experiments=table1 'a=b c' 4 runs" in shown
    pictures = re.findall(r"data:image/webp;base64,[^\"]*", made)
    assert pictures and len(pictures) == len(set(pictures)), "each is embedded once"
    assert rendered(full) == made


def blocks_of(made):
    """The data that the page's script reads."""
    found = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', made, re.DOTALL)
    return [block for block in map(json.loads, found) if isinstance(block, dict)]


def test_the_pyramid_has_the_levels_of_each_row_on_each_image_and_where_objects_are_found(full):
    (pyramid,) = [block for block in blocks_of(rendered(full)) if "images" in block and "rows" in block["images"][0]]
    assert [entry["image"] for entry in pyramid["images"]] == ["1", "2"]
    for entry, found in zip(pyramid["images"], ([0, 3], [-1]), strict=True):
        assert [row["row"] for row in entry["rows"]] == ["c4", "fpn"] and entry["picture"]
        for row in entry["rows"]:
            assert [name for name, *_ in row["levels"]] == ["P2", "P3", "P4", "P5"]
            assert row["levels"][0][1] == "stride 4, 16 × 16"
            assert [added is not None for *_, added in row["levels"]] == [True, False, False, False]
            assert [box[-1] for box in row["found"]] == found


def test_runs_of_an_earlier_version_have_one_image_and_say_how_to_get_the_rest(full):
    for file in full.rglob("artifacts.npz"):
        with np.load(file) as content:
            kept = {name: content[name] for name in ("image_ids", "values", "level_p2", "level_p3")}
        np.savez_compressed(file, **kept)
    made = rendered(full)
    (pyramid,) = [block for block in blocks_of(made) if "images" in block and "rows" in block["images"][0]]
    assert [(entry["image"], len(entry["rows"])) for entry in pyramid["images"]] == [("1", 2)]
    assert "Errors and curves: python -m fpn_ablate artifacts RUNS adds them." in text_of(made)
    assert "Errors by kind" not in text_of(made)


def test_the_configurations_of_two_runs_differ_in_what_the_page_says(put, runs):
    put("c4", 2, config={"neck": {"name": "single"}, "recipe": {"steps": 500}})
    put("fpn", 2, config={"neck": {"name": "fpn"}, "recipe": {"steps": 500}})
    put("fpn", 3, config={"neck": {"name": "fpn"}, "recipe": {"steps": 500}})
    (content,) = [block for block in blocks_of(rendered(runs)) if "common" in block]
    assert content["common"] == {"neck.name": "fpn", "seed": "2"}, "what all runs share is left out"
    assert content["runs"] == [{"neck.name": "single"}, {}, {"seed": "3"}]


@pytest.mark.parametrize(
    ("data", "generated", "kind"), [("shapes", True, "generated"), ("coco2017", False, "COCO"), ("bccd", False, "real")]
)
def test_the_kind_of_data_is_marked(put, runs, data, generated, kind):
    put("fpn", 2, data=data, generated=generated)
    made = rendered(runs)
    assert f'class="table-section {kind.lower()}"' in made and f'<span class="chip {kind.lower()}">{kind}</span>' in made


def test_a_running_run_is_called_neither_killed_nor_missing(put, runs):
    folder = put("fpn", 2, status="running", metrics={})
    lock_file = run_lock(runs.parent, load(runs)["fingerprint"].item())
    where = folder.relative_to(runs).parts
    assert len(where) == 4, "as a run's folder"
    assert "killed" in text_of(rendered(runs))
    lock_file.parent.mkdir()
    with lock(lock_file):
        shown = text_of(rendered(runs))
    assert "killed" not in shown and "running" in shown
    assert "Learning curves: no run is finished." in shown and "on this disk" not in shown


@pytest.mark.parametrize("key", ["row", "table", "recipe"])
def test_what_comes_from_records_is_escaped(runs, key):
    folder = runs / "a" / "b" / "c" / "d"
    folder.mkdir(parents=True)
    record = make_record("fpn", 1, pictures=NAME, environment={"device": NASTY, "command": NASTY}) | {key: NASTY}
    (folder / "record.json").write_text(json.dumps(record))
    leave(folder, 0.5)
    made = rendered(folder)
    assert "onerror=alert" in made and "<img src=x" not in made
    tags = re.findall(r"</?script\b", made)
    assert tags[::2] == ["<script"] * (len(tags) // 2) and tags[1::2] == ["</script"] * (len(tags) // 2)
    for block in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', made, flags=re.DOTALL):
        json.loads(block)


def test_nothing_is_loaded_from_elsewhere(full):
    made = rendered(full)
    assert "default-src 'none'" in made
    library = max(re.findall(r"<script[^>]*>(.*?)</script>", made, flags=re.DOTALL), key=len)
    assert len(library) > 100_000  # Vega's, in which addresses stand that nothing asks for
    own = made.replace(library, "")
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", own)
    assert "fetch(" not in own and "@import" not in own and not re.findall(r"url\((?!data:)", own)
    # The address of the schema would be the only one in a specification.
    assert "$schema" not in own


def test_states_of_rows_are_seen(put, runs):
    put("c4", 2, status="diverged", error="loss is not finite at step 120")
    put("c5", 2, status="failed", error="OutOfMemoryError: CUDA out of memory")
    put("fpn", 2)
    put("fpn", 3, status="failed", error="ValueError: no")
    made = rendered(runs)
    assert "diverged @ step 120" in text_of(made) and "out of memory" in text_of(made)
    assert 'aria-label="seed 2 finished, seed 3 failed, seed 4 not run"' in made


def test_the_key_of_the_charts_has_the_rows_that_were_run(full):
    assert re.findall(r"<button[^>]* data-row=.*?</span>(.*?)</button>", rendered(full)) == ["(a) baseline on conv4", "(c) FPN"]


def test_rows_of_a_table_show_the_same_seeds_planned_or_run(put, runs):
    put("c4", 0)
    put("fpn", 2, status="failed", error="ValueError: no")
    made = rendered(runs)
    shown = re.findall(r'class="seeds" role="img" aria-label="([^"]*)"', made)
    assert len(shown) == len(FACTS)
    assert {tuple(re.findall(r"seed (\d+)", label)) for label in shown} == {("0", "2", "3", "4")}
    assert "red squares: failed, interrupted or unhealthy seeds" in text_of(made)


def test_claims_with_fewer_seeds_than_planned_are_not_judged_yet_rather_than_inconclusive(put, runs):
    for row in ("c4", "fpn"):
        put(row, 2)
        for seed in (2, 3, 4):
            put(row, seed, recipe="more")
    early, complete = sorted(collate(load(runs)), key=lambda table: table.recipe == "more")
    assert {verdict.verdict for verdict in early.verdicts} == {"not judged yet", "no result"}
    assert "not judged yet" not in {verdict.verdict for verdict in complete.verdicts}
    count = sum(verdict.verdict == "not judged yet" for verdict in early.verdicts)
    shown = text_of(page.render([early]))
    assert "inconclusive" not in shown.replace("? inconclusive, – not judged yet.", ""), "but in the key of a chart"
    assert f"– {count} not judged yet" in shown and f"Not judged before 3 seeds: {count} claims." in shown
    assert shown.count("– not judged yet 1 seed, 3 planned") == count
    assert "Not judged before" not in text_of(page.render([complete]))
    assert shown.count(f"– {count} not judged yet") == 1 and text_of(rendered(runs)).count(f"– {count} not judged yet") == 2


def test_the_overview_counts_the_rows_that_were_run(put, runs):
    for row in ("c4", "fpn"):
        put(row, 2)
    put("c5", 2, status="failed", error="ValueError: no")
    put("fpn", 2, table="own")
    overview = rendered(runs).partition("overview-table")[2].partition("</table>")[0]
    assert re.findall(r'<td class="num">(.*?)</td>', overview) == ["2 of 6", "1 of 1"]


def test_a_ledger_alone_has_tables_and_says_what_it_lacks(full, tmp_path):
    write_ledger(load(full), tmp_path / "ledger.csv")
    shown = text_of(rendered(tmp_path / "ledger.csv"))
    assert "Learning curves: the folders of the runs" in shown
    assert "Pictures: no folder of its runs" in shown
    assert "Recall against object size" in shown and "Image by image" not in shown


@pytest.mark.parametrize("name", ["artifacts.npz", "detections.npz", "metrics.jsonl", "truth.json", "1.jpg"])
@pytest.mark.parametrize(
    "damage", ["gone", "other", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("cut", "empty"))]
)
def test_missing_and_damaged_files_do_not_break_the_page(full, name, damage):
    for file in [*full.rglob(name)]:
        content = file.read_bytes()
        file.unlink()
        if damage != "gone":
            file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b'{"a": [1]}\n'}[damage])
    shown = text_of(rendered(full))
    assert "Region proposals" in shown and "4 runs" in shown
    if name == "artifacts.npz":
        assert "Image by image" not in shown
        assert ("no artifacts.npz" if damage == "gone" else "damaged or incomplete") in shown
    if name == "truth.json":
        assert "truth.json is missing or damaged" in shown


def test_pictures_stay_below_six_megabytes(put, runs, monkeypatch):
    """Many tables, each with many pictures that are dear: the page stops taking them, and says so."""
    monkeypatch.setattr("fpn_ablate.report.html.gallery.MAX_BYTES", 200_000)
    for table in ("table1_rpn", "upsampling", "own"):
        for row, strength in (("c4", 0.2), ("fpn", 0.9)):
            leave(put(row, 2, table=table, pictures=NAME, by_size=by_size()), strength, images=40, side=160)
    made = rendered(runs)
    taken = sum(map(len, re.findall(r"data:image/webp;base64,[^\"]*", made)))
    assert 50_000 < taken < 200_000
    assert "Further images are left out" in made
    assert len(made.encode()) < 6_000_000


def test_no_picture_from_outside_of_its_folder_comes_onto_the_page(full):
    """Results may be another's: names in them are no paths, and links lead nowhere."""
    place = full / ".pictures" / NAME
    (full / "secret.jpg").write_bytes((place / "1.jpg").read_bytes())
    truth = json.loads((place / "truth.json").read_text())
    truth["images"] = {
        "../../secret": truth["images"]["1"],
        str(full / "secret"): truth["images"]["1"],
        "1": truth["images"]["1"],
    }
    (place / "truth.json").write_text(json.dumps(truth))
    (place / "1.jpg").unlink()
    (place / "1.jpg").symlink_to("../../secret.jpg")
    assert "data:image/webp" not in rendered(full)
    (place / "1.jpg").unlink()
    (full / "secret.jpg").rename(place / "1.jpg")
    assert "data:image/webp" in rendered(full)


def test_boxes_of_other_data_are_not_drawn_on_these_pictures(full, put):
    """Rows of two data sets stand together only on request, and their pictures not even then."""
    leave(put("finest", 2, by_size=by_size(), pictures="another-set"), 0.5)
    (table,) = collate(load(full))
    shown = gallery.load_artifacts(table, gallery.Album())
    assert [run.row.row for run in shown.runs] == ["c4", "fpn"]
    assert any("other pictures" in line for line in shown.missing)


@pytest.fixture
def masked(put, runs):
    """A row with masks and one without."""

    def make(detections):
        for row, strength in (("c4", 0.2), ("fpn", 0.9)):
            folder = put(row, 2, by_size=by_size(), pictures=NAME)
            leave(folder, strength, detections=detections, masks=row == "fpn")
        return runs

    return make


def embedded(made):
    """The comparison of rows, and the pictures, as the page's script reads them."""
    blocks = [
        json.loads(block) for block in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', made, re.DOTALL)
    ]
    comparison = next(block for block in blocks if "shown" in block)
    return comparison, next(block for block in blocks if any(key.startswith(NAME) for key in block))


@pytest.mark.parametrize("detections", [True, False])
def test_masks_are_outlined_where_a_row_has_them(masked, detections):
    comparison, pictures = embedded(rendered(masked(detections)))
    rows = {row["row"]: row for row in comparison["rows"]}
    assert "masks" not in rows["c4"] and [len(boxes) for boxes in rows["c4"]["boxes"]] == [2 + (not detections)] * 12
    shown = [[score for _, score in masks] for masks in rows["fpn"]["masks"]]
    assert shown == [[90, 60] if detections else [60]] * 12
    assert [len(boxes) for boxes in rows["fpn"]["boxes"]] == [2 if detections else 0] * 12
    assert ("Masks: of the 100 best", "Boxes and masks: detections")[detections] in comparison["shown"]
    for picture in pictures.values():
        (path,) = picture["masks"]
        numbers = np.array(re.findall(r"[\d.]+", path), float).reshape(-1, 2)
        assert np.abs([*numbers.min(0) - (4, 6), *numbers.max(0) - (20, 30)]).max() <= 0.5
        assert path.startswith("M") and path.endswith("z")


def test_the_masks_of_the_truth_may_be_missing_or_damaged(masked):
    runs = masked(detections=False)
    file = runs / ".pictures" / NAME / "masks.json"
    for content in (b"", b"[1]", b'{"1": [2]}', None):
        file.unlink() if content is None else file.write_bytes(content)
        made = rendered(runs)
        comparison, pictures = embedded(made)
        assert comparison["rows"][0]["values"] and not any("masks" in picture for picture in pictures.values())
        assert f"masks of the ground truth: {NAME}/masks.json is missing or damaged" in text_of(made)
    file.write_text(json.dumps({str(image): ["<no mask>"] for image in range(1, 13)}))
    assert {mask for picture in embedded(rendered(runs))[1].values() for mask in picture["masks"]} == {""}


def test_the_page_reloads_itself_only_while_a_sweep_is_under_way(full):
    states = (State("finished", "AR@100 60.1"), State("running", "step 40 of 500, 3 min left", share=0.08))
    rows = (("FPN", states), ("C4", (State("waiting", "waiting"), State("failed", "failed", NASTY))))
    progress = Progress((Board("Table 1", (2, 3), rows),), ("python -m fpn_ablate -m seed=2,3",), "now", "5 min")
    made = rendered(full, progress=progress)
    assert '<body data-reload="15">' in made and NASTY not in made
    assert '<progress value="2.080" max="4"' in made
    shown = text_of(made)
    assert (
        "2 of 4 runs done" in shown
        and "1 failed, interrupted or unhealthy" in shown
        and "step 40 of 500, 3 min left" in shown
        and "5 min left" in shown
    )
    assert "data-reload" not in re.sub(r"<script.*?</script>", "", rendered(full), flags=re.DOTALL).replace("dataset", "")


def test_a_sweep_without_a_record_has_a_page_too():
    progress = Progress((Board("Table 1", (2,), (("FPN", (State("waiting", "waiting"),)),)),), (), "now")
    assert "0 of 1 runs done" in text_of(page.render([], progress=progress))


BIG = """
import re, sys, time
from pathlib import Path
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.html import page
begun = time.monotonic()
tables = collate(load(sys.argv[1]))
made = page.render(tables)
# Not getrusage: there a child begins with what its parent had.
peak = int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(len(tables), len(made), time.monotonic() - begun, peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_a_ledger_of_2000_runs_takes_less_than_20_seconds_and_2_gib(tmp_path):
    for number in range(2000):
        group, row, seed = number // 60, list(FACTS)[number // 10 % 6], number % 10
        names = {"table": ("table1_rpn", "own")[group % 2], "recipe": f"recipe {group}", "fingerprint": f"{number:016x}"}
        folder = tmp_path / "runs" / str(number)
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(make_record(row, seed, by_size=by_size(), **names)))
    write_ledger(load(tmp_path / "runs"), tmp_path / "ledger.csv")
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", BIG, tmp_path / "ledger.csv"], capture_output=True, text=True, check=True)
    tables, size, seconds, mebibytes = map(float, done.stdout.split())
    assert tables == 34 and size < 6_000_000
    assert seconds < 20 and time.monotonic() - begun < 30
    assert mebibytes < 2048
