"""What a plan does with one question: tokens layer by layer, attention read, answers, the ledger.

```python
from mllm.eval.inspection import inspect

seen = inspect(model, processor, "visionzip:keep=64+fastv:layer=2", "how many dogs?", [picture])
seen                        # in a notebook: the interactive page
seen.save("inspect.html")   # the same as a file; .png is the figure
seen.figure()               # a PIL picture
```
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from mllm.errors import DataError
from mllm.eval import files, overlay, seen
from mllm.eval.answer import answer
from mllm.eval.plans import make_plan
from mllm.eval.report import templates
from mllm.loading import PLACEHOLDER, build_inputs, chat_text
from mllm.patch import patch
from mllm.plan import Plan
from mllm.signals import AttentionRows, ColumnMass, VisionAttention
from mllm.tokens import Layout
from mllm.views import with_tiles

#: Of files that :meth:`Inspection.save` writes.
SUFFIXES = (".html", ".htm", ".png")


@dataclass
class Heat:
    """Attention that a stage has read, as it was given it.

    Attributes:
        stage: name of the method.
        what: in words, with the layer or the block.
        layer: decoder layer before which the stage acts; None before the LLM.
        values: float32 `[visual tokens]`; NaN where a token had gone, or was not asked about.
    """

    stage: str
    what: str
    layer: int | None
    values: np.ndarray


@dataclass
class Inspection:
    """One question under a plan. In a notebook it shows itself.

    Attributes:
        question, plan: as given; `plan` is spec text.
        unpatched_answer, answer: without the plan, and with it.
        views: grids of visual tokens: pictures, tiles or frames.
        images: one for each view, as the model saw it.
        steps: places of the model at which tokens go (:func:`mllm.eval.seen.steps`).
        kept: per decoder layer the visual tokens that enter it: int64 indices.
        heat: attention that stages have read.
        reads: (stage, signal, in words) of everything that they read.
        ledger: of the prefill under the plan, as `patched.ledger.as_dict()`.
        panels: titles and drawings of :meth:`figure`.
    """

    question: str
    plan: str
    unpatched_answer: str
    answer: str
    views: list[seen.View]
    images: list[Image.Image]
    steps: list[seen.Step]
    kept: list[np.ndarray]
    heat: list[Heat]
    reads: list[tuple[str, str, str]]
    ledger: dict[str, Any]
    panels: list[overlay.Panel] = field(default_factory=list)

    @property
    def budgets(self) -> list[dict[str, Any]]:
        """Per view: `{name, tokens, kept_llm, last, average}`; the last two over decoder layers."""
        rows = []
        for i, view in enumerate(self.views):
            counts = [len(view.kept(kept)) for kept in self.kept]
            rows.append(
                {
                    "name": view.name or f"picture {i + 1}",
                    "tokens": len(view.tokens),
                    "kept_llm": len(view.kept(self.steps[0].kept)),
                    "last": counts[-1],
                    "average": sum(counts) / len(counts),
                }
            )
        return rows

    @property
    def flops_share(self) -> float:
        """Prefill FLOPs as a share of the unpatched model's."""
        return self.ledger["prefill_flops"][0] / self.ledger["baseline_prefill_flops"][0]

    def figure(self, columns: int = 3) -> Image.Image:
        """The views and what each step leaves of them, with question, answers and cost."""
        tokens, kept = self.ledger["visual_tokens"][0], self.ledger["kept_llm"][0]
        caption = [
            f"Question: {self.question}",
            f"Unpatched answer: {self.unpatched_answer}",
            f"With {self.plan}: {self.answer}",
            f"{tokens} visual tokens, {kept} into the LLM, {self.ledger['visual_avg'][0]:.1f} per "
            f"decoder layer on average; {self.flops_share:.0%} of the prefill FLOPs",
        ]
        return overlay.figure(self.panels, caption, columns=columns)

    def html(self) -> str:
        """The interactive page: one file that fetches nothing."""
        return (
            templates()
            .get_template("inspect.html.j2")
            .render(it=self, data=_script(self._drawn()), rows=_ledger_rows(self.ledger))
        )

    def save(self, path: str | Path) -> Path:
        """Write the page (.html) or the figure (.png), whole.

        Raises:
            DataError: another suffix.
        """
        path = Path(path)
        if files.suffix_of(path, SUFFIXES) != ".png":
            return files.write_text(path, self.html())
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            self.figure().save(temporary, format="PNG")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def as_dict(self) -> dict[str, Any]:
        """What `mllm inspect --json` prints, but for the files."""
        return {
            "question": self.question,
            "plan": self.plan,
            "answer": self.answer,
            "unpatched_answer": self.unpatched_answer,
            "visual_tokens": self.ledger["visual_tokens"][0],
            "kept_llm": self.ledger["kept_llm"][0],
            "visual_avg": self.ledger["visual_avg"][0],
            "prefill_flops_share": self.flops_share,
            "panels": [panel.title for panel in self.panels],
            "budgets": self.budgets,
            "reads": [
                {"stage": stage, "signal": name, "what": what} for stage, name, what in self.reads
            ],
            "ledger": self.ledger,
        }

    def _repr_html_(self) -> str:
        # A frame of its own: the page's style and script stay out of the notebook.
        return (
            f'<iframe srcdoc="{escape(self.html())}" title="What the plan kept" '
            'style="width: 100%; height: 860px; border: 0"></iframe>'
        )

    def _drawn(self) -> dict[str, Any]:
        """What the page's script draws from."""
        total = sum(len(view.tokens) for view in self.views)
        stops = [self.steps[0].kept, *self.kept]
        states: dict[bytes, int] = {}
        for kept in stops:
            states.setdefault(kept.tobytes(), len(states))
        into = self.steps[0].into
        return {
            "total": total,
            "views": [
                {
                    "rows": view.grid[0],
                    "cols": view.grid[1],
                    "kept": [_bits(view, np.frombuffer(s, np.int64)) for s in states],
                    "into": None if into is None else view.merged_into(into).tolist(),
                    "heat": [_levels(heat.values, view) for heat in self.heat],
                }
                for view in self.views
            ],
            "stops": [states[kept.tobytes()] for kept in stops],
            "counts": [total, *(int(len(np.unique(kept))) for kept in stops)],
            "heat": [
                {"label": f"{heat.stage}: {heat.what}", "stop": 0 if heat.layer is None
                 else heat.layer + 1}
                for heat in self.heat
            ],
        }  # fmt: skip


