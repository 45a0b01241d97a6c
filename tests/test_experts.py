"""Experts: each routing rule against a plain loop, starts that change nothing, training, adapters.

moe, moellava, deepseekmoe, bigmac, prmoe, vmoe.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import families
import pytest
import tiny
import torch
from test_flops import counted
from torch.nn import functional as F

import mllm
from mllm.errors import PlanError, RecipeError
from mllm.plan import Plan, get_method
from mllm.routers.adapter import state_of
from mllm.routers.dispatch import choose, combine, grouped_ffn, within_capacity
from mllm.routers.experts import ROUTING, Experts

REPOSITORY = Path(__file__).parents[1]
EXACT = ["moe:experts=4", "moellava", "moellava:top_k=1:mode=dense", "deepseekmoe", "prmoe",
         "prmoe:experts=2/4", "vmoe:experts=5:top_k=3:layers=1/3",
         "bigmac:experts=6:top_k=2"]  # fmt: skip
SPLIT = "deepseekmoe:experts=6:top_k=2:start_from=split"
SHORT = ["vmoe:experts=4:capacity_factor=0.5", "moellava:capacity_factor=0.6",
         "prmoe:capacity_factor=0.5", f"{SPLIT}:capacity_factor=0.7"]  # fmt: skip
FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
            "internvl", "gemma3", "idefics3", "smolvlm"]  # fmt: skip


def shaken(patched, seed=3):
    """Experts that differ: routing then shows."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in patched.upcycled.layers.values():
            for p in layer.parameters():
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return patched


# --- the start


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_start_changes_nothing(family):
    """Bit-equal logits in a padded batch; fails if weights are no copies or do not add up."""
    model = families.model(family)
    inputs = families.collate(family, families.samples(family))
    real = inputs["attention_mask"].bool()
    plain = model(**inputs).logits[real]
    for spec in EXACT if family == "llava" else ["moellava:mode=dense", "prmoe", "deepseekmoe"]:
        with mllm.upcycle(model, spec):
            assert torch.equal(model(**inputs).logits[real], plain), spec
        assert torch.equal(model(**inputs).logits[real], plain)


@pytest.mark.parametrize("spec", EXACT)
@torch.no_grad()
def test_answers_and_state_come_back(spec):
    model, inputs = tiny.llava(), tiny.collate(tiny.samples())
    keys, plain = list(model.state_dict()), model.generate(**inputs, max_new_tokens=5)
    with mllm.upcycle(model, spec) as patched:
        assert torch.equal(model.generate(**inputs, max_new_tokens=5), plain)
        new = set(model.state_dict()) - set(keys)
        assert new and all(name.startswith("mllm.0.") for name in new)
        shaken(patched)
        assert not torch.equal(model(**inputs).logits, copy.deepcopy(model)(**inputs).logits)
        assert list(copy.deepcopy(model).state_dict()) == keys  # a copy has no plan
    assert list(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), plain)


@torch.no_grad()
def test_a_split_ffn_with_all_its_parts_is_the_ffn():
    """Every group of neurons once: nothing lost, nothing twice (its order of addition differs)."""
    model, inputs = tiny.llava(), tiny.collate(tiny.samples("alone"))
    plain = model(**inputs).logits
    with mllm.upcycle(model, "deepseekmoe:experts=6:top_k=6:start_from=split") as patched:
        for layer in patched.upcycled.layers.values():
            layer.gate.zero_()
        assert torch.allclose(model(**inputs).logits, plain, atol=1e-4)


# --- the rule, against plain loops


