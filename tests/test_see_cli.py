"""`mllm inspect` and `mllm demo` on a small random model: what they write, and what they refuse."""

from __future__ import annotations

import json
import zlib

import pytest
from eval_tiny import TOKENS, save_tiny
from PIL import Image

from mllm.cli import app


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


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"image": "nowhere.png"}, "image"),
        ({"image": "broken.png"}, "image"),
        ({"image": "absurd.png"}, "image"),
        ({"output": "no/such/folder/out.png"}, "output"),
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
    words = ("report", results, "-o", tmp_path / "page.html", "--svg", tmp_path / "plot.svg")
    assert run(*words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"]["rows"] == 3
    page = (tmp_path / "page.html").read_text()
    assert "visionzip:keep=64" in page
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
