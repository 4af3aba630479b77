"""The whole model once more, slow and obvious: float64 numpy loops over one request, written apart from the model.

It shares no code with hstu_cli and never uses its classes. A checkpoint is a dict of arrays under the native names, a
config is the content of config.json as a dict. Letters: T tokens, n tokens before the candidates, D width, H heads,
d head dim, C candidates.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Config = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
Rounding = Callable[[np.ndarray], np.ndarray]

DEFAULT_KEY = -1
CONTEXTUAL_FEATURES = [
    "user_id",
    "user_active_degree",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
]
SMALL_CONFIG: Config = {
    "num_layers": 2,
    "hidden_dim": 16,
    "num_heads": 2,
    "head_dim": 8,
    "norm_eps": 1e-5,
    "position_buckets": 64,
    "scaling_seqlen": 30,
    "max_history": 8,
    "max_candidates": 5,
    "head_dims": [12, 8],
    "contextual_features": CONTEXTUAL_FEATURES,
    "next_item_temperature": 0.05,
    "contextual_mask": False,
}
"""A model small enough for loops; every window, chunk and table of it is reached by short requests."""


class UnknownIdError(Exception):
    """An id beyond a table that has no keys."""


@dataclass(frozen=True)
class OracleRequest:
    """One request: every event of the user so far, oldest first, and the candidates to score.

    `context_ids` follows the config's contextual_features. `history` is not yet cut to the window.
    """

    context_ids: Sequence[int] = ()
    history: Sequence[int] = ()
    actions: Sequence[int] = ()
    candidates: Sequence[int] = ()


@dataclass(frozen=True)
class OracleResult:
    """What the model says about one request.

    logits: [C, 8]. item_scores: raw id -> cosine / temperature, in the table's row order; None with no token before the
    candidates. hidden: [T, D], the rows after the last layer. num_before: n.
    """

    logits: np.ndarray
    item_scores: dict[int, float] | None
    hidden: np.ndarray
    num_before: int

    def best_items(self) -> list[int]:
        """All ids, the best first; equal scores keep the table's row order."""
        assert self.item_scores is not None
        return sorted(self.item_scores, key=lambda raw_id: -self.item_scores[raw_id])

    def rank(self, target: int) -> int:
        """Place of an id among `best_items`, from 1; 0 for an id that is no item."""
        best = self.best_items()
        return best.index(target) + 1 if target in best else 0


class Oracle:
    """The model of one checkpoint.

    `rounding` is applied to the result of every operation: with the identity the arithmetic is float64, with a rounding
    to a narrow dtype it is that of the plain formulas in this dtype, which tells how much error the dtype itself makes.
    """

    def __init__(self, state: Arrays, config: Config, rounding: Rounding = lambda values: values) -> None:
        self.state = {
            name: array if name.endswith(".keys") else array.astype(np.float64) for name, array in state.items()
        }
        self.config = config
        self.rounding = rounding

    def run(self, request: OracleRequest) -> OracleResult:
        """Everything about one request."""
        rows, num_before = self.embed(request)
        for index in range(self.config["num_layers"]):
            rows = self.layer(index, rows, num_before)
        logits = [self.ranking_head(row) for row in rows[num_before:]]
        scores = self.next_item_scores(rows[num_before - 1]) if num_before else None
        return OracleResult(np.array(logits).reshape(-1, self.config["head_dims"][-1]), scores, rows, num_before)

    def tokens(self, request: OracleRequest) -> tuple[list[tuple[str, int]], list[int], int]:
        """(table, raw id) and position of each token, and n."""
        start = window_start(len(request.history), self.config["max_history"])
        tokens = list(zip(self.config["contextual_features"], request.context_ids, strict=True))
        for item, action in list(zip(request.history, request.actions, strict=True))[start:]:
            tokens += [("video_id", item), ("action_weights", action)]
        num_before = len(tokens)
        tokens += [("video_id", item) for item in request.candidates]
        buckets = self.config["position_buckets"]
        return tokens, [min(index, num_before, buckets - 1) for index in range(len(tokens))], num_before

    def lookup(self, table: str, raw_id: int) -> np.ndarray:
        """The embedding of one raw id: its row, else the default row, else zeros; without keys the id is the row."""
        weight = self.state[f"embeddings.{table}.weight"]
        keys = self.state.get(f"embeddings.{table}.keys")
        if keys is None:
            if not 0 <= raw_id < len(weight):
                raise UnknownIdError(f"{table} {raw_id}")
            return weight[raw_id]
        default = np.zeros(weight.shape[1])
        for row, key in enumerate(keys.tolist()):
            if key == raw_id and raw_id >= 0:
                return weight[row]
            if key == DEFAULT_KEY:
                default = weight[row]
        return default

    def embed(self, request: OracleRequest) -> tuple[np.ndarray, int]:
        """Embedded tokens [T, D] and n."""
        tokens, positions, num_before = self.tokens(request)
        rows = np.zeros((len(tokens), self.config["hidden_dim"]))
        for index, ((table, raw_id), position) in enumerate(zip(tokens, positions, strict=True)):
            scaled = self.rounding(math.sqrt(self.config["hidden_dim"]) * self.lookup(table, raw_id))
            rows[index] = self.rounding(scaled + self.state["position.weight"][position])
        return rows, num_before

    def layer(self, index: int, rows: np.ndarray, num_before: int) -> np.ndarray:
        """One HSTU layer over [T, D]."""
        heads, head_dim, prefix = self.config["num_heads"], self.config["head_dim"], f"layers.{index}"
        u, v, q, k = (np.zeros((len(rows), heads, head_dim)) for _ in range(4))
        for t, row in enumerate(rows):
            projected = self.linear(f"{prefix}.uvqk", self.layer_norm(f"{prefix}.input_norm", row))
            u[t], v[t], q[t], k[t] = self.rounding(silu(projected)).reshape(4, heads, head_dim)
        mixed = self.attention(q, k, v, num_before)
        result = np.zeros_like(rows)
        for t, row in enumerate(rows):
            normed = self.layer_norm(f"{prefix}.output_norm", mixed[t].reshape(-1))
            gated = self.rounding(normed * u[t].reshape(-1))
            result[t] = self.rounding(row + self.linear(f"{prefix}.output", gated))
        return result

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, num_before: int) -> np.ndarray:
        """o_i = sum_j SiLU(alpha * q_i . k_j) / L * M_ij v_j over [T, H, d]."""
        num_tokens, num_heads, head_dim = q.shape
        alpha = 1 / math.sqrt(head_dim)
        outputs = np.zeros_like(v)
        for i in range(num_tokens):
            seen = [j for j in range(num_tokens) if visible(i, j, num_before)]
            for head in range(num_heads):
                products = self.rounding(np.array([np.dot(q[i, head], k[j, head]) for j in seen]))
                scores = self.rounding(silu(self.rounding(alpha * products)))
                weights = self.rounding(scores / self.config["scaling_seqlen"])
                total = sum(weight * v[j, head] for weight, j in zip(weights, seen, strict=True))
                outputs[i, head] = self.rounding(total)
        return outputs

    def ranking_head(self, row: np.ndarray) -> np.ndarray:
        """The logits [8] of one candidate row [D]."""
        row = self.rounding(row / max(math.sqrt(np.dot(row, row)), 1e-6))
        layers = sorted({int(name.split(".")[1]) for name in self.state if name.startswith("head.")})
        for layer in layers:
            row = self.linear(f"head.{layer}", row)
            if layer != layers[-1]:
                row = np.maximum(row, 0.0)
        return row

    def next_item_scores(self, row: np.ndarray) -> dict[int, float]:
        """Every item's cosine with one row [D] over the temperature; the default row is no item."""
        weight, keys = self.state["embeddings.video_id.weight"], self.state.get("embeddings.video_id.keys")
        ids = range(len(weight)) if keys is None else keys.tolist()
        scores = {}
        for raw_id, item in zip(ids, weight, strict=True):
            if raw_id != DEFAULT_KEY:
                # fsum is exact, so that equal rows have equal scores.
                cosine = math.fsum(a * b for a, b in zip(unit(row), unit(item), strict=True))
                scores[raw_id] = cosine / self.config["next_item_temperature"]
        return scores

    def layer_norm(self, prefix: str, row: np.ndarray) -> np.ndarray:
        """One row, biased variance."""
        centred = row - row.mean()
        normed = centred / math.sqrt((centred * centred).mean() + self.config["norm_eps"])
        return self.rounding(normed * self.state[f"{prefix}.weight"] + self.state[f"{prefix}.bias"])

    def linear(self, prefix: str, row: np.ndarray) -> np.ndarray:
        """Weight [out, in] times one row, plus the bias where there is one."""
        return self.rounding(self.state[f"{prefix}.weight"] @ row + self.state.get(f"{prefix}.bias", 0.0))