def plain_layer(layer, hidden, valid):
    """What one layer should give, token by token: shares no code with the dispatch."""
    stage, out = layer.stage, torch.zeros_like(hidden)
    for b in range(len(hidden)):
        rows = [t for t in range(hidden.shape[1]) if valid[b, t]]
        scores = {t: torch.softmax(layer.gate @ hidden[b, t], 0) for t in rows}
        picks = {
            t: sorted(range(layer.experts), key=lambda e: (-float(s[e]), e))[: stage.top_k]
            for t, s in scores.items()
        }
        room = dict.fromkeys(range(layer.experts), math.inf)
        if stage.capacity_factor is not None:
            share = len(rows) * stage.capacity_factor * stage.top_k / layer.experts
            room = dict.fromkeys(room, max(1, stage.min_capacity, math.ceil(share - 1e-6)))
        order = rows
        if stage.info.name == "vmoe":
            order = sorted(rows, key=lambda t: (-float(scores[t].max()), t))
        kept = set()
        for k in range(stage.top_k):
            for t in order:
                if room[picks[t][k]] > 0:
                    room[picks[t][k]] -= 1
                    kept.add((t, k))
        for t in rows:
            x, best = hidden[b, t], scores[t][picks[t]]
            if stage.info.name == "deepseekmoe":
                routed = stage.segments - stage.shared
                scale = routed * stage.experts / stage.top_k
                best = best * (scale if stage.start_from == "split" else 1)
            elif stage.info.name != "bigmac":
                best = best / best.sum()
            narrow = stage.info.name == "bigmac"
            z = layer.descend @ x if narrow else x
            y = torch.zeros_like(z)
            for k, e in enumerate(picks[t]):
                if (t, k) in kept:
                    inner = layer.act((layer.up_proj if narrow else layer.gate_proj)[e] @ z)
                    inner = inner if narrow else inner * (layer.up_proj[e] @ x)
                    y = y + best[k] * (layer.down_proj[e] @ inner)
            y = layer.ascend @ y if narrow else y
            if hasattr(layer, "shared_up_proj"):
                inner = layer.act(layer.shared_gate_proj @ x) * (layer.shared_up_proj @ x)
                always = layer.shared_down_proj @ inner
                if hasattr(layer, "mix_weight"):
                    c = torch.softmax(layer.mix_weight @ x + layer.mix_bias, 0)
                    y = c[0] * y + c[1] * always
                else:
                    y = y + always
            out[b, t] = y
    return out


@pytest.mark.parametrize("spec", [*EXACT, SPLIT, *SHORT])
@torch.no_grad()
def test_layers_equal_a_loop_over_tokens(spec):
    model = tiny.llava()
    hidden = torch.randn(3, 11, 48, generator=torch.Generator().manual_seed(5))
    valid = torch.ones(3, 11, dtype=torch.bool)
    valid[0, :4] = valid[2, :9] = False
    with shaken(mllm.upcycle(model, spec)) as patched:
        layer = next(iter(patched.upcycled.layers.values()))
        token = ROUTING.set((valid, None))
        got = layer(hidden)
        ROUTING.reset(token)
        assert torch.allclose(got, plain_layer(layer, hidden, valid), atol=1e-4)


def test_ties_go_to_the_lower_index():
    values, index = choose(torch.tensor([[0.2, 0.4, 0.4, 0.4], [0.25] * 4]), 2)
    assert index.tolist() == [[1, 2], [0, 1]] and values[0].tolist() == pytest.approx([0.4, 0.4])


def test_room_is_counted_per_sample_and_first_choices_come_first():
    expert = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 1]])
    sample = torch.tensor([0, 0, 0, 1])
    fits = within_capacity(expert, sample, torch.tensor([1, 1]), 2)
    # Row 1's first choice takes expert 1 before row 0's second choice comes.
    assert fits.tolist() == [[True, False], [True, False], [False, False], [True, True]]
    sure = within_capacity(expert, sample, torch.tensor([1, 1]), 2, torch.tensor([1, 2, 3, 0]))
    assert sure[:, 0].tolist() == [False, True, True, True]


