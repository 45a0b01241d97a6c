"""The documentation is true: its links, commands, code, figures and lists of names."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from docs_blocks import (
    FENCE,
    NOTEBOOKS,
    PAGES,
    ROOT,
    blocks,
    check_names,
    commands,
    ours,
    parse,
)

import mllm
from mllm.plan import get_method

SITE = runpy.run_path(str(ROOT / "scripts" / "site_hooks.py"))
API = runpy.run_path(str(ROOT / "scripts" / "api_doc.py"))
BLOCKS = [block for page in PAGES for block in blocks(page)]
#: Pages to follow, in order; they go from one block to the next.
TUTORIALS = ("quickstart", "patch", "finetune", "benchmark", "adding-a-method", "adding-a-family")
PYTHON = sorted({b.page for b in BLOCKS if b.kind == "python" and b.reason is None})
EXPLAINED = [p for p in PYTHON if p.stem not in (*TUTORIALS, "README")]
STAGE = r"[a-z0-9_]+(?::[a-z_]+=[\w.]*\w(?:/[\w.]*\w)*)*"
SPEC = re.compile(rf"`({STAGE}(?:\+{STAGE})*)`")
LARGEST = 300_000


def text_of(path) -> str:
    return path.read_text()


def named(items):
    return pytest.mark.parametrize("item", items, ids=lambda x: getattr(x, "name", str(x)))


@pytest.fixture()
def scratch(tmp_path, monkeypatch):
    """A folder with the examples, as a newcomer's checkout has them."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    return tmp_path


# Links and lists of pages


@named([*PAGES, *(ROOT / name for name in SITE["ALSO"] if ROOT / name not in PAGES)])
def test_links_lead_somewhere(item):
    broken = []
    for written, target, anchor in SITE["links"](item):
        path = ROOT / target
        if not path.exists():
            broken.append(written)
        elif anchor and path.suffix == ".md" and anchor[1:] not in anchors(path):
            broken.append(written + anchor)
    assert not broken


