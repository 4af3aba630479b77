"""Checkpoints of NVIDIA recsys-examples: their names, their layouts, and what they leave open.

`torch_module/model.<rank>.pth` holds the dense weights, the same in every rank; dynamic tables are
DynamicEmb dumps in `dynamicemb_module`. Two kinds of layers exist: fused ones with transposed
weights, and native ones whose u, v, q, k rows are grouped by head.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hstu_cli.config import CONTEXTUAL_FEATURES, ModelConfig
from hstu_cli.errors import InputError, UsageError
from hstu_cli.model.dynamicemb_dump import find_dumps, read_table
from hstu_cli.model.embedding import DEFAULT_KEY
from hstu_cli.model.state_files import checked_state, read_file
from hstu_cli.model.tokens import table_names

# Shapes: D hidden_dim, H heads, d head_dim.

DENSE_FOLDER = "torch_module"
DUMP_FOLDER = Path("dynamicemb_module", "model._embedding_collection._model_parallel_embedding_collection")
STATE_KEY = "model_state_dict"

_POSITIONS = "_hstu_block._preprocessor._positional_encoder._position_embeddings_weight"
_SMALL_TABLES = "_embedding_collection._data_parallel_embedding_collection.embeddings."
_SMALL_SUFFIX = "_weights"
_DYNAMIC_TABLES = "_model_parallel_embedding_collection"
_LAYER = re.compile(r"_hstu_block\._attention_layers\.(\d+)\.(.+)")
_HEAD = re.compile(r"_mlp\._mlp\.(\d+)\.(weight|bias)")

_OPEN = ("num_heads", "max_history", "max_candidates", "scaling_seqlen", "contextual_features")
"""What no tensor tells."""


@dataclass
class ForeignCheckpoint:
    """A native state dict and the configuration that goes with it; num_ignored counts what inference does not need."""

    config: ModelConfig
    state: dict[str, torch.Tensor]
    num_ignored: int = 0


def is_recsys_examples(path: Path) -> bool:
    """Whether a folder is laid out as one of their checkpoints."""
    return (path / DENSE_FOLDER).is_dir()


def read_recsys_examples(path: Path, fields: Mapping[str, Any]) -> ForeignCheckpoint:
    """Read their checkpoint folder `path`.

    fields: a configuration's JSON fields, for what the tensors cannot tell; `tables {name: rows}` are
      the sizes of the small tables.
    Raises UsageError naming a field that is still open, InputError for damaged or unknown parts.
    """
    dense, ignored = _read_ranks(path / DENSE_FOLDER)
    reader = _Reader(path, dense, dict(fields), ignored)
    return reader.read()


def _read_ranks(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The dense weights that every rank's file must agree on, and how many entries are not needed."""
    files = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(r"model\.(\d+)\.pth", p.name))}
    missing = [f"model.{rank}.pth" for rank in range(max(files, default=0) + 1) if rank not in files]
    if missing:
        raise InputError(f"{folder} lacks {', '.join(missing)}.")
    first, num_ignored = _read_rank(files[0])
    for rank in sorted(files)[1:]:
        state, _ = _read_rank(files[rank])
        if state.keys() != first.keys():
            name = sorted(state.keys() ^ first.keys())[0]
            raise InputError(f"{files[rank]} and {files[0]} do not agree: only one of them has {name}.")
        for name, tensor in state.items():
            if not _same(tensor, first[name]):
                raise InputError(
                    f"{files[rank]} and {files[0]} do not agree about {name}: they are of different saves."
                )
    return first, num_ignored


