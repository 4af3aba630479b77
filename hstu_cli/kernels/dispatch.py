"""Which implementation of an operator runs, and why: decided once, reported everywhere."""

from dataclasses import dataclass

from hstu_cli.errors import UsageError

AUTO = "auto"
IMPLEMENTATIONS = ("reference", "blocked")
"""All implementations there are; an operator may offer a part of them."""


@dataclass(frozen=True, slots=True)
class ImplChoice:
    """A resolved implementation: its name and the reason, as table and JSON show them."""

    name: str
    reason: str


def choose_impl(requested: str, device_type: str) -> ImplChoice:
    """Resolve `--impl` for a device type; an explicit name is kept or refused, never replaced.

    Raises UsageError naming the choices.
    """
    if requested == AUTO:
        return ImplChoice("blocked", f"auto: the fastest implementation for {device_type}")
    if requested not in IMPLEMENTATIONS:
        raise UsageError(f"There is no implementation {requested!r}; choose from {AUTO}, {', '.join(IMPLEMENTATIONS)}.")
    return ImplChoice(requested, "as requested")