def anchors(path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", text_of(path), flags=re.M | re.S)
    return {SITE["slug"](heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


def test_the_site_lists_every_page():
    def leaves(part):
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            part = list(part.values())
        for below in part if isinstance(part, list) else ():
            yield from leaves(below)

    listed = list(leaves(yaml.safe_load(text_of(ROOT / "mkdocs.yml"))["nav"]))
    pages = [p for p in (*PAGES, *NOTEBOOKS) if "docs" in p.relative_to(ROOT).parts]
    wanted = {SITE["site_path"](p.relative_to(ROOT).as_posix()) for p in pages}
    assert len(listed) == len(set(listed))
    assert wanted | {f"repo/{name}" for name in SITE["ALSO"]} == set(listed)


# Blocks


@named([b for b in BLOCKS if any(map(ours, commands(b) if b.kind in ("", "bash", "text") else []))])
def test_commands_are_those_of_the_command_line(item):
    for words in filter(None, map(ours, commands(item))):
        found = parse(words)
        for plan in as_list(found.get("plan") or found.get("plans")):
            check_plan(plan)
        if words[0] == "train" and (recipe := shipped(found["recipe"])):
            load_recipe(recipe, found)


def as_list(value) -> list[str]:
    return value.split(",") if isinstance(value, str) else list(value or ())


def check_plan(plan: str) -> None:
    folder = plan in ("none", "tuned") or ("/" in plan and "=" not in plan)
    if not folder and not plan.endswith(".json"):
        mllm.Plan.from_spec(plan)


def shipped(name: str):
    from mllm.training import recipe

    known = recipe.shipped()
    assert name in known or name.endswith(".yaml"), f"no recipe {name!r}"
    return known.get(name)


def load_recipe(path, found) -> None:
    from mllm.training.recipe import load

    load(path, [word for word in found["overrides"] or () if "=" in word], found["tiny"])


@named([p for p in PAGES if "`mllm " in text_of(p)])
def test_commands_in_the_text_exist(item):
    for command in re.findall(r"`mllm ([a-z][^`\n]*)`", re.sub(FENCE, "", text_of(item))):
        if "..." in command or "--help" in command:
            continue
        try:
            parse(shlex.split(command))
        except Exception as error:  # typer carries click under names of its own
            said = getattr(error, "format_message", lambda error=error: str(error))()
            # A text may leave out what a command needs, and an option its value.
            left_out = "Missing " in said or "requires an argument" in said
            assert left_out, f"mllm {command}: {said}"


@named([b for b in BLOCKS if b.kind in ("", "bash")])
def test_other_commands_name_what_is_there(item):
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.M))
    for words in commands(item):
        if ours(words) is not None:
            continue
        if words[0] == "make":
            assert words[1] in targets
        files = [w for w in words if re.fullmatch(r"(scripts|benchmarks|tests)/[\w/]+\.\w+", w)]
        assert all((ROOT / w).exists() or w.startswith("benchmarks/results") for w in files)
        if "-m" in words and (module := words[words.index("-m") + 1]).startswith("scripts."):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


@named([b for b in BLOCKS if b.kind == "python"])
def test_python_names_what_is_there(item):
    assert not check_names(item.text, str(item))


@named([b for b in BLOCKS if b.kind == "yaml"])
def test_yaml_has_keys_of_a_recipe(item):
    from mllm.training.recipe import Recipe

    given = yaml.safe_load(item.text)
    assert set(given) <= set(Recipe.model_fields)


def test_the_read_me_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (block,) = [b for b in blocks(ROOT / "README.md") if b.kind == "python"]
    exec(compile(block.text, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "green" in said and "visual tokens 576 -> 128" in said


def test_what_is_not_run_says_why():
    assert all(len(b.reason.split()) > 2 for b in BLOCKS if b.reason is not None)


def test_plans_in_the_text_can_be_read():
    known, found = {method["name"] for method in mllm.methods()}, 0
    for page in PAGES:
        for spec in SPEC.findall(text_of(page)):
            if (":" in spec or "+" in spec) and re.split("[:+]", spec)[0] in known:
                mllm.Plan.from_spec(spec)
                found += 1
    assert found > 100


def test_checks_find_what_is_wrong():
    assert check_names("import mllm.nothing", "x") and check_names("mllm.patsh(model, 1)", "x")
    assert check_names("mllm.patch(model, plan, strict=True)", "x") == [
        "x: mllm.patch has no parameter 'strict'"
    ]
    assert not check_names("model = 1\nmodel.anything(x=1)\nmllm.patch(model, plan)", "x")
    parse(["run", "a.png", "?", "--plan", "divprune:keep=64"])
    for wrong in (["rum"], ["run", "a.png", "?", "--plans", "x"], ["recipes", "lists"]):
        with pytest.raises(Exception):  # noqa: B017 - typer carries click under names of its own
            parse(wrong)


# Figures that a page repeats


@functools.cache
def measured(file: str) -> list[dict]:
    return json.loads(text_of(ROOT / "benchmarks" / "results" / f"{file}.json"))["rows"]


def score(file: str, plan: str, budget: float) -> str:
    (row,) = [r for r in measured(file) if r["method"] == plan and r["budget"] == budget]
    return f"{100 * row['score']:.1f}"


def table(heading: str) -> list[list[str]]:
    """Rows of the first table of which-method.md behind a heading, without its head."""
    _, text = text_of(ROOT / "docs" / "which-method.md").split(f"## {heading}", 1)
    lines = text[text.index("\n|") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_figures_of_the_choice_of_a_method():
    rows = table("Choosing visual tokens")
    for plan, *figures in rows:
        wanted = [score(f, plan, n) for n in (64, 16) for f in ("zoo", "easyvqa")]
        assert figures == wanted, plan
    assert len(rows) > 10


def test_figures_of_speed():
    known = {r["plan"]: r for r in measured("prefill-bench-cpu") if r["visual"] == 576}
    for plan, ratio, ideal in table("How much faster?"):
        assert (ratio, ideal) == (f"{known[plan]['ratio']:.2f}", f"{known[plan]['ideal']:.2f}")


def test_figures_of_the_cache():
    steps = {r["plan"]: f"{r['ratio']:.2f}" for r in measured("kv-bench-cpu")}
    for plan, quarter, tenth, step in table("On the KV cache"):
        assert [quarter, tenth] == [score("kv", plan, share) for share in (0.25, 0.1)], plan
        assert step == steps[f"{plan}:budget=0.25"], plan


# Names


def public() -> list[tuple[str, object]]:
    return [
        (f"{module}.{name}", getattr(importlib.import_module(module), name))
        for module in API["MODULES"]
        for name in API["names"](module)
    ]


def test_every_public_name_is_documented():
    bare, silent = [], []
    for name, thing in public():
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        text = API["docstring"](thing)
        if text is None:
            bare.append(name)
        elif inspect.isfunction(thing):
            takes = list(inspect.signature(thing).parameters)
            if "Args:" in text or len(takes) > 4:  # a sentence does for less
                silent += [f"{name}: {p}" for p in takes if not re.search(rf"\b{p}\b", text)]
    assert not bare, "no docstring"
    assert not silent, "a parameter that the docstring does not speak of"


def test_every_method_has_its_parameters_documented():
    silent = []
    for method in mllm.methods():
        cls = get_method(method["name"])
        text = " ".join(inspect.getdoc(c) or "" for c in cls.__mro__ if c is not object)
        silent += [
            f"{method['name']}: {p['name']}"
            for p in method["params"]
            if not re.search(rf"\b{p['name']}\b", text)
        ]
    assert not silent


def test_every_name_of_the_package_has_one_label():
    labels = [
        cells[1]
        for line in text_of(ROOT / "docs" / "stability.md").splitlines()
        if len(cells := line.split("|")) > 3
    ]
    for name in mllm.__all__:
        found = [cell for cell in labels if re.search(rf"`mllm\.{name}`", cell)]
        assert len(found) == 1, name


def test_the_reference_names_every_public_module():
    listed = text_of(ROOT / "docs" / "reference.md")
    for module in API["MODULES"]:
        assert f"`{module}`" in listed or f"`.{module.rsplit('.', 1)[-1]}`" in listed, module


def test_docstrings_become_pages():
    made = API["page"]()
    assert "### patch" in made and "#### Patched.remove" in made and "### VisionZip" in made
    assert "*Not documented.*" not in made and ":class:`" not in made
    assert "- `plan`: stage instances" in made


# Notebooks


def code(path) -> list[str]:
    cells = json.loads(text_of(path))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


@named(NOTEBOOKS)
def test_notebooks_name_what_is_there(item):
    source = "\n".join(code(item))
    ast.parse(source)
    assert not check_names(source, item.name)


@named(NOTEBOOKS)
def test_notebooks_have_whole_outputs(item):
    cells = [c for c in json.loads(text_of(item))["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    kinds = {shown["output_type"] for c in cells for shown in c["outputs"]}
    assert kinds and "error" not in kinds
    assert item.stat().st_size < LARGEST
    assert not re.search(r"/(work|home|root|tmp|Users)/", text_of(item))


def test_there_are_two_notebooks():
    assert [p.stem for p in NOTEBOOKS] == ["patch-and-look", "sweep-and-report"]


# The same, run


def play(script: str, *words: str, timeout: int = 1200) -> str:
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True,
                          timeout=timeout)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_newcomers_walk(scratch):
    """The tutorials, in order, in one folder."""
    said = {
        page: play(str(ROOT / "tests" / "docs_blocks.py"), str(ROOT / "docs" / f"{page}.md"))
        for page in TUTORIALS
    }
    (shown,) = [b for b in blocks(ROOT / "docs" / "quickstart.md") if b.kind == "text"]
    lines = {" ".join(line.split()) for line in said["quickstart"].splitlines()}
    assert {" ".join(line.split()) for line in shown.text.splitlines()} <= lines
    assert "fraction above 1" in said["patch"]
    assert (scratch / "kept.png").is_file() and (scratch / "report.html").is_file()
    assert (scratch / "runs/first/model/mllm_plan.json").is_file()


@pytest.mark.slow
@named(EXPLAINED)
def test_python_of_other_pages_runs(scratch, item):
    play(str(ROOT / "tests" / "docs_blocks.py"), str(item), "--python")


@pytest.mark.slow
@named(NOTEBOOKS)
def test_notebooks_run(scratch, item):
    head = "import matplotlib\nmatplotlib.use('agg')\n"  # no window
    (scratch / "cells.py").write_text(head + "\n".join(code(item)))
    play("cells.py")


@pytest.mark.slow
def test_the_site_is_whole_and_alone(tmp_path):
    pytest.importorskip("material", reason="needs mllm-efficiency[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    away = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"")
    for page in tmp_path.rglob("*.html"):
        assert not away.findall(page.read_text()), page
    home = (tmp_path / "index.html").read_text()
    assert "prefers-color-scheme: dark" in home and "prefers-color-scheme: light" in home
    assert "Patched.remove" in (tmp_path / "reference.html").read_text()
