"""`mllm report`: the page, the Markdown or the CSV of results, or of two runs side by side."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mllm.cli._common import (
    DeviceOption,
    JsonOption,
    check_writable,
    err_console,
    run_command,
    write_text,
)
from mllm.errors import DataError, MllmError

if TYPE_CHECKING:
    from mllm.eval.gallery import Pictures

KINDS = {".html": "page", ".htm": "page", ".md": "markdown", ".csv": "csv", ".svg": "svg"}
SHOWN = 12


def command(
    results: Annotated[
        Path, typer.Argument(help="JSON Lines file of mllm sweep, or folder of mllm eval.")
    ],
    other: Annotated[
        Path | None, typer.Argument(help="A second run, to be compared with the first.")
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write: .html, .md or .csv; give it again for more.",
            show_default="report.html",
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="An earlier run that RESULTS is compared with.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Also write the tables as Markdown.")
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write the tables as CSV.")] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="Also write the main plot as an SVG file.")
    ] = None,
    gallery: Annotated[
        int, typer.Option(min=0, max=200, help="Questions lost, and won, that the page shows.")
    ] = SHOWN,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model of the results, to draw what plans kept; none draws nothing.",
            show_default="tiny-llava, if the results are its",
        ),
    ] = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Make a self-contained HTML page, Markdown or CSV of results, or compare two runs.

    Example: mllm report sweep.jsonl -o report.html --csv report.csv

    Example: mllm report before.jsonl after.jsonl -o compared.html
    """
    files = Files.of(output, markdown, csv, svg)
    if against is not None and other is not None:
        raise MllmError(
            "two runs to compare with: give the second as an argument or as --against",
            argument="against",
            given=str(against),
            expected="one of the two",
        )
    pair = (against, results) if against is not None else (results, other)
    with_model = Asked(gallery, model, device)
    run_command("report", lambda: report(*pair, files, with_model), json, _show)


@dataclass
class Files:
    """What is written: kind -> paths."""

    paths: dict[str, list[Path]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, output: list[Path] | None, markdown: Path | None, csv: Path | None, svg: Path | None
    ) -> Files:
        """Sort by suffix.

        Raises:
            DataError: a suffix that says nothing.
        """
        from mllm.eval.files import suffix_of

        made = cls()
        only = markdown or csv  # these alone need no page
        for path in output or ([] if only else [Path("report.html")]):
            made.paths.setdefault(KINDS[suffix_of(path, KINDS)], []).append(path)
        for kind, path in (("markdown", markdown), ("csv", csv), ("svg", svg)):
            if path is not None:
                made.paths.setdefault(kind, []).append(path)
        return made

    def check(self) -> None:
        """See that all can be written."""
        for paths in self.paths.values():
            for path in paths:
                check_writable(path)

    def write(self, **makers: Callable[[], str]) -> None:
        """Make all that is asked for, then write it."""
        made = {kind: makers[kind]() for kind in self.paths}
        for kind, paths in self.paths.items():
            for path in paths:
                write_text(path, made[kind])


@dataclass(frozen=True)
class Asked:
    """The gallery: how many questions, and the model that drew."""

    number: int
    model: str | None
    device: str | None


@dataclass
class Results:
    """What a file or a folder holds: cells, what is wrong with it, and the questions in it."""

    name: str
    cells: list[dict[str, Any]]
    warnings: list[str]
    damaged: int
    doc: Callable[[dict[str, Any], int], tuple[str, str]] | None = None
    logged: bool = False


def report(first: Path, second: Path | None, files: Files, asked: Asked) -> dict[str, Any]:
    """Read the results, and write what is asked for.

    Raises:
        DataError: there are no results, or a file cannot be written.
    """
    files.check()
    if second is None:
        made = _report(read(first), files, asked)
    else:
        if "svg" in files.paths:
            raise MllmError(
                "a comparison has no plot of its own",
                argument="svg",
                given=str(files.paths["svg"][0]),
                expected="one run, or another kind of file",
            )
        names = _names(first, second)
        made = _compare(read(first, names[0]), read(second, names[1]), files, asked)
    written = {kind: [str(path) for path in paths] for kind, paths in files.paths.items()}
    page, svg = (written.get(kind, [None])[0] for kind in ("page", "svg"))
    return {"report": page, "svg": svg, "files": written, **made}


