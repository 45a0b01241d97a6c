"""Write docs/models.md: what works with which family, as the engine itself says.

    python -m scripts.make_models_doc            write it
    python -m scripts.make_models_doc --check    exit 1 when it is not up to date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import mllm
from mllm.compat import SERVED, TESTED
from mllm.doctor import Check, Report
from mllm.models import families

TARGET = Path(__file__).resolve().parent.parent / "docs" / "models.md"
HEAD = f"""# Models

Made by `scripts/make_models_doc.py` from what `mllm.patch` itself accepts: do not edit.
`mllm doctor MODEL` says the same of one model, and needs its `config.json` only. Columns are
`config.model_type`; sizes are those of each family's default configuration.

Made with transformers {TESTED[1]}. Tested with transformers {TESTED[0]} to {TESTED[1]}; mllm warns
once on others.
"""


class Notes:
    """Footnotes of one table: the same text has the same number."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def mark(self, mark: str, texts: Iterable[str]) -> str:
        numbers = []
        for text in texts:
            if text not in self._texts:
                self._texts.append(text)
            numbers.append(str(self._texts.index(text) + 1))
        return f"{mark} <sup>{', '.join(numbers)}</sup>" if numbers else mark

    def lines(self) -> list[str]:
        return [f"{i}. {text}" for i, text in enumerate(self._texts, 1)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def report_of(kind: str) -> Report:
    """The report on a family's default configuration, without weights."""
    config = AutoConfig.for_model(kind)
    text = config.get_text_config()
    # Idefics3 of transformers 5.17 has a padding token outside of its vocabulary by default.
    text.vocab_size = max(text.vocab_size, (text.pad_token_id or 0) + 1)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    return mllm.doctor(model)


def _texts(report: Report, check: Check) -> list[str]:
    # That a paper's layer is scaled to the depth holds for every model.
    notes = [n for n in check.notes if " scaled to " not in n]
    texts = [check.reason, *notes] if check.reason else notes
    texts = [text.replace(report.model, "the model") for text in texts]
    own = rf"^({check.name}|a method)(: | cannot work on the model: | cannot merge in the tower: )"
    return [re.sub(own, "", text) for text in texts]


def by_family(reports: Sequence[Report], what: str) -> list[str]:
    """A table of one kind of check, families as columns, with its footnotes."""
    notes, rows = Notes(), []
    for checks in zip(*(getattr(r, what) for r in reports), strict=True):
        cells = [
            notes.mark({"yes": "✓", "adjust": "(✓)", "no": "✗"}[c.verdict], _texts(r, c))
            for r, c in zip(reports, checks, strict=True)
        ]
        rows.append([f"`{checks[0].name}`", *cells])
    head = ["", *(f"`{r.family}`" for r in reports)]
    return [*table(head, rows), "", *notes.lines()]


def by_backend(reports: Sequence[Report]) -> list[str]:
    """Methods by attention backend; a footnote where any family refuses."""
    notes, rows = Notes(), []
    for checks in zip(*(r.methods for r in reports), strict=True):
        cells = []
        for backend in SERVED:
            said = {c.backends[backend] for c in checks if backend in c.backends}
            refused = sorted(said - {""})
            mark = "✗" if "" not in said else "(✓)" if refused else "✓"
            cells.append(notes.mark(mark, refused))
        rows.append([f"`{checks[0].name}`", *cells])
    return [*table(["", *(f"`{b}`" for b in SERVED)], rows), "", *notes.lines()]


def facts(reports: Sequence[Report]) -> list[str]:
    """Where the parts of each family are."""
    names = list(reports[0].facts)
    rows = [
        [f"`{r.family}`", f"`{r.model}`", *(_plain(r.facts[name]) for name in names)]
        for r in reports
    ]
    return table(["", "class", *(name.replace("_", " ") for name in names)], rows)


def _plain(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def document() -> str:
    """The whole document."""
    reports = [report_of(kind) for kind in families()]
    parts = [
        HEAD,
        "## Methods\n",
        "✓ works, (✓) works, but not with its default parameters, ✗ is refused by `mllm.patch`.\n",
        *by_family(reports, "methods"),
        "\n## Methods by attention backend\n",
        *by_backend(reports),
        "\n## What a method can read\n",
        *by_family(reports, "signals"),
        "\n## What a method can do\n",
        *by_family(reports, "actions"),
        "\n## Ways of running\n",
        *by_family(reports, "ways"),
        "\n## Where things are\n",
        *facts(reports),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    made = document()
    if "--check" in sys.argv[1:]:
        if not TARGET.is_file() or TARGET.read_text() != made:
            sys.exit("docs/models.md is not up to date: run make docs")
    else:
        TARGET.write_text(made)
