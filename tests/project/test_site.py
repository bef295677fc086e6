"""The documentation as a site: its hooks, its reference of keys, and that it builds without a warning and needs no network."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from documents import ROOT

pytestmark = pytest.mark.skipif(find_spec("mkdocs") is None, reason='mkdocs is not installed: pip install "fpn-ablate[docs]"')


@pytest.fixture(scope="module")
def docs():
    """The modules of docs/."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import hooks
        import reference
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return hooks, reference


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "docs" / "mkdocs.yml", "-d", folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_links_into_the_repository_become_links_of_the_site(docs):
    hooks, _ = docs
    text = "[a](../../../conf/neck/fpn.yaml) [b](../../../results/README.md#speed) [`c`](../tables.md) `[d](x.md)` [e](#here)"
    text += " [f](../../../conf)"
    made = hooks.rewrite_links(text, "tutorials/coco.md")
    assert made == "[a](../files/conf/neck/fpn.yaml.txt) [b](../results.md#speed) [`c`](../tables.md) `[d](x.md)` [e](#here) f"
    assert (
        hooks.rewrite_links("[a](docs/pages/tables.md#x) [b](http://x.org)", "index.md") == "[a](tables.md#x) [b](http://x.org)"
    )


def test_every_key_has_a_default_and_says_what_it_accepts(docs):
    _, reference = docs
    text = reference.switches()
    assert "| `neck.upsample` | `nearest` | `nearest` \\| `bilinear` \\| `deconv` \\| `carafe` |" in text
    assert "| `recipe.optimizer.lr` | `2.0e-3` | number > 0 |" in text
    rows = re.findall(r"^\| `([\w.]+)` \|((?:[^|]|\\\|)*)\|((?:[^|]|\\\|)*)\|((?:[^|]|\\\|)*)\|$", text, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `", text, re.MULTILINE)) > 250
    assert not [key for key, default, accepts, note in rows if not (default.strip() and accepts.strip()) and not note.strip()]


def test_the_reference_has_every_row_table_and_recipe(docs):
    _, reference = docs
    assert len(reference.rows().splitlines()) - 2 == len(list((ROOT / "conf" / "ablation").rglob("*.yaml")))
    assert len(reference.tables().splitlines()) - 2 == len(list((ROOT / "experiments").glob("*.yaml"))) - 1  # claims.yaml
    assert reference.recipes().splitlines()[0].count("`") == 2 * len(list((ROOT / "conf" / "recipe").glob("*.yaml")))
    for table in (reference.rows(), reference.tables(), reference.recipes()):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_the_verdicts_are_those_of_the_committed_tables(docs):
    _, reference = docs
    results = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in reference.verdicts().splitlines()[2:]]
    assert len(lines) > 20
    for _, claim, _, ours, _, verdict, p in lines:
        pattern = rf"^\| {re.escape(claim)} \(.*\| {re.escape(ours)} \|.*\| {verdict}[;|\s].*\| {re.escape(p.rstrip(' |'))} \|$"
        assert re.search(pattern, results, re.MULTILINE), claim


def test_the_recipes_page_names_every_recipe():
    text, *_ = (ROOT / "docs" / "pages" / "recipes.md").read_text(encoding="utf-8").partition("<!-- generated")
    named = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    assert named == {file.stem for file in (ROOT / "conf" / "recipe").glob("*.yaml")}


def test_pages_hold_the_tables_that_the_files_give(docs):
    _, reference = docs
    for page in reference.FILLED:
        text = page.read_text(encoding="utf-8")
        assert reference.filled(text) == text, f"{page} is of earlier files: python docs/reference.py"


@pytest.mark.slow  # .ci/run builds the site, too
def test_the_site_builds_without_a_warning_and_needs_no_network(site):
    pages = list(site.rglob("*.html"))
    assert {"index.html", "results.html", "switches.html", "api.html", "changelog.html"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\s\">]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|icon|preconnect)\"?[^>]*href=\"?([^\s\">]+)", text)
        assert not [target for target in loaded if "//" in target and not target.startswith("data:")], page
    assert (site / "files" / "conf" / "recipe" / "paper2017.yaml.txt").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.slow
def test_the_search_works_from_a_disk_and_asks_no_network(site):
    query = "const box = document.querySelector('.md-search__input'); box.focus(); box.value = 'carafe'"
    with Browser() as browser:
        browser.open(site / "switches.html")
        browser.run("document.querySelector('[data-md-toggle=search]').click()")
        browser.run(f"(() => {{ {query}; box.dispatchEvent(new KeyboardEvent('keyup', {{bubbles: true}})) }})()")
        browser.wait("document.querySelectorAll('.md-search-result__item').length > 1")
        assert browser.problems == []
        assert not [address for address in browser.requests if not address.startswith(("file:", "data:", "blob:"))]
