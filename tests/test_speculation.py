"""Self-speculation: greedy decoding, whatever drafts; and layers that really are passed by."""

from __future__ import annotations

import threading

import pytest
import torch
from families import LAYERS, collate, model, samples
from matrix import anatomy, equal
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

import mllm
from mllm.errors import PlanError
from mllm.speculation import SelfSpeculation

FAMILIES = ["llava", "gemma3", "qwen2_5_vl", "qwen3_vl", "llava_next"]
PLANS = [
    None, "layerskip", "visionzip:keep=4:cls=false",
    "stride:keep=5+slowfast:every=2", "pmod:max_ratio=0.8:min_ratio=0.32",
    "divprune:keep=5+fastv:layer=1:keep=0.5:positions=compact+fastv:layer=3:keep=2",
]  # fmt: skip
GREEDY = dict(max_new_tokens=11, do_sample=False)


def quiet(net, exit, size):
    """A model whose layers from `exit` on add little: early drafts are right, often or always."""
    with torch.no_grad():
        for layer in net.get_decoder().layers[exit:]:
            for name, weight in layer.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(size)
                elif name.startswith(("post_attention", "post_feedforward")) and size == 0:
                    weight.fill_(-1.0 if "gemma" in type(layer).__name__.lower() else 1.0)
    return net


def without_end(net):
    net.generation_config.eos_token_id = None
    return net


def patched(net, plan):
    if plan is None:
        return torch.no_grad()  # any context
    if "qwen" in type(net).__name__.lower():
        plan = plan.replace(":positions=compact", "")
    return mllm.patch(net, plan)


def grid():
    """Every plan on LLaVA, one on each other family; the rest is slow."""
    for i, plan in enumerate(PLANS):
        for j, family in enumerate(FAMILIES):
            marks = [] if j == 0 or i == j else [pytest.mark.slow]
            yield pytest.param(family, plan, marks=marks)


@pytest.mark.parametrize("family, plan", grid())
@torch.no_grad()
def test_answers_are_those_of_greedy_decoding(family, plan):
    """Of a padded batch, and of each sample alone; drafts that are always, often, never right."""
    if plan is not None and "layer=1" in plan and family == "qwen3_vl":
        plan = plan.replace("layer=1", "layer=2")  # it still adds features before
    batch = samples(family)
    inputs = collate(family, batch)
    for exit, tokens, size in ((1, 3, 0.2), (2, 1, 1.0), (3, 4, 0.0)):
        net = quiet(without_end(model(family)), exit, size)
        with patched(net, plan):
            want = net.generate(**inputs, **GREEDY)
            speculation = SelfSpeculation(exit=exit, tokens=tokens)
            found = net.generate(**inputs, **GREEDY, custom_generate=speculation)
            assert torch.equal(found, want), (exit, tokens)
            assert 0 <= speculation.accepted <= speculation.drafted
            if size == 0:
                # The first token is the prompt's; then each round says all drafts and one more.
                assert speculation.rate == 1 and speculation.rounds == 2
            for b, s in enumerate(batch[:2]):
                alone = net.generate(**collate(family, [s]), **GREEDY, custom_generate=speculation)
                assert torch.equal(alone[0, -11:], want[b, -11:]), (exit, tokens, b)


@pytest.mark.parametrize("exit", range(1, LAYERS))
@pytest.mark.parametrize("tokens", [1, 5, 40])
@torch.no_grad()
def test_any_exit_and_any_number_of_tokens(exit, tokens):
    net = quiet(without_end(model("llava")), exit, 0.3)
    inputs = collate("llava", samples("llava"))
    speculation = SelfSpeculation(exit=exit, tokens=tokens)
    for steps in (1, 2, 8):
        options = dict(max_new_tokens=steps, do_sample=False)
        found = net.generate(**inputs, **options, custom_generate=speculation)
        assert torch.equal(found, net.generate(**inputs, **options))
    assert speculation.drafted > 0


