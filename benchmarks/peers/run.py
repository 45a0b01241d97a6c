"""A peer and we beside each other, each against its own unpatched model, on one random shape.

    python benchmarks/peers/run.py kvpress --python kvpress-env/bin/python
    python benchmarks/peers/run.py quanto  --python quanto-env/bin/python     also hqq
    python benchmarks/peers/run.py fp8
    python benchmarks/peers/run.py compile
    python benchmarks/peers/run.py sparsevlm --python sparsevlm-env/bin/python

What each peer needs is in docs/performance.md. The two libraries run one after the other, batch 1;
each ratio is unpatched time / time with the method, of the same library, in interleaved pairs.
Where a peer is missing or fails, its row says why.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mllm
from mllm.eval import bench, bench_kv, bench_shapes, files
from mllm.eval.bench_compare import change_of
from mllm.eval.stats import median_interval
from mllm.loading import pick_device

SIDE = Path(__file__).with_name("side.py")
Row = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """What is compared.

    Attributes:
        kind: what is timed: decode "step", "prefill", or whole "answer".
        plan: ours, a format string with the settings.
        settings: of the method, ours and theirs; `--set` changes them.
        model: shape by default.
    """

    kind: str
    plan: str
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "bench-cpu"


_BITS = {"bits": 4, "group": 64, "residual": 128}  # transformers' own defaults
_KIVI = "kivi:bits={bits}:group_size={group}:residual={residual}"
PEERS = {
    # kvpress's defaults; it pools by the mean.
    "kvpress": Peer("step", "snapkv:budget={budget}:window={window}:kernel={kernel}:pool=avg",
                    {"budget": 0.25, "window": 64, "kernel": 5}),
    "quanto": Peer("step", _KIVI, _BITS),
    "hqq": Peer("step", _KIVI, _BITS),
    "fp8": Peer("step", _KIVI, {**_BITS, "bits": 8}),
    "compile": Peer("prefill", "visionzip:keep={keep}", {"keep": 64}),
    # Ours keeps a published average of 192, 128, 96 or 64 of 576 tokens; the package so many in
    # its cache behind a whole prefill.
    "sparsevlm": Peer("answer", "sparsevlm:budget={keep}", {"keep": 128, "new": 32},
                      "bench-qwen-cpu"),
}  # fmt: skip


def ours(peer: Peer, plan: str, options: argparse.Namespace, shape: bench_shapes.Shape) -> Row:
    """Our row, by the suites of `mllm bench`, and the conditions of the run."""
    given = dict(model=shape, pairs=options.pairs, dtype=options.dtype, device=options.device,
                 threads=options.threads)  # fmt: skip
    if peer.kind == "step":
        results = bench_kv.kv(**given, plans=[plan], length=[options.length])
    elif peer.kind == "prefill":
        results = bench.prefill(**given, plans=[plan], visual=[options.visual])
    else:
        results = answers(**given, plan=plan, visual=options.visual, new=options.settings["new"])
    (row,) = results.pop("rows")
    return results | {"ours": row}


@bench.restoring_threads()
def answers(*, plan: str, visual: int, new: int, **given: Any) -> Row:
    """Whole answers of `new` tokens, with the plan and without."""
    model, pairs = given.pop("model"), given["pairs"]
    options = bench.Options(visual=[visual], **given)
    base, (point,), results = bench.opened("answers", model, options)
    inputs, other = point.inputs(), bench.twin(base)
    for model in (base, other):
        model.generation_config.eos_token_id = None
    with mllm.patch(other, plan) as patched:
        times, _ = bench.time_pairs(
            base, other, inputs, pairs, timed=functools.partial(_answered, new=new)
        )
        ledger = patched.ledger.as_dict()
    row = point.about(base, plan, pairs) | _times(times[..., 0])
    return {**results, "rows": [row | {
        "visual_avg": ledger["visual_avg"][0], "kv_bytes": ledger["kv_bytes"],
        "baseline_kv_bytes": ledger["baseline_kv_bytes"], "status": _status(pairs),
    }]}  # fmt: skip


@torch.inference_mode()
def _answered(model: Any, inputs: dict[str, Any], new: int) -> tuple[float]:
    clock = bench.clock_of(model)
    clock.mark()
    model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    clock.mark()
    start, end = clock.seconds()
    return (end - start,)


def _times(seconds: np.ndarray) -> Row:
    """Fields of a row from seconds `[pairs, 2]`."""
    each = seconds[:, 0] / seconds[:, 1]
    ratio, *ratio_ci = median_interval(each)
    return {
        "ratio": ratio, "ratio_ci": ratio_ci, "samples": bench.samples(each),
        "baseline_s": float(np.median(seconds[:, 0])),
        "patched_s": float(np.median(seconds[:, 1])),
    }  # fmt: skip


def _status(pairs: int) -> str:
    return "ok" if pairs >= bench.CLAIM_PAIRS else "unresolved"


def theirs(name: str, options: argparse.Namespace, shape: Any, about: Row) -> Row:
    """The peer's row, or `{"status": "skipped", "words": why}`.

    Args:
        about: of :func:`ours`.
    """
    found = asked(name, options, shape, about)
    if isinstance(found, str):
        return {"status": "skipped", "words": found}
    row = {"status": _status(options.pairs), "versions": found.pop("versions")}
    row |= _times(np.array(found.pop("seconds"))) | {"pairs": options.pairs}
    if "prefill_s" in found:
        row["baseline_prefill_s"], row["prefill_s"] = found.pop("prefill_s")
    if "kv_bytes" in found:
        row["baseline_kv_bytes"], row["payload_bytes"] = found.pop("kv_bytes")
    return row | found


def asked(name: str, options: argparse.Namespace, shape: Any, about: Row) -> Row | str:
    """What the peer's interpreter measured, or why it did not."""
    if options.python is None and name in ("kvpress", "quanto", "hqq", "sparsevlm"):
        return f"no --python: the interpreter of an environment that has {name}"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        task = asdict(shape) | options.settings | {
            "peer": name, "visual": about["ours"]["visual"], "words": about["ours"]["text"],
            "pairs": options.pairs, "dtype": options.dtype, "threads": about["threads"],
            "device": pick_device(options.device), "output": str(output),
        }  # fmt: skip
        python = options.python or sys.executable
        # -I: nothing of this folder or of the environment of variables is found by accident.
        try:
            subprocess.run([python, "-I", str(SIDE)], input=json.dumps(task), text=True,
                           capture_output=True, check=True)  # fmt: skip
        except OSError as error:
            return f"{python} cannot be run: {error.strerror}"
        except subprocess.CalledProcessError as error:
            return f"{name} failed: {(error.stderr.strip().splitlines() or ['?'])[-1]}"
        return json.loads(output.read_text())


