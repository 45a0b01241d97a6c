"""Self-speculative decoding: a model's first layers draft, and all of them decide (LayerSkip).

    speculation = mllm.SelfSpeculation(exit=8, tokens=4)
    out = model.generate(**inputs, max_new_tokens=64, custom_generate=speculation)
    print(speculation.rate)

transformers has `assistant_early_exit`, which cannot be used here: it sets the number of layers on
the config of a text model, runs a prefill of its own without pictures, and takes one sample.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm import compat
from mllm.errors import PlanError
from mllm.models import resolve

__all__ = ["SelfSpeculation"]


class _Depths:
    """The decoder layers of a model, of which a forward runs some: a context manager.

    In a `draft` layers from `exit` on are passed by: they store zeros, which are taken back before
    anybody sees them, so that all layers have seen equally many tokens. In a `check` the others
    are: they store again what they have stored in the draft, and layer `exit` is given what it
    would have been given there.

    Args:
        layers: decoder layers.
        exit: the first one that drafts do without.
        cache: of the conversation.
    """

    def __init__(self, layers: list[nn.Module], exit: int, cache: Any) -> None:
        self.layers, self.exit, self.cache = layers, exit, cache
        self.mode: Literal["whole", "draft", "check"] = "whole"
        self.states: list[Tensor] = []
        self.stored: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._none: dict[int, list[Tensor]] = {}  # keys and values of no token
        self._update = cache.update

    def __enter__(self) -> _Depths:
        self._before = [layer.__dict__.get("forward") for layer in self.layers]
        for i, layer in enumerate(self.layers):
            layer.forward = _Layer(self, i, layer.forward)
        self.cache.update = self._store
        self._token = _DEPTHS.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _DEPTHS.reset(self._token)
        del self.cache.update
        for layer, before in zip(self.layers, self._before, strict=True):
            del layer.forward
            if before is not None:
                layer.forward = before

    def draft(self) -> None:
        """Later forwards are of a new draft."""
        self.mode, self.states, self.stored = "draft", [], {}

    def _store(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        if self.mode == "draft":
            self.stored.setdefault(layer, []).append((keys, values))
        if layer not in self._none:
            self._none[layer] = [x.new_zeros(*x.shape[:2], 0, x.shape[3]) for x in (keys, values)]
        return self._update(keys, values, layer, *args, **kwargs)

    def pass_by(self, layer: int, hidden: Tensor) -> Tensor | None:
        """What a layer that is passed by gives; None if it runs."""
        if self.mode == "draft" and layer >= self.exit:
            if layer == self.exit:
                self.states.append(hidden)
            rows = 0, 0, 0, hidden.shape[1]  # in front of the last dimension
            self._update(*(F.pad(x, rows) for x in self._none[layer]), layer)
            return hidden
        if self.mode == "check" and layer < self.exit:
            keys, values = zip(*self.stored[layer], strict=True)
            self._update(torch.cat(keys, 2), torch.cat(values, 2), layer)
            return hidden
        return None


class _Layer:
    """The forward of a layer while a model speculates."""

    def __init__(self, depths: _Depths, number: int, forward: Any) -> None:
        self.depths, self.number, self.forward = depths, number, forward

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        depths = self.depths
        if _DEPTHS.get() is not depths:  # another thread's forward
            return self.forward(hidden, *args, **kwargs)
        passed = depths.pass_by(self.number, hidden)
        if passed is not None:
            return passed
        if depths.mode == "check" and self.number == depths.exit:
            hidden = torch.cat(depths.states, 1)
        return self.forward(hidden, *args, **kwargs)


_DEPTHS: ContextVar[_Depths | None] = ContextVar("mllm_depths", default=None)


def drafting() -> bool:
    """Whether the forward that is going on in this thread is one of a draft."""
    depths = _DEPTHS.get()
    return depths is not None and depths.mode == "draft"


class SelfSpeculation:
    """Greedy decoding in rounds: early layers draft some tokens, the others check them at once.

    Given to `generate(custom_generate=)` of a model of a supported family, patched or not, with
    pictures or without. Answers are those of greedy decoding, whatever `exit` and `tokens` are:
    a draft stays only if the whole model says the same. What the first `exit` layers have computed
    and stored in a draft is used by the check and not computed again. In a batch a round ends at
    the first token that any unfinished sample has drafted wrongly: samples advance together.

    Drafts of a model that was not trained to answer early (`layerskip`) are seldom right, and then
    this is slower than plain decoding. In half precision several tokens at once may be rounded
    otherwise than one by one, as in all assisted decoding.

    Args:
        exit: decoder layers that draft, from 1.
        tokens: drafted in a round, at most.

    Attributes:
        rounds: of the newest call.
        drafted: tokens drafted in it, those of all unfinished samples.
        accepted: those among them that the whole model has said as well, and are in the answer.

    Raises:
        PlanError: numbers below 1; in `generate()`: an exit outside the model, sampling, beams, no
            dynamic cache, or a plan whose stages decide by tokens that may be taken back.
    """

    def __init__(self, exit: int, tokens: int = 4) -> None:
        for name, value in (("exit", exit), ("tokens", tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _refused(name, value, "a number from 1")
        self.exit, self.tokens = exit, tokens
        self.rounds = self.drafted = self.accepted = 0

    def __repr__(self) -> str:
        return f"SelfSpeculation(exit={self.exit}, tokens={self.tokens})"

    @property
    def rate(self) -> float | None:
        """Share of the drafted tokens that was accepted; None without any."""
        return self.accepted / self.drafted if self.drafted else None

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        """What `generate()` calls in place of its own loop."""
        layers = list(resolve(model).layers)
        self._check(model, layers, generation_config, model_kwargs)
        self.rounds = self.drafted = self.accepted = 0
        cache = model_kwargs["past_key_values"]
        with _Depths(layers, self.exit, cache) as depths:
            answer = _Answer(input_ids, logits_processor, stopping_criteria, generation_config)
            output = compat.prefill(model, input_ids, generation_config, model_kwargs)
            given = compat.one_more(model, output, model_kwargs)
            answer.say(output.logits[:, -1])
            del output
            compat.kept_past(cache)
            while not answer.done:
                given = self._round(model, depths, answer, given)
        return compat.drafted_sequences(
            answer.ids, answer.logits, answer.scores, cache, generation_config
        )

    def _round(
        self, model: nn.Module, depths: _Depths, answer: _Answer, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Draft, check, and say what was right and one token more."""
        cache, count = depths.cache, min(self.tokens, answer.room - 1)
        ids, then, drafts = answer.ids, given, []
        depths.draft()
        for step in range(count + 1):  # the last one is read for the token behind all drafts
            output = model(**compat.next_inputs(model, ids, 1, then))
            if step < count:
                drafts.append(answer.best(ids, output.logits[:, -1])[0])
                ids = torch.cat([ids, drafts[-1][:, None]], 1)
                then = compat.one_more(model, output, then)
        compat.take_back(cache, count + 1)
        depths.mode = "check"
        output = model(**compat.next_inputs(model, ids, count + 1, then))
        depths.mode = "whole"
        self.rounds += 1
        self.drafted += count * int(answer.unfinished.sum())
        for step in range(count + 1):
            there = answer.unfinished
            token = answer.say(output.logits[:, step - count - 1])
            given = compat.one_more(model, output, given)
            if step == count:
                break
            right = token == drafts[step]
            self.accepted += int((right & there).sum())
            if answer.done or bool((answer.unfinished & ~right).any()):
                break
        compat.take_back(cache, count - step)
        return given

    def _check(
        self, model: nn.Module, layers: list[nn.Module], config: Any, given: dict[str, Any]
    ) -> None:
        """PlanError for what cannot be decoded so."""
        if self.exit >= len(layers):
            raise _refused("exit", self.exit, f"a number from 1 to {len(layers) - 1}")
        for name, plain in (("do_sample", False), ("num_beams", 1)):
            value = getattr(config, name)
            if value not in (None, plain):
                raise _refused(name, value, f"{plain}: drafts are checked against greedy decoding")
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name):
                raise _refused(name, True, "False: a round runs no layer over all of its tokens")
        cache = given.get("past_key_values")
        if type(cache) is not compat.DynamicCache or given.get("use_cache") is False:
            kind = "no cache" if cache is None else type(cache).__name__
            raise _refused("past_key_values", kind, "a DynamicCache, with use_cache=True")
        if any(isinstance(layer.__dict__.get("forward"), _Layer) for layer in layers):
            raise _refused("model", type(model).__name__, "one speculation of a model at a time")


