"""`mllm inspect` and `mllm demo` on a small random model: what they write, and what they refuse."""

from __future__ import annotations

import json
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from eval_tiny import TOKENS, save_tiny
from PIL import Image

from mllm.cli import app
from mllm.errors import DataError
from mllm.yardstick import VERSION


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").convert("RGB").resize((160, 112)).save(path)
    return path


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        app([str(word) for word in arguments])
    return stopped.value.code


def test_inspect_writes_the_figure_and_tells_what_it_shows(model, picture, tmp_path, capsys):
    output = tmp_path / "out.png"
    output.write_text("an older file of that name")
    plan = "visionzip:keep=16+fastv:layer=2:keep=8"
    words = ("inspect", picture, "what?", "--plan", plan, "-o", output, "--model", model)
    assert run(*words, "--max-new-tokens", 2, "--json") == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert (data["visual_tokens"], data["kept_llm"], data["visual_avg"]) == (TOKENS, 16, 12.0)
    assert data["panels"] == [
        f"As the model sees it: {TOKENS} visual tokens",
        f"Entering the LLM: 16 of {TOKENS}",
        "Entering decoder layer 2: 8 of 16",
    ]
    assert Image.open(output).format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "picture.png"]
    assert [row["signal"] for row in data["reads"] if row["stage"] == "fastv"] == ["rows"]


class Data(HTMLParser):
    """Scripts and images of a page."""

    def __init__(self, page):
        super().__init__()
        self.sources, self.scripts, self.inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "script"
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.scripts += [data] * self.inside


def drawn(page) -> dict:
    script = "".join(Data(page).scripts)
    return json.JSONDecoder().raw_decode(script.split("const data = ")[1])[0]


@pytest.fixture(scope="module")
def loaded(model):
    from mllm.loading import load_model

    return load_model(model, device="cpu", dtype="float32")


def test_the_page_of_inspect_has_every_layer_and_the_attention_that_was_read(
    model, loaded, picture, tmp_path
):
    """The heat is what the methods ranked by: the tokens that stay are those with most of it."""
    from mllm.eval.inspection import inspect

    asked = "<b>what</b> is </script> here?"
    plan = "visionzip:keep=16:cls=false:dominant=1.0+fastv:layer=2:keep=8"
    pictures = [Image.open(picture), Image.open(picture).rotate(90)]
    made = inspect(*loaded, plan, asked, pictures, max_new_tokens=2)
    data, page = drawn(made.html()), made.html()
    assert "</b> is" not in page and page.count("</script>") == 1
    assert all(source.startswith("data:") for source in Data(page).sources)
    assert len(data["stops"]) == 1 + len(made.ledger["layers"]) and data["total"] == 2 * TOKENS
    assert data["counts"][:4] == [2 * TOKENS, 32, 32, 32] and data["counts"][4] == 16
    for i, view in enumerate(data["views"]):
        first, last = (view["kept"][data["stops"][k]] for k in (0, -1))
        assert first.count("1") == 16 == made.budgets[i]["kept_llm"]
        assert last.count("1") == made.budgets[i]["last"] and made.budgets[i]["tokens"] == TOKENS
        tower = np.array(view["heat"][0]["share"])
        kept = np.array(list(first)) == "1"
        assert tower[kept].min() >= tower[~kept].max()
        assert [share is None for share in view["heat"][1]["share"]] == (~kept).tolist()
    read = np.concatenate([[x for x in v["heat"][1]["share"] if x is not None]
                           for v in data["views"]])  # fmt: skip
    stay = np.concatenate([np.array(list(v["kept"][data["stops"][-1]])) == "1"
                           for v in data["views"]])  # fmt: skip
    before = np.concatenate([np.array(list(v["kept"][data["stops"][0]])) == "1"
                             for v in data["views"]])  # fmt: skip
    assert read[stay[before]].min() >= read[~stay[before]].max()
    assert [heat["stop"] for heat in data["heat"]] == [0, 3]
    assert "the last prompt token in decoder layer 1" in data["heat"][1]["label"]
    assert made._repr_html_().startswith("<iframe srcdoc=") and "picture 2" in page
    assert made.save(tmp_path / "a.html").read_text() == page
    with pytest.raises(DataError, match="does not say"):
        made.save(tmp_path / "a.pdf")


