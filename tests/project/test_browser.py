"""The page in a headless Chromium: what a reader's clicks and keys do, and that nothing goes wrong or over a network."""

import json

import pytest
from artifact_files import NAME, by_size, leave
from browser import CHROMIUM, Browser
from records import make_record

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.html import page
from fpn_ablate.report.html.progress import Board, Progress, State

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page of three rows, of which one has no seed, with everything on it."""
    runs = tmp_path_factory.mktemp("page") / "runs"
    for row, strength in (("c4", 0.2), ("fpn", 0.9)):
        for seed in (2, 3):
            metrics = {"AR100": strength + seed / 100}
            folder = runs / "table1_rpn" / "quick" / row / f"seed{seed}"
            folder.mkdir(parents=True)
            many = f"quick+{'recipe.roi.proposals=' * 15}"  # as settings are many that the command line adds
            record = make_record(row, seed, metrics=metrics, by_size=by_size(strength / 2), pictures=NAME, recipe=many)
            (folder / "record.json").write_text(json.dumps(record))
            leave(folder, strength, masks=row == "fpn")
    tables = collate(load(runs))
    file = runs.parent / "report.html"
    file.write_text(page.render(tables), encoding="utf-8")
    board = Board("Table 1", (2,), (("FPN", (State("running", "step 2 of 9", share=0.2),)),))
    (runs.parent / "live.html").write_text(page.render(tables, progress=Progress((board,), (), "now")), encoding="utf-8")
    return file


@pytest.fixture
def browser(made):
    with Browser() as found:
        found.open(made)
        found.wait("figures.length === 8 && figures.every((figure) => figure.view)")
        yield found
        assert found.problems == []
        asked = [address for address in found.requests if not address.startswith(("data:", "file:", "blob:"))]
        assert asked == []


def change(browser, selector, value):
    """Choose or type a value, as a reader does."""
    browser.run(
        f"(() => {{ const field = document.querySelector('{selector}'); field.value = '{value}';"
        " ['input', 'change'].forEach((kind) => field.dispatchEvent(new Event(kind))) })()"
    )


def first_rows(browser):
    return browser.run("[...document.querySelectorAll('.results tbody tr.ours th')].map((th) => th.textContent)")


def test_sorting_filtering_and_themes(browser):
    """One browser for all: it takes a second to start."""
    press_sorts_the_table(browser)
    the_gallery_is_filtered(browser)
    the_theme_is_the_systems(browser)
    a_legend_sets_a_row_off(browser)
    a_choice_redraws_a_chart(browser)
    figures_are_a_table(browser)
    tables_and_charts_are_downloads(browser)
    runs_are_searched_and_compared(browser)
    the_pyramid_shows_two_rows(browser)
    a_telephone_shows_metrics_first(browser)
    the_page_is_never_wider_than_the_window(browser)


def press_sorts_the_table(browser):
    names = first_rows(browser)
    column = "[...document.querySelectorAll('.results thead th')].find((th) => th.textContent === 'AR@100')"
    browser.run(f"{column}.querySelector('button').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13)
    assert browser.run(f"{column}.getAttribute('aria-sort')") == "descending"
    assert [name[:3] for name in first_rows(browser)[:2]] == ["(c)", "(a)"], "what is not run stands last"
    below = "document.querySelector('.results tbody').rows[1].textContent"
    assert "44.0" in browser.run(below), "the paper's line moves with its row"
    browser.run(f"{column}.querySelector('button').click()")
    assert [name[:3] for name in first_rows(browser)[:2]] == ["(a)", "(c)"]
    browser.run(f"{column}.querySelector('button').click()")
    assert first_rows(browser) == names
    assert browser.run(f"{column}.getAttribute('aria-sort')") == "none"


def the_gallery_is_filtered(browser):
    cards = "document.querySelectorAll('.card p').length"
    differences = "[...document.querySelectorAll('.card p')].map((p) => Number(p.textContent.split('A − B: ')[1]))"
    browser.run("document.querySelector('[data-more]').click()")
    assert browser.run(cards) == 12
    browser.run("document.querySelector('[data-filter=a]').click()")
    won = browser.run(differences)
    assert len(won) == 6 and all(value > 0 for value in won)
    browser.run("document.querySelector('[data-filter=b]').click()")
    assert all(value < 0 for value in browser.run(differences))
    for kind in (".predicted", "path.mask", "path.true", "rect.true"):  # one row has masks
        assert browser.run(f"document.querySelectorAll('.card {kind}').length") > 0
    assert browser.run("getComputedStyle(document.querySelector('path.mask')).fillOpacity") == "0.35"
    assert browser.run("document.querySelectorAll('.sheet path.object').length") == 12


def the_theme_is_the_systems(browser):
    """Charts too: their colours are the page's variables."""
    style = "getComputedStyle(element)"
    elements = "[document.body, document.querySelector('.chart svg text')]"
    colours = f"{elements}.map((element) => {style}.backgroundColor + {style}.fill)"
    seen = []
    for scheme in ("light", "dark"):
        browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        seen.append(browser.run(colours))
    assert all(light != dark for light, dark in zip(*seen, strict=True))


