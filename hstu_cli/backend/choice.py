"""Which device and dtype an option means, and what is said where it is absent."""

import functools
from dataclasses import dataclass

import torch

from hstu_cli.backend.base import Backend
from hstu_cli.backend.npu import NpuBackend
from hstu_cli.backend.streams import CudaBackend
from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.hardware import HARDWARE_PRESETS, HardwarePreset

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

BACKENDS: tuple[type[Backend], ...] = (CudaBackend, NpuBackend, Backend)
"""In the order in which `auto` prefers them."""


@functools.cache
def backend_of(device: torch.device) -> Backend:
    """The backend of a tensor's device; KeyError for a kind of device that none of them drives."""
    return {kind.type: kind for kind in BACKENDS}[device.type](device.index or 0)


def prefers_few_shapes(device: torch.device) -> bool:
    """Whether padding to few shapes pays on a tensor's device; not on a kind that no backend drives."""
    return any(kind.type == device.type and kind.few_shapes for kind in BACKENDS)


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """A resolved `--device`: the backend, the preset that was named, and a warning where it is absent."""

    requested: str
    backend: Backend
    preset: HardwarePreset | None = None
    warning: str | None = None


def open_device(requested: str, *, require: bool = False) -> DeviceChoice:
    """Resolve `auto`, `cpu`, `cuda[:N]`, `npu[:N]` or a hardware preset.

    require: a hardware preset must be this very GPU. Raises UsageError for an unknown name,
    UnavailableError for a device that is not there.
    """
    kind, colon, index = requested.lower().partition(":")
    if kind in HARDWARE_PRESETS and not colon:
        return _open_preset(requested, HARDWARE_PRESETS[kind], require)
    if kind == "auto" and not colon:
        return DeviceChoice(requested, next(b for b in BACKENDS if b.why_unavailable() is None)())
    by_type = {backend.type: backend for backend in BACKENDS}
    if kind not in by_type or (colon and (kind == "cpu" or not index.isdecimal())):
        names = ("auto", "cpu", "cuda[:N]", "npu[:N]", *HARDWARE_PRESETS)
        raise UsageError(f"There is no device {requested!r}; choose from {', '.join(names)}.")
    backend = by_type[kind]
    reason = backend.why_unavailable()
    if reason is not None:
        raise UnavailableError(f"--device {requested}: {reason}")
    number = int(index or 0)
    if number >= backend.device_count():
        last = backend.device_count() - 1
        there = f"there is only {kind}:0" if last == 0 else f"there are only {kind}:0 to {kind}:{last}"
        raise UnavailableError(f"--device {requested}: {there}; {backend.how_to_list}.")
    return DeviceChoice(requested, backend(number))


def resolve_dtype(name: str, backend: Backend) -> str:
    """The dtype's name that `auto` or `--dtype` stands for on this backend; UsageError if unknown."""
    if name == "auto":
        return backend.default_dtype
    if name not in DTYPES:
        raise UsageError(f"There is no dtype {name!r}; choose from auto, {', '.join(DTYPES)}.")
    return name


def _open_preset(requested: str, preset: HardwarePreset, require: bool) -> DeviceChoice:
    """The GPU of this name if there is one, else the best backend here with a warning."""
    if CudaBackend.why_unavailable() is None:
        for number in range(CudaBackend.device_count()):
            backend = CudaBackend(number)
            if preset.matches(backend.device_name):
                return DeviceChoice(requested, backend, preset)
    if require:
        raise UnavailableError(f"--require-device: this machine has no {requested.upper()}.")
    best = open_device("auto").backend
    warning = f"This machine has no {requested.upper()}: running on {best.device_name}, and reported as such."
    return DeviceChoice(requested, best, preset, warning)
