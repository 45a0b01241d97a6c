"""Accelerators by their data sheets, and how long a computation takes on them at least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mllm.errors import DataError


@dataclass(frozen=True)
class Hardware:
    """What a data sheet promises of one device.

    Attributes:
        name: for results.
        flops: dense FLOP per second by dtype, accumulated in fp32; float32 without TF32.
        bandwidth: bytes per second of its memory.
        memory: bytes; None if nobody said.
        source: the data sheet.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: float | None = None
    source: str = "given"

    def seconds(self, flops: float, nbytes: float, dtype: str) -> float:
        """The longer of computing and of reading.

        Raises:
            DataError: the data sheet has no rate for this dtype.
        """
        if dtype not in self.flops:
            raise DataError(
                f"dtype={dtype!r} has no rate on {self.name}",
                argument="dtype",
                given=dtype,
                expected=", ".join(self.flops),
            )
        return max(flops / self.flops[dtype], nbytes / self.bandwidth)


def _device(
    name: str, half: float, single: float, bandwidth: float, memory: float, source: str
) -> Hardware:
    rates = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    return Hardware(name, rates, bandwidth * 1e9, memory * 1e9, source)


#: By name. TFLOP/s in 16 and 32 bits, GB/s, GB; tensor cores without sparsity.
HARDWARE = {
    device.name: device
    for device in (
        _device("a100-80gb", 312, 19.5, 2039, 80, "NVIDIA A100 80GB SXM data sheet"),
        _device("h100", 989.4, 67, 3350, 80, "NVIDIA H100 SXM data sheet"),
        _device("h200", 989.4, 67, 4800, 141, "NVIDIA H200 SXM data sheet"),
        _device("l40s", 362.05, 91.6, 864, 48, "NVIDIA L40S data sheet"),
        _device("rtx4090", 165.2, 82.6, 1008, 24, "NVIDIA Ada GPU architecture whitepaper"),
    )
}


def device(name: str) -> Hardware:
    """A device by name.

    Raises:
        DataError: there is none of this name.
    """
    if name not in HARDWARE:
        raise DataError(
            f"hardware={name!r} is not known; give one of {', '.join(HARDWARE)}, or numbers of "
            "your own",
            argument="hardware",
            given=name,
            expected=", ".join(HARDWARE),
        )
    return HARDWARE[name]