def read(path: Path, name: str | None = None) -> Results:
    """The cells of a sweep's file or of an evaluation's folder.

    Raises:
        DataError: there is no such file, it holds nothing, or it is not ours.
    """
    if not path.exists():
        raise DataError(
            f"there is no {path}",
            argument="results",
            given=str(path),
            expected="a JSON Lines file of mllm sweep, or a folder of mllm eval",
        )
    name, warnings = name or _stem(path), []
    if path.is_dir():
        from mllm.eval import logged

        found = logged.read(path)
        for task in found.graded:
            warnings.append(
                f"answers of {task} are graded, not right or wrong; it is left out here, and its "
                "score is in the results of mllm eval."
            )
        for plan in found.costless:
            warnings.append(f"{plan} has no costs in its samples, and is left out here.")
        cells, damaged, doc = found.cells, found.damaged, found.doc
    else:
        from mllm.eval import cells as results_files

        try:
            rows = results_files.read(path)
        except DataError as error:
            raise DataError(
                str(error),
                argument="results",
                given=str(path),
                expected="a JSON Lines file of mllm sweep, or a folder of mllm eval",
            ) from error
        cells, damaged, doc = rows.rows, rows.damaged, None
    if damaged:
        were = "line was" if damaged == 1 else "lines were"
        warnings.insert(0, f"{damaged} damaged {were} skipped in {path.name}.")
    if not cells:
        raise DataError(
            f"{path} holds no results of a sweep" + (f": {warnings[0]}" if warnings else ""),
            argument="results",
            given=str(path),
            expected="a JSON Lines file written by mllm sweep, or a folder of mllm eval",
        )
    styles = sorted({cell.get("style", "plain") for cell in cells})
    if len(styles) > 1:
        raise DataError(
            f"{path} holds results on pictures of several styles: {', '.join(styles)}",
            argument="results",
            given=str(path),
            expected="one style; mllm sweep with another --output keeps them apart",
        )
    for warning in warnings:
        err_console().print(f"Beware: {warning}", markup=False, highlight=False, soft_wrap=True)
    return Results(name, cells, warnings, damaged, doc, path.is_dir())


def _report(results: Results, files: Files, asked: Asked) -> dict[str, Any]:
    from mllm.eval import gallery, plots, table, words
    from mllm.eval import report as pages

    made = table.build(results.cells)
    if not made["rows"]:
        raise DataError(
            f"{results.name} has no method with all of its {len(made['tasks'])} tasks yet",
            argument="results",
            given=results.name,
            expected=f"a finished sweep. {' '.join(made['words'])}",
        )
    if results.logged:
        made |= {"title": "Evaluation", "written": "Written by `mllm report` from `mllm eval`."}
    rows = [_row(row) for row in made["rows"]]
    each = f"{words.per_task(made)} questions each"
    page = pages.Report(
        f"{'Evaluation' if results.logged else 'Yardstick'}: {', '.join(made['tasks'])}; {each}",
        made["words"],
        _facts(made),
        rows,
        changed="questions that are right under one of plan and unpatched model, not both",
        warnings=results.warnings,
    )

    def page_text() -> str:
        tasks, entries, _, _ = table.grouped(results.cells)
        lost, won, counts = gallery.choose(
            entries.values(), list(tasks), asked.number, {row.name for row in rows if row.sanity}
        )
        pictures = _pictures(results, asked, bool(lost or won))
        page.lost, page.won = ([pictures.flip(found) for found in side] for side in (lost, won))
        page.gallery = _sampled(page.lost, page.won, counts, pictures)
        return pages.render(page)

    files.write(
        page=page_text,
        markdown=lambda: table.markdown(made),
        csv=lambda: table.comma_separated(made),
        svg=lambda: plots.picture(rows, f"{len(made['tasks'])} tasks, {each}"),
    )
    shown = {"lost": len(page.lost), "won": len(page.won)}
    return {"rows": len(rows), "damaged": results.damaged, "gallery": shown}


def _compare(first: Results, second: Results, files: Files, asked: Asked) -> dict[str, Any]:
    from mllm.eval import compare

    made = compare.build(first.cells, second.cells, (first.name, second.name))
    page = compare.Page(
        made,
        [
            (run.name, f"{len(run.cells)} cells, weights {about['weights_sha256'][:12]}, "
                       f"{about['dtype']} on {about['device']}")
            for run in (first, second)
            for about in [run.cells[0]["about"]]
        ],
        warnings=[*first.warnings, *second.warnings],
    )  # fmt: skip

    def page_text() -> str:
        lost, won, counts = compare.flips(first.cells, second.cells, made["tasks"], asked.number)
        pictures = _pictures(second, asked, bool(lost or won))
        page.lost, page.won = (
            [pictures.flip(found, first.name) for found in side] for side in (lost, won)
        )
        page.gallery = _sampled(page.lost, page.won, counts, pictures)
        return compare.render(page)

    files.write(
        page=page_text,
        markdown=lambda: compare.markdown(made),
        csv=lambda: compare.comma_separated(made),
    )
    resolved = sum(row["holds"] for row in made["rows"])
    damaged = first.damaged + second.damaged
    return {
        "rows": len(made["rows"]),
        "resolved": resolved,
        "words": made["words"],
        "damaged": damaged,
        "gallery": {"lost": len(page.lost), "won": len(page.won)},
    }