@pytest.mark.parametrize("counts", [[0, 3, 1, 0, 7], [0, 0, 0, 0, 0], [11, 0, 0, 0, 0]])
def test_groups_equal_one_expert_at_a_time(counts):
    """Also where an expert has no row, or fewer than a product should have; with gradients."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 8, generator=g, requires_grad=True)
    weights = [
        torch.randn(5, *s, generator=g, requires_grad=True) for s in ((6, 8), (6, 8), (8, 6))
    ]
    got = grouped_ffn(x, counts, *weights, F.silu, least=4)
    parts = x.split(counts)
    want = torch.cat([
        F.linear(F.silu(F.linear(p, a)) * F.linear(p, b), c)
        for p, a, b, c in zip(parts, *(w.unbind() for w in weights), strict=True)
    ])  # fmt: skip
    assert torch.allclose(got, want, atol=1e-5)
    mine = torch.autograd.grad(got.square().sum(), [x, *weights])
    other = torch.autograd.grad(want.square().sum(), [x, *weights])
    for a, b in zip(mine, other, strict=True):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-4)


def test_experts_that_agree_are_exact():
    y = torch.randn(1000, 1, 8).expand(-1, 3, -1)
    weight = torch.rand(1000, 3)
    weight = weight / weight.sum(1, keepdim=True)
    assert torch.equal(combine(y, weight, True), y[:, 0])
    weight[:, 1] = 0  # dropped
    assert torch.allclose(combine(y, weight, True), weight.sum(1, keepdim=True) * y[:, 0])


# --- batches


@pytest.mark.parametrize("spec", ["moellava", "deepseekmoe", "bigmac", SPLIT, *SHORT])
@torch.no_grad()
def test_padded_equals_alone_in_any_order(spec):
    """Fails if padding is routed or counted, or if a sample takes another one's room."""
    model, batch = tiny.llava(), tiny.samples()
    with shaken(mllm.upcycle(model, spec)):
        alone = [model(**tiny.collate([s])).logits[0] for s in batch]
        for order in ([0, 1, 2], [2, 0, 1]):
            inputs = tiny.collate([batch[i] for i in order])
            logits = tiny.per_sample(model(**inputs).logits, inputs["attention_mask"])
            for i, got in zip(order, logits, strict=True):
                assert torch.allclose(got, alone[i], atol=1e-4), (spec, order)


@pytest.mark.parametrize("spec", ["moellava:mode=dense", SPLIT, "prmoe"])
@torch.no_grad()
def test_decoding_equals_reading_again(spec):
    model, inputs = tiny.llava(), tiny.collate(tiny.samples())
    options = dict(max_new_tokens=5, do_sample=False)
    with shaken(mllm.upcycle(model, spec)):
        cached = model.generate(**inputs, **options)
        assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


# --- losses, gradients


def trained(spec, kwargs=None, spread=True):
    """Loss, gradients of what is new, statistics, of one backward pass."""
    model, inputs = tiny.llava().train(), tiny.collate(tiny.samples(), "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if kwargs is not None:
        model.gradient_checkpointing_enable(kwargs)
    with mllm.patch(model, spec) as patched:
        if spread:
            shaken(patched)
        loss = model(**inputs, labels=labels, use_cache=False).loss
        (2 * loss).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if n.startswith("mllm.")}
        return float(loss.detach()), grads, patched.router_stats()


@pytest.mark.parametrize(
    "spec",
    ["moellava", "deepseekmoe", "prmoe:top_k=1", "moe:experts=4", "vmoe:capacity_factor=0.8",
     "bigmac:experts=6:top_k=2"],  # fmt: skip
)
def test_gradients_reach_every_router_and_expert(spec):
    """With both kinds of checkpointing, to the same numbers; auxiliary losses included."""
    loss, grads, stats = trained(spec)
    busy = {row["layer"]: [x > 0 for x in row["load"]] for row in stats}
    for name, grad in grads.items():
        assert grad is not None and grad.isfinite().all(), name
        if name.endswith((".gate", "mix_weight")):
            assert (grad.abs().sum(1) > 0).all(), name
        elif "_proj" in name and "shared" not in name:
            reached = (grad.flatten(1).abs().sum(1) > 0).tolist()
            assert reached == busy[int(name.split(".")[2])], name
    for reentrant in (True, False):
        again, other, _ = trained(spec, {"use_reentrant": reentrant})
        assert again == pytest.approx(loss, abs=1e-5)
        for name, grad in grads.items():
            assert torch.allclose(other[name], grad, atol=1e-4, rtol=1e-4), (name, reentrant)


