"""Triton kernels, and who runs them.

Each kernel does what a function of this package does in torch, its reference, and has a file of the
same name here. :func:`run` chooses: the kernel on a CUDA device where it was validated on one or
:func:`use` asks for it, and the reference everywhere else. Triton is imported when a kernel is
about to run.

No kernel has run on a GPU yet. They are tested in Triton's interpreter, on a CPU, and compile for
compute capability 8.0 and 9.0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from mllm.errors import MllmError

log = logging.getLogger(__name__)

T = TypeVar("T")
Mode = Literal["auto", "triton", "interpreter", "torch"]

#: Kernels that gave their references' results on a GPU: what `auto` uses on a CUDA device.
VALIDATED: frozenset[str] = frozenset()

_MODE: ContextVar[Mode] = ContextVar("mllm_kernels", default="auto")
_STRICT: ContextVar[bool] = ContextVar("mllm_kernels_strict", default=False)
# Blocks of `use` that are open, in all threads. While there is none, nobody asks the context
# variable, at which torch.compile would cut a graph.
_OPEN = 0
_COUNTING = threading.Lock()


@contextlib.contextmanager
def use(mode: Mode, strict: bool = False) -> Iterator[None]:
    """While open, in this thread, say who computes what has a kernel.

    What a kernel cannot do (gradients, another device, a head size) stays in torch, and the log
    says so once.

    Args:
        mode: `auto`, the default: kernels that are validated, on CUDA; `triton`: all kernels, on
            CUDA; `interpreter`: all kernels in Triton's interpreter, on a CPU, to test them (very
            slow; Triton wants `TRITON_INTERPRET=1` before it is imported); `torch`: none.
        strict: what a kernel cannot do is an error, so that nobody takes torch's results or times
            for a kernel's.

    Raises:
        MllmError: another mode; under `strict`, in the block, a kernel that cannot run.
    """
    if mode not in get_args(Mode):
        raise MllmError(
            f"kernels cannot be used as {mode!r}",
            argument="mode", given=mode, expected=f"one of {', '.join(get_args(Mode))}",
        )  # fmt: skip
    token, strictly = _MODE.set(mode), _STRICT.set(strict)
    _opened(1)
    try:
        yield
    finally:
        _opened(-1)
        _STRICT.reset(strictly)
        _MODE.reset(token)


def _opened(more: int) -> None:
    global _OPEN
    with _COUNTING:
        _OPEN += more


def _mode() -> Mode:
    return _MODE.get() if _OPEN else "auto"


def considered(name: str, like: Tensor) -> bool:
    """Whether :func:`run` would look at a kernel, for tensors such as this one."""
    mode = _mode()
    return mode != "torch" and (mode != "auto" or (name in VALIDATED and like.is_cuda))


def run(name: str, reference: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What `reference` gives, from the kernel `name` where that is chosen.

    The kernel's module has `unsupported`, which says of the same arguments why not or returns None,
    and a function of the kernel's name, which may be given arguments that it supports.
    """
    mode = _mode()
    if mode == "torch" or (mode == "auto" and name not in VALIDATED):
        return reference(*args, **kwargs)
    tensors = list(_tensors([*args, *kwargs.values()]))
    if mode == "auto" and not all(t.is_cuda for t in tensors):
        return reference(*args, **kwargs)
    why = _obstacle(mode, tensors)
    if why is None:
        module = importlib.import_module(f"mllm.kernels.{name}")
        why = module.unsupported(*args, **kwargs)
    if why is not None:
        if _STRICT.get():
            raise MllmError(
                f"the kernel {name} cannot run: {why}",
                argument="mode", given=mode, expected="use(mode), which stays in torch",
            )  # fmt: skip
        _say(name, why)
        return reference(*args, **kwargs)
    with _current(tensors[0].device):
        return getattr(module, name)(*args, **kwargs)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif dataclasses.is_dataclass(value):
            yield from _tensors(vars(value).values())


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current GPU, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _obstacle(mode: Mode, tensors: list[Tensor]) -> str | None:
    """Why no kernel can run, whichever it is."""
    wanted = "cpu" if mode == "interpreter" else "cuda"
    if any(t.device != tensors[0].device or t.device.type != wanted for t in tensors):
        return f"tensors are not all on one {wanted} device"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "kernels have no gradients"
    return _triton_obstacle(mode == "interpreter")


@functools.cache
def _triton_obstacle(interpreter: bool) -> str | None:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return "triton is not installed"
    if isinstance(tl.sum, triton.runtime.jit.JITFunction) == interpreter:
        return f"TRITON_INTERPRET was {'not ' * interpreter}set when triton was imported"
    return None


@functools.cache
def _say(name: str, why: str) -> None:
    """Log once."""
    log.warning("%s runs in torch: %s", name, why)
