"""Train experts under DeepSpeed and save what came of it.

Usage: python -m torch.distributed.run --standalone --nproc_per_node=N tests/experts_runs.py FILE,
where FILE is a JSON list of {spec, ep_size, zero, out}; each process takes its share of one batch.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import tiny
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

import mllm
from mllm.routers.adapter import state_of
from mllm.training.launch import end_worker

STEPS = 3


def train(spec: str, ep_size: int, zero: int, out: str) -> None:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = tiny.llava().train()
    batch = [s for seed in (1, 2) for s in tiny.samples("alone", seed=seed)][rank::size]
    inputs = tiny.collate(batch)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, -100)
    with mllm.upcycle(model, spec, ep_size=ep_size) as patched:
        parameters = {"params": [p for p in model.parameters() if p.requires_grad], "name": "all"}
        if ep_size > 1:
            parameters = split_params_into_different_moe_groups_for_optimizer(parameters)
        else:
            parameters = [parameters]
        config = {
            "train_micro_batch_size_per_gpu": len(batch),
            "zero_optimization": {"stage": zero, "contiguous_gradients": True},
            # Under ZeRO 0 DeepSpeed leaves other processes' experts out of the norm.
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        losses = []
        for _ in range(STEPS):
            loss = engine(**inputs, labels=labels, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            answers = float(loss.detach() - patched.routing.added())
            mean = torch.tensor(answers)
            torch.distributed.all_reduce(mean)
            losses.append(float(mean) / size)
        state = state_of(patched)
    if rank == 0:
        torch.save({"losses": torch.tensor(losses), **state}, out)


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for job in json.loads(open(sys.argv[1]).read()):
        train(**job)
        torch.distributed.barrier()
    end_worker(0)