def test_inspect_shows_frames_as_pictures_to_a_model_without_videos(loaded, picture):
    from mllm.eval.inspection import inspect

    frames = [Image.open(picture)] * 3
    made = inspect(*loaded, "visionzip:keep=4", "what?", frames=frames, max_new_tokens=1)
    assert [row["name"] for row in made.budgets] == ["frame 1", "frame 2", "frame 3"]
    assert made.panels[3].title == "Frame 1: entering the LLM: 4 of 64"
    with pytest.raises(DataError, match="not both"):
        inspect(*loaded, "visionzip:keep=4", "what?")
    with pytest.raises(DataError, match="nothing to inspect"):
        inspect(*loaded, "none", "what?", frames=frames)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"image": "nowhere.png"}, "image"),
        ({"image": "broken.png"}, "image"),
        ({"image": "absurd.png"}, "image"),
        ({"output": "no/such/folder/out.png"}, "output"),
        ({"output": "out.pdf"}, "output"),
        ({"plan": "visionzip:keep=0"}, "keep"),
        ({"plan": "fastv:layer=99"}, "layer"),
        ({"plan": "visionzap"}, "method"),
        ({"model": "no-model"}, "model"),
    ],
)
def test_inspect_refuses_bad_input(model, picture, tmp_path, capsys, change, argument):
    content = picture.read_bytes()
    (tmp_path / "broken.png").write_bytes(content[:60])
    header = b"IHDR" + (90_000).to_bytes(4, "big") * 2 + content[24:29]
    absurd = content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]
    (tmp_path / "absurd.png").write_bytes(absurd)
    given = {"image": picture.name, "output": "out.png", "plan": "visionzip:keep=16"} | change
    before = sorted(path.name for path in tmp_path.iterdir())
    code = run(
        "inspect",
        tmp_path / given["image"],
        "what?",
        "--plan",
        given["plan"],
        "-o",
        tmp_path / given["output"],
        "--model",
        tmp_path / change["model"] if "model" in change else model,
        "--json",
    )
    answer = json.loads(capsys.readouterr().out)
    assert code == 2 and not answer["ok"] and answer["error"]["argument"] == argument
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_demo_asks_every_plan_and_writes_the_report(model, tmp_path, capsys, monkeypatch):
    import mllm.cli.demo as demo
    import mllm.yardstick

    monkeypatch.setattr(demo, "MODEL", str(model))
    monkeypatch.setattr(demo, "BUDGETS", (32, 8))
    monkeypatch.setattr(demo, "SHOWN", (("visionzip+fastv", 8), ("random", 32)))
    monkeypatch.setattr(mllm.yardstick, "ADMITTED", ("exist", "color"))
    assert run("demo", "-o", tmp_path / "demo", "--samples", 2, "--quick", "--json") == 0
    caught = capsys.readouterr()
    data = json.loads(caught.out)["data"]
    rows = {(row["name"], row["budget"]): row for row in data["rows"]}
    assert len(rows) == 1 + 2 * len(demo.METHODS)
    assert rows["unpatched", None]["visual_avg"] == TOKENS
    for (name, budget), row in rows.items():
        if name == "fastv" and budget == 8:
            assert row["n"] == 0 and "cannot be reached" in row["note"]
        elif budget:
            # Cuts keep whole tokens and pools whole grids (5 x 6 = 30): near, not equal.
            assert abs(row["visual_avg"] - budget) <= 2 and row["n"] == 4
    page = (tmp_path / "demo" / "report.html").read_text()
    assert all(row["spec"] in page for row in data["rows"])
    assert "patch, ask, remove" in caught.err and "bit for bit: yes" in caught.err


