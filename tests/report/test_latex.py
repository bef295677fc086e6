"""The LaTeX of a table compiles, whatever its names are made of."""

import shutil
import subprocess

import pytest

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.formats.tables import latex

PDFLATEX = shutil.which("pdflatex")
LONG = "quick+backbone=mobilenet_v2+backbone.weights=mobilenetv2_coral.pth+data.invalid=clip+batch_size=4+box.steps=300"
NASTY = r"50 % of {Pk} & a_b #1 ~ ^ \ $x$ <b> |c| [d] ± … − ✓ † Δ 日本"


def compiled(text, folder):
    document = r"\documentclass{article}\usepackage{booktabs,amssymb,graphicx}\begin{document}"
    (folder / "table.tex").write_text(f"{document}\n{text}\n\\end{{document}}\n", encoding="utf-8")
    command = [PDFLATEX, "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120)
    return done.returncode, done.stdout


@pytest.mark.skipif(PDFLATEX is None, reason="pdflatex is not installed")
def test_it_compiles_with_verdicts_best_cells_notes_and_a_control(runs, put, tmp_path):
    for row, recall in (("c4", 0.3), ("fpn", 0.6)):
        for seed in range(2, 5):
            put(row, seed, metrics={"AR100": recall + 0.001 * seed}, data=NASTY, recipe=LONG)
    for seed in (5, 6, 7):
        put("fpn", seed, metrics={"AR100": 0.6 + 0.001 * seed}, data=NASTY, recipe=LONG)
    put("c5", 0, status="diverged", error=f"diverged at step 3: {NASTY}", data=NASTY, recipe=LONG)
    (table,) = collate(load(runs))
    assert table.best and table.control and any(v.verdict == "supported" for v in table.verdicts)
    text = latex(table)
    code, log = compiled(text, tmp_path)
    assert code == 0, log[-2000:]
    assert "Overfull" not in log
    assert r"\toprule" in text and r"\textbf{" in text