def words(results: Row, name: str, kind: str) -> str:
    """What the two rows say."""
    lines = []
    for who in ("ours", name):
        row = results[who]
        if row.get("ratio") is None:
            lines.append(f"{who}: {row['words']}")
            continue
        low, high = row["ratio_ci"]
        line = (
            f"{who}: {1e3 * row['baseline_s']:.1f} -> {1e3 * row['patched_s']:.1f} ms per {kind}, "
            f"{row['ratio']:.2f}x ({low:.2f}-{high:.2f})"
        )
        if high < 1:
            line += ", no real speed-up: slower"
        elif low <= 1:
            line += ", no real speed-up: the interval contains 1"
        if "payload_bytes" in row:
            line += (
                f"; keys and values {row['payload_bytes'] / 2**20:.1f} of "
                f"{row['baseline_kv_bytes'] / 2**20:.1f} MiB"
            )
        if "hooks_slots" in row:
            most, least = row["hooks_slots"]
            line += f"; under its hooks layers hold {least} to {most} slots"
        lines.append(line)
    if results["relative"] is not None:
        low, high = results["relative_ci"]
        line = f"our ratio / that of {name}: {results['relative']:.2f} ({low:.2f}-{high:.2f})"
        lines.append(line + ", not resolved" * (low <= 1 <= high))
    if results["ours"]["status"] == "unresolved":
        lines.append(f"a look, no claim: {results['ours']['pairs']} pairs, or not resolved")
    return "\n".join(lines)


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("--python", help="interpreter of an environment that has the peer")
    parser.add_argument("--model", help="a random shape of mllm bench")
    parser.add_argument("--length", type=int, default=bench_kv.LENGTH, help="of prompts, for steps")
    parser.add_argument("--visual", type=int, default=576, help="tokens, for prefills and answers")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of the method, such as budget=0.5")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=bench.CLAIM_PAIRS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", help="default: benchmarks/results/peer-NAME.json")
    options = parser.parse_args()
    peer = PEERS[options.peer]
    options.settings = peer.settings | dict(options.set)
    if unknown := set(options.settings) - set(peer.settings):
        parser.error(f"{options.peer} has no setting {', '.join(unknown)}")
    plan = peer.plan.format(**options.settings)
    shape = bench_shapes.SHAPES[options.model or peer.model]
    torch.manual_seed(0)
    results = run(options.peer, peer, plan, options, shape, theirs)
    output = options.output or f"benchmarks/results/peer-{options.peer}.json"
    files.write_json(Path(output), results)
    print(words(results, options.peer, peer.kind))


def run(
    name: str, peer: Peer, plan: str, options: argparse.Namespace, shape: Any,
    theirs: Callable[..., Row],
) -> Row:  # fmt: skip
    """The results object, with a row for us and one for the peer."""
    results = ours(peer, plan, options, shape)
    results |= {"suite": f"peer-{name}", "kind": peer.kind, "settings": options.settings}
    results[name] = theirs(name, options, shape, results)
    rows, found = (results[name], results["ours"]), [None, None, None]
    if all(row.get("ratio") is not None for row in rows):
        found = change_of(*rows, "ratio")
    return results | {"relative": found[0], "relative_ci": found[0] and list(found[1:3])}


if __name__ == "__main__":
    main()