def test_experts_that_agree_still_teach_a_single_choice():
    """At the start, an answer's loss reaches the router of one expert per token."""
    _, grads, _ = trained("moellava:top_k=1:balance=0.0", spread=False)
    assert all(float(g.abs().max()) > 0 for n, g in grads.items() if n.endswith("gate"))


@pytest.mark.parametrize("spec", ["moellava:layers=1", "moe:experts=4:layers=1:balance=0.0:z=0.5"])
def test_auxiliary_losses_are_those_of_the_papers(spec):
    """Value and gradient against the formula; half the padding would already move them."""
    model, inputs = tiny.llava().train(), tiny.collate(tiny.samples())
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    real, seen = inputs["attention_mask"].bool(), {}
    with shaken(mllm.upcycle(model, spec)) as patched:
        layer = patched.upcycled.layers[1]
        layer.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
        with_loss = model(**inputs, labels=labels).loss
        model.eval()
        without = model(**inputs, labels=labels).loss  # an evaluation has the answers' loss
        model.train()
        logits = F.linear(seen["x"][real], layer.gate)
        p, stage = logits.softmax(-1), layer.stage
        first = F.one_hot(p.argmax(-1), 4).float().mean(0)
        want = stage.balance * 4 * (p.mean(0) * first).sum()
        want = want + stage.z * torch.logsumexp(logits, -1).square().mean()
        assert float(with_loss - without) == pytest.approx(float(want), abs=1e-5)
        gate = lambda loss: torch.autograd.grad(loss, layer.gate, retain_graph=True)[0]  # noqa: E731
        got = gate(model(**inputs, labels=labels).loss)
        model.eval()
        plain = gate(model(**inputs, labels=labels).loss)
        # The scores' own path only: what enters the layer does not depend on its router.
        assert torch.allclose(got - plain, gate(want), atol=1e-5)


def test_statistics_leave_padding_out():
    model, inputs = tiny.llava().eval(), tiny.collate(tiny.samples())
    with torch.no_grad(), mllm.upcycle(model, SHORT[0]) as patched:
        model(**inputs)
        row = patched.router_stats()[0]
        rows = patched.routing.stats[0, 2]["rows"]
        assert int(rows) == int(inputs["attention_mask"].sum())
    assert sum(row["load"]) == pytest.approx(1) and 0 < row["dropped"] < 1
    assert 0 < row["entropy"] <= math.log(4)


# --- the ledger


@pytest.mark.parametrize("spec", ["moellava", "deepseekmoe", "prmoe", "bigmac", SPLIT, SHORT[0]])
@torch.no_grad()
def test_ledger_counts_what_torch_counts(spec):
    model, inputs = tiny.llava("eager"), tiny.collate(tiny.samples("alone"))
    with mllm.patch(model, spec) as patched:
        for layer in patched.upcycled.layers.values():
            layer.gate.zero_()  # the first experts take all: no product is rounded up to four rows
        total = counted(lambda: model(**inputs))
        assert sum(patched.ledger.as_dict()["prefill_flops"]) == total


@torch.no_grad()
def test_experts_stand_beside_fewer_tokens():
    model, inputs = tiny.llava(), tiny.collate(tiny.samples())
    spec = "visionzip:keep=6+fastv:layer=2:keep=3"
    with mllm.patch(model, spec):
        plain = model(**inputs).logits
    with mllm.patch(model, f"{spec}+moellava:mode=dense") as patched:
        real = inputs["attention_mask"].bool()
        assert torch.equal(model(**inputs).logits[real], plain[real])
        data = patched.ledger.as_dict()
        rows = [int(patched.routing.stats[2, i]["rows"]) for i in range(4)]
    assert rows == [sum(layer["tokens"]) for layer in data["layers"]] and rows[3] < rows[1]


