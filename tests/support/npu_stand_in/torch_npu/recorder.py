"""What reached the stand-in device: operators with their shapes, and moments when the host waited for it."""

import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

HARNESS = str(Path(__file__).parent)


class CaptureError(RuntimeError):
    """Something that cannot be captured was done while a graph was."""


class Recorder:
    """Counts since the last `take`."""

    capturing = False

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.shapes: Counter[tuple[str, str]] = Counter()
        self.syncs: Counter[str] = Counter()

    def operator(self, name: str, tensors: list[torch.Tensor]) -> None:
        """An operator of the device and its tensors there."""
        self.operators[name] += 1
        self.shapes[name, " ".join(f"{tuple(t.shape)}{str(t.dtype).removeprefix('torch.')}" for t in tensors)] += 1

    def sync(self, what: str) -> None:
        """The host waits for the device, at the line of the package that is running; not while a graph is captured."""
        self.refuse_in_capture(what)
        self.syncs[f"{what} at {_caller()}"] += 1

    def refuse_in_capture(self, what: str) -> None:
        """Say that this cannot be while a graph is captured."""
        if self.capturing:
            raise CaptureError(f"{what} while a graph is captured")

    def take(self) -> dict[str, Any]:
        """What was counted, as JSON knows it; counting begins anew."""
        taken = {
            "operators": dict(self.operators),
            "num_shapes": len(self.shapes),
            "shapes": [[name, shapes, count] for (name, shapes), count in self.shapes.items()],
            "syncs": dict(self.syncs),
        }
        self.__init__()
        return taken


def _caller() -> str:
    """The innermost line of the package under test."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "hstu_cli" in path and not path.startswith(HARNESS):
            return f"{path[path.index('hstu_cli') :]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return traceback.extract_stack(limit=4)[0].name


RECORDER = Recorder()