@pytest.mark.parametrize("plan", [None, "fastv:layer=2:keep=0.5"])
@torch.no_grad()
def test_layers_are_passed_by(plan):
    """Early layers see every token once, late ones a round at a time, and stores are as ever."""
    net = quiet(without_end(model("llava")), 2, 0.0)
    inputs = collate("llava", samples("llava", "alone"))
    seen: dict[int, list[int]] = {}
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: seen.setdefault(i, []).append(
                kwargs["hidden_states"].shape[1]
            ),
            with_kwargs=True,
        )
        for i, layer in enumerate(net.get_decoder().layers)
    ]
    more = dict(return_dict_in_generate=True)
    with patched(net, plan) as own:
        want = net.generate(**inputs, **GREEDY, **more)
        seen.clear()
        found = net.generate(
            **inputs, **GREEDY, **more, custom_generate=SelfSpeculation(exit=2, tokens=4)
        )
        if plan is not None:
            assert own.ledger.as_dict()["decode_steps"] == 2, "rounds"
    for handle in handles:
        handle.remove()
    assert [seen[i][1:] for i in range(LAYERS)] == [[1] * 10, [1] * 10, [5, 5], [5, 5]]
    for a, b in zip(found.past_key_values.layers, want.past_key_values.layers, strict=True):
        equal(a.keys, b.keys, "keys", 1e-4)
        equal(a.values, b.values, "values", 1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_samples_end_by_themselves(family):
    """Some before others, some within a round: then there is padding, as ever."""
    batch = samples(family)
    inputs = collate(family, batch)
    net = quiet(without_end(model(family)), 2, 0.2)
    new = net.generate(**inputs, max_new_tokens=16, do_sample=False)[:, -16:]
    for end in (new[0, 2], new[1, 5], new[2, 0]):
        options = dict(max_new_tokens=16, do_sample=False, eos_token_id=int(end), pad_token_id=0)
        want = net.generate(**inputs, **options)
        for tokens in (1, 3, 8):
            speculation = SelfSpeculation(exit=2, tokens=tokens)
            found = net.generate(**inputs, **options, custom_generate=speculation)
            assert torch.equal(found, want)
            assert speculation.accepted <= speculation.drafted


@torch.no_grad()
def test_processors_scores_and_logits():
    """What may not be said is not drafted either; scores are those of greedy decoding."""
    net = quiet(without_end(model("llava")), 2, 0.1)
    inputs = collate("llava", samples("llava"))
    options = dict(GREEDY, repetition_penalty=1.7, no_repeat_ngram_size=2, output_scores=True,
                   output_logits=True, return_dict_in_generate=True)  # fmt: skip
    want = net.generate(**inputs, **options)
    found = net.generate(**inputs, **options, custom_generate=SelfSpeculation(2, 3))
    assert torch.equal(found.sequences, want.sequences)
    for name in ("logits", "scores"):
        mine, theirs = (torch.stack(x[name], 1) for x in (found, want))
        hidden = theirs == -torch.inf
        assert torch.equal(mine == -torch.inf, hidden)
        equal(mine[~hidden], theirs[~hidden], name, 1e-4 * max(1.0, float(theirs[~hidden].std())))


@pytest.mark.parametrize("plan", [None, "visionzip:keep=4:cls=false+fastv:layer=2:keep=2"])
@torch.no_grad()
def test_a_later_turn_and_text_alone(plan):
    net = quiet(without_end(model("llava")), 1, 0.2)
    question, more = torch.tensor([11, 23, 31]), dict(return_dict_in_generate=True)
    for kind in ("padded", "text"):
        inputs, answers = collate("llava", samples("llava", kind)), []
        with patched(net, plan):
            for given in ({}, {"custom_generate": SelfSpeculation(1, 3)}):
                first = net.generate(**inputs, **GREEDY, **more, **given)
                ids = torch.cat([first.sequences, question.expand(len(first.sequences), -1)], 1)
                mask = inputs["attention_mask"]
                mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
                answers.append(net.generate(
                    input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values,
                    **GREEDY, **given,
                ))  # fmt: skip
        assert torch.equal(*answers)


class _Looks(LogitsProcessor):
    """Runs the model in another thread while this one speculates."""

    def __init__(self, net, inputs):
        self.net, self.inputs, self.seen = net, inputs, []

    def __call__(self, ids, scores):
        def run():
            with torch.no_grad():
                self.seen.append(self.net(**self.inputs).logits)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return scores


class _Breaks(StoppingCriteria):
    def __call__(self, ids, scores, **kwargs):
        raise KeyboardInterrupt


@torch.no_grad()
def test_nothing_is_left_behind_and_threads_do_not_meet():
    net = quiet(without_end(model("llava")), 2, 0.2)
    inputs = collate("llava", samples("llava"))
    plain, want = net(**inputs).logits, net.generate(**inputs, **GREEDY)
    before, looks = anatomy(net), _Looks(net, inputs)
    found = net.generate(
        **inputs, **GREEDY, custom_generate=SelfSpeculation(2, 3),
        logits_processor=LogitsProcessorList([looks]),
    )  # fmt: skip
    assert torch.equal(found, want)
    assert len(looks.seen) > 11 and all(torch.equal(x, plain) for x in looks.seen)
    with pytest.raises(KeyboardInterrupt):
        net.generate(**inputs, **GREEDY, custom_generate=SelfSpeculation(2, 3),
                     stopping_criteria=[_Breaks()])  # fmt: skip
    assert anatomy(net) == before and torch.equal(net(**inputs).logits, plain)


@pytest.mark.parametrize("make, argument", [
    (lambda: SelfSpeculation(exit=0), "exit"), (lambda: SelfSpeculation(exit=True), "exit"),
    (lambda: SelfSpeculation(exit=2, tokens=0), "tokens"),
])  # fmt: skip
def test_numbers_that_are_refused(make, argument):
    with pytest.raises(PlanError) as caught:
        make()
    assert caught.value.argument == argument


@pytest.mark.parametrize("options, argument", [
    (dict(do_sample=True), "do_sample"), (dict(num_beams=2), "num_beams"),
    (dict(use_cache=False), "past_key_values"), (dict(cache_implementation="static"), None),
    (dict(output_hidden_states=True, return_dict_in_generate=True), "output_hidden_states"),
])  # fmt: skip
def test_ways_of_generating_that_are_refused(options, argument):
    net, inputs = model("llava"), collate("llava", samples("llava"))
    with pytest.raises(PlanError) as caught:
        net.generate(**inputs, **{**GREEDY, **options}, custom_generate=SelfSpeculation(2))
    assert caught.value.argument == (argument or "past_key_values")


def test_an_exit_outside_the_model():
    net, inputs = model("llava"), collate("llava", samples("llava"))
    with pytest.raises(PlanError, match=f"a number from 1 to {LAYERS - 1}"):
        net.generate(**inputs, **GREEDY, custom_generate=SelfSpeculation(LAYERS))


@pytest.mark.parametrize("plan", ["snapkv:budget=64", "mod", "layerskip:exit=2"])
def test_plans_that_decide_by_drafts(plan):
    net, inputs = model("llava"), collate("llava", samples("llava"))
    with mllm.patch(net, plan), pytest.raises(PlanError) as caught:
        net.generate(**inputs, **GREEDY, custom_generate=SelfSpeculation(2))
    assert caught.value.argument == "custom_generate"


def test_early_exits_of_transformers_point_here():
    """`assistant_early_exit` knows no model with a tower."""
    net, inputs = model("llava"), collate("llava", samples("llava", "alone"))
    with pytest.raises(AttributeError):
        net.generate(**inputs, **GREEDY, assistant_early_exit=2)
    with mllm.patch(net, "layerskip"), pytest.raises(PlanError) as caught:
        net.generate(**inputs, **GREEDY, assistant_early_exit=2)
    assert "SelfSpeculation" in caught.value.expected
