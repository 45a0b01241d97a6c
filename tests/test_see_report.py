"""The HTML report: complete, escaped, well-formed, and without anything from outside."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from mllm.errors import DataError
from mllm.eval import plots, report
from mllm.eval.report import Flip, Overlay, Report, Row, Training

VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}
NASTY = '<script>alert("x")</script> & "quotes"'


def row(name, budget, right, **more):
    values = {"visual_avg": float(budget or 576), "flops": 1e9, "prefill_s": 0.05} | more
    spec = f"{name}:keep={budget}" if budget else ""
    return Row(name, spec, budget, tasks={"exist": (right, 12), NASTY: (right, 12)}, **values)


@pytest.fixture
def page() -> str:
    image = Image.new("RGB", (40, 40), "#804020")
    rows = [
        row("unpatched", None, 12),
        *(row("random", b, 6, sanity=True, flipped=3) for b in (64, 16)),
        *(row("visionzip", b, 11, flipped=1) for b in (64, 16)),
        Row("fastv", "", 16, note="cannot be reached"),
    ]
    said = [("no", ["random @ 16", "random @ 64"])]
    flips = [Flip([("", image)], "exist", NASTY, "yes", "yes", said)]
    return report.render(
        Report(
            f"Demo {NASTY}",
            ["Lead."],
            [("model", NASTY)],
            rows,
            [Overlay("Is there a cat?", "no", [("kept", image)])],
            flips,
            [],
            Training("Fine-tuning", "Ten steps.", [(1, 2.0), (2, 1.5)]),
        )
    )


class Reader(HTMLParser):
    """Checks nesting, and collects tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.seen, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def reader(page) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def test_html_is_balanced_and_has_one_script_of_its_own(reader):
    assert reader.open == []
    assert not {"iframe", "object"} & set(reader.seen) and reader.seen.count("script") == 1


def test_nothing_is_fetched(page, reader):
    assert not re.search(r"https?://|@import|url\(", page)
    links = [value for name, value in reader.attributes if name in ("src", "href", "srcset")]
    assert links and all(value.startswith("data:") for value in links)


def test_text_from_outside_is_escaped(page, reader):
    assert page.count("<script") == 1 and "<script>alert" not in page
    assert any(NASTY in text for text in reader.text)


def test_every_row_every_flip_and_the_note_are_there(page):
    for wanted in ("random:keep=16", "visionzip:keep=64", "cannot be reached", "random @ 64"):
        assert wanted in page
    assert page.count('<span class="chip">sanity</span>') == 2 * 2  # heat map and table
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_every_plot_is_well_formed_and_inside_its_frame(page):
    plots = re.findall(r"<svg.*?</svg>", page, re.S)
    # tokens, FLOPs, time, one per task, loss; and a legend entry for each plan with results
    assert len(plots) == 3 + 2 + 1 + 2
    for plot in plots:
        tree = ElementTree.fromstring(plot)
        _, _, width, height = map(float, tree.get("viewBox").split())
        for circle in tree.iter("circle"):
            assert 0 <= float(circle.get("cx")) <= width
            assert 0 <= float(circle.get("cy")) <= height


def test_time_is_left_out_where_it_was_not_measured():
    rows = [row("unpatched", None, 12, prefill_s=None), row("random", 64, 6, prefill_s=None)]
    page = report.render(Report("t", [], [], rows))
    assert "first token, ms" not in page and "Measured prefill" not in page


def test_statistics_are_shown_where_they_are_known():
    rows = [row("unpatched", None, 12), row("random", 64, 6)]
    page = report.render(Report("t", [], [], rows))
    assert "verdict" not in page.split("<body>")[1] and "same answer" not in page
    more = {"same": 0.625, "verdict": "worse than <random>", "ci": (0.11, 0.97)}
    page = report.render(Report("t", [], [], [*rows, row("stride", 64, 6, **more)]))
    assert "worse than &lt;random&gt;" in page and "<td>62</td>" in page and "11–97" in page
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    tables = re.findall(r"<table.*?</table>", page, re.S)
    assert len(tables) == 3
    for table in tables:
        rows = re.findall(r"<tr><th scope=.row.*?</tr>", table, re.S)
        assert len({line.count("<td") for line in rows}) == 1


def test_a_cost_that_some_rows_lack_is_plotted_without_them():
    rows = [row("unpatched", None, 12, kv_bytes=4e6), row("random", 64, 6, kv_bytes=1e6)]
    page = report.render(Report("t", [], [], [*rows, row("visionzip", 64, 9)]))
    assert "KV cache in MiB per question" in page and "1 rows have no such figure" in page
    kv = str(plots.pareto([*rows, row("visionzip", 64, 9)], "kv"))
    assert 'data-name="random"' in kv and "visionzip" not in kv
    assert "KV cache" not in report.render(Report("t", [], [], [row("random", 64, 6)]))
    text_only = row("textonly", 64, 6, visual_avg=0.0)  # no place on a logarithmic axis
    assert text_only not in plots.measured([text_only], "tokens")
    assert text_only in plots.measured([text_only], "flops")


