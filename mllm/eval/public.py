"""Tasks of lmms-eval by name, and local copies of their data.

A local copy stands in for a data set of the hub: the task's own configuration is used, with the
place of its data changed. A data set `org/name` is looked for as `DIR/org/name`, `DIR/name` and
`DIR/<task>` (or DIR itself, if it is called so), with the files of a split in one of these forms,
in the folder of the task's subset, or else in `data/` or at the top:

* parquet: `<split>-*.parquet`, `<split>.parquet` or `<split>/*.parquet`, as on the hub;
* arrow: the same names, or what `DatasetDict.save_to_disk` writes;
* imagefolder: `<split>/` with pictures and `metadata.jsonl` (or `.csv`, `.parquet`);
* anything that a `README.md` with `configs:` describes.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lmms_eval.tasks import TaskManager, get_task_dict
from tenacity import RetryError

from mllm.errors import DataError, MllmError
from mllm.eval import tasks

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_INDEX: dict[bool, Any] = {}
_BUILDERS = ("parquet", "arrow", "json", "csv", "imagefolder")


class Copy(NamedTuple):
    """Where a data set lies: arguments of `datasets.load_dataset`, or of `load_from_disk`."""

    path: str
    name: str | None
    options: dict[str, Any]
    disk: bool = False


class Tasks(TaskManager):
    """lmms-eval's task index, with changed configurations.

    Args:
        changes: keys of a task's configuration to set, by its name.
        data_dir: folder with local copies of public data sets; None to fetch them.
        everything: index lmms-eval's own two thousand tasks, too.
    """

    def __init__(
        self,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        data_dir: Path | None = None,
        everything: bool = True,
    ) -> None:
        self._changes, self._data_dir = changes or {}, data_dir
        super().__init__(
            include_path=tasks.PATH, include_defaults=everything, model_name="mllm"
        )

    def initialize_tasks(self, include_path: Any = None, include_defaults: bool = True) -> Any:
        """The index by name, read once per process: it takes seconds."""
        if include_defaults not in _INDEX:
            _INDEX[include_defaults] = super().initialize_tasks(include_path, include_defaults)
        return _INDEX[include_defaults]

    def _get_config(self, name: str) -> dict[str, Any]:
        try:
            # lmms-eval writes into the configurations that it is given.
            changes = copy.deepcopy(dict(self._changes.get(name, {})))
            config = {**super()._get_config(name), **changes}
        except ImportError as error:
            raise MllmError(
                f"the task {name} needs a package that is not installed: {error}",
                argument="tasks",
                given=name,
                expected=f"pip install {error.name or '(what the message names)'}",
            ) from error
        if self._data_dir is not None and "class" not in config:
            config = redirected(name, config, self._data_dir)
        return config

    def leaves(self, name: str) -> Iterator[str]:
        """The tasks that a name stands for: its own, or those of a group or tag."""
        entry = self.task_index[name]
        if entry["type"] in ("task", "python_task"):
            yield name
            return
        listed = entry["task"]
        if listed == -1:
            listed = super()._get_config(name)["task"]
        for item in listed:
            own = item["task"] if isinstance(item, dict) else item
            for one in own if isinstance(own, list) else [own]:
                yield from self.leaves(one)


def find_tasks(
    names: Sequence[str],
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    data_dir: Path | None = None,
) -> Tasks:
    """An index that knows `names`; the one of public tasks is read only if needed.

    Raises:
        MllmError: a name that neither we nor lmms-eval know (it lists near names), or a task that
            is no `generate_until` task; none, or two that have a task in common.
        DataError: `data_dir` has no copy of a task's data.
    """
    manager = Tasks(changes, data_dir, everything=False)
    ours = manager.all_tasks
    for name in names:
        near = difflib.get_close_matches(name, ours, 3, 0.8)
        if f"yardstick_{name}" in ours:  # as sweeps call it
            near = [f"yardstick_{name}"]
        if near and name not in ours:  # a slip of ours: no need to read two thousand files
            raise _no_task(name, near)
    if set(names) <= set(ours):
        _check_apart(manager, names)
        return manager
    manager = Tasks(changes, data_dir)
    for name in names:
        if name not in manager.all_tasks:
            raise _no_task(name, difflib.get_close_matches(name, manager.all_tasks, 3, 0.5) or ours)
        for leaf in manager.leaves(name):
            kind = manager._get_config(leaf).get("output_type", "generate_until")
            if kind != "generate_until":
                raise MllmError(
                    f"the task {leaf} is a {kind} task; the model 'mllm' answers generate_until "
                    "tasks, which is what lmms-eval asks chat models",
                    argument="tasks",
                    given=leaf,
                    expected="a task with output_type generate_until",
                )
    _check_apart(manager, names)
    return manager


def _check_apart(manager: Tasks, names: Sequence[str]) -> None:
    """lmms-eval refuses a task that is asked twice, once the model is there."""
    found: dict[str, str] = {}
    for name in names:
        for leaf in manager.leaves(name):
            if (other := found.setdefault(leaf, name)) != name:
                raise MllmError(
                    f"{other} and {name} both have the task {leaf}",
                    argument="tasks",
                    given=", ".join(names),
                    expected="every task once",
                )
    if not found:
        raise MllmError(
            "no task is named", argument="tasks", given="", expected="for example yardstick"
        )


def check_data(
    manager: Tasks, wanted: Sequence[str | dict], data_dir: Path | None
) -> dict[str, Any]:
    """Load the data of tasks before any weights are read.

    Returns:
        lmms-eval's tasks by name, those of a group under it.

    Raises:
        DataError: it cannot be fetched or read; the message says how to provide it.
    """
    names = [one if isinstance(one, str) else one["task"] for one in wanted]
    try:
        # lmms-eval takes keys out of the configuration that it is given.
        own = [dict(one) if isinstance(one, dict) else one for one in wanted]
        return get_task_dict(own, manager, "chat")
    except RetryError as error:  # lmms-eval tries a download several times
        cause = error.last_attempt.exception()
        if isinstance(cause, MllmError):
            raise cause from error
        raise unavailable(manager, names, data_dir, cause) from error
    except (KeyError, AttributeError, TypeError) as error:
        if data_dir is None:
            raise
        raise unavailable(manager, names, data_dir, error) from error


def unavailable(
    manager: Tasks, names: Sequence[str], data_dir: Path | None, cause: BaseException | None
) -> DataError:
    """The error for data that cannot be had, with what would help."""
    why = f"{type(cause).__name__}: {cause}"
    if data_dir is not None:
        return DataError(
            f"the local copy of the data of {', '.join(names)} in {data_dir} cannot be used, "
            f"perhaps because columns are missing: {why}",
            argument="data_dir",
            given=data_dir,
            expected="the files of the task's data set, unchanged",
        )
    sets = []
    for name in names:
        for leaf in manager.leaves(name):
            repo = manager._get_config(leaf).get("dataset_path")
            if repo and repo not in sets and repo not in _BUILDERS:
                sets.append(repo)
    ways = "; ".join(_download(repo, Path("DIR")) for repo in sets)
    return DataError(
        f"the data of {', '.join(names)} cannot be fetched: {why.splitlines()[0]}. Fetch it where "
        f"there is a network, and give --data-dir DIR: {ways}",
        argument="tasks",
        given=", ".join(names),
        expected="a network, --data-dir with a local copy, or the yardstick tasks",
    )


def redirected(task: str, config: dict[str, Any], data_dir: Path) -> dict[str, Any]:
    """A task's configuration with its data taken from `data_dir`.

    Raises:
        DataError: there is no copy.
    """
    repo = config.get("dataset_path")
    local = repo in _BUILDERS or (config.get("dataset_kwargs") or {}).get("load_from_disk")
    if not repo or local:
        return config
    split = config.get("test_split") or config.get("validation_split")
    wanted = [split, config.get("fewshot_split")] if config.get("num_fewshot") else [split]
    found = find_copy(data_dir, repo, config.get("dataset_name"), [s for s in wanted if s], task)
    # Some tasks load a second data set while they prepare the first. Their functions are of a
    # module that was made for this configuration, so that no other task is redirected.
    for value in config.values():
        if callable(value) and "load_dataset" in value.__globals__:
            value.__globals__["load_dataset"] = functools.partial(load_copy, data_dir, task)
    options = found.options | ({"load_from_disk": True} if found.disk else {})
    return {
        **config,
        "dataset_path": found.path,
        "dataset_name": found.name,
        "dataset_kwargs": options,
    }


def load_copy(
    data_dir: Path, task: str, path: str, name: str | None = None, split: str | None = None,
    **_: Any,
) -> Any:  # fmt: skip
    """`datasets.load_dataset` of a local copy: a split, or all that a task reads at once.

    Raises:
        DataError: there is no copy, or no split was named.
    """
    import datasets

    if split is None:
        raise DataError(
            f"{task} loads all splits of {path}; that cannot be taken from a local copy",
            argument="data_dir",
            given=data_dir,
            expected="a task that names the split that it loads",
        )
    found = find_copy(data_dir, path, name, [split], task)
    if found.disk:
        return datasets.load_from_disk(found.path)[split]
    return datasets.load_dataset(found.path, found.name, split=split, **found.options)


def find_copy(
    data_dir: Path, repo: str, subset: str | None, splits: Sequence[str], task: str
) -> Copy:
    """The local copy of some splits of a data set.

    Args:
        data_dir: see the head of this file.
        repo: `org/name` on the hub.
        subset: its configuration there; None for the only one.
        splits: that are needed.
        task: a folder of that name may have the files, too.

    Raises:
        DataError: there is none; the message says what was looked for.
    """
    last = repo.rsplit("/", 1)[-1]
    bases = [data_dir / repo, data_dir / last, data_dir / task]
    if data_dir.name.lower() in (last.lower(), task.lower()):
        bases.append(data_dir)
    for base in dict.fromkeys(bases):
        roots = [base / subset, base / "data" / subset] if subset else []
        if not subset or subset == "default" or base.name == task:
            roots += [base / "data", base]
        for root in roots:
            found = _in_folder(root, splits)
            if found is not None:
                return found
        if subset in _described(base / "README.md"):
            return Copy(str(base), subset, {})
    place = data_dir / last / (subset or "data")
    raise DataError(
        f"no local copy of {repo}{f', {subset},' if subset else ''} for the task {task}: no files "
        f"of the split {' or '.join(splits)} in {', '.join(map(str, dict.fromkeys(bases)))}. "
        f"{_download(repo, data_dir)} on a machine with a network, or write "
        f"{place}/{splits[0]}-00000-of-00001.parquet (or .arrow, or an image folder "
        f"{place}/{splits[0]} with metadata.jsonl)",
        argument="data_dir",
        given=data_dir,
        expected=f"the files of {repo}",
    )


def _in_folder(root: Path, splits: Sequence[str]) -> Copy | None:
    """Files of all splits in one folder and one form."""
    if not root.is_dir():
        return None
    whole = root / "dataset_dict.json"
    if whole.is_file():
        there = json.loads(whole.read_text(encoding="utf-8")).get("splits", ())
        if set(splits) <= set(there):
            return Copy(str(root), None, {}, disk=True)
    if all(any((root / split / name).is_file() for name in _METADATA) for split in splits):
        files = {split: [str(root / split / "**")] for split in splits}
        return Copy("imagefolder", None, {"data_files": files})
    for form in ("parquet", "arrow"):
        found = {split: _files(root, split, form) for split in splits}
        if all(found.values()):
            options: dict[str, Any] = {"data_files": found}
            features = _features(found[splits[0]][0]) if form == "parquet" else None
            return Copy(form, None, options | ({"features": features} if features else {}))
    return None


def _files(root: Path, split: str, form: str) -> list[str]:
    patterns = (f"{split}-*.{form}", f"{split}.{form}", f"{split}/*.{form}")
    return sorted({str(path) for pattern in patterns for path in root.glob(pattern)})


def _features(path: str) -> Any:
    """Column types of a parquet file that does not say which columns are pictures, else None."""
    import datasets
    import pyarrow.parquet as parquet

    schema = parquet.read_schema(path)
    if b"huggingface" in (schema.metadata or {}):
        return None
    features = datasets.Features.from_arrow_schema(schema)
    for name, kind in features.items():
        if isinstance(kind, dict) and set(kind) == {"bytes", "path"}:
            features[name] = datasets.Image()
    return features


def _described(readme: Path) -> list[str | None]:
    """Subsets that the front matter of a data set's README describes; None for the default one."""
    if not readme.is_file():
        return []
    _, _, rest = readme.read_text(encoding="utf-8").partition("---\n")
    try:
        found = (yaml.safe_load(rest.partition("\n---")[0]) or {}).get("configs") or []
    except (yaml.YAMLError, AttributeError):
        return []
    names = [one.get("config_name") for one in found]
    return [*names, None] if "default" in names or len(names) == 1 else names


def _download(repo: str, data_dir: Path) -> str:
    last = repo.rsplit("/", 1)[-1]
    return f"hf download {repo} --repo-type dataset --local-dir {data_dir / last}"


def _no_task(name: str, near: list[str]) -> MllmError:
    return MllmError(
        f"there is no task {name!r}; did you mean: {', '.join(near)}?",
        argument="tasks",
        given=name,
        expected=", ".join(near),
    )