def _read_rank(path: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The dense weights in a rank's file; dynamic tables and what stands beside the weights are counted."""
    content = read_file(path)
    if not isinstance(content, dict) or not isinstance(content.get(STATE_KEY), dict):
        raise InputError(f"{path} holds no {STATE_KEY}.")
    whole = content[STATE_KEY]
    needed = {name: value for name, value in whole.items() if not _is_ignored(str(name))}
    state = checked_state(needed, f"{path}, {STATE_KEY},")
    return state, len(whole) - len(state) + len(content) - 1


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers; a NaN, which is refused later, is the same as another."""
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _is_ignored(name: str) -> bool:
    return _DYNAMIC_TABLES in name


@dataclass
class _Reader:
    """Turns the dense weights and dumps of a checkpoint into native names, piece by piece."""

    path: Path
    dense: dict[str, torch.Tensor]
    fields: dict[str, Any]
    ignored: int
    problems: list[str] = field(default_factory=list)

    def read(self) -> ForeignCheckpoint:
        """Everything; what is left over or missing is one InputError with a list."""
        layers = self._layers()
        positions = self._take(_POSITIONS)
        head = self._head()
        config = self._config(layers, positions, head)
        state = {"position.weight": positions, **head}
        for index, layer in layers.items():
            state |= self._native_layer(index, layer, config)
        state |= self._tables(config)
        self.problems += [f"{name} is not known" for name in sorted(self.dense)]
        if self.problems:
            raise InputError(f"{self.path} is no checkpoint of this model:\n  " + "\n  ".join(self.problems))
        return ForeignCheckpoint(config, state, self.ignored)

    def _take(self, name: str) -> torch.Tensor:
        if name not in self.dense:
            raise InputError(f"{self.path / DENSE_FOLDER}: {name} is missing.")
        return self.dense.pop(name)

    def _layers(self) -> dict[int, dict[str, torch.Tensor]]:
        """The tensors of each layer by their own names."""
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for name in [name for name in self.dense if _LAYER.fullmatch(name)]:
            index, rest = _LAYER.fullmatch(name).groups()
            layers.setdefault(int(index), {})[rest] = self.dense.pop(name)
        missing = [str(i) for i in range(max(layers, default=0) + 1) if i not in layers]
        if missing:
            raise InputError(f"{self.path / DENSE_FOLDER}: layer {', '.join(missing)} is missing.")
        return dict(sorted(layers.items()))

    def _head(self) -> dict[str, torch.Tensor]:
        names = [name for name in self.dense if _HEAD.fullmatch(name)]
        return {"head.{}.{}".format(*_HEAD.fullmatch(name).groups()): self.dense.pop(name) for name in names}

    def _config(
        self,
        layers: Mapping[int, Mapping[str, torch.Tensor]],
        positions: torch.Tensor,
        head: Mapping[str, torch.Tensor],
    ) -> ModelConfig:
        """Widths and counts from the tensors, the rest from the fields."""
        for name in _OPEN:
            if name not in self.fields:
                raise UsageError(f"{self.path}: the tensors do not tell {name}; name a --config that does.")
        uvqk = layers[0].get("_linear_uvqk_weight", layers[0].get("_linear_uvqk.weight"))
        if uvqk is None:
            raise InputError(
                f"{self.path / DENSE_FOLDER}: layer 0 has neither _linear_uvqk_weight nor _linear_uvqk.weight."
            )
        if positions.dim() != 2 or any(tensor.dim() < 1 for tensor in head.values()):
            raise InputError(f"{self.path / DENSE_FOLDER}: positions or head are not of the shapes of this model.")
        hidden_dim, heads = positions.shape[1], self.fields["num_heads"]
        inner = max(uvqk.numel() // max(hidden_dim, 1), 1)
        if not isinstance(heads, int) or heads < 1 or inner % (4 * heads):
            raise UsageError(
                f"{self.path}: num_heads {heads} does not divide the {inner // 4} columns of u, v, q and k."
            )
        biases = sorted((int(name.split(".")[1]), len(t)) for name, t in head.items() if name.endswith(".bias"))
        known = {
            "num_layers": len(layers),
            "hidden_dim": hidden_dim,
            "head_dim": inner // (4 * heads),
            "position_buckets": positions.shape[0],
            "head_dims": [width for _, width in biases],
        }
        rest = {k: v for k, v in self.fields.items() if k not in ("format", "format_version", "tables")}
        try:
            return ModelConfig.from_dict(rest | known)
        except ValueError as error:
            raise InputError(f"{self.path}: {error}.") from error

    def _native_layer(self, index: int, layer: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
        """One layer under native names, from either of their kinds."""
        names = {
            "_input_layernorm_weight": "input_norm.weight",
            "_input_layernorm_bias": "input_norm.bias",
            "_output_layernorm_weight": "output_norm.weight",
            "_output_layernorm_bias": "output_norm.bias",
            "_output_ln_dropout_mul.weight": "output_norm.weight",
            "_output_ln_dropout_mul.bias": "output_norm.bias",
            "_linear_uvqk_weight": "uvqk.weight",
            "_linear_uvqk_bias": "uvqk.bias",
            "_linear_proj_weight": "output.weight",
            "_linear_uvqk.weight": "uvqk.weight",
            "_linear_uvqk.bias": "uvqk.bias",
            "_linear_proj.weight": "output.weight",
        }
        native = {}
        for name, tensor in layer.items():
            if name not in names:
                self.problems.append(f"_hstu_block._attention_layers.{index}.{name} is not known")
                continue
            if name in ("_linear_uvqk_weight", "_linear_proj_weight"):
                tensor = tensor.T.contiguous()
            elif name.startswith("_linear_uvqk.") and tensor.shape[:1] == (4 * config.attention_dim,):
                tensor = _by_head_to_by_kind(tensor, config)
            native[f"layers.{index}.{names[name]}"] = tensor
        return native

    def _tables(self, config: ModelConfig) -> dict[str, torch.Tensor]:
        """Dynamic tables from their dumps, small ones from their flat tensors."""
        tables = self._small_tables(config)
        dumps = {}
        if (self.path / DUMP_FOLDER).is_dir():
            dumps, ignored = find_dumps(self.path / DUMP_FOLDER)
            self.ignored += ignored
        state = {}
        for name, ranks in dumps.items():
            if name not in table_names(config) or name in tables:
                what = "is there twice" if name in tables else "is not part of the model"
                self.problems.append(f"table {name} {what}")
                continue
            weight, keys = read_table(ranks, config.hidden_dim)
            state |= {f"embeddings.{name}.weight": weight, f"embeddings.{name}.keys": keys}
        for name, weight in tables.items():
            if name not in table_names(config):
                self.problems.append(f"table {name} is not part of the model")
            elif name in CONTEXTUAL_FEATURES:
                # An id beyond the table takes row 0, as it does there.
                keys = torch.cat([torch.arange(len(weight)), torch.tensor([DEFAULT_KEY])])
                state |= {f"embeddings.{name}.weight": torch.cat([weight, weight[:1]]), f"embeddings.{name}.keys": keys}
            else:
                state[f"embeddings.{name}.weight"] = weight
        return state

    def _small_tables(self, config: ModelConfig) -> dict[str, torch.Tensor]:
        """Tables that lie end to end in flat tensors, split by the sizes that the fields give."""
        sizes = self.fields.get("tables", {})
        if not isinstance(sizes, dict) or not all(type(rows) is int and rows > 0 for rows in sizes.values()):
            raise InputError(f"{self.path}: tables must give the rows of each small table by name, not {sizes}.")
        tables = {}
        for name in [name for name in self.dense if name.startswith(_SMALL_TABLES)]:
            flat = self.dense.pop(name).flatten()
            members = name.removeprefix(_SMALL_TABLES).removesuffix(_SMALL_SUFFIX).rstrip("/").split("/")
            unknown = [member for member in members if member not in sizes]
            rows_left = flat.numel() // config.hidden_dim - sum(sizes[m] for m in members if m not in unknown)
            if len(unknown) > 1:
                raise UsageError(
                    f"{self.path}: {name} holds several tables, whose sizes the tensors do not tell; name them in "
                    f"--config config.json under tables: {', '.join(unknown)}."
                )
            rows = {member: sizes.get(member, rows_left) for member in members}
            if sum(rows.values()) * config.hidden_dim != flat.numel() or min(rows.values()) < 1:
                raise InputError(
                    f"{self.path}: {name} holds {flat.numel():,} numbers, but {rows} rows of {config.hidden_dim} are "
                    f"{sum(rows.values()) * config.hidden_dim:,}."
                )
            parts = flat.split([count * config.hidden_dim for count in rows.values()])
            tables |= {m: part.view(-1, config.hidden_dim) for m, part in zip(members, parts, strict=True)}
        return tables


def _by_head_to_by_kind(tensor: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Rows H x (u, v, q, k) x d as (u, v, q, k) x H x d; a weight [4 * H * d, D] or a bias [4 * H * d]."""
    grouped = tensor.unflatten(0, (config.num_heads, 4, config.head_dim))
    return grouped.transpose(0, 1).flatten(0, 2).contiguous()
