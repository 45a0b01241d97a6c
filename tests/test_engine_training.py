"""Losses and gradients through a patched model equal the oracle's; LoRA and checkpointing run."""

from __future__ import annotations

import oracles
import pytest
import tiny
import torch
from matrix import CASES, FEW, LAYERS, SIDE, equal, fresh, reference
from torch.nn import functional as F

import mllm

CHECKPOINTING = [None, True, False]


def labelled(kind="padded"):
    """A batch whose labels are the last four tokens of every sample."""
    batch = tiny.samples(kind, side=SIDE)
    inputs = tiny.collate(batch, "right")
    labels = torch.full_like(inputs["input_ids"], -100)
    for b, sample in enumerate(batch):
        n = len(sample.ids)
        labels[b, n - 4 : n] = sample.ids[-4:]
    return batch, inputs, labels


def gradients(model, inputs, labels, spec, reentrant):
    model.train()
    model.zero_grad()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with mllm.patch(model, spec) as patched:
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        kept = [patched.ledger.kept(i) for i in range(LAYERS)]
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, kept


@pytest.mark.parametrize("reentrant", CHECKPOINTING, ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("spec", FEW)
def test_loss_and_gradients_equal_the_oracle(spec, reentrant):
    batch, inputs, labels = labelled()
    loss, grads, kept = gradients(fresh(), inputs, labels, spec, reentrant)

    oracle = fresh("eager")
    losses, case = [], CASES[spec]
    for b, sample in enumerate(batch):
        # What is supervised is the answer: the last prompt token stands before it.
        prompt = tiny.Sample(sample.ids[:-4], sample.pixels)
        rows = case.rows(oracle, prompt, kept[0][b])
        want = oracles.dense(oracle, rows, sample.ids[-4:], case.cuts)
        assert kept[-1][b].tolist() == sorted(want.entering[-1].tolist())
        losses.append(F.cross_entropy(want.logits[-5:-1], sample.ids[-4:], reduction="sum"))
    total = torch.stack(losses).sum() / (4 * len(batch))
    total.backward()
    equal(loss, total.detach(), "loss", 1e-5)
    wanted = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        scale = max(1.0, float(grad.abs().max()))
        equal(grads[name] / scale, grad / scale, f"gradient of {name}")


@pytest.mark.parametrize("spec", ["avgpool:keep=4", "downsample:keep=4", "random:keep=0.5"])
def test_checkpointing_changes_nothing(spec):
    _, inputs, labels = labelled()
    runs = [gradients(fresh(), inputs, labels, spec, r) for r in CHECKPOINTING]
    for loss, grads, _ in runs[1:]:
        equal(loss, runs[0][0], "loss", 1e-6)
        assert grads.keys() == runs[0][1].keys()
        for name, grad in grads.items():
            equal(grad, runs[0][1][name], name, 1e-5)


@pytest.mark.parametrize("spec", FEW)
def test_a_label_on_a_dropped_row_is_finite(spec):
    """Labels everywhere, as for a text loss over the whole prompt: no NaN, no crash."""
    _, inputs, _ = labelled()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss, grads, _ = gradients(fresh(), inputs, labels, spec, None)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("supervised", ["all", "before", "image"])
def test_the_prompt_reaches_to_its_last_image(supervised):
    """Supervised text before an image does not end the prompt: the cut still sees the image."""
    batch = tiny.samples(side=SIDE)
    inputs = tiny.collate(batch, "right")
    ids, labels = inputs["input_ids"], torch.full_like(inputs["input_ids"], -100)
    ends = []
    for b, sample in enumerate(batch):
        n = len(sample.ids)
        last = int(sample.visual.nonzero().max()) + 1 if sample.n_visual else 0
        if supervised == "all":
            labels[b, :n] = ids[b, :n]
        elif supervised == "before":
            labels[b, 1:3] = ids[b, 1:3]
        else:
            labels[b, last:n] = ids[b, last:n]
        ends.append(n if supervised == "before" else last)
    spec = "fastv:layer=2:keep=0.5"
    model = fresh()
    with mllm.patch(model, spec) as patched, torch.no_grad():
        model(**inputs, labels=labels)
        kept = patched.ledger.kept(2)
    for b, sample in enumerate(batch[:2]):
        prompt = tiny.Sample(sample.ids[: ends[b]], sample.pixels)
        want = oracles.dense(
            reference(), oracles.plain(reference(), prompt), None, CASES[spec].cuts
        )
        assert kept[b].tolist() == want.entering[2].tolist()


@pytest.mark.parametrize("first", ["lora", "patch"])
@pytest.mark.parametrize("spec", FEW)
def test_lora_learns(spec, first):
    peft = pytest.importorskip("peft")
    _, inputs, labels = labelled()
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    model = fresh()
    if first == "lora":
        model = peft.get_peft_model(model, lora)
        patched = mllm.patch(model, spec)
    else:
        patched = mllm.patch(model, spec)
        model = peft.get_peft_model(model, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, 1e-2)
    losses = []
    for _ in range(6):
        loss = model(**inputs, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    ledger = patched.ledger.as_dict()
    assert ledger["layers"][-1]["visual"] != ledger["visual_tokens"]
    model.eval()
    with torch.no_grad():
        model.generate(**tiny.collate(tiny.samples(side=SIDE)), max_new_tokens=3)
    patched.remove()
    with torch.no_grad():
        plain = model(**inputs).logits
    assert plain.isfinite().all()


@pytest.mark.parametrize("spec", FEW)
def test_bf16_runs(spec):
    """The dtype is kept, and what is chosen in bf16 is a legal choice."""
    inputs = tiny.collate(tiny.samples(side=SIDE))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    model = fresh().bfloat16()
    with mllm.patch(model, spec) as patched, torch.no_grad():
        logits = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert len(patched.ledger.kept(LAYERS - 1)[2]) == 0
