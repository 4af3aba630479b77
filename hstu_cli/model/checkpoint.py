"""Native checkpoints: a folder of config.json + model.safetensors, or one state dict with those names."""

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hstu_cli.config import DEFAULT_PRESET, MODEL_PRESETS, ModelConfig, model_config_from_fields, read_json_object
from hstu_cli.errors import InputError, UsageError
from hstu_cli.model.embedding import EmbeddingTable
from hstu_cli.model.ranking import RankingModel
from hstu_cli.model.recsys_examples import is_recsys_examples, read_recsys_examples
from hstu_cli.model.state_files import read_state_dict
from hstu_cli.model.tokens import table_names

FORMAT = "hstu-native"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save_checkpoint(model: RankingModel, path: str | os.PathLike[str]) -> None:
    """Write the model to folder `path` as config.json and model.safetensors.

    Each file is replaced in one step, the weights first, so that a folder with a config.json is
    complete. Over a checkpoint of the same configuration, a run that is killed leaves the old or the new one; over
    another one it may leave none, and never the configuration of one with the weights of the other.
    Raises InputError where the folder cannot be written.
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
            text = json.dumps(config, indent=2) + "\n"
            Path(scratch, CONFIG_FILE).write_text(text, encoding="utf-8")
            shutil.copymode(Path(scratch, CONFIG_FILE), Path(scratch, WEIGHTS_FILE))  # safetensors makes it private
            if not _is_text_of(folder / CONFIG_FILE, text):
                (folder / CONFIG_FILE).unlink(missing_ok=True)
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                Path(scratch, name).replace(folder / name)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk into an error of its own
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"The checkpoint cannot be written to {folder}: {reason}.") from error


def _is_text_of(path: Path, text: str) -> bool:
    """Whether a file is there and holds this."""
    return path.is_file() and path.read_bytes() == text.encode()


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
    config: ModelConfig | Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> RankingModel:
    """Read a checkpoint folder, native or of recsys-examples, or a state dict (.pt, .pth, .safetensors).

    config: for a state dict its configuration (None: the preset `kuairand_gr`); for a native folder,
      whose own config.json decides, it must agree (UsageError naming the first field that does not);
      for one of recsys-examples what its tensors do not tell, as a configuration or as the JSON
      fields of one, which may be some of them and may name `tables {name: rows}`.
    dtype: of the weights (None: as saved). Pickles are read with `weights_only=True`.
    Raises InputError for a missing or unreadable file and, with a list, for missing, extra,
    misshaped or non-finite tensors.
    """
    return read_checkpoint(Path(path), config=config, dtype=dtype).model.to(device)


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A model on the CPU, the kind of checkpoint that it comes from, and how many entries of that were not needed."""

    model: RankingModel
    kind: str
    num_ignored: int = 0


def read_checkpoint(
    path: Path, *, config: ModelConfig | Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> LoadedCheckpoint:
    """What `load_checkpoint` does, with what else there is to tell."""
    if is_recsys_examples(path):
        fields = config.to_dict() if isinstance(config, ModelConfig) else config
        foreign = read_recsys_examples(path, fields or {})
        model = model_from_state(foreign.config, foreign.state, path, None, dtype)
        return LoadedCheckpoint(model, "recsys-examples", foreign.num_ignored)
    if config is not None and not isinstance(config, ModelConfig):
        config = model_config_from_fields(config, path)
    table_rows, assumed, kind = None, config is None, "state dict"
    if path.is_dir():
        assumed, kind = False, "native"
        config, table_rows = _read_config(path / CONFIG_FILE, config)
        path = path / WEIGHTS_FILE
    state = read_state_dict(path)
    try:
        model = model_from_state(config or MODEL_PRESETS[DEFAULT_PRESET], state, path, table_rows, dtype)
    except InputError as error:
        if not assumed:
            raise
        raise InputError(f"{error}\nIt was read as {DEFAULT_PRESET}, for want of another --config.") from error
    return LoadedCheckpoint(model, kind)


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
