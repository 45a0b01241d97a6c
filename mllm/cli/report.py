"""`mllm report`: the HTML page of a finished sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mllm.cli._common import JsonOption, check_writable, run_command, write_text
from mllm.errors import DataError


def command(
    results: Annotated[Path, typer.Argument(help="JSON Lines file of mllm sweep.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path(
        "report.html"
    ),
    svg: Annotated[
        Path | None, typer.Option("--svg", help="Also write the main plot as an SVG file.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Build a self-contained HTML report from the results of a sweep.

    Example: mllm report benchmarks/results/yardstick.jsonl -o report.html
    """
    run_command("report", lambda: report(results, output, svg), json, _show)


def report(results: Path, output: Path, svg: Path | None) -> dict[str, Any]:
    """Read the cells, write the page and, if asked for, the plot.

    Raises:
        DataError: `results` holds no sweep, or a file cannot be written.
    """
    for path in filter(None, (output, svg)):
        check_writable(path)
    from mllm.eval import cells as results_files
    from mllm.eval import report as pages
    from mllm.eval import table

    cells = results_files.read(results).rows
    if not cells:
        raise DataError(
            f"{results} holds no results of a sweep",
            argument="results",
            given=str(results),
            expected="a JSON Lines file written by mllm sweep",
        )
    styles = sorted({cell.get("style", "plain") for cell in cells})
    if len(styles) > 1:
        raise DataError(
            f"{results} holds results on pictures of several styles: {', '.join(styles)}",
            argument="results",
            given=str(results),
            expected="one style; mllm sweep with another --output keeps them apart",
        )
    made = table.build(cells)
    if not made["rows"]:
        raise DataError(
            f"{results} has no method with all of its {len(made['tasks'])} tasks yet",
            argument="results",
            given=str(results),
            expected=f"a finished sweep. {' '.join(made['words'])}",
        )
    rows = [_row(row) for row in made["rows"]]
    about = made["about"]
    page = pages.Report(
        f"Yardstick: {', '.join(made['tasks'])}; {made['n']} questions each",
        made["words"],
        [
            ("split", f"{made['split']}, seed {made['seed']}"),
            ("weights", about["weights_sha256"][:12]),
            ("arithmetic", f"{about['dtype']} on {about['device']}, {about['threads']} threads"),
            ("versions", ", ".join(f"{k} {v}" for k, v in about["versions"].items())),
            ("commit", (about["commit"] or "unknown")[:12]),
        ],
        rows,
        changed="questions that are right under one of plan and unpatched model, not both",
    )
    write_text(output, pages.render(page))
    if svg:
        write_text(svg, pages.picture(rows, f"{len(made['tasks'])} tasks of {made['n']} questions"))
    return {"report": str(output), "svg": svg and str(svg), "rows": len(rows)}


def _row(row: dict[str, Any]) -> Any:
    from mllm.eval.report import Row
    from mllm.eval.sweep import KV_SANITY, SANITY

    unpatched = row["vs_unpatched"]
    return Row(
        row["method"],
        row["plan"] if row["budget"] is not None else "",
        row["budget"],
        visual_avg=row["visual_avg"],
        flops=row["flops"],
        prefill_s=row["prefill_s"],
        tasks={
            name: (round(task["score"] * task["n"]), task["n"])
            for name, task in row["tasks"].items()
        },
        sanity=row["method"] in (*SANITY, *KV_SANITY),
        flipped=unpatched and unpatched["flipped"],
        ci=tuple(row["ci"]),
        same=row["loyalty"] and row["loyalty"]["share"],
        verdict=row["verdict"],
    )


def _show(data: dict[str, Any]) -> None:
    for path in filter(None, (data["report"], data["svg"])):
        Console().print(f"wrote {path}", markup=False, soft_wrap=True)
