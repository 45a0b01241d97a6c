"""Whether a model is at work in some thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn


def running(model: nn.Module) -> bool:
    """Whether a forward of `model`, or of a part of it, is going on in any thread.

    Reads the call stacks, so that it can be asked of a model that nothing was ever done to.
    """
    at_work = {
        id(frame.f_locals.get("self"))
        for innermost in sys._current_frames().values()
        for frame in _callers(innermost)
        if frame.f_code.co_name == "forward"
    }
    return bool(at_work) and any(id(module) in at_work for module in model.modules())


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
