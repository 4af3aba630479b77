"""Which implementation of an operator runs, and why: decided once, reported everywhere."""

from dataclasses import dataclass

import torch

from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.kernels.inputs import casts
from hstu_cli.kernels.native.build import native_state
from hstu_cli.kernels.triton.state import is_interpreting, triton_state

AUTO = "auto"
IMPLEMENTATIONS = ("reference", "blocked", "native", "triton")
"""All implementations there are; an operator may offer a part of them."""

WITHOUT_GRADIENTS = ("native", "triton")


@dataclass(frozen=True, slots=True)
class ImplChoice:
    """A resolved implementation: its name and the reason, as table and JSON show them."""

    name: str
    reason: str


def choose_impl(requested: str, device_type: str, *, build: bool = True, gradients: bool = False) -> ImplChoice:
    """Resolve `--impl` for a device type; an explicit name is kept or refused, never replaced.

    build: build the native operators now if they are chosen and not built yet. gradients: it must have them.
    Raises UsageError naming the choices, UnavailableError where native cannot be built or triton is not installed.
    """
    if requested == AUTO:
        return _fastest(device_type, build, gradients)
    if requested not in IMPLEMENTATIONS:
        raise UsageError(f"There is no implementation {requested!r}; choose from {AUTO}, {', '.join(IMPLEMENTATIONS)}.")
    if gradients and requested in WITHOUT_GRADIENTS:
        raise UsageError(f"Implementation {requested!r} computes no gradients; choose auto, reference or blocked.")
    if requested == "native":
        _require_native(device_type)
    if requested == "triton":
        _require_triton(device_type)
    return ImplChoice(requested, "as requested")


def choose_impl_for(requested: str, *tensors: torch.Tensor) -> str:
    """The name of the implementation that computes with these tensors, which are on one device.

    Raises what `choose_impl` does, and ValueError for native and triton where a gradient is wanted.
    """
    device_type = tensors[0].device.type
    needs_gradient = wants_gradient(*tensors)
    autocast = casts(device_type)
    if requested == AUTO and (
        needs_gradient or autocast or (device_type == "cuda" and tensors[0].dtype == torch.float64)
    ):
        return "blocked"  # which has gradients, and every dtype
    if autocast and requested in WITHOUT_GRADIENTS:
        raise ValueError(f"impl={requested!r} does not follow torch.autocast; use 'auto' or 'blocked' within it")
    if needs_gradient and requested in WITHOUT_GRADIENTS:
        raise ValueError(
            f"impl={requested!r} computes no gradients; use 'auto' or 'blocked', or run under torch.no_grad()"
        )
    return choose_impl(requested, device_type).name


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether what is computed with these tensors will be differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def exact_impl(name: str) -> str:
    """What computes in a wider dtype, perhaps on the CPU, for comparison with implementation `name` on a GPU."""
    return AUTO if name == "triton" else name


def _fastest(device_type: str, build: bool, gradients: bool) -> ImplChoice:
    if gradients:
        return ImplChoice("blocked", "auto: the fastest one with gradients")
    if device_type == "cuda":
        triton = triton_state()
        if not triton.available or is_interpreting():
            return ImplChoice("blocked", f"auto: {triton.reason}")
        return ImplChoice("triton", f"auto: the fastest implementation for cuda, {triton.reason}")
    if device_type != "cpu":
        return ImplChoice("blocked", f"auto: the fastest implementation for {device_type}")
    state = native_state(build=build)
    if not state.available:
        return ImplChoice("blocked", f"auto: {state.reason}")
    return ImplChoice("native", f"auto: the fastest implementation for cpu, {state.reason}")


def _require_native(device_type: str) -> None:
    if device_type != "cpu":
        raise UsageError(f"Implementation 'native' runs on a CPU, not on {device_type}; choose auto or blocked.")
    state = native_state()
    if not state.available:
        raise UnavailableError(f"--impl native: {state.reason}. Or choose blocked.")


def _require_triton(device_type: str) -> None:
    state = triton_state()
    interpreted = device_type == "cpu" and state.available and is_interpreting()
    if device_type != "cuda" and not interpreted:
        raise UsageError(
            f"Implementation 'triton' runs on an NVIDIA GPU, not on {device_type}; choose auto, reference, blocked"
            f"{' or native' if device_type == 'cpu' else ''}."
        )
    if not state.available:
        raise UnavailableError(f"--impl triton: {state.reason}. Or choose blocked.")
