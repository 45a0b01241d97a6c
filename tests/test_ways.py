"""Every way of running, over families, for a plan before, inside, and both before and inside."""

from __future__ import annotations

import copy
import itertools
import threading

import pytest
import tiny
import torch
from families import KITS, LAYERS, VIDEO, Sample, collate, model, samples
from family_oracles import dense, positions
from matrix import anatomy, equal
from oracles import Cut
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import mllm
from mllm.errors import PlanError

FAMILIES = ["llava", "qwen2_5_vl", "gemma3"]
PLANS = {
    "divprune:keep=3": [],
    "fastv:layer=2:keep=0.5": [Cut(2, 0.5)],
    "stride:keep=3:positions=original+fastv:layer=2:keep=2": [Cut(2, 2)],
}
PRE, IN, BOTH = PLANS
#: Every part of the decoder moves later tokens by another distance.
COMPACT = "fastv:layer=1:keep=0.5:positions=compact+fastv:layer=3:keep=2:positions=compact"
CUTS = {**PLANS, COMPACT: [Cut(1, 0.5, "compact"), Cut(3, 2, "compact")]}


def grid(families=FAMILIES, plans=tuple(PLANS)):
    """Families x plans; the fast suite meets each family and each plan at least once."""
    rows = []
    for (i, family), (j, spec) in itertools.product(enumerate(families), enumerate(plans)):
        marks = [] if (i + j) % 3 == 2 else [pytest.mark.slow]
        rows.append(pytest.param(family, spec, marks=marks, id=f"{family}-{spec}"))
    return pytest.mark.parametrize("family, spec", rows)


def wanted(family, spec, sample, kept, more=None, **options):
    """The oracle's run of one sample."""
    moved = not KITS[family].mrope and spec == PRE
    return dense(
        family, sample, more, cuts=CUTS[spec], kept=kept, compact=moved, **options
    )