def inspect(
    model: Any,
    processor: Any,
    plan: str | Plan,
    question: str,
    images: Sequence[Image.Image] = (),
    *,
    frames: Sequence[Image.Image] = (),
    metadata: dict[str, Any] | None = None,
    max_new_tokens: int = 32,
    width: int = 504,
) -> Inspection:
    """Ask a question with and without a plan, and say what the plan did.

    Args:
        model, processor: as `mllm.load_model` gives them.
        plan: spec text, a folder or a Plan.
        question: about the pictures.
        images: pictures of the prompt, in order.
        frames: of a video, instead; a model without videos is shown them as pictures.
        metadata: of the video, as processors take it (`total_num_frames`, `fps`,
            `frames_indices`, `duration`); None is a video of these frames.
        max_new_tokens: longest answer.
        width: of a panel of the figure, in pixels.

    Raises:
        PlanError: the plan does not work on this model, or its pictures cannot be drawn.
        DataError: no pictures, or both pictures and frames.
    """
    if bool(images) == bool(frames):
        raise DataError(
            "pictures or the frames of a video are needed, not both",
            argument="images",
            given=f"{len(images)} pictures and {len(frames)} frames",
            expected="at least one picture, or at least one frame",
        )
    chosen = make_plan(plan)
    if not chosen.stages:
        raise DataError(
            "there is nothing to inspect in the model as it is",
            argument="plan",
            given=str(plan),
            expected="a plan with a stage",
        )
    inputs = _inputs(processor, question, images, frames, metadata)
    as_video = inputs.get("pixel_values_videos") is not None
    pictures = list(images or frames)
    given = inputs.to(model.device, model.dtype)
    (plain,) = answer(model, processor, given, None, max_new_tokens=max_new_tokens)
    with patch(model, chosen) as patched:
        given = with_tiles(inputs, processor, pictures, patched.tiles)
        given = given.to(model.device, model.dtype)
        holes = [family.image_token_id for family in patched.kinds.values() if family is not None]
        visual = np.isin(inputs["input_ids"][0].cpu().numpy(), holes)
        with _recording(patched) as calls:
            (cut,) = answer(model, processor, given, patched, max_new_tokens=max_new_tokens)
        ledger = patched.ledger
        stages, cls = [*patched.reducers, *patched.pruners], bool(patched.family.prefix)
    layouts = ledger.layouts[0]
    seen_images = seen.pictures(processor, inputs, [pictures] if as_video else pictures, layouts)
    views = seen.views(layouts)
    if frames and not as_video:
        views = [
            seen.View(f"frame {i + 1}", view.picture, view.grid, view.tokens)
            for i, view in enumerate(views)
        ]
    record = ledger.as_dict()
    return Inspection(
        question=question,
        plan=chosen.spec,
        unpatched_answer=plain.text,
        answer=cut.text,
        views=views,
        images=seen_images,
        steps=seen.steps(ledger),
        kept=[ledger.kept(layer)[0].numpy() for layer in range(len(record["layers"]))],
        heat=_heat(calls, layouts, visual, cls),
        reads=[
            (stage.info.name, name, _said(signal, cls))
            for _, stage in stages
            for name, signal in stage.reads().items()
        ],
        ledger=record,
        panels=seen.panels(seen_images, ledger, width=width, there=views),
    )


