"""From requests to token batches: which table and id each token takes, and its position.

A user's sequence is `[context] [item_0, action_0, item_1, action_1, ...] [candidate items]`. A batch
may leave out the first tokens of a sequence where their keys and values are known already.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hstu_cli.backend import upload
from hstu_cli.config import ModelConfig
from hstu_cli.kernels import BatchPlan, plan_batch
from hstu_cli.kernels.buckets import bucket, padded

VIDEO_TABLE = "video_id"
ACTION_TABLE = "action_weights"

# Shapes: B sequences, T tokens of the batch (those that are computed), C candidates of one request.


@dataclass(frozen=True, slots=True)
class UserRequest:
    """One request: what is known of the user at that moment, and the items to score.

    user_id: whose cached keys and values may serve; the model itself sees the context alone.
    context: int64 [num_context_tokens], in the order of the configuration's contextual features.
    video_ids, action_weights: integers [events], the user's history, oldest first, not cut to a window.
    candidates: int64 [C], raw video ids.
    """

    user_id: int
    context: np.ndarray
    video_ids: np.ndarray
    action_weights: np.ndarray
    candidates: np.ndarray

    def num_history_tokens(self, config: ModelConfig) -> int:
        """Tokens before the candidates, after the history was cut to its window."""
        num_events = len(self.video_ids)
        return config.num_context_tokens + 2 * (num_events - config.window_start(num_events))


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens of B sequences, jagged; every tensor is int64 and on one device.

    ids, slots: per table, the ids to look up and the rows [0, T) that their embeddings go to.
    positions: [T], the row of the position table for each token.
    seq_offsets: [B + 1], where each sequence's tokens begin; num_candidates: [B], its last tokens.
    """

    ids: dict[str, torch.Tensor]
    slots: dict[str, torch.Tensor]
    positions: torch.Tensor
    seq_offsets: torch.Tensor
    num_candidates: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """T, the tokens that are computed."""
        return self.positions.shape[0]

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch, if it is on the host, on another device: one copy, for which nobody waits."""
        rest = [self.positions, self.seq_offsets, self.num_candidates]
        parts = iter(upload([*self.ids.values(), *self.slots.values(), *rest], torch.device(device)))
        ids, slots = ({table: next(parts) for table in of_table} for of_table in (self.ids, self.slots))
        return TokenBatch(ids, slots, *parts)

    def in_bucket(self) -> "TokenBatch":
        """The same batch on the host, padded to sizes of which there are few; the results of its own rows are the same.

        There is at least one row of padding: the embeddings of padding ids, 0 in every table, go to the last one.
        """
        num_rows = bucket(self.num_tokens + 1)
        sizes = {table: bucket(len(ids)) for table, ids in self.ids.items()}
        return replace(
            self,
            ids={table: padded(ids, sizes[table]) for table, ids in self.ids.items()},
            slots={table: padded(slots, sizes[table], num_rows - 1) for table, slots in self.slots.items()},
            positions=padded(self.positions, num_rows),
        )

    def plan(self, device: torch.device | str = "cpu") -> BatchPlan:
        """The batch as attention on `device` takes it; of a batch on the host, for which nothing waits."""
        return plan_batch(self.seq_offsets, self.num_candidates, self.num_tokens, device)

    def candidate_rows(self) -> torch.Tensor:
        """Rows of all candidates, in the order of the sequences: [sum of num_candidates] int64."""
        rows = torch.arange(self.num_tokens, device=self.positions.device)
        sequence = torch.repeat_interleave(self.seq_offsets.diff())  # [T], the sequence of each token
        return rows[rows >= (self.seq_offsets[1:] - self.num_candidates)[sequence]]

    def last_rows(self) -> torch.Tensor:
        """Row of the last token before each sequence's candidates, [B] int64; -1 where there is none."""
        rows = self.seq_offsets[1:] - self.num_candidates - 1
        return torch.where(rows >= self.seq_offsets[:-1], rows, -1)


def table_names(config: ModelConfig) -> tuple[str, ...]:
    """The embedding tables of a configuration, in the order of their first token."""
    return (*config.contextual_features, VIDEO_TABLE, ACTION_TABLE)


def build_token_batch(
    config: ModelConfig, requests: Sequence[UserRequest], num_cached_tokens: Sequence[int] | None = None
) -> TokenBatch:
    """The tokens of the requests that must be computed, on the CPU.

    Each history is cut to its window. `num_cached_tokens[b]` tokens are left out at the front of
    sequence b; they must lie before the candidates (ValueError otherwise).
    """
    tables = table_names(config)
    cached = [0] * len(requests) if num_cached_tokens is None else num_cached_tokens
    sequences = [_sequence(config, r, n) for r, n in zip(requests, cached, strict=True)]
    codes, ids, positions = (
        np.concatenate([s[i] for s in sequences]) if sequences else np.empty(0, np.int64) for i in range(3)
    )
    slots = {table: np.flatnonzero(codes == code) for code, table in enumerate(tables)}
    return TokenBatch(
        ids={table: torch.from_numpy(ids[rows]) for table, rows in slots.items()},
        slots={table: torch.from_numpy(rows) for table, rows in slots.items()},
        positions=torch.from_numpy(positions),
        seq_offsets=torch.tensor([0, *(len(s[0]) for s in sequences)]).cumsum(0),
        num_candidates=torch.tensor([len(r.candidates) for r in requests], dtype=torch.int64),
    )


def _sequence(config: ModelConfig, request: UserRequest, num_cached: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Table code, id and position of one sequence's tokens behind the cached ones, each int64."""
    num_context = config.num_context_tokens
    if len(request.context) != num_context:
        raise ValueError(f"a request needs {num_context} context ids, not {len(request.context)}")
    start = config.window_start(len(request.video_ids))
    videos, actions = request.video_ids[start:], request.action_weights[start:]
    num_before = num_context + 2 * len(videos)  # n, the tokens before the candidates
    if not 0 <= num_cached <= num_before:
        raise ValueError(f"{num_cached} cached tokens for a sequence with {num_before} before the candidates")
    video_code = num_context
    codes = np.full(num_before + len(request.candidates), video_code, np.int64)
    ids = np.empty_like(codes)
    codes[:num_context] = np.arange(num_context)
    ids[:num_context] = request.context
    codes[num_context + 1 : num_before : 2] = video_code + 1
    ids[num_context:num_before:2] = videos
    ids[num_context + 1 : num_before : 2] = actions
    ids[num_before:] = request.candidates
    # Candidates share position n: they are alternatives for one place, not a row of items.
    positions = np.minimum(np.arange(len(codes)), min(num_before, config.position_buckets - 1))
    return codes[num_cached:], ids[num_cached:], positions[num_cached:]
