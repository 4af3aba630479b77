"""The model's configuration: one frozen dataclass, three presets, and a strict JSON reader."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta, timezone
from pathlib import Path
from typing import Any

from hstu_cli.errors import InputError, UsageError

CONTEXTUAL_FEATURES = (
    "user_id",
    "user_active_degree",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
)
"""The context tokens of a KuaiRand user, in the order in which they open the sequence."""

TASKS = (
    "is_click",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "long_view",
    "is_profile_enter",
)
"""The ranking head's outputs; bit t of `action_weights` is task t."""

KUAIRAND_TIMEZONE = timezone(timedelta(hours=8))
"""In which KuaiRand's days begin."""

NUM_ACTION_WEIGHTS = 1 << len(TASKS)
"""Rows of the `action_weights` table: every sum of the eight bits."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that decides a model's scores besides its weights.

    Lengths: `max_history` in events (two tokens each; a multiple of 4), `max_candidates` in items
    scored at a time, `scaling_seqlen` the constant divisor L of the attention scores. A wrong value
    raises ValueError naming the field and the value.
    """

    num_layers: int
    hidden_dim: int
    num_heads: int
    head_dim: int
    max_history: int
    max_candidates: int
    position_buckets: int
    scaling_seqlen: int
    head_dims: tuple[int, ...]
    contextual_features: tuple[str, ...] = CONTEXTUAL_FEATURES
    norm_eps: float = 1e-5
    next_item_temperature: float = 0.05
    contextual_mask: bool = False

    def __post_init__(self) -> None:
        for name in _POSITIVE_INTS:
            _require_positive_int(name, getattr(self, name))
        for name in ("head_dims", "contextual_features"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise ValueError(f"{name} must be a list, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        for dim in self.head_dims:
            _require_positive_int("head_dims", dim)
        if not self.head_dims or self.head_dims[-1] != len(TASKS):
            raise ValueError(f"head_dims must end with {len(TASKS)}, one logit per task, not {list(self.head_dims)}")
        if self.max_history % 4:
            raise ValueError(
                f"max_history must be a multiple of 4 (the window moves by quarters), not {self.max_history}"
            )
        for feature in self.contextual_features:
            if feature not in CONTEXTUAL_FEATURES:
                raise ValueError(f"contextual_features holds {feature!r}; known are {', '.join(CONTEXTUAL_FEATURES)}")
        if len(set(self.contextual_features)) != len(self.contextual_features):
            raise ValueError(f"contextual_features holds a name twice: {list(self.contextual_features)}")
        for name in ("norm_eps", "next_item_temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        if self.contextual_mask is not False:
            raise ValueError(
                "contextual_mask must be false (context tokens are causal here, which is what makes them cacheable), "
                f"not {self.contextual_mask!r}"
            )

    @property
    def num_context_tokens(self) -> int:
        """Tokens that stand before the history."""
        return len(self.contextual_features)

    @property
    def attention_dim(self) -> int:
        """Width of u, v, q and k: all heads side by side."""
        return self.num_heads * self.head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of a token's keys and values, all layers together."""
        return self.num_layers * 2 * self.attention_dim

    @property
    def alpha(self) -> float:
        """Scale of the attention scores, 1 / sqrt(head_dim)."""
        return self.head_dim**-0.5

    @property
    def max_history_tokens(self) -> int:
        """The most tokens that can stand before the candidates."""
        return self.num_context_tokens + 2 * self.max_history

    def window_start(self, num_events: int) -> int:
        """The first event that the model sees of a history of `num_events` events.

        A history longer than W = max_history loses its oldest part in steps of W/4, by a rule that
        depends on its length alone: cached and uncached runs see the same tokens, and cached keys
        and values stay valid until the start moves.
        """
        window = self.max_history
        if num_events <= window:
            return 0
        step = window // 4
        return -(-(num_events - window) // step) * step

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Build from JSON fields; unknown and missing ones raise ValueError naming them."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"unknown field {', '.join(unknown)}; known are {', '.join(known)}")
        missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in fields]
        if missing:
            raise ValueError(f"missing field {', '.join(missing)}")
        return cls(**fields)


_POSITIVE_INTS = (
    "num_layers",
    "hidden_dim",
    "num_heads",
    "head_dim",
    "max_history",
    "max_candidates",
    "position_buckets",
    "scaling_seqlen",
)


def _require_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}")


MODEL_PRESETS: dict[str, ModelConfig] = {
    "kuairand_gr": ModelConfig(
        num_layers=3,
        hidden_dim=512,
        num_heads=4,
        head_dim=128,
        max_history=4096,
        max_candidates=100,
        position_buckets=8192,
        scaling_seqlen=8398,
        head_dims=(512, 8),
    ),
    "tiny": ModelConfig(
        num_layers=2,
        hidden_dim=64,
        num_heads=2,
        head_dim=32,
        max_history=64,
        max_candidates=32,
        position_buckets=1024,
        scaling_seqlen=198,
        head_dims=(64, 8),
    ),
    "benchmark": ModelConfig(
        num_layers=8,
        hidden_dim=1024,
        num_heads=4,
        head_dim=256,
        max_history=2048,
        max_candidates=256,
        position_buckets=8192,
        scaling_seqlen=4352,
        head_dims=(512, 8),
        contextual_features=(),
    ),
}


CHECKPOINT_ONLY_FIELDS = ("format", "format_version", "tables")
"""What a native checkpoint's config.json says besides the model's configuration."""


DEFAULT_PRESET = "kuairand_gr"
"""The configuration where nothing names one."""


def resolve_model_config(name_or_path: str) -> ModelConfig:
    """The configuration that `--config` names: a preset, or the path of a config.json.

    Raises UsageError for a name that is neither, InputError for a file that cannot be used.
    """
    preset = MODEL_PRESETS.get(name_or_path.lower().replace("-", "_"))
    if preset is not None:
        return preset
    path = Path(name_or_path)
    if path.suffix == ".json" or _is_file(path):
        return model_config_from_fields(read_json_object(path), path)
    raise UsageError(
        f"--config {name_or_path}: there is no preset of that name ({', '.join(MODEL_PRESETS)}) and no such file."
    )


def resolve_config_fields(name_or_path: str) -> dict[str, Any]:
    """The fields that `--config` names, for a checkpoint that tells the others itself: a preset's, or a JSON file's."""
    preset = MODEL_PRESETS.get(name_or_path.lower().replace("-", "_"))
    return preset.to_dict() if preset is not None else read_json_object(Path(name_or_path))


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a text that is too long for a name names none."""
    try:
        return path.is_file()
    except OSError:
        return False


def model_config_from_fields(fields: Mapping[str, Any], path: Path) -> ModelConfig:
    """The configuration in a config.json that was read from `path`, a native checkpoint's included."""
    try:
        return ModelConfig.from_dict({k: v for k, v in fields.items() if k not in CHECKPOINT_ONLY_FIELDS})
    except ValueError as error:
        raise InputError(f"{path}: {error}.") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError where it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # bad JSON or bad UTF-8
        raise InputError(f"{path} is not a JSON file: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value
