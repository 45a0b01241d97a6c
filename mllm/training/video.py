"""Videos as training data: some frames of each, evenly over its length, decoded by PyAV."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

INSTALL = "pip install 'mllm-efficiency[video]'"


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Attributes:
        frames: RGB pictures, in order.
        numbers: of these frames, among those of the video.
        total: frames of the video.
        fps: its frames per second; None where it does not say.
    """

    frames: list[Image.Image]
    numbers: list[int]
    total: int
    fps: float | None

    def metadata(self) -> dict[str, Any]:
        """What transformers' video processors ask of frames that were chosen before."""
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "frames_indices": self.numbers,
            "duration": None if self.fps is None else self.total / self.fps,
        }


def check_decoder() -> None:
    """Say how videos can be read here.

    Raises:
        DataError: there is no PyAV.
    """
    if importlib.util.find_spec("av") is None:
        raise DataError(
            f"videos are decoded by PyAV, which is not installed; {INSTALL}",
            argument="data",
            given="a video",
            expected=f"{INSTALL}, or: pip install av",
        )


def read_clip(video: Path | bytes, frames: int, name: str) -> Clip:
    """Decode frames of a video: of `total` ones, number `i * total // frames` for each `i`.

    That is how transformers' video processors sample. A video with fewer frames has some of them
    several times in a row, as in PLLaVA (arXiv:2404.16994), so that all videos are equally long.

    Args:
        video: a file, or the content of one.
        frames: how many are wanted.
        name: of the video, for messages.

    Raises:
        DataError: the video cannot be read, or ends before it should; no PyAV.
    """
    check_decoder()
    import av

    def opened() -> Any:
        return av.open(io.BytesIO(video) if isinstance(video, bytes) else str(video))

    try:
        with opened() as container:
            stream = container.streams.video[0]
            rate = stream.average_rate
            # Some containers do not say how many frames they have.
            total = stream.frames or sum(1 for _ in container.decode(stream))
        numbers = [i * total // frames for i in range(frames)]
        found = {}
        with opened() as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in numbers:
                    found[number] = frame.to_image()
                if number == numbers[-1]:
                    break
        if numbers[-1] not in found:
            raise EOFError(f"it ends before frame {numbers[-1]} of {total}")
    except (av.error.FFmpegError, OSError, EOFError, IndexError) as error:
        reason = "it has no video stream" if isinstance(error, IndexError) else error
        raise DataError(
            f"cannot read the video {name}: {reason}",
            argument="data",
            given=name,
            expected="a whole video file that FFmpeg can decode",
        ) from error
    return Clip([found[n] for n in numbers], numbers, total, float(rate) if rate else None)
