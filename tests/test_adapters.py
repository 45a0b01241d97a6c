"""Adapter folders: what routers have learnt is saved and loaded bit for bit, or refused."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from families import LAYERS, collate, model, samples
from safetensors.torch import load_file
from test_routers import PLAN, teach
from torch.utils.flop_counter import FlopCounterMode

import mllm
from mllm.errors import PlanError
from mllm.plan import Plan
from mllm.routers import MoD, MoELLaVA


def _logits(net, inputs):
    with torch.no_grad():
        return net(**inputs).logits


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_saved_and_loaded_bit_for_bit(family, tmp_path):
    net, inputs = model(family), collate(family, samples(family))
    with mllm.patch(net, PLAN) as patched:
        new = _logits(net, inputs)
        teach(net)
        trained = _logits(net, inputs)
        assert not torch.equal(new, trained)
        patched.save_adapter(tmp_path / "a")
        before = {k: v.clone() for k, v in net.mllm.state_dict().items()}
    other = model(family)
    with mllm.patch(other, tmp_path / "a") as patched:
        assert torch.equal(_logits(other, inputs), trained)
        assert all(torch.equal(before[k], v) for k, v in other.mllm.state_dict().items())
        assert not any("know nothing" in note for note in patched.ledger.notes)
        patched.save_adapter(tmp_path / "b")
    for name in ("mllm_adapter.safetensors", "mllm_adapter.json", "mllm_plan.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not list((tmp_path / "a").glob(".*"))


def test_the_files_are_those_of_the_contract(tmp_path):
    net = model("llava")
    with mllm.patch(net, PLAN) as patched:
        patched.save_adapter(tmp_path)
        plan = patched.plan
    head = json.loads((tmp_path / "mllm_adapter.json").read_text())
    assert set(head) == {
        "base_model", "config_sha256", "hidden_size", "num_hidden_layers", "plan_sha256",
        "trained_dtype",
    }  # fmt: skip
    assert head["num_hidden_layers"] == LAYERS and head["trained_dtype"] == "float32"
    assert set(load_file(tmp_path / "mllm_adapter.safetensors")) == {
        f"mllm.0.{i}.{p}" for i in (1, 2, 3) for p in ("weight", "bias")
    }
    assert Plan.from_pretrained(tmp_path).sha256 == plan.sha256 == head["plan_sha256"]


def test_another_plan_depth_or_width_is_refused(tmp_path):
    net = model("llava")
    with mllm.patch(net, PLAN) as patched:
        teach(net)
        patched.save_adapter(tmp_path)
    with mllm.patch(net, PLAN.replace(min_ratio=0.2)) as patched:
        with pytest.raises(PlanError) as caught:
            patched.load_adapter(tmp_path)
        assert caught.value.argument == "plan"
        assert not any(p.any() for p in net.mllm.parameters()), "nothing was loaded"
    head = json.loads((tmp_path / "mllm_adapter.json").read_text())
    for name, value in (("num_hidden_layers", 8), ("hidden_size", 64)):
        (tmp_path / "mllm_adapter.json").write_text(json.dumps(head | {name: value}))
        with pytest.raises(PlanError) as caught:
            mllm.patch(net, tmp_path)
        assert caught.value.argument == name and not hasattr(net, "mllm")
    (tmp_path / "mllm_adapter.json").write_text(json.dumps(head))
    (tmp_path / "mllm_adapter.safetensors").write_bytes(b"broken")
    with pytest.raises(PlanError, match="cannot read"):
        mllm.patch(net, tmp_path)


def test_nothing_to_save(tmp_path):
    net = model("llava")
    with mllm.patch(net, "fastv:layer=2:keep=0.5") as patched:
        with pytest.raises(PlanError, match="no trained parts"):
            patched.save_adapter(tmp_path)
    patched = mllm.patch(net, PLAN)
    patched.remove()
    with pytest.raises(PlanError, match="removed"):
        patched.save_adapter(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", ["plan", "peft"])
def test_beside_lora(first, tmp_path):
    """LoRA trains its own, and routers whole; both are saved, each in its folder."""
    from peft import LoraConfig, get_peft_model

    net = model("llava").train()
    inputs = collate("llava", samples("llava"))
    options = dict(target_modules=r".*language_model.*(q_proj|v_proj)", r=2)
    if first == "plan":
        patched = mllm.patch(net, PLAN)
        wrapped = get_peft_model(net, LoraConfig(**options, modules_to_save=["mllm"]))
    else:
        wrapped = get_peft_model(net, LoraConfig(**options))
        patched = mllm.patch(wrapped, PLAN)
    learnt = [p for n, p in wrapped.named_parameters() if "mllm" in n and p.requires_grad]
    assert len(learnt) == 6
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    assert learnt[0].any() and learnt[2].any()
    wrapped.eval()
    trained = _logits(wrapped, inputs)
    patched.save_adapter(tmp_path / "routers")
    patched.save_adapter(tmp_path / "gathered", state=wrapped.state_dict())
    wrapped.save_pretrained(tmp_path / "lora")
    same = [load_file(tmp_path / n / "mllm_adapter.safetensors") for n in ("routers", "gathered")]
    assert all(torch.equal(v, same[1][k]) for k, v in same[0].items())
    patched.remove()
    from peft import PeftModel

    if first == "peft":
        again = PeftModel.from_pretrained(model("llava"), tmp_path / "lora").eval()
        with mllm.patch(again, tmp_path / "routers"):
            assert torch.equal(_logits(again, inputs), trained)


BOTH = [PLAN, MoELLaVA(experts=3, top_k=2, mode="dense")]


def shake(net):
    """Routers and experts as if they were trained."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.mllm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)


