"""The HTML report: complete, escaped, well-formed, and without anything from outside."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from mllm.eval import report
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
    flips = [Flip(image, "exist", NASTY, "yes", "yes", [("no", ["random @ 16", "random @ 64"])])]
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


def test_html_is_balanced_and_carries_no_script(reader):
    assert reader.open == []
    assert not {"script", "link", "iframe", "object"} & set(reader.seen)


def test_nothing_is_fetched(page, reader):
    assert not re.search(r"https?://|@import|url\(", page)
    links = [value for name, value in reader.attributes if name in ("src", "href", "srcset")]
    assert links and all(value.startswith("data:image/jpeg;base64,") for value in links)


def test_text_from_outside_is_escaped(page, reader):
    assert "<script" not in page
    assert any(NASTY in text for text in reader.text)


def test_every_row_every_flip_and_the_note_are_there(page):
    for wanted in ("random:keep=16", "visionzip:keep=64", "cannot be reached", "random @ 64"):
        assert wanted in page
    assert page.count('<span class="chip">sanity</span>') == 2
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
    assert "first token, ms" not in page and "Measured time" not in page


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
    widths = {line.count("<td") for line in re.findall(r"<tr><th scope=.row.*?</tr>", page, re.S)}
    assert len(widths) == 1


def test_write_replaces_the_page_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    report.write(Report("t", [], [], [row("unpatched", None, 12)]), path)
    assert path.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


def test_picture_is_one_well_formed_svg_with_a_legend():
    rows = [row("unpatched", None, 12), row("random", 64, 6, sanity=True), row("fastv", 64, 9)]
    text = report.picture(rows, NASTY)
    tree = ElementTree.fromstring(text)
    said = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {NASTY, "random (sanity)", "fastv", "unpatched"} <= set(said)
    assert "prefers-color-scheme: dark" in text


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
    assert report._ticks(low, high, log=log) == pytest.approx(ticks)


def test_row_as_dict_has_no_nan():
    empty = Row("fastv", "", 16, note="out of reach").as_dict()
    assert empty["score"] is None and empty["visual_avg"] is None
    full = row("random", 64, 6).as_dict()
    assert full["n"] == 24 and math.isclose(full["score"], 0.5) and len(full["ci"]) == 2