def _pictures(results: Results, asked: Asked, needed: bool) -> Pictures:
    """Pictures of a gallery; with the model, where it is the one of the results.

    Raises:
        DataError: a model that was named, and is not the one.
    """
    from mllm.eval.gallery import Pictures

    bare = Pictures(None, results.doc)
    if not needed or asked.model == "none" or not asked.number:
        return bare
    with err_console().status("loading the model to draw what plans kept"):
        import transformers

        from mllm.eval.provenance import weights_sha256
        from mllm.loading import EMBEDDED, load_model

        transformers.utils.logging.disable_progress_bar()
        about = results.cells[0]["about"]
        name = asked.model or EMBEDDED
        try:
            loaded = load_model(
                name, dtype=about["dtype"], device=asked.device,
                attn_implementation=about["backend"],
            )  # fmt: skip
        except DataError as error:  # the results may be of another machine
            if asked.model is not None or asked.device is not None:
                raise
            bare.missing[f"what plans kept is not drawn: {error}"] = None
            return bare
        ours, theirs = weights_sha256(loaded[0]), about["weights_sha256"]
    if ours == theirs:
        return Pictures(loaded, results.doc)
    if asked.model is not None:
        raise DataError(
            f"the results are of weights {theirs[:12]}, and {name} has {ours[:12]}",
            argument="model",
            given=name,
            expected="the model of the results, or none",
        )
    bare.missing[
        f"what plans kept is not drawn: the results are of weights {theirs[:12]}, which are not "
        "those of the embedded model; --model draws it"
    ] = None
    return bare


def _sampled(lost: list[Any], won: list[Any], counts: dict[bool, int], pictures: Pictures) -> str:
    """How many questions changed, how many are shown, and why some have no picture."""
    said = (
        f"{len(lost)} of {counts[True]:,} lost and {len(won)} of {counts[False]:,} won are shown, "
        "from every task in turn."
    )
    if pictures.model is not None:
        said += " Each shows what the first plan named had kept behind its last cut."
    missing = "; ".join(pictures.missing)
    return said + (f" {missing[0].upper()}{missing[1:]}." if missing else "")


def _names(first: Path, second: Path) -> tuple[str, str]:
    """Short names of two runs that tell them apart."""
    names = _stem(first), _stem(second)
    if names[0] != names[1]:
        return names
    if first.resolve().parent.name != second.resolve().parent.name:
        return tuple(f"{p.resolve().parent.name}/{names[0]}" for p in (first, second))
    return f"{names[0]} (1)", f"{names[1]} (2)"


def _stem(path: Path) -> str:
    """The name of a file or folder, also of `.`."""
    return Path(os.path.abspath(path)).stem


def _facts(made: dict[str, Any]) -> list[tuple[str, str]]:
    from mllm.eval import words

    about = made["about"]
    return [
        ("split", f"{made['split']}, {words.seeds(made)}"),
        ("weights", about["weights_sha256"][:12]),
        ("arithmetic", f"{about['dtype']} on {about['device']}, {about['threads']} threads"),
        ("versions", ", ".join(f"{k} {v}" for k, v in about["versions"].items())),
        ("commit", (about["commit"] or "unknown")[:12]),
    ]


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
            name: (task["score"] * task["n"], task["n"]) for name, task in row["tasks"].items()
        },
        sanity=row["method"].split(":")[0] in (*SANITY, *KV_SANITY),
        flipped=unpatched and unpatched["flipped"],
        ci=tuple(row["ci"]),
        same=row["loyalty"] and row["loyalty"]["share"],
        verdict=row["verdict"],
        kv_bytes=row["kv_bytes"],
        versus={name: row[f"vs_{name}"] for name in ("random", "downsample", "unpatched")},
        task_versus={name: task["vs_unpatched"] for name, task in row["tasks"].items()},
    )


def _show(data: dict[str, Any]) -> None:
    console = Console()
    for text in data.get("words", ()):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for paths in data["files"].values():
        for path in paths:
            console.print(f"wrote {path}", markup=False, soft_wrap=True)
