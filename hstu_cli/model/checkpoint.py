"""Native checkpoints: a folder of config.json + model.safetensors, or one state dict with those names."""

import dataclasses
import functools
import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hstu_cli.config import MODEL_PRESETS, ModelConfig, model_config_from_fields, read_json_object
from hstu_cli.errors import InputError, UsageError
from hstu_cli.model.embedding import EmbeddingTable
from hstu_cli.model.ranking import RankingModel, table_names

FORMAT = "hstu-native"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DEFAULT_PRESET = "kuairand_gr"
"""The configuration of a bare state dict for which none is named."""


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
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            save_file(state, Path(scratch, WEIGHTS_FILE))
            Path(scratch, CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                Path(scratch, name).replace(folder / name)
    except OSError as error:
        raise InputError(f"The checkpoint cannot be written to {folder}: {error.strerror or error}.") from error


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
    table_rows = None
    if path.is_dir():
        config, table_rows = _read_config(path / CONFIG_FILE, config)
        path = path / WEIGHTS_FILE
    state = read_state_dict(path)
    return model_from_state(config or MODEL_PRESETS[DEFAULT_PRESET], state, path, table_rows, dtype).to(device)


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
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not a readable checkpoint: {error}.") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} must hold a dictionary of tensors (a state dict) and nothing else.")
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
    problems = [f"{name} is not finite" for name, tensor in floating.items() if not _is_finite(tensor)]
    dtype = dtype or functools.reduce(torch.promote_types, (t.dtype for t in floating.values()), torch.float16)
    state = {name: tensor.to(dtype) if name in floating else tensor for name, tensor in state.items()}
    tables, table_problems = _read_tables(config, state, table_rows)
    problems += table_problems
    if not table_problems:
        model = RankingModel(config, tables).to(dtype)
        problems += _differences(model.state_dict(), state)
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
) -> tuple[dict[str, EmbeddingTable], list[str]]:
    """The embedding tables of a state dict, and what is wrong with them."""
    tables: dict[str, EmbeddingTable] = {}
    problems = []
    for name in table_names(config):
        weight = state.get(f"embeddings.{name}.weight")
        rows = None if table_rows is None else table_rows.get(name)
        if weight is None:
            problems.append(f"embeddings.{name}.weight is missing")
            continue
        try:
            tables[name] = EmbeddingTable(weight, state.get(f"embeddings.{name}.keys"))
        except ValueError as error:
            problems.append(f"embeddings.{name}: {error}")
            continue
        wanted = [weight.shape[0] if table_rows is None else rows, config.hidden_dim]
        if list(weight.shape) != wanted:
            problems.append(f"embeddings.{name}.weight is {list(weight.shape)}, expected {wanted}")
    return tables, problems


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