def _inputs(
    processor: Any,
    question: str,
    images: Sequence[Image.Image],
    frames: Sequence[Image.Image],
    metadata: dict[str, Any] | None,
) -> Any:
    """A batch of one; frames go through the processor's own part for videos where it has one."""
    token = getattr(processor, "video_token", None)
    if not frames or not token or getattr(processor, "video_processor", None) is None:
        return build_inputs(processor, [(list(images or frames), question)])
    content = [{"type": "video"}, {"type": "text", "text": question.replace(PLACEHOLDER, "")}]
    text = chat_text(processor, [{"role": "user", "content": content}])
    if metadata is None:
        numbers = list(range(len(frames)))
        metadata = {"total_num_frames": len(frames), "fps": None, "frames_indices": numbers,
                    "duration": None}  # fmt: skip
    return processor(
        text=[text],
        videos=[np.stack([np.asarray(frame.convert("RGB")) for frame in frames])],
        videos_kwargs={"do_sample_frames": False, "video_metadata": [metadata]},
        return_tensors="pt",
    )


@dataclass
class _Call:
    """A call of a stage: what it read of attention, and what is needed to place it."""

    stage: Any
    layer: int | None
    number: int  # of this stage's calls
    signals: list[tuple[Any, Any]]
    visual: Any = None
    index: Any = None


@contextlib.contextmanager
def _recording(patched: Any) -> Iterator[list[_Call]]:
    """The attention that stages are given in the prefills of this context.

    Their methods are wrapped on the instances of this patch, which nothing else uses.
    """
    calls: list[_Call] = []
    counts: dict[int, int] = {}

    def wrapped(stage: Any, method: Any, ctx: Any) -> Any:
        layer = getattr(ctx, "layer", None)
        if not getattr(ctx, "decoding", False):
            there = [
                (signal if layer is None else signal.at(layer), ctx[name].detach().float().cpu())
                for name, signal in stage.reads().items()
                if isinstance(signal, VisionAttention | AttentionRows | ColumnMass)
                and name in ctx
                and ctx[name] is not None
            ]
            number = counts[id(stage)] = counts.get(id(stage), -1) + 1
            call = _Call(stage, layer, number, there)
            if layer is not None:
                call.visual, call.index = ctx.visual[0].cpu(), ctx.index[0].cpu()
            calls.append(call)
        return method(ctx)

    held = []
    for stages, name in ((patched.reducers, "reduce"), (patched.pruners, "act")):
        for _, stage in stages:
            setattr(stage, name, functools.partial(wrapped, stage, getattr(stage, name)))
            held.append((stage, name))
    try:
        yield calls
    finally:
        for stage, name in held:
            delattr(stage, name)