def a_legend_sets_a_row_off(browser):
    browser.run("document.querySelector('.legend [data-row=r2]').click()")
    assert browser.run("figures[0].view.signal('highlight')") == "r2"
    browser.run("document.querySelector('.legend [data-row=r2]').click()")
    assert browser.run("figures[0].view.signal('highlight')") == ""


def a_choice_redraws_a_chart(browser):
    figure = "document.querySelector('.chart.curves')"
    assert browser.run(f"{figure}.view.signal('choice')") == "rpn_class"
    assert browser.run(f"{figure}.querySelectorAll('svg path').length") > 4


def figures_are_a_table(browser):
    details = "document.querySelector('.chart.recall .values')"
    browser.run(f"{details}.open = true")
    browser.wait(f"{details}.querySelectorAll('tbody tr').length === 20")


def tables_and_charts_are_downloads(browser):
    """What would be saved; a headless browser has no folder for it."""
    browser.run("window.saved = []; download = (...file) => window.saved.push(file)")
    browser.run("document.querySelectorAll('.table-section .save').forEach((button) => button.click())")
    browser.wait("window.saved.length === 18")  # 8 charts as SVG and CSV, the results, the claims
    saved = {name: text for name, _, text in browser.run("window.saved")}
    results = next(text for name, text in saved.items() if name.endswith("-results.csv")).splitlines()
    assert results[0].startswith('"row","feature"') and any(line.startswith('"(c) FPN","{Pk}"') for line in results)
    assert len({line.count('","') for line in results}) == 1, "a state spans its columns"
    name, svg = next((name, text) for name, text in saved.items() if name.endswith("-recall.svg"))
    assert name.startswith("table1_rpn-shapes-quick") and svg.startswith("<svg") and "var(--" not in svg and "rgb(" in svg
    assert browser.run("csv([['=1', '-a', '-1.5 ± 2', 'a \"b\"']])") == '"\'=1","\'-a","-1.5 ± 2","a ""b"""\r\n'


def runs_are_searched_and_compared(browser):
    shown = "document.querySelector('#runs output').textContent"
    for words, count in (
        ("fpn", 2),
        ("fpn seed:2", 1),
        ("-fpn", 2),
        ("row:c4 seed:3 state:finished", 1),
        ("nothing", 0),
        ("", 4),
    ):
        change(browser, "[data-search]", words)
        assert browser.run(shown) == f"{count} of 4 runs", words
    for number in (0, 1, 3):  # of three ticks the last two count
        browser.run(f"document.querySelectorAll('#runs input[type=checkbox]')[{number}].click()")
    difference = (
        "[...document.querySelectorAll('[data-difference] tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    assert browser.run(difference) == [
        ["key", "c4, seed 3", "fpn, seed 3"],
        ["neck.lateral", "false", "true"],
        ["neck.top_down", "false", "true"],
    ]
    browser.run("document.querySelector('[data-runs]').click()")
    assert browser.run(shown) == "4 of 4 runs"