def window_start(num_events: int, max_history: int) -> int:
    """start(N): events before it are left out. Depends on N alone."""
    if num_events <= max_history:
        return 0
    step = max_history // 4
    return math.ceil((num_events - max_history) / step) * step


def visible(i: int, j: int, num_before: int) -> bool:
    """The mask M: may token i see token j?"""
    if i < num_before:
        return j <= i
    return j < num_before or j == i


def silu(values: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return values / (1.0 + np.exp(-values))


def unit(row: np.ndarray) -> np.ndarray:
    """The row at length 1; a zero row stays zero."""
    length = math.sqrt(math.fsum(row * row))
    return row / length if length > 0 else row


def random_state(config: Config, tables: Mapping[str, int | Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """A float32 checkpoint under the native names in which every tensor matters.

    `tables`: per table its keys in row order, or the number of rows of a table without keys.
    """
    generator = np.random.default_rng(seed)
    width, inner = config["hidden_dim"], config["num_heads"] * config["head_dim"]

    def normal(*shape: int, mean: float = 0.0, std: float) -> np.ndarray:
        return generator.normal(mean, std, shape).astype(np.float32)

    state = {"position.weight": normal(config["position_buckets"], width, std=0.5)}
    for name in [*config["contextual_features"], "video_id", "action_weights"]:
        keys = tables[name]
        state[f"embeddings.{name}.weight"] = normal(keys if isinstance(keys, int) else len(keys), width, std=0.25)
        if not isinstance(keys, int):
            state[f"embeddings.{name}.keys"] = np.array(keys, dtype=np.int64)
    for index in range(config["num_layers"]):
        for norm, size in (("input_norm", width), ("output_norm", inner)):
            state[f"layers.{index}.{norm}.weight"] = normal(size, mean=1.0, std=0.2)
            state[f"layers.{index}.{norm}.bias"] = normal(size, std=0.2)
        state[f"layers.{index}.uvqk.weight"] = normal(4 * inner, width, std=1.5 * width**-0.5)
        state[f"layers.{index}.uvqk.bias"] = normal(4 * inner, std=0.2)
        state[f"layers.{index}.output.weight"] = normal(width, inner, std=inner**-0.5)
    size = width
    for index, next_size in enumerate(config["head_dims"]):
        state[f"head.{2 * index}.weight"] = normal(next_size, size, std=size**-0.5)
        state[f"head.{2 * index}.bias"] = normal(next_size, std=0.2)
        size = next_size
    return state
