"""The pages in a real browser: drawn, quiet, without requests, and no wider than a phone."""

from __future__ import annotations

import numpy as np
import pytest
from browser import BINARY, Browser
from PIL import Image
from test_see_logged import runs

from mllm.eval import compare, seen
from mllm.eval.inspection import Heat, Inspection
from mllm.eval.report import Flip, Report, Row, render
from mllm.tokens import Layout

pytestmark = pytest.mark.skipif(
    not BINARY, reason="no Chromium here: apt-get install chromium, or another one on the path"
)

PICTURE = Image.linear_gradient("L").convert("RGB")
TASKS = ("exist", "a_task_with_quite_a_long_name", "color", "needle", "chart_max")


def report_page() -> str:
    def row(name, budget, right, **more):
        tasks = {task: (right - i, 100) for i, task in enumerate(TASKS)}
        return Row(name, f"{name}:keep={budget}", budget, float(budget or 576), 1e10, 0.05, tasks,
                   kv_bytes=1024 * right**2, verdict="better than random",
                   **more)  # fmt: skip

    methods = ("visionzip", "visionzip+fastv:layer=2", "divprune")
    rows = [row("unpatched", None, 95)]
    for budget in (192, 64, 16):
        rows.append(row("random", budget, 20 + budget // 4, sanity=True))
        rows += [row(name, budget, 60 + budget // 10 + i) for i, name in enumerate(methods)]
    said = [("no", ["visionzip at 64, 16", "random at 16"])]
    shots = [("", PICTURE), ("visionzip at 64. Entering the LLM: 64 of 576", PICTURE)]
    flips = [Flip(shots, "exist", "is there a cat?", "yes", "yes", said)]
    facts = [("versions", "torch 2.13, transformers 5.23"), ("weights", "9fecf92dc581" * 4)]
    return render(Report("Yardstick", ["Lead."], facts, rows, lost=flips, gallery="1 of 1."))


def compare_page() -> str:
    made = compare.build(*runs(0.1), ("old", "new"))
    flips = [Flip([("", PICTURE)], "ocr", "what?", "a", "✓ a", [("✗ b", ["visionzip"])], "old")]
    return compare.render(compare.Page(made, [("old", "x"), ("new", "y")], flips, [], "1 of 1."))


def inspect_page() -> str:
    """Two pictures of 24 tokens: 12 enter the LLM, others are merged; 6 reach the last layer."""
    kept, last = np.arange(0, 48, 4), np.arange(0, 48, 8)
    into = np.arange(48) // 4 * 4
    layers = [kept, kept, last, last]
    ledger = {
        "visual_tokens": [48], "kept_llm": [12], "visual_avg": [9.0], "prefill_flops": [4e9],
        "baseline_prefill_flops": [9e9], "vision_flops": [1e9], "selection_flops": [1e6],
        "kv_bytes": 1 << 20, "baseline_kv_bytes": 1 << 21, "notes": ["a note"],
        "layers": [{"layer": i, "tokens": [len(k) + 9], "visual": [len(k)]}
                   for i, k in enumerate(layers)],
    }  # fmt: skip
    steps = [seen.Step(None, kept, None, into), seen.Step(2, last, kept, None)]
    values = np.where(np.isin(np.arange(48), kept), np.arange(48), np.nan).astype(np.float32)
    heat = [Heat("fastv", "attention of the last prompt token in decoder layer 1", 2, values)]
    return Inspection(
        "what is </script> here?", "visionzip:keep=6+fastv:layer=2:keep=3", "yes", "no",
        seen.views([Layout(((4, 6),))] * 2), [PICTURE] * 2, steps, layers, heat,
        [("fastv", "rows", heat[0].what)], ledger,
    ).html()  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for make in (report_page, compare_page, inspect_page):
        (folder / f"{make.__name__}.html").write_text(make(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["report_page", "compare_page", "inspect_page"])
def test_a_page_is_quiet_and_fits_a_phone(browser, pages, name, dark):
    page = browser.open(pages / f"{name}.html", 390, dark=dark)
    assert page.errors == [] and page.requests == []
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide == page.evaluate("window.innerWidth") == 390
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


VISIBLE = """[...document.querySelectorAll("figure.plot")].filter(f => f.checkVisibility())
    .map(f => [f.querySelector("svg").getBoundingClientRect().width,
               f.querySelectorAll(".mark").length,
               getComputedStyle(f.querySelector(".line")).stroke])"""


def test_plots_are_visible_and_marks_tell_their_figures(browser, pages):
    page = browser.open(pages / "report_page.html", 1200)
    plots = page.evaluate(VISIBLE)
    assert len(plots) == 4  # tokens, FLOPs, KV cache, time; the tasks' own are folded
    for width, marks, stroke in plots:
        assert width > 300 and marks == 13 and stroke.startswith("rgb")
    page.evaluate("""(() => {
        const mark = document.querySelector('.series[data-name="divprune"] .dot');
        mark.scrollIntoView();
        const box = mark.getBoundingClientRect();
        mark.dispatchEvent(new MouseEvent("click", {bubbles: true,
            clientX: box.x + box.width / 2, clientY: box.y + box.height / 2}));
    })()""")
    assert page.evaluate('document.querySelector(".said").textContent').startswith("divprune at 16")
    page.evaluate("""document.querySelector('.legend [data-name="visionzip"]').click()""")
    shown = """[...document.querySelector("figure.plot").querySelectorAll(".series")].filter(
        s => getComputedStyle(s).opacity === "1").map(s => s.dataset.name)"""
    assert page.evaluate(shown) == ["visionzip"]
    assert page.errors == []


def test_tables_show_one_budget_and_sort(browser, pages):
    page = browser.open(pages / "report_page.html", 1200)
    shown = """[...document.querySelectorAll("table.heat tbody")].filter(b => b.checkVisibility())
        .map(b => b.dataset.budget)"""
    assert page.evaluate(shown) == ["None", "192", "64", "16"]
    page.evaluate("""document.querySelector('.budgets [data-budget="64"]').click()""")
    assert page.evaluate(shown) == ["None", "64"]
    page.evaluate('document.querySelectorAll("table.heat thead button")[1].click()')
    names = """[...document.querySelectorAll('table.heat tbody[data-budget="64"] th[scope=row]')]
        .map(h => h.firstChild.textContent)"""
    assert page.evaluate(names) == ["divprune", "visionzip+fastv:layer=2", "visionzip", "random"]
    # Largest first, from 4,624 KiB down to 1,296: a comma is no end of a number.
    results = 'table[aria-describedby="about"]'
    page.evaluate(f"document.querySelectorAll('{results} thead button')[6].click()")
    kept = f"""[...document.querySelectorAll('{results} tbody[data-budget="64"] tr:not(.group)')]
        .map(row => row.cells[6].textContent)"""
    assert page.evaluate(kept) == ["4,624", "4,489", "4,356", "1,296"]
    assert page.errors == []


def test_inspect_draws_every_layer(browser, pages):
    page = browser.open(pages / "inspect_page.html", 390)
    where = 'document.getElementById("where").textContent'
    assert page.evaluate(where) == "Entering the language model: 12 of 48 visual tokens"
    dark = """[...document.querySelectorAll("canvas")].map(c => {
        const p = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        let sum = 0;
        for (let i = 3; i < p.length; i += 4) sum += p[i];
        return sum / p.length * 4;
    })"""
    at_llm = page.evaluate(dark)
    slide = """(k => { const s = document.getElementById("stop"); s.value = k;
        s.dispatchEvent(new Event("input")); })"""
    page.evaluate(f"{slide}(4)")
    assert page.evaluate(where) == "Entering decoder layer 2: 6 of 48 visual tokens"
    assert all(x > y > 0 for x, y in zip(page.evaluate(dark), at_llm, strict=True))
    page.evaluate(f"{slide}(0)")
    assert page.evaluate(dark) == [0, 0]
    page.evaluate('document.querySelectorAll("#heats button")[1].click()')
    assert "last prompt token" in page.evaluate(where)
    page.evaluate("""(() => {
        const box = document.querySelector(".view img").getBoundingClientRect();
        document.querySelector(".view canvas").dispatchEvent(new MouseEvent("click",
            {bubbles: true, clientX: box.x + box.width * 5.5 / 6, clientY: box.y + 2}));
    })()""")
    said = page.evaluate('document.getElementById("said").textContent')
    assert said == "Row 1, column 6: merged before the language model."
    assert page.errors == []
