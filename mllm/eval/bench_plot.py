"""A result file of the bench as a picture; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm.errors import DataError
from mllm.eval.bench_words import Row, verdict

KINDS = (".svg", ".png")
_COLOURS = {"faster": "#1b7837", "slower": "#b2182b", "open": "#777777", "none": "#3b6ea5"}
_LABELS = {
    "ratio": "times as fast (95 % interval); a bar marks the ideal",
    "cost": "what choosing costs, of what fewer tokens save (95 % interval)",
    "share": "share of the ideal reached (95 % interval)",
}


def check(path: str | Path) -> None:
    """Find out before the work that a picture cannot be made.

    Raises:
        DataError: another kind of file, or no matplotlib.
    """
    if Path(path).suffix not in KINDS:
        raise DataError(
            f"plot={path} is no picture that can be made",
            argument="plot", given=str(path), expected=f"a name that ends in {' or '.join(KINDS)}",
        )  # fmt: skip
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DataError(
            "plot needs matplotlib, which is not installed",
            argument="plot", given=str(path), expected="pip install 'mllm-efficiency[eval]'",
        ) from error  # fmt: skip


def plot(results: dict[str, Any], path: str | Path) -> Path:
    """Draw every row that was measured, with its interval.

    Rows that are resolved faster than unpatched are green, slower ones red, others grey. A suite of
    kernels shows the share of the ideal instead, where nothing was compared.

    Args:
        results: of a suite.
        path: SVG or PNG; written whole.

    Raises:
        DataError: as :func:`check`.
    """
    check(path)
    from matplotlib.figure import Figure

    shown = [(row, name) for row in results["rows"] if (name := figure_of(row)) is not None]
    names = list(dict.fromkeys(name for _, name in shown)) or ["ratio"]
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(shown)), layout="constrained")
    heights = [1 + sum(name == own for _, own in shown) for name in names]
    panels = figure.subplots(len(names), squeeze=False, height_ratios=heights)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        own = [row for row, which in shown if which == name]
        for place, row in enumerate(own):
            low, high = row[f"{name}_ci"]
            colour = _COLOURS[verdict(row)]
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([row[name]], [place], "o", color=colour)
            if name == "ratio":
                axes.plot([row["ideal"]], [place], "|", color="black", markersize=12)
        axes.axvline(0 if name == "cost" else 1, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(own)), [label(row) for row in own], fontsize=8)
        axes.set_ylim(len(own) - 0.5, -0.5)
        axes.set_xlabel(_LABELS[name])
    figure.suptitle(
        f"{results['suite']}, {results['model_shape']['name']}, {results['device']}", fontsize=9
    )
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    return temporary.replace(path)


def figure_of(row: Row) -> str | None:
    """Which field of a row is drawn; None where nothing was measured."""
    return next((n for n in _LABELS if row.get(n) is not None and row.get(f"{n}_ci")), None)


def label(row: Row) -> str:
    """A row's name beside its mark."""
    more = [row["part"]] if "part" in row else []
    return ", ".join([row["plan"], *more, f"{row['visual']} tokens, batch {row['batch']}"])