def the_pyramid_shows_two_rows(browser):
    names = "[...document.querySelectorAll('.pyramid .levels > p')].map((p) => p.textContent)"
    maps = "[...document.querySelectorAll('.pyramid canvas')].map((map) => map.getAttribute('aria-label'))"
    assert browser.run(names) == ["(a) baseline on conv4", "+ top-down", "(c) FPN", "+ top-down", "A − B (red: A is stronger)"]
    assert len(browser.run(maps)) == 4 + 1 + 4 + 1 + 4
    empty = "Object.assign(document.createElement('canvas'), {width: map.width, height: map.height}).toDataURL()"
    browser.wait(f"[...document.querySelectorAll('.pyramid canvas')].every((map) => map.toDataURL() !== {empty})")
    assert browser.run("document.querySelectorAll('.pyramid rect.level').length") == 4
    change(browser, "[data-image]", 1)
    assert browser.run("document.querySelectorAll('.pyramid rect.unfound').length") == 2
    change(browser, ".pyramid [data-b]", 0)
    assert browser.run(names) == ["(a) baseline on conv4", "+ top-down"]


def a_telephone_shows_metrics_first(browser):
    browser.size(390, 800)
    seen = (
        "[...document.querySelectorAll('.results thead th')].filter((th) => th.offsetWidth).map((th) => th.textContent.trim())"
    )
    assert browser.run(seen)[:2] == ["row", "AR@100"]
    browser.run("document.querySelector('[data-toggle]').click()")
    assert browser.run(seen)[:2] == ["row", "feature"]
    browser.run("document.querySelector('[data-toggle]').click()")
    tops = "['.verdict', 'th'].map((part) => document.querySelector('.verdicts tbody ' + part).getBoundingClientRect().top)"
    verdict, claim = browser.run(tops)
    assert verdict < claim


def the_page_is_never_wider_than_the_window(browser):
    for width in (390, 768, 1400):
        browser.size(width, 800)
        browser.run("new Promise((done) => setTimeout(done, 100))")
        assert browser.run("document.documentElement.scrollWidth") <= width
        beyond = "[...document.querySelectorAll('.scroll:has(> table)')].map((place) => "
        beyond += "place.scrollWidth - Math.max(place.clientWidth, place.firstElementChild.offsetWidth))"
        assert set(browser.run(beyond)) == {0}, "nothing sticks out of a table, so that no scroll bar is there for an arrow"


def test_tables_of_one_name_are_told_apart_on_a_telephone(tmp_path):
    for recipe, data in (("quick", "shapes"), ("smoke", "shapes"), (f"finetune+backbone.weights={'x' * 40}.pth", "photos")):
        for row in ("c4", "fpn"):
            folder = tmp_path / "runs" / "table1_rpn" / recipe / row / "seed2"
            folder.mkdir(parents=True)
            record = make_record(row, 2, recipe=recipe, data=data, generated=data == "shapes")
            (folder / "record.json").write_text(json.dumps(record))
    file = tmp_path / "report.html"
    file.write_text(page.render(collate(load(tmp_path / "runs"))), encoding="utf-8")
    with Browser(390, 800) as browser:
        browser.open(file)
        names = browser.run("[...document.querySelectorAll('nav li')].map((item) => item.innerText)")
        assert len(names) == len(set(names)) == 4
        chips = browser.run("[...document.querySelectorAll('.chip')].map((chip) => chip.getClientRects()[0].height)")
        assert len(chips) == 6 and max(chips) < 25, "a line each"
        overview = "document.querySelector('.overview .scroll')"
        assert browser.run(f"{overview}.scrollWidth") == browser.run(f"{overview}.clientWidth")
        assert browser.run("document.documentElement.scrollWidth") <= 390


