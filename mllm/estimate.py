"""`mllm.estimate`: what a plan will cost, without weights. Light until it is called."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from mllm.roofline import Hardware


@dataclass(frozen=True)
class Cost:
    """What one batch costs, with the plan or without. Sums over the batch, bytes and seconds.

    Attributes:
        visual: visual tokens of a sample that enter the language model.
        visual_avg: visual tokens of a sample per decoder layer, on average.
        tower_flops, projector_flops, selection_flops, llm_flops: of the prefill.
        prefill_flops: their sum, which is the ledger's.
        kv_bytes: keys and values behind the prefill.
        weight_bytes: of the model, and of what the plan learns.
        ttft_s: roofline of the prefill.
        decode_s: roofline of one decode step, a mean over the new tokens.
        total_s: of the prefill and all decode steps.
    """

    visual: int
    visual_avg: float
    tower_flops: float
    projector_flops: float
    selection_flops: float
    llm_flops: float
    prefill_flops: float
    kv_bytes: int
    weight_bytes: int
    ttft_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` gives.

    Attributes:
        model, family: name and `config.model_type`.
        parameters: of the model without the plan.
        plan: as text; empty without a plan.
        dtype: of weights, activations and cache.
        prompt: what was asked for: `batch`, `images` of each sample and their `size` (height,
            width; None where the model fixes it), `visual` and `text` tokens of each sample,
            `new` tokens.
        hardware: a device and its rates.
        plain, patched: costs without the plan and with it.
        layers: of every decoder layer `tokens` and `visual` tokens of a sample that enter it;
            `flops`, `kv_bytes`, and the same without the plan (`plain_`), of the batch.
        ledger: `as_dict()` of the ledger that the numbers come from.
        assumptions: what stands behind the numbers, in words.
    """

    model: str
    family: str
    parameters: int
    plan: str
    dtype: str
    prompt: dict[str, Any]
    hardware: Hardware
    plain: Cost
    patched: Cost
    layers: list[dict[str, Any]]
    ledger: dict[str, Any]
    assumptions: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> dict[str, float]:
        """How many times less the plan needs: FLOPs, bytes and seconds of the unpatched model."""
        names = ("prefill_flops", "kv_bytes", "ttft_s", "decode_s", "total_s")
        found = {name: (getattr(self.plain, name), getattr(self.patched, name)) for name in names}
        return {name: a / b for name, (a, b) in found.items() if b}

    @property
    def break_even(self) -> int | None:
        """New tokens from which on the plan saves time; None where there is no such number.

        0 where its prefill is no slower and its steps are not either.
        """
        late = self.patched.ttft_s - self.plain.ttft_s
        saved = self.plain.decode_s - self.patched.decode_s
        if late <= 0:
            return 0 if saved >= 0 else None
        return 1 + -int(-late // saved) if saved > 0 else None

    @property
    def _faster_up_to(self) -> int:
        """New tokens up to which a plan saves time whose steps take longer."""
        early = self.plain.ttft_s - self.patched.ttft_s
        late = self.patched.decode_s - self.plain.decode_s
        return math.ceil(early / late) if early > 0 and late > 0 else 0

    @property
    def selection_share(self) -> float | None:
        """What choosing costs, of the FLOPs that fewer tokens save; None if nothing is saved."""
        cost = self.patched.selection_flops
        saved = self.plain.prefill_flops - self.patched.prefill_flops + cost
        return cost / saved if saved > 0 else None

    @property
    def fits(self) -> bool | None:
        """Whether weights and the full cache fit into the device; None if nobody knows."""
        memory = self.hardware.memory
        return None if memory is None else self.peak_bytes <= memory

    @property
    def peak_bytes(self) -> int:
        """Weights, and the cache behind the last new token, with the plan; no activations."""
        grown = self.ledger["baseline_kv_bytes"] // max(1, sum(self.ledger["prompt_tokens"]))
        new = grown * self.prompt["new"] * self.prompt["batch"]
        return self.patched.weight_bytes + self.patched.kv_bytes + new

    def as_dict(self) -> dict[str, Any]:
        """Plain Python values only."""
        import dataclasses

        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        costs = {name: dataclasses.asdict(data[name]) for name in ("plain", "patched")}
        hardware = {f.name: getattr(self.hardware, f.name) for f in dataclasses.fields(
            self.hardware)}  # fmt: skip
        return {
            "schema": 1,
            **data,
            **costs,
            "hardware": hardware | {"flops": dict(self.hardware.flops)},
            "ratios": self.ratios,
            "break_even": self.break_even,
            "selection_share": self.selection_share,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
        }

    def tables(self, by_layer: bool = False) -> Iterator[Table | str]:
        """The estimate for a :class:`rich.console.Console`.

        Args:
            by_layer: also a table with a row for every decoder layer.
        """
        from rich.table import Table

        prompt = self.prompt
        pictures = f"{prompt['images']} image" + "s" * (prompt["images"] != 1)
        size = prompt["size"]
        at = f" of {size[1]} x {size[0]} pixels" if size else ""
        yield (
            f"{self.model} ({self.parameters / 1e9:.2f} G parameters, {self.dtype}), batch "
            f"{prompt['batch']}: {pictures}{at}, {prompt['visual']} visual and {prompt['text']} "
            f"text tokens, {prompt['new']} new ones; {self.hardware.name}"
        )
        table = Table(box=None, pad_edge=False)
        columns = ["", "unpatched", self.plan or "no plan", "unpatched / plan"]
        for column in columns:
            table.add_column(column, justify="right" if column else "left", overflow="fold")
        for name, show, key in _ROWS:
            a, b = getattr(self.plain, key), getattr(self.patched, key)
            ratio = f"{a / b:.2f}" if a and b else "–"
            table.add_row(name, show(a), show(b), ratio)
        yield table
        if by_layer:
            table = Table(box=None, pad_edge=False)
            for column in ("layer", "tokens", "visual", "GFLOPs", "unpatched", "KV MiB",
                           "unpatched"):  # fmt: skip
                table.add_column(column, justify="right")
            for row in self.layers:
                cells = [str(row[key]) for key in ("layer", "tokens", "visual")]
                cells += [f"{row[key] / 1e9:,.2f}" for key in ("flops", "plain_flops")]
                cells += [f"{row[key] / 2**20:,.2f}" for key in ("kv_bytes", "plain_kv_bytes")]
                table.add_row(*cells)
            yield table
        yield from self._remarks()

    def _remarks(self) -> Iterator[str]:
        if self.plan:
            even = self.break_even
            if even is None and (most := self._faster_up_to) > 0:
                yield f"The plan is faster up to {most} new tokens: its steps take longer."
            elif even is None:
                yield "No real speed-up: the plan is slower for any number of new tokens."
            elif even:
                yield f"The plan is faster from {even} new tokens on."
            elif self.patched.total_s == self.plain.total_s:
                yield "No real speed-up: both take as long."
            if (share := self.selection_share) is not None and self.patched.selection_flops:
                yield f"Choosing costs {share:.2%} of the FLOPs that it saves."
        if self.fits is False:
            peak, memory = self.peak_bytes / 1e9, self.hardware.memory / 1e9
            yield f"Weights and cache need {peak:.0f} GB; {self.hardware.name} has {memory:.0f}."
        yield from (f"- {text}" for text in self.assumptions)

    def __str__(self) -> str:
        import io

        from rich.console import Console

        console = Console(file=io.StringIO(), width=100)
        for part in self.tables():
            console.print(part, markup=False) if isinstance(part, str) else console.print(part)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _gflops(x: float) -> str:
    return f"{x / 1e9:,.2f} GFLOPs"


def _mib(x: float) -> str:
    return f"{x / 2**20:,.1f} MiB"


def _ms(x: float) -> str:
    return f"{1e3 * x:,.3f} ms"


_ROWS = (
    ("visual tokens", str, "visual"),
    ("per layer", lambda x: f"{x:.1f}", "visual_avg"),
    ("tower", _gflops, "tower_flops"),
    ("projector", _gflops, "projector_flops"),
    ("selection", _gflops, "selection_flops"),
    ("language model", _gflops, "llm_flops"),
    ("prefill", _gflops, "prefill_flops"),
    ("KV cache", _mib, "kv_bytes"),
    ("weights", _mib, "weight_bytes"),
    ("first token", _ms, "ttft_s"),
    ("decode step", _ms, "decode_s"),
    ("all tokens", _ms, "total_s"),
)


def estimate(
    model: Any,
    plan: Any = None,
    *,
    images: int | None = None,
    size: tuple[int, int] | None = None,
    visual: int | None = None,
    text: int = 64,
    new: int = 128,
    batch: int = 1,
    hardware: str | Hardware = "h100",
    dtype: str = "bfloat16",
) -> Estimate:
    """Tokens, FLOPs, KV bytes and roofline times of a plan on a model, without its weights.

    The engine runs over tensors that have a shape and no values, so that its own ledger counts:
    tokens, FLOPs and KV bytes are those of a real run on as many tokens. Times are a roofline, a
    bound that real runs stay above; see `assumptions` of the result.

    ```python
    print(mllm.estimate("qwen2.5-vl-7b", "visionzip:keep=64", size=(1080, 1920)))
    ```

    Args:
        model: a name of :data:`mllm.shapes.SHAPES`, a folder with ``config.json``, a hub name, a
            configuration, or a model.
        plan: as :func:`mllm.patch` takes it; None is no plan.
        images: of every sample, where a tile is an image if the model takes tiles so; None is one.
        size: (height, width) of the images in pixels as the tower sees them, for models that take
            any; None is 768 x 1024.
        visual: visual tokens of every sample, instead of `images` or `size`.
        text: text tokens of every sample.
        new: tokens of the answer.
        batch: samples, all alike.
        hardware: a name of :data:`mllm.roofline.HARDWARE`, or a device of your own.
        dtype: of weights, activations and cache: `bfloat16`, `float16` or `float32`.

    Raises:
        DataError: a number that cannot be, no such model or hardware.
        PlanError: the plan cannot work on this model, or how much it keeps depends on the
            picture, so that nobody can say beforehand.
    """
    from mllm.estimating import run

    return run(
        model, plan, images=images, size=size, visual=visual, text=text, new=new, batch=batch,
        hardware=hardware, dtype=dtype,
    )  # fmt: skip
