"""Which implementation of an operator runs, and why: decided once, reported everywhere."""

from dataclasses import dataclass

import torch

from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.kernels.native.build import native_state

AUTO = "auto"
IMPLEMENTATIONS = ("reference", "blocked", "native")
"""All implementations there are; an operator may offer a part of them."""


@dataclass(frozen=True, slots=True)
class ImplChoice:
    """A resolved implementation: its name and the reason, as table and JSON show them."""

    name: str
    reason: str


def choose_impl(requested: str, device_type: str, *, build: bool = True, gradients: bool = False) -> ImplChoice:
    """Resolve `--impl` for a device type; an explicit name is kept or refused, never replaced.

    build: build the native operators now if they are chosen and not built yet. gradients: it must have them.
    Raises UsageError naming the choices, UnavailableError where native cannot be built.
    """
    if requested == AUTO:
        return _fastest(device_type, build, gradients)
    if requested not in IMPLEMENTATIONS:
        raise UsageError(f"There is no implementation {requested!r}; choose from {AUTO}, {', '.join(IMPLEMENTATIONS)}.")
    if requested == "native":
        _require_native(device_type, gradients)
    return ImplChoice(requested, "as requested")


def choose_impl_for(requested: str, *tensors: torch.Tensor) -> str:
    """The name of the implementation that computes with these tensors, which are on one device.

    Raises what `choose_impl` does, and ValueError for native where a gradient is wanted.
    """
    device_type = tensors[0].device.type
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not needs_gradient:
        return choose_impl(requested, device_type).name
    if requested == "native":
        raise ValueError("impl='native' computes no gradients; use 'auto' or 'blocked', or run under torch.no_grad()")
    return "blocked" if requested == AUTO else choose_impl(requested, device_type).name


def _fastest(device_type: str, build: bool, gradients: bool) -> ImplChoice:
    if gradients:
        return ImplChoice("blocked", "auto: the fastest one with gradients")
    if device_type != "cpu":
        return ImplChoice("blocked", f"auto: the fastest implementation for {device_type}")
    state = native_state(build=build)
    if not state.available:
        return ImplChoice("blocked", f"auto: {state.reason}")
    return ImplChoice("native", f"auto: the fastest implementation for cpu, {state.reason}")


def _require_native(device_type: str, gradients: bool) -> None:
    if gradients:
        raise UsageError("Implementation 'native' computes no gradients; choose auto, reference or blocked.")
    if device_type != "cpu":
        raise UsageError(f"Implementation 'native' runs on a CPU, not on {device_type}; choose auto or blocked.")
    state = native_state()
    if not state.available:
        raise UnavailableError(f"--impl native: {state.reason}. Or choose blocked.")