def test_a_page_that_reloads_stands_where_it_stood(made):
    file = made.with_name("live.html")
    text, reloaded = file.read_text(encoding="utf-8"), "window.before === undefined && document.readyState === 'complete'"
    place = "document.querySelector('.pyramid').getBoundingClientRect().top"
    with Browser() as browser:
        browser.open(file)
        browser.wait("figures.every((figure) => figure.view)")
        browser.run("document.querySelector('[data-search]').value = 'fpn'; document.querySelector('.values').open = true")
        browser.run("document.querySelector('.results thead button').click()")
        names = first_rows(browser)
        browser.run("document.querySelector('[data-filter=b]').click()")
        browser.run("document.querySelector('.pyramid').scrollIntoView({behavior: 'instant'})")
        browser.run("scrollBy({top: 30, behavior: 'instant'})")
        before = browser.run(place)
        precision = "document.querySelector('.chart.precision [data-choice]').value"
        browser.run(f"{precision} = 'IoU .75'")
        more = "<h2>Running sweep</h2>" + "<p>a line</p>" * 20  # as of a sweep that goes on, above what the reader looks at
        longer = text.replace("<option>IoU .50</option>", "<option>IoU .25</option><option>IoU .50</option>")
        file.write_text(longer.replace("<h2>Running sweep</h2>", more), encoding="utf-8")
        browser.run("window.before = true; void setTimeout(reload)")
        browser.wait(reloaded)
        assert browser.run(place) == pytest.approx(before, abs=2)
        browser.wait("figures.every((figure) => figure.view)")
        assert browser.run(place) == pytest.approx(before, abs=2), "charts that are drawn later move nothing"
        assert browser.run("document.querySelector('.values').open")
        assert browser.run("document.querySelector('#runs output').textContent") == "2 of 4 runs"
        assert browser.run("document.querySelector('[data-filter=b]').getAttribute('aria-pressed')") == "true"
        assert browser.run(precision) == "IoU .75", "what was chosen, though a choice was added before it"
        assert first_rows(browser) == names
        assert browser.problems == []


ATTACKS = {
    "an element of script": "<script>window.hurt = 'script'</script>",
    "an attribute": '<img src="data:," onerror="window.hurt = \'attribute\'">',
    "an address": "<a id=bad href=\"javascript:window.hurt = 'address'\">x</a>",
    "a style": "<style>body { outline: 7px solid red }</style>",
    "a file": '<script src="bad.js"></script><link rel=stylesheet href="bad.css"><iframe src="bad.html"></iframe>',
    "a picture from a network": '<img src="http://127.0.0.1:9/x.png">',
    "a form": '<form id=form action="http://127.0.0.1:9/"><input name=a></form>',
    "a base": '<base href="http://127.0.0.1:9/">',
}


def test_the_policy_holds_though_the_escapes_did_not(made, tmp_path):
    """What would be on the page if a name could bring its own markup does nothing, and the page itself works."""
    style = "body { outline: 7px solid red }"
    for name, content in (("js", "window.hurt = 'file'"), ("css", style), ("html", "x")):
        (tmp_path / f"bad.{name}").write_text(content)
    text = made.read_text(encoding="utf-8")
    (tmp_path / "bad.html.html").write_text(text.replace("<main", "".join(ATTACKS.values()) + "<main", 1), encoding="utf-8")
    with Browser() as browser:
        browser.open(tmp_path / "bad.html.html")
        browser.wait("figures.every((figure) => figure.view)")
        browser.run("document.getElementById('bad').click(); document.getElementById('form').requestSubmit()")
        assert browser.run("location.href").endswith("bad.html.html")
        added = "const s = document.createElement('script'); s.textContent = 'window.hurt = 1'; document.body.append(s)"
        browser.run(f"(() => {{ {added} }})()")
        fetched = "fetch('http://127.0.0.1:9/').then(() => 'got', () => 'refused')"
        assert browser.run(fetched) == "refused"
        browser.run("new Promise((done) => setTimeout(done, 200))")
        assert browser.run("window.hurt") is None
        assert browser.run("getComputedStyle(document.body).outlineStyle") == "none"
        assert browser.run("document.baseURI").startswith("file:")
        refused = " ".join(browser.problems)
        for directive in ("script-src ", "style-src ", "img-src ", "default-src ", "form-action ", "base-uri "):
            assert directive in refused, directive


def test_a_text_cannot_become_a_script(made):
    """What the page's scripts themselves do is bound too: charts are drawn without compiling a text."""
    with Browser() as browser:
        browser.open(made)
        browser.wait("figures.every((figure) => figure.view)")
        compiled = "(() => { try { return new Function('return 1')() } catch (error) { return error.name } })()"
        answer = browser.send("Runtime.evaluate", expression=compiled, allowUnsafeEvalBlockedByCSP=False, returnByValue=True)
        assert answer["result"]["value"] == "EvalError"