# --- adapters


def test_an_adapter_is_loaded_bit_by_bit(tmp_path):
    model, inputs = tiny.llava(), tiny.collate(tiny.samples())
    plan = Plan.from_spec("moellava:experts=3+visionzip:keep=6", seed=4)
    with torch.no_grad(), shaken(mllm.upcycle(model, plan)) as patched:
        patched.save_adapter(tmp_path)
        want, state = model(**inputs).logits, state_of(patched)
    assert {"mllm_plan.json", "mllm_adapter.safetensors", "mllm_adapter.json", "README.md"} == {
        path.name for path in tmp_path.iterdir()
    }
    with torch.no_grad(), mllm.patch(tiny.llava(), tmp_path) as patched:
        again = state_of(patched)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[k], state[k]) for k in state)
        assert torch.equal(patched.model(**inputs).logits, want)
    for change, argument in (
        ({"layers": 6}, "num_hidden_layers"), ({"hidden": 64}, "hidden_size"),
    ):  # fmt: skip
        other = tiny.llava(**change)
        keys = list(other.state_dict())
        with pytest.raises(PlanError) as caught:
            mllm.patch(other, tmp_path)
        assert caught.value.argument == argument and list(other.state_dict()) == keys
    with mllm.upcycle(tiny.llava(), "moellava:experts=2") as patched:
        with pytest.raises(PlanError, match="another plan"):
            patched.load_adapter(tmp_path)
    (tmp_path / "mllm_adapter.safetensors").write_bytes(b"torn")
    with pytest.raises(PlanError, match="cannot read the adapter"):
        mllm.patch(tiny.llava(), tmp_path)
    assert json.loads((tmp_path / "mllm_adapter.json").read_text())["hidden_size"] == 48


def test_lora_stands_beside_experts():
    """Adapters on attention and experts learn together; neither is in the other's files."""
    peft = pytest.importorskip("peft")
    model, inputs = tiny.llava(), tiny.collate(tiny.samples())
    with mllm.upcycle(model, "moellava") as patched:
        lora = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=r".*text.*q_proj|.*language.*q_proj")
        )
        patched.train_routers()
        lora.train()
        lora(**inputs, labels=inputs["input_ids"]).loss.backward()
        got = {n for n, p in lora.named_parameters() if p.grad is not None and p.grad.any()}
        assert any("lora_B" in n for n in got) and any(n.endswith("0.0.gate") for n in got)
        assert not any("mlp." in n for n in got)
        assert all(n.startswith("mllm.0.") for n in state_of(patched))
        assert not any("mllm." in n for n in peft.get_peft_model_state_dict(lora))


# --- what is refused


@pytest.mark.parametrize(
    "spec, argument",
    [
        ("moellava:experts=2:top_k=3", "top_k"),
        ("prmoe:experts=4/1:top_k=2", "top_k"),
        ("moellava:layers=4", "layers"),
        ("moellava:layers=3/1", "layers"),
        ("prmoe:experts=2/4/8", "experts"),
        ("moe:experts=0", "experts"),
        ("moe:capacity_factor=0.0", "capacity_factor"),
        ("moe:balance=-1.0", "balance"),
        ("deepseekmoe:segments=7", "segments"),
        ("deepseekmoe:shared=8", "shared"),
        ("moe:mode=some", "mode"),
        ("moellava+moe", "layers"),
        ("visionzip:keep=4", "plan"),
    ],
)
def test_bad_plans_are_refused(spec, argument):
    model = tiny.llava()
    keys = list(model.state_dict())
    with pytest.raises(PlanError) as caught:
        mllm.upcycle(model, spec)
    assert caught.value.argument == argument and list(model.state_dict()) == keys
    assert "mllm_patched" not in model.model.__dict__
    assert all(p.requires_grad for p in model.parameters())