def test_demo_refuses_a_folder_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("demo", "-o", tmp_path / "file" / "demo", "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["argument"] == "output"


def cell(method, budget, outcomes):
    right = outcomes.count("1")
    return {
        "method": method,
        "budget": budget,
        "plan": f"{method}:keep={budget}" if budget else "unpatched",
        "task": "exist",
        "split": "test",
        "seed": 0,
        "n": len(outcomes),
        "correct": right,
        "score": right / len(outcomes),
        "ci": [0.0, 1.0],
        "visual_avg": float(budget or 576),
        "kept_llm": float(budget or 576),
        "flops": 1e9,
        "kv_bytes": 1,
        "prefill_s": {"median": 0.05, "ci": [0.04, 0.06]},
        "outcomes": outcomes,
        "data": f"scenes {VERSION}",
        "about": {
            "weights_sha256": "0" * 64,
            "dtype": "bfloat16",
            "backend": "sdpa",
            "device": "cpu",
            "threads": 1,
            "versions": {"torch": "2"},
            "commit": None,
        },
    }


def test_report_shows_the_cells_of_a_sweep(tmp_path, capsys):
    cells = [
        cell("unpatched", None, "1111"),
        cell("random", 64, "1000"),
        cell("visionzip", 64, "1110"),
    ]
    results = tmp_path / "cells.jsonl"
    results.write_text("".join(json.dumps(c) + "\n" for c in cells))
    words = ["report", results, "--model", "none"]
    for name in ("page.html", "table.md", "table.csv"):
        words += ["-o", tmp_path / name]
    assert run(*words, "--svg", tmp_path / "plot.svg", "--json") == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert data["rows"] == 3 and data["gallery"] == {"lost": 3, "won": 0}
    page = (tmp_path / "page.html").read_text()
    assert "visionzip:keep=64" in page and "| `visionzip:keep=64` | 64 |" in (
        tmp_path / "table.md"
    ).read_text()
    assert (tmp_path / "table.csv").read_text().count("\n") == 1 + 3 * 2
    assert "3 of 3 lost and 0 of 0 won are shown" in page and page.count("data:image/jpeg") == 3
    assert "not better than random; not compared with downsample, which is missing" in page
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")


def test_report_of_a_sweep_without_a_finished_row_says_what_is_missing(tmp_path, capsys):
    cells = [cell("random", 64, "10"), cell("unpatched", None, "11") | {"task": "ocr_word"}]
    results = tmp_path / "cells.jsonl"
    results.write_text("".join(json.dumps(c) + "\n" for c in cells))
    assert run("report", results, "-o", tmp_path / "page.html", "--json") == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "random at 64 (seed 0: no ocr_word)" in json.dumps(error)


@pytest.mark.parametrize("content", [None, "", '{"a": 1}\n', "nonsense\n"])
def test_report_refuses_what_is_no_sweep(tmp_path, capsys, content):
    results = tmp_path / "cells.jsonl"
    if content is not None:
        results.write_text(content)
    assert run("report", results, "-o", tmp_path / "page.html", "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "DataError"
    assert not (tmp_path / "page.html").exists()


def test_token_map_draws_two_rows_a_line():
    from mllm.cli.demo import token_map

    assert token_map((3, 2), [0, 2, 3]) == "    █▄\n    ··"


def two_runs(tmp_path, **more):
    for name, right in (("old", "1110"), ("new", "0011")):
        cells = [cell("unpatched", None, "1111"), cell("visionzip", 64, right) | more]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells))
    return tmp_path / "old.jsonl", tmp_path / "new.jsonl"


@pytest.mark.parametrize("against", [False, True])
def test_report_compares_two_runs(tmp_path, capsys, against):
    old, new = two_runs(tmp_path)
    pair = (new, "--against", old) if against else (old, new)
    words = ("-o", tmp_path / "page.html", "--csv", tmp_path / "c.csv", "--model", "none")
    assert run("report", *pair, *words, "--json") == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert data["rows"] == 2 and data["resolved"] == 0
    assert data["gallery"] == {"lost": 2, "won": 1}
    page = (tmp_path / "page.html").read_text()
    assert "new against old" in page and "Right in old, wrong in new" in page
    assert "−25.0" in page and "visionzip,64,all,4,0.75,0.5,-0.25" in (
        tmp_path / "c.csv"
    ).read_text()


