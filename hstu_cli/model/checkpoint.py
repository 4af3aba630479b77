"""Native checkpoints: a folder of config.json + model.safetensors, or one state dict with those names."""

import dataclasses
import functools
import json
import os
import pickle
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hstu_cli.config import DEFAULT_PRESET, MODEL_PRESETS, ModelConfig, model_config_from_fields, read_json_object
from hstu_cli.errors import InputError, UsageError
from hstu_cli.model.embedding import EmbeddingTable
from hstu_cli.model.ranking import RankingModel
from hstu_cli.model.tokens import table_names

FORMAT = "hstu-native"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save_checkpoint(model: RankingModel, path: str | os.PathLike[str]) -> None:
    """Write the model to folder `path` as config.json and model.safetensors.

    Each file is replaced in one step, the weights first, so that a folder with a config.json is
    complete. Raises InputError where the folder cannot be written.
    """
    folder = Path(path)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **model.config.to_dict(),
        "tables": {name: table.num_rows for name, table in model.embeddings.items()},
    }
    state = _unshared({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            save_file(state, Path(scratch, WEIGHTS_FILE))
            Path(scratch, CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                Path(scratch, name).replace(folder / name)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk into an error of its own
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"The checkpoint cannot be written to {folder}: {reason}.") from error


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of those tensors whose memory another one has: safetensors refuses them."""
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen:
            state[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return state


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    config: ModelConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> RankingModel:
    """Read a checkpoint folder, or a .pt, .pth or .safetensors state dict with the native names.

    config: for a state dict its configuration (None: the preset `kuairand_gr`); for a folder, whose
      own config.json decides, it must agree (UsageError naming the first field that does not).
    dtype: of the weights (None: as saved). Pickles are read with `weights_only=True`.
    Raises InputError for a missing or unreadable file and, with a list, for missing, extra,
    misshaped or non-finite tensors.
    """
    path = Path(path)
    table_rows, assumed = None, config is None
    if path.is_dir():
        assumed = False
        config, table_rows = _read_config(path / CONFIG_FILE, config)
        path = path / WEIGHTS_FILE
    state = read_state_dict(path)
    try:
        model = model_from_state(config or MODEL_PRESETS[DEFAULT_PRESET], state, path, table_rows, dtype)
    except InputError as error:
        if not assumed:
            raise
        raise InputError(f"{error}\nIt was read as {DEFAULT_PRESET}, for want of another --config.") from error
    return model.to(device)


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
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is not a plain dictionary of tensors: it is damaged, or it holds code, which is never run. "
            "Save model.state_dict() and nothing else."
        ) from error
    except _UNREADABLE as error:
        raise InputError(f"{path} is not a readable checkpoint: {error}.") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} must hold a dictionary of tensors (a state dict) and nothing else.")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise InputError(f"{path}: {name} is {tensor.layout} on {tensor.device}, not a plain tensor.")
    return state


def model_from_state(
    config: ModelConfig,
    state: Mapping[str, torch.Tensor],
    source: Path,
    table_rows: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
) -> RankingModel:
    """A model with the tensors of a native state dict, every one of them checked.

    table_rows: the rows that each table must have (None: as in the tensors). dtype: of the weights
    (None: the widest among the tensors). `source` is what the errors name.
    """
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    dtypes = [tensor.dtype for tensor in floating.values()] or [torch.float32]
    dtype = dtype or functools.reduce(torch.promote_types, dtypes)
    state = {name: tensor.to(dtype) if name in floating else tensor for name, tensor in state.items()}
    # After the conversion: a narrower dtype may not hold a large weight.
    problems = [f"{name} is not finite" for name in floating if not _is_finite(state[name])]
    tables, table_problems = _read_tables(config, state, table_rows)
    problems += [problem for found in table_problems.values() for problem in found]
    model = RankingModel(config, tables).to(dtype)
    judged = tuple(f"embeddings.{name}." for name in table_problems)
    problems += [p for p in _differences(model.state_dict(), state) if not p.startswith(judged)]
    if problems:
        raise InputError(f"{source} does not fit its configuration:\n  " + "\n  ".join(problems))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read_config(path: Path, wanted: ModelConfig | None) -> tuple[ModelConfig, dict[str, int]]:
    """The configuration and table sizes of a checkpoint folder."""
    fields = read_json_object(path)
    if fields.get("format") != FORMAT or fields.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} says format {fields.get('format')!r}, version {fields.get('format_version')!r}; "
            f"this program reads {FORMAT!r}, version {FORMAT_VERSION}."
        )
    missing = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in fields]
    if missing:
        raise InputError(f"{path}: missing field {', '.join(missing)}.")
    tables = fields.get("tables")
    if not isinstance(tables, dict):
        raise InputError(f"{path} must name its tables and their rows under 'tables'.")
    config = model_config_from_fields(fields, path)
    for field in dataclasses.fields(ModelConfig) if wanted else ():
        ours, theirs = getattr(wanted, field.name), getattr(config, field.name)
        if ours != theirs:
            raise UsageError(
                f"--config has {field.name} {_plain(ours)}, but the checkpoint was made with {_plain(theirs)}. "
                "The checkpoint's own configuration decides: leave --config out."
            )
    return config, tables


def _read_tables(
    config: ModelConfig, state: Mapping[str, torch.Tensor], table_rows: Mapping[str, int] | None
) -> tuple[dict[str, EmbeddingTable], dict[str, list[str]]]:
    """The embedding tables of a state dict, and by table what is wrong; a wrong one has a stand-in."""
    tables: dict[str, EmbeddingTable] = {}
    problems: dict[str, list[str]] = {}
    for name in (table_rows or {}).keys() - set(table_names(config)):
        problems[name] = [f"{CONFIG_FILE} names a table {name}, which is not part of the model"]
    for name in table_names(config):
        found = problems.setdefault(name, [])
        weight = state.get(f"embeddings.{name}.weight")
        tables[name] = EmbeddingTable(torch.empty(1, config.hidden_dim))
        if table_rows is not None and name not in table_rows:
            found.append(f"{CONFIG_FILE} does not name the rows of table {name}")
        if weight is None:
            found.append(f"embeddings.{name}.weight is missing")
            continue
        try:
            table = EmbeddingTable(weight, state.get(f"embeddings.{name}.keys"))
        except ValueError as error:
            found.append(f"embeddings.{name}: {error}")
            continue
        wanted = [(table_rows or {}).get(name, weight.shape[0]), config.hidden_dim]
        if list(weight.shape) == wanted:
            tables[name] = table
        else:
            found.append(f"embeddings.{name}.weight is {list(weight.shape)}, expected {wanted}")
    return tables, {name: found for name, found in problems.items() if found}


def _differences(expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    """What is missing from a state dict, too much in it, or of another shape or kind."""
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not part of the model" for name in state if name not in expected]
    for name in expected.keys() & state.keys():
        if state[name].shape != expected[name].shape:
            problems.append(f"{name} is {list(state[name].shape)}, expected {list(expected[name].shape)}")
        elif state[name].dtype != expected[name].dtype:
            problems.append(f"{name} is {state[name].dtype}, expected {expected[name].dtype}")
    return sorted(problems)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite, without a mask of the tensor's size."""
    if tensor.numel() == 0:
        return True
    least, most = torch.aminmax(tensor)  # NaN anywhere makes both NaN
    return bool(torch.isfinite(least) & torch.isfinite(most))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
