"""Files of tensors: safetensors and pickles, read without ever running code in them."""

import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hstu_cli.errors import InputError

_UNREADABLE = (
    OSError,
    SafetensorError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)
"""What the readers raise for damaged files: torch's unpickler checks little of what it reads."""


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors, .pt or .pth file, on the CPU; InputError where it is not one."""
    return checked_state(read_file(path), str(path))


def read_file(path: Path) -> Any:
    """What a .safetensors, .pt or .pth file holds, on the CPU; InputError where it cannot be read."""
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are then read or refused all the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is not a plain dictionary of tensors: it is damaged, or it holds code, which is never run. "
            "Save model.state_dict() and nothing else."
        ) from error
    except _UNREADABLE as error:
        raise InputError(f"{path} is not a readable checkpoint: {error}.") from error


def checked_state(state: Any, source: str) -> dict[str, torch.Tensor]:
    """The value itself where it is a dictionary of plain tensors; else InputError naming `source`."""
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{source} must hold a dictionary of tensors by name (a state dict) and nothing else.")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise InputError(f"{source}: {name} is {tensor.layout} on {tensor.device}, not a plain tensor.")
    return state