def test_expert_parallelism_that_does_not_fit():
    with pytest.raises(PlanError, match="evenly") as caught:
        mllm.upcycle(tiny.llava(), "moellava:experts=4", ep_size=3)
    assert caught.value.argument == "ep_size"


@pytest.mark.slow
def test_processes_that_share_experts_train_as_one(tmp_path):
    """Fails if a loss is of one process, gradients count twice, or rows come back wrong."""
    pytest.importorskip("deepspeed")
    spec = "moellava:mode=dense:balance=0.1:z=0.01"
    one = [{"spec": spec, "ep_size": 1, "zero": 0, "out": str(tmp_path / "one")}]
    two = [
        {"spec": spec, "ep_size": ep, "zero": zero, "out": str(tmp_path / f"{ep}-{zero}")}
        for ep, zero in ((1, 0), (2, 0), (2, 1), (2, 2))
    ]
    for processes, jobs in ((1, one), (2, two)):
        listed = tmp_path / "jobs.json"
        listed.write_text(json.dumps(jobs))
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [sys.executable, *launch, "tests/experts_runs.py", str(listed)],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    want = torch.load(tmp_path / "one")
    with mllm.upcycle(tiny.llava(), spec) as patched:
        start = state_of(patched)
    for job in two:
        got = torch.load(job["out"])
        assert got.keys() == want.keys()
        assert torch.allclose(got["losses"], want["losses"], atol=1e-4), job
        for name, before in start.items():
            assert (want[name] - before).norm() > 0, name
            assert torch.allclose(got[name], want[name], atol=1e-4), (job, name)
            change = (want[name] - before).norm()
            assert (got[name] - want[name]).norm() < 2e-3 * change, (job, name)


def test_parameters_in_parts_are_refused():
    """As ZeRO-3 leaves them."""
    model = tiny.llava()
    next(model.parameters()).ds_status = "NOT_AVAILABLE"
    with pytest.raises(PlanError, match="ZeRO-3 keeps parameters in parts"):
        mllm.upcycle(model, "moellava")


def test_recipes_that_cannot_train_experts_are_refused():
    validate = pytest.importorskip("mllm.training.recipe").validate
    written = {
        "version": 1,
        "model": {"path": "tiny-llava"},
        "plan": "visionzip:keep=6+moellava",
        "data": [{"path": "yardstick", "limit": 2}],
        "output": {"dir": "run"},
    }
    for method in ({"type": "full"}, {"type": "moe"}, {"type": "moe", "r": 4}, {"type": "router"}):
        assert validate(written | {"method": method}).method.type == method["type"]
    for change, argument in (
        ({"plan": "visionzip:keep=6", "method": {"type": "moe"}}, "plan"),
        ({"plan": None, "method": {"type": "router"}}, "plan"),
        ({"method": {"type": "full", "dense_ffn": True}}, "method.dense_ffn"),
        ({"method": {"type": "moe", "dense_ffn": True, "r": 4}}, "method.dense_ffn"),
        ({"method": {"type": "lora", "load_in_4bit": True}}, "method.load_in_4bit"),
        ({"method": {"type": "router", "r": 4}}, "method.r"),
        ({"parallel": {"ep_size": 2}}, "parallel.zero"),
    ):
        with pytest.raises(RecipeError) as caught:
            validate(written | change)
        assert caught.value.argument == argument, change
    with pytest.raises(RecipeError, match="ZeRO-3") as caught:
        validate(written | {"parallel": {"zero": 3}})
    assert caught.value.argument == "parallel.zero"


def test_a_model_without_a_gated_ffn_is_refused():
    model = tiny.llava()
    model.model.language_model.layers[0].mlp.gate_proj = torch.nn.Identity()
    with pytest.raises(PlanError, match="not a dense gated one"):
        mllm.upcycle(model, "moellava")


def test_every_expert_method_is_tried():
    names = {row["name"] for row in mllm.methods() if row["stage"] == "experts"}
    assert names == {spec.split(":")[0] for spec in [*EXACT, *SHORT]}
    assert all(issubclass(get_method(name), Experts) for name in names)