def _heat(
    calls: list[_Call], layouts: Sequence[Layout], visual: np.ndarray, cls: bool
) -> list[Heat]:
    """Attention by visual token; calls of one stage for pictures of several layouts are joined."""
    total = sum(layout.tokens for layout in layouts)
    starts = np.cumsum([0, *(layout.tokens for layout in layouts)])
    ordinal = np.cumsum(visual) - 1
    found: dict[tuple, Heat] = {}
    for call in calls:
        for signal, values in call.signals:
            name = call.stage.info.name
            key = id(call.stage), call.layer, signal
            heat = found.setdefault(
                key,
                Heat(name, _said(signal, cls), call.layer,
                     np.full(total, np.nan, np.float32)),
            )  # fmt: skip
            if call.layer is None:
                group = list(dict.fromkeys(layouts))[call.number % len(set(layouts))]
                own = [i for i, layout in enumerate(layouts) if layout == group]
                for i, row in zip(own, values.numpy(), strict=True):
                    heat.values[starts[i] + group.places.cell.numpy()] = row
                continue
            row = values[0]
            while row.dim() > 1:  # heads, then query rows
                row = row.mean(0)
            at = call.visual.nonzero()[:, 0]
            heat.values[ordinal[call.index[at].numpy()]] = row[at].numpy()
    for heat in found.values():  # masked logits are -inf
        heat.values[~np.isfinite(heat.values)] = np.nan
    return [heat for heat in found.values() if np.isfinite(heat.values).any()]


def _said(signal: Any, cls: bool) -> str:
    """A signal in words; `cls` says whether the tower has [CLS]."""
    if isinstance(signal, VisionAttention):
        where = "the block that feeds the projector"
        if signal.block is not None:
            where = f"block {signal.block:g}"
        by_cls = signal.query == "cls" or signal.query == "auto" and cls
        asked = "of [CLS]" if by_cls else "that each patch receives"
        return f"attention {asked} in {where} of the tower"
    if isinstance(signal, AttentionRows | ColumnMass):
        at = "before its cut" if signal.layer is None else f"in decoder layer {signal.layer}"
        if isinstance(signal, ColumnMass):
            return f"attention that each token receives from the {signal.rows} rows {at}"
        rows = {
            "last": "the last prompt token",
            "text": "the text behind the pictures",
            "window": f"the last {signal.window} prompt tokens",
        }
        asked = rows.get(signal.rows, "chosen rows") if isinstance(signal.rows, str) else (
            "rows that it chooses"
        )  # fmt: skip
        return f"attention of {asked} {at}"
    first = (type(signal).__doc__ or type(signal).__name__).split("\n")[0].split(":")[0]
    return first.rstrip(".").replace("`", "")


def _bits(view: seen.View, kept: np.ndarray) -> str:
    """`1` and `0` per cell of a view."""
    return "".join("01"[x] for x in np.isin(view.tokens, kept).astype(int))


def _levels(values: np.ndarray, view: seen.View) -> dict[str, Any] | None:
    """Attention of a view's cells for the page: three digits each, and nothing where there is none.

    Shares are of what is in all views, so that frames can be compared.
    """
    own = values[view.tokens]
    if not np.isfinite(own).any():
        return None
    least, most = min(0.0, float(np.nanmin(values))), float(np.nanmax(values))
    reach = most - least or 1.0
    return {
        "least": least,
        "reach": reach,
        "share": [None if np.isnan(x) else round((float(x) - least) / reach, 3) for x in own],
    }


def _ledger_rows(record: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, unpatched, with the plan, ratio) of the ledger."""
    tokens = record["visual_tokens"][0]
    rows: list[tuple[str, float, float, float, str]] = [
        ("visual tokens into the LLM", tokens, record["kept_llm"][0], 1, ",.0f"),
        ("visual tokens per layer, average", tokens, record["visual_avg"][0], 1, ",.1f"),
        ("prefill, GFLOPs", record["baseline_prefill_flops"][0], record["prefill_flops"][0], 1e-9,
         ",.2f"),
        ("KV cache, KiB", record["baseline_kv_bytes"], record["kv_bytes"], 1 / 1024, ",.0f"),
    ]  # fmt: skip
    shown = [
        (what, format(a * scale, form), format(b * scale, form), f"{b / a:.0%}" if a else "–")
        for what, a, b, scale, form in rows
    ]
    for what, name in (("vision tower", "vision_flops"), ("selection", "selection_flops")):
        value = f"{record[name][0] * 1e-9:,.3f}"
        shown.append((f"of that {what}, GFLOPs", "", value, ""))
    return shown


def _script(data: Any) -> Markup:
    """JSON that can stand in a script element."""
    return Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
