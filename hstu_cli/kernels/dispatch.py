"""Which implementation of an operator runs, and why: decided once, reported everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.kernels.inputs import casts
from hstu_cli.kernels.native.build import native_state
from hstu_cli.kernels.triton.state import is_interpreting, triton_state

AUTO = "auto"
IMPLEMENTATIONS = ("reference", "blocked", "native", "triton", "ascend")
"""All implementations there are; an operator may offer a part of them."""

WITHOUT_GRADIENTS = ("native", "triton", "ascend")
"""Implementations of which single operators have no gradients; attention and the training layer of two of them do."""

WITHOUT_TRAINING_LAYER = ("ascend",)
"""Implementations in which the whole layer has no gradients either."""

RUNS_ON = {"native": ("cpu", "a CPU"), "triton": ("cuda", "an NVIDIA GPU"), "ascend": ("npu", "an NPU")}
"""The type of device that an implementation is made for, and its name in a message; the others run on all."""


@dataclass(frozen=True, slots=True)
class ImplChoice:
    """A resolved implementation: its name and the reason, as table and JSON show them."""

    name: str
    reason: str


def choose_impl(
    requested: str,
    device_type: str,
    *,
    build: bool = True,
    gradients: bool = False,
    refused: Mapping[str, str] | None = None,
) -> ImplChoice:
    """Resolve `--impl` for a device type; an explicit name is kept or refused, never replaced.

    build: build the native operators now if they are chosen and not built yet. gradients, refused: see
    `check_possible`, whose errors this raises, and UnavailableError where native cannot be built or triton is not
    installed.
    """
    check_possible(requested, device_type, gradients=gradients, refused=refused)
    if requested == AUTO:
        return _fastest(device_type, build, gradients)
    reason = _why_absent(requested)
    if reason is not None:
        raise UnavailableError(f"--impl {requested}: {reason}. Or choose blocked.")
    return ImplChoice(requested, "as requested")


def check_possible(
    requested: str, device_type: str, *, gradients: bool = False, refused: Mapping[str, str] | None = None
) -> None:
    """UsageError for an implementation that is not to be had, whatever is installed; it names those that are.

    gradients: the layer must have them. refused: implementations that the command does not take, each with what is
    said of it.
    """
    refused = dict(refused or {})
    if gradients:
        refused |= dict.fromkeys(WITHOUT_TRAINING_LAYER, "computes no gradients")

    def is_taken(name: str) -> bool:
        return name not in refused and runs_on(name, device_type)

    if requested == AUTO or (requested in IMPLEMENTATIONS and is_taken(requested)):
        return
    choices = (AUTO, *filter(is_taken, IMPLEMENTATIONS))
    listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
    if requested not in IMPLEMENTATIONS:
        raise UsageError(f"There is no implementation {requested!r}; choose {listed}.")
    if not runs_on(requested, device_type):
        raise UsageError(
            f"Implementation {requested!r} runs on {RUNS_ON[requested][1]}, not on {device_type}; choose {listed}."
        )
    raise UsageError(f"Implementation {requested!r} {refused[requested]}; choose {listed}.")


def choose_impl_for(requested: str, *tensors: torch.Tensor, has_gradients: bool = False) -> str:
    """The name of the implementation that computes with these tensors, which are on one device.

    has_gradients: whether the operator has gradients in C++ and in Triton.
    Raises what `choose_impl` does, and ValueError for an implementation without gradients where one is wanted.
    """
    device_type = tensors[0].device.type
    needs_gradient = wants_gradient(*tensors)
    autocast = casts(device_type)
    differentiable = not needs_gradient or (has_gradients and device_type == "cpu")
    if requested == AUTO and (
        not differentiable or autocast or (device_type == "cuda" and tensors[0].dtype == torch.float64)
    ):
        return "blocked"  # which has gradients, and every dtype
    if autocast and requested in WITHOUT_GRADIENTS:
        raise ValueError(f"impl={requested!r} does not follow torch.autocast; use 'auto' or 'blocked' within it")
    if needs_gradient and requested in WITHOUT_GRADIENTS and (requested == "ascend" or not has_gradients):
        raise ValueError(
            f"impl={requested!r} computes no gradients; use 'auto' or 'blocked', or run under torch.no_grad()"
        )
    return choose_impl(requested, device_type).name


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether what is computed with these tensors will be differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def exact_impl(name: str) -> str:
    """What computes in a wider dtype, perhaps on the CPU, for comparison with implementation `name` on a device."""
    return AUTO if name in ("triton", "ascend") else name


def _fastest(device_type: str, build: bool, gradients: bool) -> ImplChoice:
    if gradients and device_type not in ("cuda", "cpu"):
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


def runs_on(name: str, device_type: str) -> bool:
    """Whether an implementation is made for this type of device; Triton's interpreter lets it run on a CPU."""
    if name == "triton" and device_type == "cpu":
        return triton_state().available and is_interpreting()
    return name not in RUNS_ON or RUNS_ON[name][0] == device_type


def _why_absent(name: str) -> str | None:
    """Why an implementation cannot be used in this process, as a clause; None where it can."""
    if name == "native":
        state = native_state()
        return None if state.available else state.reason
    if name == "triton":
        return None if triton_state().available else triton_state().reason
    if name == "ascend":
        from hstu_cli.kernels.attention.ascend import why_unavailable

        return why_unavailable()
    return None