def test_the_front_is_what_no_other_row_beats():
    rows = [row("a", 64, 9), row("b", 64, 10), row("c", 32, 10), row("d", 16, 3), row("e", 128, 9)]
    assert [r.name for r in plots.front(rows, "tokens")] == ["d", "c"]


def test_of_many_methods_those_behind_the_front_stand_back():
    rows = [row(f"m{i}", 64, i) for i in range(9)] + [row("random", 64, 1, sanity=True)]
    drawn = plots.styles(rows)
    assert [name for name, style in drawn.items() if not style.back] == ["m8", "random"]
    assert len({(s.css, s.marker) for s in drawn.values()}) == 10
    assert not any(style.back for style in plots.styles(rows[:3]).values())


def test_the_heat_map_shades_differences_to_the_unpatched_model():
    def tasks(*right):
        return {"x": (right[0], 100), "y": (right[1], 100)}

    versus = {"verdict": "worse", "holds": False}
    rows = [
        Row("unpatched", "", None, 576.0, 1e9, tasks=tasks(90, 90)),
        Row("visionzip", "v", 64, 64.0, 1e9, tasks=tasks(50, 94), task_versus={"x": versus}),
    ]
    page = report.render(Report("t", [], [], rows))
    assert '<td class="down5" title="-40.0 points">50 ▽</td>' in page
    assert '<td class="up2" title="+4.0 points">94 </td>' in page
    assert [report.shade(x) for x in (-0.9, 1, -3, 30)] == ["h0", "up1", "down2", "up5"]


def test_a_long_page_opens_on_one_budget_and_all_rows_are_there():
    rows = [row(f"m{i}", b, 6) for b in (256, 64, 16) for i in range(25)]
    page = report.render(Report("t", ["word " * 300], [], rows))
    assert 'data-opened="64"' in page and page.count('data-budget="16"') == 3
    assert "<details><summary>What can be said" in page
    assert 'data-opened=""' in report.render(Report("t", [], [], [rows[0], rows[26], rows[52]]))


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_marks_stand_out(dark):
    """WCAG 2: 4.5 to 1 for text, 3 to 1 for marks, in both colour schemes."""
    found = {}
    for name in ("plot.css", "page.css"):
        text = report.templates().get_template(name).render()
        light, night = re.findall(r":root \{(.*?)\}", text, re.S)
        for part in (light, night) if dark else (light,):
            found |= dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", part))

    def contrast(one, other):
        low, high = sorted(_luminance(found[name]) for name in (one, other))
        return (high + 0.05) / (low + 0.05)

    shades = [f"{way}{i}" for way in ("up", "down") for i in range(1, 6)]
    for ground in ("paper", "card", *shades):
        assert contrast("ink", ground) >= 4.5, ground
    for text in ("quiet", "up", "down"):
        assert contrast(text, "paper") >= 4.5, text
    assert contrast("quiet", "card") >= 4.5
    for mark in ("c0", "c1", "c2", "c3", "c4", "c5", "sanity"):
        assert contrast(mark, "paper") >= 3, mark


def test_write_replaces_the_page_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    report.write(Report("t", [], [], [row("unpatched", None, 12)]), path)
    assert path.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


def test_picture_is_one_well_formed_svg_with_a_legend():
    rows = [row("unpatched", None, 12), row("random", 64, 6, sanity=True), row("fastv", 64, 9)]
    text = plots.picture(rows, NASTY)
    tree = ElementTree.fromstring(text)
    said = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {NASTY, "random (sanity)", "fastv", "unpatched"} <= set(said)
    assert "prefers-color-scheme: dark" in text


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(DataError, match="no visual tokens") as caught:
        plots.picture([row("unpatched", None, 12, visual_avg=0.0)], "text only")
    assert caught.value.argument == "svg"


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0, 100, False, [0, 20, 40, 60, 80, 100]),
        (30, 100, False, [40, 60, 80, 100]),
        (0, 0.07, False, [0, 0.02, 0.04, 0.06]),
        (14, 662, True, [16, 32, 64, 128, 256, 512]),
    ],
)
def test_ticks_are_round_and_inside(low, high, log, ticks):
    assert plots._ticks(low, high, log=log) == pytest.approx(ticks)


def test_row_as_dict_has_no_nan():
    empty = Row("fastv", "", 16, note="out of reach").as_dict()
    assert empty["score"] is None and empty["visual_avg"] is None
    full = row("random", 64, 6).as_dict()
    assert full["n"] == 24 and math.isclose(full["score"], 0.5) and len(full["ci"]) == 2
