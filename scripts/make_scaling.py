"""Write docs/scaling.md and its picture from a result of benchmarks/scaling.py.

    python -m scripts.make_scaling            write them; needs matplotlib
    python -m scripts.make_scaling --check    exit 1 when the page is not up to date

Without a result there is no page.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mllm
from mllm.estimate import Estimate
from mllm.eval.bench_words import CLAIM_PAIRS, commits
from mllm.eval.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "scaling.md"
PICTURE = PAGE.with_suffix(".svg")
COLOURS = ("#3b6ea5", "#b2182b", "#1b7837")

#: What is extrapolated to: shapes, devices, and visual tokens of a prompt.
MODELS = {"llava-1.5-13b": 576, "qwen2.5-vl-7b": 1, "qwen2.5-vl-72b": 1}
HARDWARE = ("a100-80gb", "h200")
TOKENS = (2_304, 20_160, 100_224, 1_000_512)  # all of them whole pictures of LLaVA
ANSWER = 128

ABOUT = """\
# Scaling

How prefill, decode, memory and selection grow with the visual tokens of a prompt: measured on a
small random shape, fitted by a law, compared with `mllm estimate`, and carried on to large models
by the roofline. `python -m scripts.make_scaling` writes this page from the result file.

```
python benchmarks/scaling.py --output benchmarks/results/{name}.json
```
"""
LAW = """\
## The law

A decoder layer of the unpatched prefill costs `a + b n + c n^2` seconds for `n` tokens of each
sample, its decode step `a + b n`: least squares of relative errors, no coefficient below zero. Both
are the time from the decoder on, LM head included, shared out over the layers. Three points are met
by three coefficients exactly, and their error says nothing. The FLOPs of `mllm estimate` are such a
polynomial too, so that the rate of either part is what the machine reached in it: projections and
FFN in the linear part, attention in the quadratic one.
"""
FURTHER = """\
## Carried on

What `mllm estimate` says of public shapes under the same plan. **Nothing in this table was
measured**: tokens, FLOPs and KV bytes are those of the ledger, times are a roofline. It assumes

{assumptions}
- one sample, and {answer} new tokens, over which a decode step is a mean; 64 tokens of text, or one
  more than there are pictures where that is more (LLaVA, {each} visual tokens each);
- one device, of which the data sheet's rates are reached and whose memory holds everything: where
  weights and cache do not fit, the row says so, and its times are those of one that had the room;