class _Answer:
    """What has been said, as greedy decoding of `generate()` says it.

    Attributes:
        ids: int64 `[batch, tokens]`, with the prompt.
        unfinished: bool `[batch]`.
        logits, scores: of every new token, `[batch, vocabulary]`, where the config asks for them.
    """

    def __init__(self, ids: Tensor, processor: Any, criteria: Any, config: Any) -> None:
        self.ids, self.processor, self.criteria, self.config = ids, processor, criteria, config
        self.unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.logits: list[Tensor] = []
        self.scores: list[Tensor] = []
        self._pad = compat.padding(config, criteria)

    @property
    def done(self) -> bool:
        """Whether all samples have ended."""
        return not bool(self.unfinished.any())

    @property
    def room(self) -> int:
        """Tokens that may still be said."""
        return self.config.max_length - self.ids.shape[1]

    def best(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens behind `ids`, int64 `[batch]`, and processed scores."""
        scores = self.processor(ids, logits.to(ids.device, torch.float32, copy=True))
        return scores.argmax(-1), scores

    def say(self, logits: Tensor) -> Tensor:
        """Add a token to every sample; those that have ended get padding."""
        token, scores = self.best(self.ids, logits)
        if self.config.output_logits:
            self.logits.append(logits.to(token.device, torch.float32, copy=True))
        if self.config.output_scores:
            self.scores.append(scores)
        if self._pad is not None:
            token = torch.where(self.unfinished, token, self._pad.to(token.device))
        self.ids = torch.cat([self.ids, token[:, None]], 1)
        self.unfinished = self.unfinished & ~self.criteria(self.ids, None)
        return token


def _refused(argument: str, given: Any, expected: str) -> PlanError:
    return PlanError(
        f"self-speculation: {argument}={given!r} is not {expected}",
        argument=argument,
        given=given,
        expected=expected,
    )
