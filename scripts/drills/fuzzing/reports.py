"""Bad records, definitions of tables, and names: the inputs of tables and the page."""

import csv
import io
import json
import re
import shutil
import unittest.mock
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from fuzzing.archives import bad_archive, forge_sizes
from fuzzing.checks import Lost, check_equal, check_message
from fuzzing.draw import TEXTS, Draw, mutate_bytes, mutate_tree, nesting_depth
from fuzzing.pictures import NO_PICTURES

ROWS = ("c4", "fpn", "fpn+upsample=bilinear")
METRICS = ("AR100", "AR1k", "AR1k_s")


def record(row: str, seed: int) -> dict[str, Any]:
    """Make the record of a finished run, as far as tables read it."""
    values = {name: 0.1 + 0.05 * seed + 0.1 * len(row) / (n + 9) for n, name in enumerate(METRICS)}
    return {
        **{"format": 1, "status": "finished", "error": None, "fingerprint": f"{row}-{seed}", "setting": "s"},
        "table": "table1_rpn",
        **{"recipe": "quick", "data": "shapes", "generated": True, "task": "rpn", "row": row, "seed": seed, "draws": "d"},
        "config": {"neck": {"lateral": row != "c4"}, "seed": seed, "factors": ["neck"], "recipe": {"steps": 5}},
        "verify": {"feature": "{Pk}", "anchors": 199974, "lateral": True, "top_down": True, "gflops": 1.5},
        "metrics": values,
        "objects": {"small": 11, "medium": 12, "large": 13},
        "images": {"count": 4, "digest": "1a2b"},
        "repairs": {"train": {"boxes clipped": 2}, "val": {}},
        "cost": {"pretrain_s": 12.0, "train_s": 70.0, "eval_s": 9.0, "steps": 5},
        "environment": {"device": "cpu", "evaluator": "e 1", "commit": "abc", "dirty": False, "command": "x"},
        "by_size": {"edges": [4.0, 8.0], "objects": [0, 1, 2], "AR100": [None, 0.2, 0.3]},
        "pictures": "set",
        **{"started": "2026-11-21T08:00:00+00:00", "finished": f"2026-11-21T09:0{seed}:00+00:00"},
    }  # fmt: skip


