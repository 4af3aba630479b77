"""Devices behind one interface: what there is, why something is not, and what to wait for.

Only this package names `torch.cuda` and `torch.npu`.
"""

from hstu_cli.backend.base import BROKEN, Backend, Event, Graph, GraphPool, WallTimer, packed, upload
from hstu_cli.backend.choice import (
    BACKENDS,
    DTYPES,
    DeviceChoice,
    backend_of,
    open_device,
    prefers_few_shapes,
    resolve_dtype,
)
from hstu_cli.backend.npu import NpuBackend
from hstu_cli.backend.streams import CudaBackend, StreamBackend

__all__ = [
    "BACKENDS",
    "BROKEN",
    "DTYPES",
    "Backend",
    "CudaBackend",
    "DeviceChoice",
    "Event",
    "Graph",
    "GraphPool",
    "NpuBackend",
    "StreamBackend",
    "WallTimer",
    "backend_of",
    "open_device",
    "packed",
    "prefers_few_shapes",
    "resolve_dtype",
    "upload",
]
