"""Write the tables of docs/performance.md, from benchmarks/results.

    python -m scripts.make_performance            write them
    python -m scripts.make_performance --check    exit 1 when the page is not up to date

A part of the page between `<!-- NAMES -->` and `<!-- until here -->` is made from the result files
of these names, all of one suite; a file that is not there has no rows.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mllm.eval.bench_words import CLAIM_PAIRS, commits

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
_PART = re.compile(r"(<!-- made from ([\w ,-]+) -->\n).*?(<!-- until here -->)", re.S)

Row = dict[str, Any]


def times(row: Row, name: str = "ratio") -> str:
    """A ratio with its interval."""
    low, high = row[f"{name}_ci"]
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def kv(row: Row) -> list[str]:
    return [
        times(row),
        f"{row['ideal']:.2f}",
        row["claim"],
        percent(row["payload_bytes"] / row["baseline_kv_bytes"]),
        "–" if row["payload_share"] is None else f"{row['payload_share']:.3f}",
        percent(row["scorer_s"] / row["prefill_s"]),
        percent(row["peak_bytes"] / row["baseline_peak_bytes"]),
    ]


def prefill(row: Row) -> list[str]:
    return [
        str(row["visual"]), str(row["batch"]), times(row), f"{row['ideal']:.2f}",
        percent(row["share"]), times(row, "attainable"), percent(row["attainable_share"]),
    ]  # fmt: skip


def selection(row: Row) -> list[str]:
    at = [str(row["visual"]), str(row["batch"]), f"{row['visual_avg']:.0f}"]
    if "cost" not in row:
        return [*at, "", "", "", row["words"]]
    low, high = (percent(x) for x in row["cost_ci"])
    found = [f"{1e3 * row[key]:,.0f}" for key in ("spent_s", "saved_s")]
    return [*at, *found, f"{percent(row['cost'])} ({low} to {high})", str(row["pairs"])]


def train(row: Row) -> list[str]:
    return [
        row["method"], str(row["visual"]), str(row["batch"]), times(row), f"{row['ideal']:.2f}",
        percent(row["share"]), times(row, "attainable"), row["words"],
    ]  # fmt: skip


def routers(row: Row) -> list[str]:
    return [
        row["part"], str(row["visual"]), str(row["batch"]), row["dtype"], times(row),
        f"{row['ideal']:.2f}", percent(row["share"]), row["words"],
    ]  # fmt: skip


def decode(row: Row) -> list[str]:
    return [
        str(row["visual"]), str(row["batch"]), times(row), f"{row['ideal']:.2f}",
        percent(row["share"]), percent(row["roofline_share"]),
        percent(row["kv_bytes"] / row["baseline_kv_bytes"]), row["words"],
    ]  # fmt: skip


def kernels(row: Row) -> list[str]:
    if "overhead_s" in row:
        return ["", str(row["batch"]), row["dtype"], f"{1e6 * row['overhead_s']:.1f}",
                "", "", "", "", row["words"]]  # fmt: skip
    each = (row.get(f"{name}_s") for name in ("torch", "reference", "triton"))
    return [
        str(row["visual"]), str(row["batch"]), row["dtype"],
        *("" if x is None else f"{1e6 * x:,.0f}" for x in each),
        f"{1e6 * row['ideal_s']:,.0f}", percent(row["share"]), row["words"],
    ]  # fmt: skip


#: By suite: the columns behind the plan, and a row's entries.
TABLES: dict[str, tuple[Sequence[str], Callable[[Row], list[str]]]] = {
    "kv": (
        ["decode step, times as fast", "ideal", "claim", "payload of the full cache",
         "payload of the budget", "choosing, of the prefill", "peak of a step"],
        kv,
    ),
    "prefill": (
        ["visual tokens", "batch", "prefill, times as fast", "ideal", "of the ideal",
         "attainable", "of the attainable"],
        prefill,
    ),
    "selection": (
        ["visual tokens", "batch", "left per layer", "spent, ms", "saved, ms",
         "spent of what is saved", "rounds"],
        selection,
    ),
    "train": (
        ["trained", "visual tokens", "batch", "step, times as fast", "ideal", "of the ideal",
         "attainable", "in words"],
        train,
    ),
    "decode": (
        ["visual tokens", "batch", "step, times as fast", "ideal", "of the ideal",
         "of what the machine can", "keys and values", "in words"],
        decode,
    ),
    "kernels": (
        ["tokens", "batch", "dtype", "torch, µs", "reference, µs", "Triton, µs", "ideal, µs",
         "of the ideal", "in words"],
        kernels,
    ),
    "routers": (
        ["part", "rows", "batch", "dtype", "times as fast", "ideal", "of the ideal", "in words"],
        routers,
    ),
}  # fmt: skip


def part(names: Sequence[str], folder: Path = RESULTS) -> str:
    """Table and conditions of some result files."""
    files = {name: folder / f"{name}.json" for name in names}
    found = {name: json.loads(x.read_text()) for name, x in files.items() if x.is_file()}
    if not found:
        return "Not measured."
    suite = next(iter(found.values()))["suite"]
    if suite.startswith("peer-"):
        return "\n\n".join(map(_peers, found.values()))
    head, entries = TABLES[suite]
    rows = [r for results in found.values() for r in results["rows"] if r["status"] != "refused"]
    body = [[_named(row), *entries(row)] for row in rows if row["status"] != "oom"]
    lines = [*_grid(["plan", *head], body), "", *map(_conditions, found, found.values())]
    lines += [
        f"`{row['plan']}`, {row['visual']} visual tokens, batch {row['batch']}: {row['words']}."
        for row in rows if row["status"] == "oom"
    ]  # fmt: skip
    return "\n".join(lines)


def _named(row: Row) -> str:
    """The plan, and whether its row is a claim."""
    look = f", a look: {row['pairs']} pairs" if row["pairs"] < CLAIM_PAIRS else ""
    return f"`{row['plan']}`{look}"


def _peers(results: dict[str, Any]) -> str:
    peer = results["suite"].removeprefix("peer-")
    what = {"step": "decode step"}.get(kind := results.get("kind", "step"), kind)
    head = ["", "version", f"{what}, times as fast", f"unpatched {kind}, ms", "payload, MiB"]
    versions = {"mllm": results["versions"], peer: results[peer].get("versions", {})}
    body = []
    for name, row in (("mllm", results["ours"]), (peer, results[peer])):
        if row.get("ratio") is None:
            body.append([name, row["words"], "", "", ""])
            continue
        own = versions[name]
        package = [own[n] for n in (name, "optimum-quanto") if n in own]
        about = ", ".join([*package, f"transformers {own['transformers']}", *_torch(name, own)])
        step = f"{1e3 * row['baseline_s']:.0f}"
        size = f"{row['payload_bytes'] / 2**20:.0f}" if "payload_bytes" in row else ""
        body.append([name, about, times(row), step, size])
    return "\n".join([*_grid(head, body), "", _conditions(results["suite"], results)])


def _torch(name: str, versions: dict[str, str]) -> list[str]:
    return [f"torch {versions['torch']}"] if name == "compile" else []


def _conditions(name: str, results: dict[str, Any]) -> str:
    versions = results["versions"]
    return (
        f"[{name}](../benchmarks/results/{name}.json): {results['model_shape']['name']}, "
        f"{results['device']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {commits(results)}."
    )


def _grid(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines]


def page(text: str, folder: Path = RESULTS) -> str:
    """The page with every part made anew."""

    def anew(match: re.Match) -> str:
        return f"{match[1]}{part(match[2].split(', '), folder)}\n{match[3]}"

    return _PART.sub(anew, text)


if __name__ == "__main__":
    made = page(PAGE.read_text())
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != made:
            sys.exit("docs/performance.md is not up to date: run make docs")
    else:
        PAGE.write_text(made)