- positions beyond what a model was trained on, without asking whether its answers are any good.
"""


def seconds(value: float) -> str:
    """Three significant digits in a fitting unit."""
    for unit, size in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if value * size >= 1 or unit == "µs":
            return f"{value * size:,.3g} {unit}"
    raise AssertionError


def grid(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return [f"| {' | '.join(line)} |" for line in lines]


def interval(pairs: int, value: str, low: str, high: str) -> str:
    """A value with its interval; of one pair there is none."""
    return value if pairs == 1 else f"{value} ({low} to {high})"


def measured(rows: list[dict[str, Any]]) -> list[str]:
    head = ["visual tokens", "batch", "pairs", "prefill", "times as fast", "of the FLOPs ideal",
            "from the decoder on", "decode step", "times as fast", "choosing", "peak, MiB",
            "with the plan", "ledger = estimate"]  # fmt: skip
    body = []
    for row in sorted(rows, key=lambda row: (row["batch"], row["visual"])):
        at = [f"{row['visual']:,}", str(row["batch"])]
        if row["status"] in ("oom", "timeout"):
            body.append([*at, "–", row["words"], *["–"] * (len(head) - 4)])
            continue
        whole, decoder, step = (
            interval(row["pairs"], *(f"{x:.2f}" for x in (row[name], *row[f"{name}_ci"])))
            for name in ("ratio", "llm_ratio", "decode_ratio")
        )
        spent = (row["selection_s"], *row["selection_s_ci"])
        body.append([
            *at, f"{row['pairs']}{', a look' * (row['pairs'] < CLAIM_PAIRS)}",
            seconds(row["baseline_s"]), whole, f"{row['share']:.0%}", decoder,
            seconds(row["decode_baseline_s"]), step,
            interval(row["pairs"], *(f"{x / row['patched_s']:.1%}" for x in spent)),
            f"{row['baseline_peak_bytes'] / 2**20:,.0f}", f"{row['peak_bytes'] / 2**20:,.0f}",
            "yes" if row["estimate_equal"] else "**no**",
        ])  # fmt: skip
    return grid(head, body)


def fitted(laws: list[dict[str, Any]]) -> list[str]:
    head = ["batch", "points", "tokens", "a, ms", "b, µs", "c, ns", "largest error",
            "linear part, GFLOP/s", "quadratic part", "decode a, µs", "b, ns",
            "largest error"]  # fmt: skip
    body = []
    for law in laws:
        a, b, c = law["prefill"]
        first, slope = law["decode"]
        rates = ["–" if rate is None else f"{rate / 1e9:,.0f}" for rate in law["rates"]]
        tokens = " to ".join(f"{n:,}" for n in law["tokens"])
        body.append([
            str(law["batch"]), str(law["points"]), tokens, f"{1e3 * a:.3g}", f"{1e6 * b:.3g}",
            f"{1e9 * c:.3g}", f"{law['prefill_error']:.1%}", *rates, f"{1e6 * first:.3g}",
            f"{1e9 * slope:.3g}", f"{law['decode_error']:.1%}",
        ])  # fmt: skip
    return grid(head, body)


def further(plan: str) -> tuple[list[str], list[str]]:
    """The table of extrapolations, and what they assume."""
    head = ["", "device", "visual tokens", "prefill, TFLOPs", "with the plan", "KV, GB",
            "with the plan", "first token", "with the plan", "times as fast", "decode step",
            "times as fast", "fits, with the plan"]  # fmt: skip
    body, said = [], {}
    for name, each in MODELS.items():
        for visual in TOKENS:
            text = max(64, visual // each + 1 if each > 1 else 0)
            for hardware in HARDWARE:
                found = mllm.estimate(name, plan, visual=visual, text=text, new=ANSWER,
                                      hardware=hardware)  # fmt: skip
                said |= dict.fromkeys(found.assumptions)
                body.append([name, hardware, f"{visual:,}", *_further(found)])
    return grid(head, body), list(said)


def _further(found: Estimate) -> list[str]:
    plain, own, ratio = found.plain, found.patched, found.ratios
    return [
        *(f"{x.prefill_flops / 1e12:,.1f}" for x in (plain, own)),
        *(f"{x.kv_bytes / 1e9:,.2f}" for x in (plain, own)),
        *(seconds(x.ttft_s) for x in (plain, own)), f"{ratio['ttft_s']:.2f}",
        seconds(plain.decode_s), f"{ratio['decode_s']:.2f}", "yes" if found.fits else "no",
    ]  # fmt: skip


def picture(results: dict[str, Any]) -> str:
    """Seconds of the decoder's prefill, and times as fast, over visual tokens, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["status"] not in ("oom", "timeout")]
    rows.sort(key=lambda row: row["visual"])
    layers = results["model_shape"]["text"]["num_hidden_layers"]
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    times, gains = figure.subplots(1, 2)
    for colour, batch in zip(COLOURS, sorted({row["batch"] for row in rows}), strict=False):
        own = [row for row in rows if row["batch"] == batch]
        tokens = [row["visual"] for row in own]
        for law in (law for law in results["laws"] if law["batch"] == batch):
            said = [
                layers * sum(c * (row["visual"] + row["text"]) ** i
                             for i, c in enumerate(law["prefill"]))
                for row in own
            ]  # fmt: skip
            times.plot(tokens, said, color=colour, linewidth=0.8)
        for which, face in (("baseline", colour), ("patched", "white")):
            times.plot(tokens, [row[f"llm_{which}_s"] for row in own], "o", color=colour,
                       markerfacecolor=face, markersize=4.5)  # fmt: skip
        for name, mark in (("llm_ratio", "o-"), ("decode_ratio", "^--")):
            values = [row[name] for row in own]
            gains.plot(tokens, values, mark, color=colour, markersize=4.5, linewidth=1)
            gains.vlines(tokens, *zip(*(row[f"{name}_ci"] for row in own), strict=True),
                         color=colour, linewidth=1)  # fmt: skip
        times.plot([], [], "o", color=colour, label=f"batch {batch}")
    times.plot([], [], "o", color="black", markerfacecolor="white", label="with the plan")
    times.plot([], [], color="black", linewidth=0.8, label="the law")
    gains.plot([], [], "o-", color="black", label="prefill")
    gains.plot([], [], "^--", color="black", label="decode step")
    gains.axhline(1, color="black", linewidth=0.8, linestyle=":")
    times.set(yscale="log", ylabel="seconds of a prefill, from the decoder on")
    gains.set(ylabel="times as fast as unpatched, from the decoder on")
    ticks = sorted({row["visual"] for row in rows})
    for axes in (times, gains):
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7, rotation=30)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("visual tokens of a sample")
        axes.legend(fontsize=8)
    drawn = io.StringIO()
    # The same file from the same rows, with its text as text.
    with matplotlib.rc_context({"svg.hashsalt": "mllm", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n"


def page(name: str, results: dict[str, Any]) -> str:
    """The page of a result file."""
    shape, versions = results["model_shape"], results["versions"]
    text, vision = shape["text"], shape["vision"]
    dtype = next(row["dtype"] for row in results["rows"] if "dtype" in row)
    table, assumptions = further(results["plan"])
    conditions = (
        f"Shape `{shape['name']}` ({shape['family']}): LLM {text['hidden_size']} wide, FFN "
        f"{text['intermediate_size']}, {text['num_hidden_layers']} layers, "
        f"{text['num_attention_heads']}/{text['num_key_value_heads']} heads; tower "
        f"{vision['hidden_size']} wide, {vision['depth']} blocks; "
        f"{shape['parameters'] / 1e6:.0f} M random weights. Plan `{results['plan']}` against the "
        f"unpatched model, {dtype}, interleaved; 95 % intervals. {results['device']}, "
        f"{results['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {commits(results)}. "
        f"[{name}](../benchmarks/results/{name}.json)."
    )
    parts = [
        ABOUT.format(name=name),
        "## Measured\n",
        conditions + "\n",
        f"Rows of fewer than {CLAIM_PAIRS} pairs are a look, not a claim. The prefill has the "
        "tower in it, which the plan does not shorten; \"from the decoder on\" is times as fast "
        "without it. Choosing is what the plan's prefill takes longer than one that keeps the "
        "first tokens, as a share of it.\n",
        f"![Seconds of a prefill and times as fast over visual tokens]({PICTURE.name})\n",
        *measured(results["rows"]),
        "",
        LAW,
        *fitted(results["laws"]),
        "",
        FURTHER.format(
            assumptions="\n".join(f"- {x}" for x in assumptions), answer=ANSWER,
            each=max(MODELS.values()),
        ),
        *table,
        "",
    ]
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> None:
    found = sorted(RESULTS.glob("scaling-*.json"))
    if not found:
        sys.exit("nothing was measured: run benchmarks/scaling.py first")
    if len(found) > 1:
        sys.exit(f"the page is of one result, and there are {', '.join(x.name for x in found)}")
    results = json.loads(found[0].read_text())
    if "suite" not in results:
        sys.exit(f"no point of {found[0].name} was measured: all ran out of memory or time")
    made = page(found[0].stem, results)
    if "--check" not in arguments:
        write_text(PICTURE, picture(results))
        write_text(PAGE, made)
    elif not PAGE.is_file() or PAGE.read_text() != made:
        sys.exit("docs/scaling.md is not up to date: run python -m scripts.make_scaling")


if __name__ == "__main__":
    main(sys.argv[1:])
