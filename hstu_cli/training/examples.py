"""Training examples: passes over users' events, in which every item token is one example.

With the model's mask and positions, the row of an item token equals that of the same item as the
only candidate at that moment, so one pass over a user trains on, or scores, every event.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hstu_cli.config import ModelConfig
from hstu_cli.data.dataset import EventStore, PreparedDataset
from hstu_cli.errors import InputError
from hstu_cli.model.layer import JaggedAttention
from hstu_cli.model.ranking import RankingModel
from hstu_cli.model.tokens import VIDEO_TABLE, TokenBatch, UserRequest, build_token_batch

# Shapes: E examples (item tokens that are scored), T tokens of a batch, D hidden_dim.


@dataclass(frozen=True, slots=True)
class UserPass:
    """One forward over events first to end of a user, of which those from `scored_from` on are examples."""

    user: int
    first: int
    scored_from: int
    end: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the events."""
        return 2 * (self.end - self.first) - 1


@dataclass(frozen=True, slots=True)
class ExampleBatch:
    """The tokens of some passes, on the CPU, and the examples among them.

    item_rows: int64 [E], the token of each example; the token before it, if any, predicts it.
    has_previous: bool [E], whether there is a token before it in its sequence.
    video_ids: int64 [E], raw ids; labels: int16 [E], bit sums.
    """

    tokens: TokenBatch
    item_rows: torch.Tensor
    has_previous: torch.Tensor
    video_ids: torch.Tensor
    labels: np.ndarray


def score_examples(model: RankingModel, batch: ExampleBatch, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [E, 8] of the examples, and the hidden rows [P, D] that predict those P that have a token before them."""
    device = model.device
    hidden = model(batch.tokens.to(device), JaggedAttention(model.config, batch.tokens.plan(device), impl))  # [T, D]
    before = batch.item_rows[batch.has_previous] - 1
    return model.rank(hidden[batch.item_rows.to(device)]), hidden[before.to(device)]


class ExampleSource:
    """The examples of a period: every event of its requests, with all of the user's earlier events as history."""

    def __init__(
        self,
        dataset: PreparedDataset,
        config: ModelConfig,
        *,
        from_ms: int | None = None,
        until_ms: int | None = None,
        events: EventStore | None = None,
    ) -> None:
        """Events of requests with from_ms <= request time < until_ms; there may be none.

        events: those of the period's users, and maybe of others, where they have been read already.
        """
        self.config = config
        timeline = dataset.requests(from_ms=from_ms, until_ms=until_ms)
        self.user_ids, inverse = np.unique(timeline.user_id, return_inverse=True)
        self._first = np.full(len(self.user_ids), np.iinfo(np.int64).max)
        self._end = np.zeros(len(self.user_ids), np.int64)
        np.minimum.at(self._first, inverse, timeline.history_end)
        np.maximum.at(self._end, inverse, timeline.history_end + timeline.num_candidates)
        self.events = dataset.events(self.user_ids) if events is None else events
        self._offsets = self.events.offsets[np.searchsorted(self.events.user_ids, self.user_ids)]
        users = dataset.users(["user_id", *config.contextual_features])
        if not np.isin(self.user_ids, users[:, 0]).all():
            raise InputError(f"{dataset.path} has events of users that its table of users lacks; prepare it again.")
        self._context = users[np.searchsorted(users[:, 0], self.user_ids), 1:]
        self.num_examples = int((self._end - self._first).sum()) if len(self.user_ids) else 0

    def summary(self) -> dict[str, int]:
        """Users and examples of the period."""
        return {"num_users": len(self.user_ids), "num_examples": self.num_examples}

    def passes(self) -> list[UserPass]:
        """All examples of the period, each in one pass; a user with a short history is one pass."""
        return [
            UserPass(user, *bounds)
            for user, (start, end) in enumerate(zip(self._first.tolist(), self._end.tolist(), strict=True))
            for bounds in pass_bounds(self.config, start, end)
        ]

    def batches_of_tokens(self, num_tokens: int) -> Iterator[list[UserPass]]:
        """All passes, similar lengths together, in batches of at most this many tokens or of one pass."""
        yield from parts_of_tokens(sorted(self.passes(), key=lambda one: one.num_tokens), num_tokens)

    def count(self, passes: Sequence[UserPass]) -> tuple[int, int]:
        """Examples of some passes, and those among them that a token before predicts."""
        examples = sum(one.end - one.scored_from for one in passes)
        first_tokens = sum(one.scored_from == one.first for one in passes) if not self.config.num_context_tokens else 0
        return examples, examples - first_tokens

    def batch(self, passes: Sequence[UserPass]) -> ExampleBatch:
        """The tokens and examples of some passes."""
        requests, scored, videos, labels = [], [], [], []
        for one in passes:
            offset = self._offsets[one.user]
            video_ids = self.events.video_id[offset + one.first : offset + one.end]
            actions = self.events.action_weights[offset + one.first : offset + one.end]
            # Nothing comes after the last event, so its action is no token and it stands as a candidate.
            requests.append(
                UserRequest(
                    user_id=int(self.user_ids[one.user]),
                    context=self._context[one.user],
                    video_ids=video_ids[:-1],
                    action_weights=actions[:-1],
                    candidates=video_ids[-1:],
                )
            )
            scored.append(np.arange(one.first, one.end) >= one.scored_from)
            videos.append(video_ids)
            labels.append(actions)
        is_example = np.concatenate(scored)
        tokens = build_token_batch(self.config, requests)
        item_rows = tokens.slots[VIDEO_TABLE][torch.from_numpy(is_example)]
        return ExampleBatch(
            tokens=tokens,
            item_rows=item_rows,
            has_previous=~torch.isin(item_rows, tokens.seq_offsets),
            video_ids=torch.from_numpy(np.concatenate(videos)[is_example]),
            labels=np.concatenate(labels)[is_example],
        )

    def labels(self) -> np.ndarray:
        """Bit sums int16 of the period's examples, user by user."""
        return self._gathered("action_weights", self._first)

    def video_ids(self) -> np.ndarray:
        """Every video up to the period's end once, int64, ascending."""
        return np.unique(self._gathered("video_id", np.zeros_like(self._first)))

    def _gathered(self, column: str, starts: np.ndarray) -> np.ndarray:
        """A column of each user's events from `starts` to the period's end."""
        values = getattr(self.events, column)
        bounds = zip(self._offsets.tolist(), starts.tolist(), self._end.tolist(), strict=True)
        return np.concatenate([values[offset + start : offset + end] for offset, start, end in bounds])


def parts_of_tokens(passes: Sequence[UserPass], num_tokens: int) -> Iterator[list[UserPass]]:
    """The passes in order, in parts of at most this many tokens or of one pass."""
    part: list[UserPass] = []
    tokens = 0
    for one in passes:
        if part and tokens + one.num_tokens > num_tokens:
            yield part
            part, tokens = [], 0
        part.append(one)
        tokens += one.num_tokens
    if part:
        yield part


def pass_bounds(config: ModelConfig, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(first, scored_from, end) of the passes that score events start to end of one user.

    All events of a pass see the same window as in inference: event k has the k events before it as
    its history, of which the model sees those from `config.window_start(k)` on.
    """
    while start < end:
        first = config.window_start(start)
        last = min(end, first + config.max_history + 1)  # the last event whose history fills this window
        yield first, start, last
        start = last
