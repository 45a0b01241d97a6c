"""Time and memory of what runs: CUDA events on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


def clock_of(model: Any) -> _CpuClock | _CudaClock:
    """A clock for the device of a model: `mark()` at each moment, then `seconds()` of all."""
    return _CudaClock(model.device) if model.device.type == "cuda" else _CpuClock()


class _CpuClock:
    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return self.marks


class _CudaClock:
    """CUDA events: the GPU's own time, whatever the queue of launches does.

    The GPU is named throughout, for the current one may be another.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[torch.cuda.Event] = []
        torch.cuda.synchronize(device)

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append(event)

    def seconds(self) -> list[float]:
        torch.cuda.synchronize(self.device)
        return [self.marks[0].elapsed_time(event) / 1e3 for event in self.marks]


def peak_of(device: torch.device, run: Callable[[], Any]) -> int:
    """Most bytes of tensors that lived at once during `run`, beyond what lived before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The CPU allocator keeps no peak; the profiler's trace has every allocation and release.
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as p:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        p.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    steps = np.cumsum([size for _, size in sorted(memory, key=lambda item: item[0])])
    return int(max(0, steps.max(initial=0)))


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep the profiler's native log lines (one at start, one at stop) off the terminal."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