def write_run(runs: Path, row: str, seed: int, content: Any, names: Sequence[str] = ("ant", "bee")) -> Path:
    """Write the folder of a run with all files that the page reads; return the folder."""
    folder = runs / "table1_rpn" / "quick" / row / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(content))
    ids = np.arange(1, 4)
    levels = {f"level_p{k}": np.full((4, 4), 40 * k, np.uint8) for k in (2, 3)}
    np.savez(folder / "artifacts.npz", image_ids=ids, values=np.array([0.1, 0.5, 0.2]) * len(row), **levels)
    boxes = np.tile(np.array([[4.0, 6.0, 20.0, 30.0]]), (3, 1))
    np.savez(folder / "detections.npz", image_ids=ids, boxes=boxes, scores=np.array([0.9, 0.6, 0.2]))
    lines = [{"step": step, "loss": 1 / step, names[0]: 0.5} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures = runs / ".pictures" / "set"
    if not pictures.is_dir():
        pictures.mkdir(parents=True)
        for image in ids:
            Image.new("RGB", (32, 32), (90, 10 * int(image), 0)).save(pictures / f"{image}.jpg")
        Image.new("RGB", (32, 32), (255, 0, 0)).save(runs / "secret.jpg")
    images = {str(n): {"width": 32, "height": 32, "objects": [{"bbox": [4, 6, 9, 9], "category": names[n % 2]}]} for n in ids}
    (pictures / "truth.json").write_text(json.dumps({"categories": list(names), "images": images}))
    return folder


class PageTags(HTMLParser):
    """Collect the tags of a page with the names of their attributes, and check that its JSON blocks can be parsed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[tuple[str, ...]] = set()
        self._json = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add((tag, *sorted({name for name, _ in attrs})))
        self._json = tag == "script" and ("type", "application/json") in attrs

    def handle_data(self, data: str) -> None:
        if self._json:
            json.loads(data, parse_constant=float)

    def handle_endtag(self, tag: str) -> None:
        self._json = False


def check_outputs(collated: Any, allowed: set[tuple[str, ...]], width: int = 120) -> None:
    """Check that all outputs are well-formed, and that names bring no markup, command, formula or control character."""
    from rich.console import Console

    from fpn_ablate.report.formats import tables, terminal
    from fpn_ablate.report.html import page

    with unittest.mock.patch.object(page, "_vega", lambda: "0"):  # a megabyte that is always the same
        html = page.render(collated)
    if unexpected := {tag for tag in PageTags(html).tags if tag not in allowed}:
        raise Lost(f"the page has {sorted(unexpected)[:3]}")
    for table in collated:
        markdown, latex, sheet = tables.markdown(table), tables.latex(table), tables.csv_text(table)
        stream = io.StringIO()
        terminal.show(table, Console(file=stream, width=width))
        for text in (markdown, latex, stream.getvalue(), sheet, tables.claims_csv(table) if table.verdicts else "x"):
            check_plain(text)
        if match := re.search(r"<(?!br>)[a-zA-Z/!]|(?<!\\)[`\[]", markdown):
            raise Lost(f"Markdown holds {markdown[match.start() : match.end() + 40]!a}")
        lines = [line for line in markdown.splitlines() if line.startswith("|")]
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in lines[: 1 + len(table.rows)]}
        check_equal(len(widths), 1, "kinds of lines in a table of Markdown")
        bare = re.sub(r"\\[\\%&$#_{}]", "", latex.split("\n", 1)[1])
        check_equal((bare.count("{"), bare.count("$") % 2), (bare.count("}"), 0), "braces and dollars of LaTeX")
        if foreign := set(re.findall(r"\\[a-zA-Z]+", bare)) - LATEX:
            raise Lost(f"LaTeX holds {foreign}")
        for cell in (cell for line in csv.reader(io.StringIO(sheet)) for cell in line):
            if re.match(r"\s*[=+@＝＋＠－]|\s*-(?![\d.])|.*;\s*[\"']?[=+@-]", cell) and not re.match(r'"', cell):
                raise Lost(f"a formula: {cell[:80]!a}")


LATEX = {rf"\{name}" for name in (
    *("begin", "end", "centering", "footnotesize", "setlength", "tabcolsep", "caption", "allowbreak"),
    *("resizebox", "ifdim", "width", "linewidth", "else", "fi", "toprule", "midrule", "addlinespace", "textbf", "quad"),
    *("bottomrule", "par", "smallskip"),
    *("scriptsize", "textbackslash", "textasciitilde", "textasciicircum", "textless"),
    *("textgreater", "textbar", "pm", "checkmark", "Delta", "cdot", "dots", "dagger"),
)}  # fmt: skip


def check_plain(text: str) -> None:
    """Check that a text holds no control character and can be encoded."""
    if controls := {char for char in text if not char.isprintable() and char not in "\n\t"}:
        raise Lost(f"written: {sorted(map(ascii, controls))}")
    text.encode()


class Report:
    """Try an input of tables and page: it is skipped with a message, refused, or written in valid files."""

    def __init__(self, folder: Path) -> None:
        from fpn_ablate.report.collate.collate import collate
        from fpn_ablate.report.collate.records import load
        from fpn_ablate.utils.paths import EXPERIMENTS

        self.runs, self.experiments = folder / "runs", EXPERIMENTS
        self.folder = folder / "experiments"
        self.folder.mkdir()
        for row in ROWS:
            for seed in (2, 3):
                write_run(self.runs, row, seed, record(row, seed))
        other = self.runs / "own" / "quick" / "c4" / "seed2"  # a page of several tables has an overview
        other.mkdir(parents=True)
        (other / "record.json").write_text(json.dumps(record("c4", 2) | {"table": "own"}))
        from fpn_ablate.report.html import page

        with unittest.mock.patch.object(page, "_vega", lambda: "0"):
            self.allowed = PageTags(page.render(collate(load(self.runs)))).tags
        # A page has some of these only if a table has errors, notes, a best row or pictures.
        for tag, *names in list(self.allowed):
            self.allowed |= {(tag, *sorted({*names, more})) for more in ("class", "title", "colspan", "id", "tabindex")}
            self.allowed |= {(tag, *(name for name in names if name != less)) for less in ("class", "title", "colspan")}
        text = ("p", "small", "strong", "span", "i", "em", "h1", "h2", "h3", "div", "ul", "li", "br")
        for tag in (*text, "label", "select", "option"):
            self.allowed |= {(tag,), (tag, "class")}

    def collate(self, folders: Sequence[Path] = (), draw_plots: bool = False) -> str:
        """Make all outputs from the runs and the definitions in `folders`, and check them; with `draw_plots` plots too."""
        from fpn_ablate.report.collate.collate import collate
        from fpn_ablate.report.collate.records import load

        frame = load(self.runs)
        for line in frame.attrs["unreadable"]:
            check_plain(line)
        errors: list[str] = []
        collated = collate(frame, experiments=[self.experiments, *folders], errors=errors, allow_unfair=True)
        for error in errors:
            check_message(error)
        check_outputs(collated, self.allowed)
        if draw_plots:
            from fpn_ablate.report.formats import plots

            for table in collated:
                check_plain(plots.render(table)["svg"].decode())
        return "accepted" if not errors and not frame.attrs["unreadable"] else "refused"


class Records(Report):
    how = "mutated record.json, metrics.jsonl, truth.json and arrays of finished runs, through all tables and the page"

    def case(self, draw: Draw) -> str:
        folder = write_run(self.runs, ROWS[1], 2, record(ROWS[1], 2))
        if draw.random() < 0.7:
            (folder / "record.json").write_text(json.dumps(mutate_tree(draw, record(ROWS[1], 2))))
        else:
            name = draw.choice(["record.json", "metrics.jsonl", "artifacts.npz", "detections.npz", "truth.json", "1.jpg"])
            file = folder / name if (folder / name).exists() else self.runs / ".pictures" / "set" / name
            data = file.read_bytes()
            if name == "truth.json" and draw.random() < 0.7:
                data = json.dumps(mutate_tree(draw, json.loads(data))).encode()
            elif draw.random() < 0.8:
                data = mutate_bytes(draw, data)
            else:
                archives = [bad_archive(draw), forge_sizes(draw, data)]
                data = draw.choice(archives) if name.endswith("npz") else draw.choice(NO_PICTURES)
            file.write_bytes(data)
        try:
            return self.collate()
        finally:
            shutil.rmtree(self.runs / ".pictures")
            write_run(self.runs, ROWS[1], 2, record(ROWS[1], 2))


class Plans(Report):
    how = "mutated plans of sweeps, of this machine and of others, through the page and its progress"

    def case(self, draw: Draw) -> str:
        from fpn_ablate.report.collate.collate import collate
        from fpn_ablate.report.collate.records import load
        from fpn_ablate.report.html import page
        from fpn_ablate.report.html.progress import progress
        from fpn_ablate.store import plan

        planned = [plan.PlannedRun("table1_rpn", "quick", "shapes", row, 2, 5) for row in ROWS]
        file = plan.write_plan(self.runs, planned, "code")
        text = file.read_bytes()
        if draw.random() < 0.3:
            file.write_bytes(mutate_bytes(draw, text))
        else:
            content = json.loads(text)
            content["started"] = draw.choice(["2999-01-01T00:00:00+00:00", "2026-11-21T08:00:00", content["started"]])
            file.write_text(json.dumps(mutate_tree(draw, content)))
        frame = load(self.runs)
        try:
            plans = plan.active_plans(self.runs)
            plan.active_plans(self.runs, this_host=True)
            tables = collate(frame)
            with unittest.mock.patch.object(page, "_vega", lambda: "0"):
                html = page.render(tables, progress=progress(plans, self.runs, frame.to_dict("records"), tables))
            check_plain(html)
            return "accepted" if plans else "refused"
        finally:
            plan.remove_plan(self.runs)


class Links(Report):
    how = "symbolic links in the place of files and folders of a run, to files elsewhere: these stay as they are"

    def case(self, draw: Draw) -> str:
        from fpn_ablate.report.html import live, page

        elsewhere = self.runs.parent / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        text = draw.choice([json.dumps(record(ROWS[1], 2)), "mine", ""])
        target = elsewhere / draw.choice(["record.json", "notes.txt", "there"])
        target.write_text(text)
        run = self.runs / "table1_rpn" / "quick" / ROWS[1] / "seed2"
        out = self.runs.parent
        places = [run / name for name in ("record.json", "metrics.jsonl", "artifacts.npz", "detections.npz", "resampled.npz")]
        place = draw.choice([*places, run, run.parent, self.runs / ".pictures" / "set" / "1.jpg", out / "report.html"])
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        place.symlink_to(draw.choice([target, target, elsewhere, elsewhere / "nowhere", place]))
        try:
            ending = self.collate()
            with unittest.mock.patch.object(page, "_vega", lambda: "0"):
                live.write(self.runs, out)
            return ending
        finally:
            check_equal({f.name: f.read_text() for f in elsewhere.iterdir()}, {target.name: text}, "files elsewhere")
            shutil.rmtree(elsewhere)
            place.unlink(missing_ok=True)
            shutil.rmtree(self.runs / ".pictures")
            write_run(self.runs, ROWS[1], 2, record(ROWS[1], 2))
            write_run(self.runs, ROWS[1], 3, record(ROWS[1], 3))


class Names(Report):
    how = (
        "hostile names of rows, tables, recipes, data, classes, errors, devices: in HTML, LaTeX, CSV, Markdown, terminal, plots"
    )

    def case(self, draw: Draw) -> str:
        names = [text for text in TEXTS if text.strip()]
        content = record(ROWS[1], 2)
        for key in draw.sample(
            ["row", "table", "recipe", "data", "setting", "fingerprint", "error", "draws", "task"], draw.choice([1, 2, 3])
        ):
            content[key] = draw.choice(names)
        content["environment"][draw.choice(["device", "commit", "command", "evaluator"])] = draw.choice(names)
        content["verify"]["feature"] = draw.choice(names)
        content["metrics"][draw.choice(names)] = 0.5
        content["status"] = draw.choice(["finished", "finished", "failed", "diverged"])
        write_run(self.runs, ROWS[1], 2, content, (draw.choice(TEXTS), draw.choice(TEXTS)))
        return self.collate(draw_plots=draw.random() < 0.2)  # a second each


class Tables(Report):
    how = (
        "mutated definitions of tables and claims (YAML: types, keys, nesting, aliases, bytes), with the records that they read"
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.texts = {name: (self.experiments / f"{name}.yaml").read_text() for name in ("table1_rpn", "claims")}

    def case(self, draw: Draw) -> str:
        name = draw.choice(list(self.texts))
        text = self.texts[name]
        if draw.random() < 0.7:
            content = yaml.safe_load(text)
            part = content["report"] if "report" in content and draw.random() < 0.8 else content
            part = mutate_tree(draw, part)
            content = content | {"report": part} if "report" in content and part is not content else part
            data = (yaml.safe_dump(content) if nesting_depth(content) < 100 else json.dumps(content)).encode(
                "utf-8", "surrogatepass"
            )
        elif draw.random() < 0.7:
            data = mutate_bytes(draw, text.encode())
        else:
            odd_texts = ["a: &a [*a]", "a: !!python/object/apply:os.system ['x']", "a: 2026-13-45", "a: 0x", "[" * 3000,
                       "{" * 3000, "a: !!int x",
                       "? {a: [1]}\n: 2", "\0", "a: !!binary x", "- 1", "a: !!timestamp x", "%YAML 9", "a: b: c",
                       "<<: 1", yaml_bomb()]  # fmt: skip
            data = draw.choice([*odd_texts, text + "\n" + draw.choice(odd_texts)]).encode()
        (self.folder / f"{name}.yaml").write_bytes(data)
        try:
            return self.collate([self.folder])
        finally:
            (self.folder / f"{name}.yaml").unlink()


def yaml_bomb() -> str:
    """Make a text of aliases of aliases: a few lines that stand for 9^9 entries."""
    lines = ["table: table1_rpn", "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return "\n".join([*lines, "report: {title: x, facts: *a8, metrics: [], notes: *a8}"])