@pytest.mark.parametrize(
    ("words", "argument"),
    [
        (["-o", "page.pdf"], "output"),
        (["-o", "no/such/page.html"], "output"),
        (["old.jsonl", "--against", "old.jsonl"], "against"),
        (["old.jsonl", "--svg", "plot.svg"], "svg"),
        (["missing.jsonl"], "results"),
        (["empty"], "results"),
        (["other.jsonl"], "results"),
        (["--model", "tiny-llava"], "model"),
    ],
)
def test_report_refuses_bad_input(tmp_path, capsys, monkeypatch, words, argument):
    monkeypatch.chdir(tmp_path)
    two_runs(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.jsonl").write_text(json.dumps(cell("a", 64, "1") | {"schema": 99}) + "\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run("report", "new.jsonl", *words, "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["argument"] == argument
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_truncated_line_is_skipped_counted_and_said(tmp_path, capsys):
    old, _ = two_runs(tmp_path)
    with old.open("a") as file:
        file.write(json.dumps(cell("random", 64, "1000"))[:50])
    assert run("report", old, "-o", tmp_path / "a.html", "--model", "none", "--json") == 0
    caught = capsys.readouterr()
    assert json.loads(caught.out)["data"]["damaged"] == 1
    for text in (caught.err, (tmp_path / "a.html").read_text()):
        assert "1 damaged line was skipped in old.jsonl" in text


def test_rows_of_several_seeds_and_tasks_of_other_sizes_are_as_they_are(tmp_path, capsys):
    cells = [cell("unpatched", None, "1111"), cell("unpatched", None, "11") | {"task": "color"}]
    for seed, right in enumerate(("1000", "1100", "1000")):
        cells.append(cell("random", 64, right) | {"seed": seed})
        cells.append(cell("random", 64, "10") | {"seed": seed, "task": "color"})
    results = tmp_path / "cells.jsonl"
    results.write_text("".join(json.dumps(c) + "\n" for c in cells))
    words = ("-o", tmp_path / "page.html", "-o", tmp_path / "table.md", "--model", "none")
    assert run("report", results, *words, "--json") == 0
    page, table = ((tmp_path / name).read_text() for name in ("page.html", "table.md"))
    assert "exist, color; 2 to 4 questions each" in page and "2 to 4 questions each" in table
    assert "test, seeds 0, 1, 2" in page
    assert "<td>38.9</td>" in page and "| 38.9 (" in table  # 7 of 18


def test_a_report_whose_plot_has_nothing_writes_nothing(tmp_path, capsys):
    results = tmp_path / "cells.jsonl"
    results.write_text(json.dumps(cell("unpatched", None, "10") | {"visual_avg": 0.0}) + "\n")
    words = ("-o", tmp_path / "page.html", "--svg", tmp_path / "plot.svg", "--json")
    assert run("report", results, *words) == 2
    assert json.loads(capsys.readouterr().out)["error"]["argument"] == "svg"
    assert [path.name for path in tmp_path.iterdir()] == ["cells.jsonl"]


def test_results_of_another_machine_are_reported_without_drawings(tmp_path, capsys):
    old, _ = two_runs(tmp_path, about=cell("a", 1, "1")["about"] | {"backend": "flash_attention_9"})
    cells = [json.loads(line) for line in old.read_text().splitlines()]
    old.write_text("".join(json.dumps(c | {"about": cells[1]["about"]}) + "\n" for c in cells))
    assert run("report", old, "-o", tmp_path / "page.html", "--json") == 0
    assert "What plans kept is not drawn: cannot load" in (tmp_path / "page.html").read_text()
    assert run("report", old, "-o", tmp_path / "page.html", "--model", "tiny-llava", "--json") == 2


def test_the_gallery_draws_what_plans_kept_by_the_model_of_the_results(model, loaded, tmp_path):
    from mllm.cli.report import Asked, Files, report
    from mllm.eval.provenance import describe_run

    about = {"about": describe_run(loaded[0])}
    plan = {"plan": "visionzip:keep=16", "answers": ["yes", "no"], **about}
    cells = [
        cell("unpatched", None, "10") | about | {"answers": ["no", "yes"]},
        cell("visionzip", 16, "01") | plan,
    ]
    results = tmp_path / "cells.jsonl"
    results.write_text("".join(json.dumps(c) + "\n" for c in cells))
    page = tmp_path / "page.html"
    report(results, None, Files.of([page], None, None, None), Asked(5, str(model), "cpu"))
    text = page.read_text()
    assert "visionzip at 16. Entering the LLM: 16 of 64" in text
    assert text.count("data:image/jpeg") == 4 and "✓ no" in text and "✗ yes" in text
