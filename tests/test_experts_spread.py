"""Recipes whose processes share experts: the same numbers, also after a stop; what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import command, losses, needs_deepspeed, run_in
from test_distributed import written as recipe_of
from train_tiny import save_small

from mllm.errors import RecipeError
from mllm.training import preview
from mllm.training.data import load_data
from mllm.training.launch import World
from mllm.training.recipe import validate
from mllm.training.run import run

PLAN = "visionzip:keep=6+moellava:experts=4:mode=dense:balance=0.1"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("small"))


def written(small, folder, *, ep=1, zero=None, plan=PLAN, method=None, norm=1.0, batch=1, **train):
    """A recipe of three steps that trains experts; `batch` is that of each process."""
    recipe = recipe_of(
        small, folder, zero=zero, plan=plan, batch=batch, parallel={"ep_size": ep},
        max_grad_norm=norm, **train,
    )  # fmt: skip
    return recipe | {"method": method or {"type": "moe"}}


def logged(folder, name):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([float(row[name]) for row in rows if name in row])


def learnt(folder):
    return load_file(folder / "routers/mllm_adapter.safetensors")


LORA = {"type": "moe", "r": 4}
CASES = {
    "data parallel": {"zero": 2, "ep": 1},
    "zero 0": {"zero": 0, "ep": 2, "norm": 0},
    "zero 1": {"zero": 1, "ep": 2},
    "zero 2": {"zero": 2, "ep": 2},
    "bigmac": {"zero": 2, "ep": 2, "plan": "bigmac:experts=4:top_k=2"},
    "lora": {"zero": 2, "ep": 2, "method": LORA},
    "all": {"zero": 1, "ep": 2, "method": {"type": "full"}, "gradient_checkpointing": True},
}


@needs_deepspeed
@pytest.mark.slow
def test_processes_that_share_experts_train_as_one(small, tmp_path):
    """Losses, the norm that gradients are clipped by, and all experts in the end.

    Fails if a process keeps gradients or weights of its experts to itself.
    """
    spread = [written(small, tmp_path / name, **case) for name, case in CASES.items()]
    run_in(2, spread, tmp_path)
    for name, case in CASES.items():
        one = tmp_path / f"{name} alone"
        more = {key: value for key, value in case.items() if key not in ("zero", "ep")}
        run(validate(written(small, one, batch=2, **more)))
        two = tmp_path / name
        assert torch.allclose(losses(two), losses(one), atol=1e-4, rtol=0), name
        if case["zero"]:
            assert torch.allclose(logged(two, "grad_norm"), logged(one, "grad_norm"), rtol=1e-3)
        for got, want in (
            (learnt(two), learnt(one)),
            *((load_file(f / "model/model.safetensors") for f in (two, one)),),
            (load_file(two / "model/mllm_adapter.safetensors"), learnt(one)),
        ):
            assert got.keys() == want.keys()
            # AdamW turns rounding into whole steps (1e-2) where there is hardly a gradient.
            apart = [(got[k] - want[k]).abs().mean() for k in want if "k_proj.bias" not in k]
            assert max(apart) < 1e-3, name


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero 0", "zero 1", "zero 2", "lora"])
def test_a_run_with_shared_experts_resumes_to_the_same_weights(name, small, tmp_path):
    """To the last bit; fails if a checkpoint lacks the experts or states of one process."""
    recipe = written(small, tmp_path / "run", max_steps=4, **CASES[name])
    run_in(2, [recipe], tmp_path)
    whole, experts = losses(tmp_path / "run"), learnt(tmp_path / "run")
    weights = load_file(tmp_path / "run/model/model.safetensors")
    sealed = json.loads((tmp_path / "run/checkpoint-2/COMPLETE").read_text())
    assert "routers/mllm_adapter.safetensors" in sealed
    for gone in ("checkpoint-4", "model", "routers"):
        shutil.rmtree(tmp_path / "run" / gone)
    (tmp_path / "run/metrics.jsonl").unlink()
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(record | {"status": "stopped"}))
    path = tmp_path / "recipe.yaml"
    path.write_text(validate(recipe).to_yaml())
    done = command(str(path), "--resume", "--nproc", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(losses(tmp_path / "run"), whole[2:])
    again = learnt(tmp_path / "run")
    assert all(torch.equal(again[k], experts[k]) for k in experts)
    again = load_file(tmp_path / "run/model/model.safetensors")
    assert all(torch.equal(again[k], weights[k]) for k in weights)


@needs_deepspeed
def test_optimizers_have_shared_experts_apart():
    from mllm.routers.experts_parallel import optimizer_groups

    own, shared, other = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    shared.allreduce, shared.group_name = False, "ep_size_2"
    other.allreduce, other.group_name = False, "ep_size_2"
    groups = optimizer_groups(
        [{"params": [own, shared], "lr": 1.0}, {"params": [other], "lr": 2.0}]
    )
    found = [(g["lr"], g.get("moe", False), [id(p) for p in g["params"]]) for g in groups]
    assert found == [
        (1.0, False, [id(own)]), (1.0, True, [id(shared)]), (2.0, True, [id(other)]),
    ]  # fmt: skip


def checked(small, processes, **case):
    recipe = validate(written(small, "run", **case))
    return preview.check(recipe, load_data(recipe.data)[0], World(size=processes))


def test_the_preview_shows_the_experts_of_a_process(small, monkeypatch):
    """And counts the memory of these alone: fp32 weights, gradients, two states of AdamW."""
    monkeypatch.setattr(preview, "check_deepspeed", lambda: None)
    case = {"zero": 0, "norm": 0, "plan": "moe:experts=2/4:mode=dense"}
    alone, shared = checked(small, 2, **case), checked(small, 2, ep=2, **case)
    assert [row["per_process"] for row in alone["experts"]] == [2, 4]
    assert shared["experts"] == [
        {"layer": 0, "experts": 2, "per_process": 1}, {"layer": 1, "experts": 4, "per_process": 2}
    ]  # fmt: skip
    ffn = 3 * 32 * 48
    assert alone["memory"]["fixed"] - shared["memory"]["fixed"] == 16 * 3 * ffn
    two = {**case, "zero": 2, "norm": 1.0}
    alone, shared = checked(small, 2, **two), checked(small, 2, ep=2, **two)
    assert alone["memory"]["fixed"] - shared["memory"]["fixed"] == 4 * 3 * ffn


def test_processes_that_cannot_share_evenly_are_refused(small, monkeypatch):
    monkeypatch.setattr(preview, "check_deepspeed", lambda: None)
    with pytest.raises(RecipeError, match="does not divide 3 processes"):
        checked(small, 3, zero=1, ep=2)
    with pytest.raises(RecipeError, match="does not divide 3 experts"):
        checked(small, 2, zero=1, ep=2, plan="moe:experts=4/3:mode=dense")


@pytest.mark.parametrize(
    ("case", "argument"),
    [
        ({}, "parallel.zero"),
        ({"zero": 3}, "parallel.zero"),
        ({"zero": 0}, "train.max_grad_norm"),
        ({"zero": 0, "norm": 0, "bf16": True}, "train.bf16"),
        ({"zero": 1, "plan": "visionzip:keep=6", "method": {"type": "full"}}, "plan"),
    ],
)
def test_what_cannot_go_with_shared_experts_is_named(case, argument, small):
    with pytest.raises(RecipeError) as caught:
        validate(written(small, "run", ep=2, **case))
    assert caught.value.argument == argument


def test_offloaded_states_cannot_go_with_shared_experts(small):
    recipe = written(small, "run", ep=2, zero=2)
    with pytest.raises(RecipeError, match="cannot go with parallel.offload"):
        validate(recipe | {"parallel": recipe["parallel"] | {"offload": "optimizer"}})