def test_depth_and_experts_in_one_folder(tmp_path):
    """One submodule, one file, one account of losses and statistics."""
    net, inputs = model("llava"), collate("llava", samples("llava"))
    with mllm.patch(net, BOTH) as patched:
        shake(net)
        trained, before = _logits(net, inputs), {k: v.clone() for k, v in net.state_dict().items()}
        found = patched.router_stats()
        patched.save_adapter(tmp_path)
    depth = [(row["stage"], row["layer"]) for row in found if "kept" in row]
    experts = [(row["stage"], row["layer"]) for row in found if "load" in row]
    assert depth == [(0, 1), (0, 2), (0, 3)] and experts == [(1, i) for i in range(LAYERS)]
    names = set(load_file(tmp_path / "mllm_adapter.safetensors"))
    assert {"mllm.0.1.weight", "mllm.1.0.gate", "mllm.1.3.down_proj"} < names
    other = model("llava")
    with mllm.patch(other, Plan.of(tmp_path)):  # a plan brings what lies beside it
        assert torch.equal(_logits(other, inputs), trained)
        assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    with mllm.patch(other, Plan(Plan.of(tmp_path).stages)):
        assert not torch.equal(_logits(other, inputs), trained)


def test_experts_work_on_the_rows_that_run_a_layer():
    """Padded equals alone, and every expert is booked for the rows that its layer works on."""
    net, batch = model("llava", "eager"), samples("llava")
    inputs = collate("llava", batch)
    with mllm.patch(net, BOTH) as patched:
        shake(net)
        together = tiny.per_sample(_logits(net, inputs), inputs["attention_mask"])
        seen = [sum(layer["tokens"]) for layer in patched.ledger.as_dict()["layers"]]
        rows = [int(patched.routing.stats[1, i]["rows"]) for i in range(LAYERS)]
        assert rows == seen and seen[3] < seen[0]
        for s, got in zip(batch, together, strict=True):
            alone = _logits(net, collate("llava", [s]))[0]
            assert torch.allclose(got, alone, atol=1e-4)
        for layer in patched.upcycled.layers.values():
            layer.gate.data.zero_()  # the first take all: no product is rounded up to four rows
        with FlopCounterMode(display=False) as counter:
            _logits(net, collate("llava", batch[:1]))
        assert patched.ledger.as_dict()["prefill_flops"][0] == pytest.approx(
            counter.get_total_flops(), rel=1e-4
        )


@pytest.mark.parametrize("again", [False, True])
def test_both_learn_together(again):
    """Auxiliary losses of both kinds are in the loss once, with their gradients."""
    net, inputs = model("llava").train(), collate("llava", samples("llava"))
    plan = [MoD(capacity=0.5, auxiliary=0.1), MoELLaVA(experts=3, mode="dense", balance=0.2, z=0.1)]
    if again:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    with mllm.patch(net, plan) as patched:
        shake(net)
        loss = net(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        losses = patched.losses
        assert set(losses) == {"predictor", "balance", "z"}
        added = 0.1 * losses["predictor"] + 0.2 * losses["balance"] + 0.1 * losses["z"]
        assert float(patched.routing.added()) == pytest.approx(float(added), abs=1e-5)
        assert float(loss.detach()) > float(added)
        for name, p in net.mllm.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
            if name.endswith(("gate", "weight")):
                assert p.grad.any(), name
