"""What the machine can do at best, so that times have an ideal beside them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from mllm.roofline import HARDWARE, Hardware

#: How CUDA calls the devices whose data sheets are known. A100 and H100 are sold in weaker forms.
_NAMES = {
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}
SECONDS = 0.3  # that each of the two measurements takes, about


def machine(device: str, dtype: str) -> Hardware:
    """Peak FLOP and bytes per second of a device: its data sheet's, or measured here and now.

    Measured are a large square matrix product and a copy of a buffer larger than caches (each byte
    read and written counts), the best of several runs each; `source` says so.

    Args:
        device: torch device.
        dtype: of the matrix product.
    """
    where = torch.device(device)
    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
        if name in _NAMES:
            return HARDWARE[_NAMES[name]]
        index = torch.cuda.current_device() if where.index is None else where.index
        where = torch.device("cuda", index)  # one name, so that it is measured once
    return _measured(str(where), dtype, torch.get_num_threads())


@functools.cache
def _measured(device: str, dtype: str, threads: int) -> Hardware:
    cuda = torch.device(device).type == "cuda"
    side, size = (8192, 2**30) if cuda else (1024, 2**27)
    flops = 2 * side**3 / _product(side, device, dtype)
    bandwidth = 2 * size / _copy(size, device)
    if cuda:
        torch.cuda.empty_cache()
    source = f"measured: product of {side} x {side} matrices, copy of {size // 2**20} MiB"
    return Hardware("this machine", {dtype: flops}, bandwidth, source=source)


@torch.inference_mode()
def _product(side: int, device: str, dtype: str) -> float:
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    return _best(lambda: a @ a, torch.device(device))


@torch.inference_mode()
def _copy(size: int, device: str) -> float:
    buffer = torch.zeros(2, size, dtype=torch.uint8, device=device)
    return _best(lambda: buffer[0].copy_(buffer[1]), torch.device(device))


def _best(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of at least three runs, the first of which is left out."""
    found: list[float] = []
    while len(found) < 4 or sum(found) < SECONDS:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def reached(at: Hardware, dtype: str, flops: float, nbytes: float, seconds: float) -> dict:
    """Fields of a row: what was to be done, how long the machine needs at least, and the share.

    Args:
        at: of :func:`machine`.
        dtype: of the matrix products.
        flops: of what took `seconds`.
        nbytes: that had to be read and written for it.
    """
    ideal = at.seconds(flops, nbytes, dtype)
    return {
        "flops": flops, "bytes": nbytes, "ideal_s": ideal, "roofline_share": ideal / seconds,
    }  # fmt: skip


def said(at: Hardware, dtype: str) -> dict[str, Any]:
    """The `machine` of a results object."""
    return {
        "name": at.name, "flops": at.flops[dtype], "bandwidth": at.bandwidth, "source": at.source,
    }  # fmt: skip
