"""`mllm.doctor`: what works with a model, and why the rest does not. Light until it is called."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mllm.errors import DataError, first_line

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn


Verdict = Literal["yes", "adjust", "no"]


@dataclass(frozen=True)
class Check:
    """One thing that was tried on a model.

    Attributes:
        name: a method, a signal, an action, or a way of running.
        verdict: `"adjust"` is a method that works, but not with its default parameters.
        reason: why it is refused, and what would work; empty for `"yes"`.
        notes: what a method does otherwise than on its paper's model.
        backends: of a method, what it says under other attention backends: empty where it works.
    """

    name: str
    verdict: Verdict
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    backends: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What works with one model, under its attention backend and this transformers.

    Attributes:
        model: class of the model.
        family: its `config.model_type`.
        backends: attention backend of `"decoder"` and `"tower"`.
        transformers: the installed release.
        tested: whether mllm is tested with that release.
        facts: where the parts of the model are, and what sets its family apart.
        methods, signals, actions, ways: what was tried.
    """

    model: str
    family: str
    backends: dict[str, str]
    transformers: str
    tested: bool
    facts: dict[str, Any]
    methods: list[Check]
    signals: list[Check]
    actions: list[Check]
    ways: list[Check]

    def as_dict(self) -> dict[str, Any]:
        """Plain Python values only."""
        return dataclasses.asdict(self)

    def tables(self) -> list[Table]:
        """The report for a :class:`rich.console.Console`."""
        from rich.table import Table

        tested = "" if self.tested else " (not a tested release)"
        title = (
            f"{self.model} ({self.family}), transformers {self.transformers}{tested}, "
            + ", ".join(f"{part} {name}" for part, name in self.backends.items())
        )
        facts = Table(title=title, title_justify="left", box=None, show_header=False)
        for name, value in self.facts.items():
            shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
            facts.add_row(name.replace("_", " "), shown)
        found, reasons = [facts], {}
        for what in ("methods", "signals", "actions", "ways"):
            table = Table(title=f"\n{what}", title_justify="left", box=None)
            table.add_column("", no_wrap=True)
            table.add_column("works", no_wrap=True)
            table.add_column("", overflow="fold")
            for check in getattr(self, what):
                lines = [check.reason, *check.notes]
                lines += [f"not under {name}" for name, why in check.backends.items() if why]
                reasons |= {(name, why): None for name, why in check.backends.items() if why}
                table.add_row(check.name, check.verdict, "\n".join(filter(None, lines)))
            if table.row_count:
                found.append(table)
        why_not = Table(title="\nattention", title_justify="left", box=None, show_header=False)
        for name, why in reasons:
            why_not.add_row(name, why)
        return [*found, why_not] if reasons else found

    def __str__(self) -> str:
        import io

        from rich.console import Console

        console = Console(file=io.StringIO(), width=100)
        console.print(*self.tables())
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def doctor(model: nn.Module) -> Report:
    """Try every method, signal, action and way of running on a model.

    Each is put into the model and taken out again, so the answers are those of
    :func:`mllm.patch`. Nothing is computed: the model may be on the meta device.

    Args:
        model: a model of any class; not patched at the moment.

    Returns:
        What works; `print` it, or read `as_dict()`.

    Raises:
        PlanError: the family is not supported (the nearest one is named), or the model as a whole
            cannot be patched.
    """
    from mllm.examine import examine

    return examine(model)


def skeleton(path: str | os.PathLike, dtype: str | None = None) -> nn.Module:
    """A model without its weights, on the meta device.

    Args:
        path: a folder with a ``config.json``, a hub name, or ``"tiny-llava"`` (embedded).
        dtype: of the weights that it has not got; None is the configuration's.

    Raises:
        DataError: there is no configuration there.
        PlanError: it is of a family that is not supported.
    """
    from transformers import AutoConfig

    import mllm.models.towers  # noqa: F401 - transformers is told of our towers
    from mllm.loading import model_path

    try:
        config = AutoConfig.from_pretrained(model_path(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the configuration of {path}: {first_line(error)}",
            argument="model",
            given=path,
            expected="a folder with config.json, a hub name, or 'tiny-llava'",
        ) from error
    return bones(config, dtype)


def bones(config: Any, dtype: str | None = None) -> nn.Module:
    """:func:`skeleton` of a configuration.

    Raises:
        PlanError: it is of a family that is not supported.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from mllm.models import family_of

    family_of(config, (config.architectures or [config.model_type])[0])
    more = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(
            config, attn_implementation="sdpa", **more
        ).eval()