def follow(family, spec, batch, kept, sequences, logits):
    """Every step equals the oracle's along the tokens that were generated."""
    copies, steps = len(sequences) // len(batch), logits.shape[1]
    for row, sequence in enumerate(sequences):
        sample = batch[row // copies]
        want = wanted(family, spec, sample, kept[row // copies], sequence[-steps:])
        equal(logits[row], want.logits[len(sample.ids) - 1 : -1], f"sequence {row}")


def generate(net, inputs, steps=6, **options):
    options = {"do_sample": False, "max_new_tokens": steps, **options}
    return net.generate(**inputs, **options)


FULL = dict(return_dict_in_generate=True, output_logits=True)


# Forward


@grid()
@torch.no_grad()
def test_loss(family, spec, supervised=2):
    """The mean over supervised tokens; the last row before them decides."""
    batch = samples(family)
    inputs = collate(family, batch, "right")
    labels = torch.full_like(inputs["input_ids"], -100)
    for b, sample in enumerate(batch):
        n = len(sample.ids)
        labels[b, n - supervised : n] = sample.ids[-supervised:]
    net = model(family)
    with mllm.patch(net, spec) as patched:
        loss = net(**inputs, labels=labels).loss
        kept = patched.ledger.kept("llm")
    losses = []
    for b, sample in enumerate(batch):
        prompt = Sample(sample.ids[:-supervised], sample.pictures)
        answer = sample.ids[-supervised:]
        logits = wanted(family, spec, prompt, kept[b], answer).logits[-supervised - 1 : -1]
        losses.append(F.cross_entropy(logits, answer, reduction="sum"))
    equal(loss, torch.stack(losses).sum() / (supervised * len(batch)), "loss", 1e-5)


@grid()
@torch.no_grad()
def test_logits_to_keep(family, spec):
    inputs = collate(family, samples(family))
    net = model(family)
    with mllm.patch(net, spec) as patched:
        full = net(**inputs).logits
        flops = patched.ledger.as_dict()["prefill_flops"]
        for asked, at in ((1, [-1]), (3, [-3, -2, -1]), (torch.tensor([4, 7]), [4, 7])):
            some = net(**inputs, logits_to_keep=asked).logits
            equal(some, full[:, at], f"logits_to_keep={asked}", 1e-5)
            fewer = patched.ledger.as_dict()["prefill_flops"]
            assert all(a < b for a, b in zip(fewer, flops, strict=True)), "the head is booked"


@grid()
@torch.no_grad()
def test_hidden_states(family, spec):
    """They have the length that the caller knows; rows that have left are zero."""
    batch = samples(family)
    inputs = collate(family, batch)
    net = model(family)
    with mllm.patch(net, spec) as patched:
        out = net(**inputs, output_hidden_states=True)
        again = net(**inputs)
        entering = [patched.ledger.kept(i) for i in range(LAYERS)]
        steps = generate(net, inputs, **FULL, output_hidden_states=True).hidden_states
    assert torch.equal(out.logits, again.logits), "looking changes nothing"
    assert len(out.hidden_states) == LAYERS + 1
    assert [h.shape[1] for h in steps[0]] == [inputs["input_ids"].shape[1]] * (LAYERS + 1)
    assert {h.shape[1] for step in steps[1:] for h in step} == {1}
    for i, states in enumerate(out.hidden_states):
        states = tiny.per_sample(states, inputs["attention_mask"])
        for b, sample in enumerate(batch):
            want = wanted(family, spec, sample, entering[0][b])
            visual = sample.visual.nonzero()[:, 0]
            stay = torch.ones(len(sample.ids), dtype=torch.bool)
            stay[visual] = False
            stay[visual[entering[max(0, i - 1)][b]]] = True
            equal(states[b][stay], want.hidden[i][stay], f"state {i} of sample {b}", 1e-3)
            assert not states[b][~stay].any()


# Generation


@grid()
@torch.no_grad()
def test_sampling(family, spec):
    batch = samples(family)
    inputs = collate(family, batch)
    net = model(family)
    runs = []
    with mllm.patch(net, spec) as patched:
        for _ in range(2):
            torch.manual_seed(0)
            runs.append(generate(net, inputs, **FULL, do_sample=True, top_k=0))
            kept = patched.ledger.kept("llm")
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    follow(family, spec, batch, kept, runs[0].sequences, torch.stack(runs[0].logits, 1))


@grid()
@torch.no_grad()
def test_several_answers(family, spec):
    batch = samples(family, "alone")
    net = model(family)
    with mllm.patch(net, spec) as patched:
        torch.manual_seed(0)
        out = generate(
            net, collate(family, batch), **FULL, do_sample=True, num_return_sequences=3,
            temperature=5.0,
        )
        kept = patched.ledger.kept("llm")[:1]
    assert len({tuple(row.tolist()) for row in out.sequences}) > 1
    follow(family, spec, batch, kept, out.sequences, torch.stack(out.logits, 1))


@grid()
@torch.no_grad()
def test_beams(family, spec, steps=6):
    """The winner's score is the oracle's score of that text."""
    batch = samples(family, "alone")
    net = model(family)
    with mllm.patch(net, spec) as patched:
        out = generate(
            net, collate(family, batch), steps, num_beams=3, length_penalty=0.0,
            return_dict_in_generate=True, output_scores=True,
        )
        kept = patched.ledger.kept("llm")[0]
    new = out.sequences[0, -steps:]
    want = wanted(family, spec, batch[0], kept, new).logits
    logprob = want[len(batch[0].ids) - 1 : -1].log_softmax(-1).gather(1, new[:, None]).sum()
    equal(out.sequences_scores[0], logprob, "beam", 1e-3)


@grid()
@torch.no_grad()
def test_without_cache(family, spec):
    inputs = collate(family, samples(family))
    net = model(family)
    with mllm.patch(net, spec):
        cached = generate(net, inputs)
        assert torch.equal(generate(net, inputs, use_cache=False), cached)


@grid()
@torch.no_grad()
def test_prompt_lookup(family, spec):
    """The first step verifies candidates: the prompt ends before them."""
    sample = samples(family, "alone")[0]
    tail = sample.ids[-3:]
    sample.ids = torch.cat([sample.ids, tail, tail, tail[:2]])
    inputs = collate(family, [sample])
    net = model(family)
    with mllm.patch(net, spec) as patched:
        greedy = generate(net, inputs, 12)
        kept = patched.ledger.kept(3)[0].tolist()
        looked = generate(net, inputs, 12, prompt_lookup_num_tokens=3)
        assert patched.ledger.kept(3)[0].tolist() == kept
    assert torch.equal(looked, greedy)


@pytest.mark.parametrize("assistant", ["text", "patched", "itself", "unpatched"])
@grid()
@torch.no_grad()
def test_assistant(family, spec, assistant):
    """Assisted decoding is greedy decoding, whatever the assistant.

    transformers gives no picture to an assistant: it drafts from the placeholders alone.
    """
    inputs = collate(family, samples(family, "alone"))
    net, draft = model(family), model(family)
    if assistant == "text":
        torch.manual_seed(0)
        draft = LlamaForCausalLM(tiny.config(layers=2).text_config).eval()
        draft.generation_config = net.generation_config
    try:
        generate(net, inputs, 10, assistant_model=draft)
    except (RuntimeError, ValueError, TypeError) as error:
        pytest.skip(f"this transformers cannot: {error}")
    if assistant == "patched":
        mllm.patch(draft, "random:keep=0.5:positions=original")
    elif assistant == "itself":
        draft = net
    with mllm.patch(net, spec) as patched:
        greedy = generate(net, inputs, 10)
        kept = patched.ledger.kept(3)[0].tolist()
        assert torch.equal(generate(net, inputs, 10, assistant_model=draft), greedy)
        assert patched.ledger.kept(3)[0].tolist() == kept
        assert not patched.ledger.history


@grid()
@torch.no_grad()
def test_streaming(family, spec, capsys):
    class Words:
        """As much of a tokenizer as a streamer needs."""

        def decode(self, ids, **_):
            return " ".join(map(str, ids if isinstance(ids, list) else ids.tolist())) + "\n"

    inputs = collate(family, samples(family, "alone"))
    net = model(family)
    with mllm.patch(net, spec):
        answer = generate(net, inputs)[0, -6:].tolist()
        generate(net, inputs, streamer=TextStreamer(Words(), skip_prompt=True))
        assert capsys.readouterr().out.split() == list(map(str, answer))
        streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
        options = {"streamer": streamer}
        thread = threading.Thread(target=generate, args=(net, inputs), kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text.split() == list(map(str, answer))


# Conversations


@pytest.mark.parametrize(
    "family, spec", [*itertools.product(FAMILIES, PLANS), ("llava", COMPACT), ("gemma3", COMPACT)]
)
@torch.no_grad()
def test_a_second_picture(family, spec):
    """A later turn brings a picture: its own last row decides, the first turn stays as it was."""
    one, two = samples(family, "alone")[0], samples(family, "alone", seed=9)[0]
    net = model(family)
    with mllm.patch(net, spec) as patched:
        first = generate(net, collate(family, [one]), **FULL, suppress_tokens=[tiny.IMAGE, VIDEO])
        kept = [patched.ledger.kept("llm")[0]]
        talk = torch.cat([first.sequences[0], two.ids[1:]])
        whole = Sample(talk, [*one.pictures, *two.pictures])
        start = first.past_key_values.get_seq_length()
        new = Sample(talk[start:], two.pictures)
        fields = collate(family, [new])
        fields["attention_mask"] = torch.ones(1, len(talk), dtype=torch.long)
        if KITS[family].mrope:
            fields["position_ids"] = positions(family, whole, len(talk))[:, None, start:]
        logits = net(**fields, past_key_values=first.past_key_values).logits[0]
        kept_last = patched.ledger.kept(LAYERS - 1)[0]
        kept.append(patched.ledger.kept("llm")[0] + one.pictures[0].tokens)
        assert patched.ledger.history[0].kept("llm")[0].tolist() == kept[0].tolist()
        assert first.past_key_values.get_seq_length() == len(talk)
    turns = [(0, len(one.ids)), (start, len(talk))]
    want = wanted(family, spec, whole, torch.cat(kept), turns=turns)
    text = ~new.visual
    equal(logits[text], want.logits[start:][text], "second turn")
    new_ones = want.entering[-1][want.entering[-1] >= one.pictures[0].tokens]
    assert kept_last.tolist() == (new_ones - one.pictures[0].tokens).tolist()
    assert 0 < len(new_ones) < two.pictures[0].tokens


# Precision and weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@grid()
@torch.no_grad()
def test_precision(family, spec, dtype):
    """Keeping everything is bit-exact, and half precision is near the oracle."""
    everything = "stride:keep=1.0+fastv:layer=2:keep=1.0"
    batch = samples(family, "alone")
    inputs = {k: v.to(dtype) if v.is_floating_point() else v
              for k, v in collate(family, batch).items()}  # fmt: skip
    net = model(family).to(dtype)
    plain = net(**inputs).logits
    with mllm.patch(net, everything):
        assert torch.equal(net(**inputs).logits, plain)
    with mllm.patch(net, spec) as patched:
        logits = net(**inputs).logits
        kept = patched.ledger.kept("llm")[0], patched.ledger.kept(LAYERS - 1)[0]
        data = patched.ledger.as_dict()
        assert generate(net, inputs).shape[1] == inputs["input_ids"].shape[1] + 6
    assert logits.dtype == dtype
    assert data["kv_bytes"] % dtype.itemsize == 0
    assert data["kv_bytes"] / data["baseline_kv_bytes"] < 1
    if spec == PRE:  # a cut by attention may choose otherwise in half precision
        want = wanted(family, spec, batch[0], kept[0]).logits[-1]
        error = (logits[0, -1].float() - want).norm() / want.norm()
        assert error < {torch.float32: 1e-4}.get(dtype, 0.25), float(error)


class Quantised(nn.Module):
    """A linear layer as quantisation libraries make it: packed bytes that only it can read."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max().item() / 127
        codes = (linear.weight / self.scale).round()
        codes = codes.to(torch.int8) if dtype == torch.int8 else (codes + 128).to(torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        codes = self.weight.to(x.dtype) - (128 if self.weight.dtype == torch.uint8 else 0)
        return F.linear(x, codes * self.scale, self.bias)


def unpacked(layer: Quantised) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    codes = layer.weight.float() - (128 if layer.weight.dtype == torch.uint8 else 0)
    linear.weight.data = codes * layer.scale
    linear.bias = layer.bias
    return linear


def exchanged(net, kind, change):
    """Replace every linear layer of a kind inside the decoder and the projector."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind and name != "lm_head":
                setattr(parent, name, change(child))
    return net


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@grid()
@torch.no_grad()
def test_quantised_weights(family, spec, dtype):
    """Weights that cannot be calculated with: the engine never looks at them."""
    inputs = collate(family, samples(family))
    packed = exchanged(model(family), nn.Linear, lambda x: Quantised(x, dtype))
    plain = exchanged(copy.deepcopy(packed), Quantised, unpacked)
    with mllm.patch(packed, spec) as one, mllm.patch(plain, spec) as two:
        equal(packed(**inputs).logits, plain(**inputs).logits, "logits", 1e-3)
        assert torch.equal(generate(packed, inputs), generate(plain, inputs))
        assert one.ledger.as_dict() == two.ledger.as_dict()


# Wrappers and copies


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("first", ["lora", "patch"])
@grid()
def test_lora(family, spec, first, task):
    """With an adapter the model equals the one that the adapter was merged into."""
    peft = pytest.importorskip("peft")
    batch = samples(family)
    inputs = collate(family, batch, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-1] = -100
    for b, sample in enumerate(batch):
        labels[b, len(sample.ids) - 2 : len(sample.ids)] = sample.ids[-2:]
    lora = peft.LoraConfig(
        r=4, target_modules=r".*layers.*\.(q_proj|v_proj)", init_lora_weights=False, task_type=task
    )
    net = model(family)
    if first == "lora":
        torch.manual_seed(1)
        net = peft.get_peft_model(net, lora)
    patched = mllm.patch(net, spec)
    if first == "patch":
        torch.manual_seed(1)
        net = peft.get_peft_model(net, lora)
    net.eval()
    loss = net(**inputs, labels=labels).loss
    loss.backward()
    trained = [p for p in net.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.any() for p in trained)
    left = collate(family, batch)
    with torch.no_grad():
        logits, answer = net(**left).logits, generate(net, left)
        kept = [patched.ledger.kept(i) for i in range(LAYERS)]
        patched.remove()
        merged = net.merge_and_unload()
        with mllm.patch(merged, spec) as again:
            equal(merged(**left).logits, logits, "logits", 1e-3)
            assert torch.equal(generate(merged, left), answer)
            assert [
                [k.tolist() for k in again.ledger.kept(i)] for i in range(LAYERS)
            ] == [[k.tolist() for k in layer] for layer in kept]
            equal(merged(**inputs, labels=labels).loss, loss, "loss", 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@grid()
def test_gradient_checkpointing(family, spec, reentrant):
    inputs = collate(family, samples(family), "right")
    labels = torch.full_like(inputs["input_ids"], -100)
    for b, sample in enumerate(samples(family)):
        n = len(sample.ids)
        labels[b, n - 2 : n] = sample.ids[-2:]
    runs = []
    for checkpointing in (False, True):
        net = model(family).train()
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with mllm.patch(net, spec) as patched:
            loss = net(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
            kept = [k.tolist() for k in patched.ledger.kept(LAYERS - 1)]
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        runs.append((loss.detach(), kept, grads))
    (loss, kept, grads), (again, kept_again, grads_again) = runs
    equal(again, loss, "loss", 1e-6)
    assert kept_again == kept
    assert grads_again.keys() == grads.keys()
    for name, grad in grads.items():
        equal(grads_again[name], grad, name, 1e-4 * max(1.0, float(grad.abs().max())))


@grid()
@torch.no_grad()
def test_a_deep_copy_is_plain(family, spec):
    """A copy of a patched model is an ordinary model: unpatched, and free to be patched."""
    inputs = collate(family, samples(family))
    net = model(family)
    plain = net(**inputs).logits
    other = copy.deepcopy(net)
    before = anatomy(other, shared=False)
    with mllm.patch(net, spec) as patched:
        mine = net(**inputs).logits
        twin = copy.deepcopy(net)
        assert anatomy(twin, shared=False) == before
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
        assert torch.equal(twin(**inputs).logits, plain)
        assert torch.equal(net(**inputs).logits, mine)
        rows = patched.ledger.as_dict()
        with mllm.patch(twin, "random:keep=0.5:positions=original"):
            twin(**inputs)
        assert patched.ledger.as_dict() == rows, "the two know nothing of each other"
        decoder = copy.deepcopy(net.get_decoder())
        assert not any(m._forward_pre_hooks for m in decoder.modules())
    assert torch.equal(net(**inputs).logits, plain)


@grid()
@torch.no_grad()
def test_a_saved_model_is_plain(family, spec, tmp_path):
    inputs = collate(family, samples(family))
    net = model(family)
    plain, keys = net(**inputs).logits, list(net.state_dict())
    net.save_pretrained(tmp_path / "plain")
    with mllm.patch(net, spec):
        mine = net(**inputs).logits
        assert list(net.state_dict()) == keys
        net.save_pretrained(tmp_path / "patched")
        assert torch.equal(net(**inputs).logits, mine)
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "patched" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "patched").iterdir())) == len(list((tmp_path / "plain").iterdir()))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "patched").eval()
    loaded.set_attn_implementation("sdpa")
    assert torch.equal(loaded(**inputs).logits, plain)
    with mllm.patch(loaded, spec):
        assert torch.equal(loaded(**inputs).logits, mine)


# Threads


@torch.no_grad()
def test_two_models_in_two_threads():
    """Different families, different plans, at the same time."""
    jobs = []
    for family, spec in (("llava", BOTH), ("qwen2_5_vl", IN)):
        net, inputs = model(family), collate(family, samples(family))
        mllm.patch(net, spec)
        jobs.append((net, inputs, net(**inputs).logits, generate(net, inputs)))
    problems, barrier = [], threading.Barrier(len(jobs))

    @torch.no_grad()
    def work(net, inputs, logits, answer):
        barrier.wait()
        for _ in range(5):
            if not torch.equal(net(**inputs).logits, logits):
                problems.append("forward")
            if not torch.equal(generate(net, inputs), answer):
                problems.append("generate")

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not problems


@pytest.mark.parametrize("place", ["tower", "decoder"])
@torch.no_grad()
def test_no_patching_while_another_thread_is_at_work(place):
    net, inputs = model("llava"), collate("llava", samples("llava"))
    plain, before = net(**inputs).logits, anatomy(net)
    module = net.model.vision_tower if place == "tower" else net.model.language_model.layers[1]
    inside, go = threading.Event(), threading.Event()
    seen = []

    def stop(*_):
        inside.set()
        go.wait(60)

    def work():
        with torch.no_grad():
            seen.append(net(**inputs).logits)

    def meanwhile(action):
        inside.clear()
        go.clear()
        handle = module.register_forward_pre_hook(stop)
        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(60)
        with pytest.raises(PlanError, match="thread") as caught:
            action()
        assert caught.value.argument == "model" and caught.value.expected
        handle.remove()
        go.set()
        thread.join()

    meanwhile(lambda: mllm.patch(net, BOTH))
    assert torch.equal(seen.pop(), plain), "the other thread saw nothing"
    assert anatomy(net) == before
    patched = mllm.patch(net, BOTH)
    mine = net(**inputs).logits
    meanwhile(patched.remove)
    assert torch.equal(seen.pop(), mine), "the plan stays in until it can be removed"
    assert torch.equal(net(**inputs).logits, mine)
    patched.remove()
    assert anatomy(net) == before
    assert torch.equal(net(**inputs).logits, plain)


# Compilation


#: Graphs of a forward without a cache: the layer whose attention is read is cut in five pieces.
#: The two layers behind a cut share a graph; under BOTH torch compiles it twice, though they are
#: given the same shapes (a guard of its own finds None).
GRAPHS = {PRE: 1, IN: 7, BOTH: 8}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.slow
@grid(["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_compiled_layers(family, spec, backend, order):
    """`layer.forward = torch.compile(layer.forward)`: hooks stay outside of the graphs."""
    inputs = collate(family, samples(family))
    net = model(family)
    with mllm.patch(net, spec):
        logits, answer = net(**inputs).logits, generate(net, inputs)
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    def compile_layers():
        for layer in net.get_decoder().layers:
            layer.forward = torch.compile(layer.forward, backend=count)

    torch._dynamo.reset()
    if order == "before":
        compile_layers()
    with mllm.patch(net, spec):
        if order == "after":
            compile_layers()
        equal(net(**inputs, use_cache=False).logits, logits, "logits", 1e-5)
        assert len(graphs) == GRAPHS[spec]
        assert torch.equal(generate(net, inputs), answer)
    torch._dynamo.reset()


@pytest.mark.slow
@grid(["llava"])
@torch.no_grad()
def test_a_compiled_model(family, spec):
    """`torch.compile(model)` breaks the graph at every hook, and is right."""
    inputs = collate(family, samples(family))
    net = model(family)
    with mllm.patch(net, spec):
        logits, answer = net(**inputs).logits, generate(net, inputs)
        torch._dynamo.reset()
        compiled = torch.compile(net, backend="eager")
        equal(compiled(**inputs).logits, logits, "logits", 1e-5)
        assert torch.equal(generate(compiled, inputs), answer)
    torch._dynamo.reset()


# The embedded model through a pipeline


@pytest.mark.parametrize("spec", ["visionzip:keep=64", "fastv:layer=2:keep=0.25", PRE + "+" + IN])
def test_pipeline(spec):
    from PIL import Image

    net, processor = mllm.load_model("tiny-llava", dtype="float32", device="cpu")
    pipe = pipeline("image-text-to-text", model=net, processor=processor)
    g = torch.Generator().manual_seed(0)
    side = net.config.vision_config.image_size
    pixels = torch.randint(0, 255, (side, side, 3), generator=g, dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    talk = [{"role": "user", "content": [{"type": "image", "image": image},
                                         {"type": "text", "text": "What is there?"}]}]  # fmt: skip
    asked = dict(max_new_tokens=6, return_full_text=False)
    with mllm.patch(net, spec) as patched:
        answer = pipe(text=talk, **asked)[0]["generated_text"]
        data = patched.ledger.as_dict()
        inputs = processor.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = generate(net, inputs)[0, inputs["input_ids"].shape[1] :]
        both = pipe(text=[talk, talk], **asked, batch_size=2)
    assert data["layers"][-1]["visual"] != data["visual_tokens"]
    assert answer.strip() == processor.decode(ids, skip_special_tokens=True).strip()
    assert [b[0]["generated_text"] for b in both] == [answer] * 2
