"""The requests of a data set's period, ready for the engine."""

from collections.abc import Iterator

import numpy as np

from hstu_cli.config import ModelConfig
from hstu_cli.data.dataset import EventStore, PreparedDataset, RequestTimeline
from hstu_cli.errors import InputError
from hstu_cli.model.tokens import UserRequest


class RequestSource:
    """The requests of a period, ready for the engine: histories, candidates, context and labels."""

    def __init__(
        self,
        dataset: PreparedDataset,
        config: ModelConfig,
        *,
        from_ms: int | None = None,
        until_ms: int | None = None,
        limit: int | None = None,
    ) -> None:
        """Requests with from_ms <= request time < until_ms, the first `limit`; InputError for none."""
        self.timeline: RequestTimeline = dataset.requests(from_ms=from_ms, until_ms=until_ms, limit=limit)
        if not len(self.timeline):
            raise InputError(f"{dataset.path} has no request in this period; its events run {dataset.time_span}.")
        self._events: EventStore = dataset.events(self.timeline.user_id)
        users = dataset.users(["user_id", *config.contextual_features])
        self._user_ids, self._context = users[:, 0], users[:, 1:]
        if not np.isin(self.timeline.user_id, self._user_ids).all():
            raise InputError(f"{dataset.path} has requests of users that its table of users lacks; prepare it again.")

    def __len__(self) -> int:
        return len(self.timeline)

    def request(self, index: int) -> UserRequest:
        """Request number `index` of the period, with the user's whole history up to it."""
        first, middle, last = self._bounds(index)
        context_row = np.searchsorted(self._user_ids, self.timeline.user_id[index])
        return UserRequest(
            user_id=int(self.timeline.user_id[index]),
            context=self._context[context_row],
            video_ids=self._events.video_id[first:middle],
            action_weights=self._events.action_weights[first:middle],
            candidates=self._events.video_id[middle:last],
        )

    def history_tokens_by_user(self, config: ModelConfig) -> list[int]:
        """For each user of the period, the most tokens that stand before the candidates of a request."""
        most: dict[int, int] = {}
        for user, num_events in zip(self.timeline.user_id.tolist(), self.timeline.history_end.tolist(), strict=True):
            num_tokens = config.num_context_tokens + 2 * (num_events - config.window_start(num_events))
            most[user] = max(most.get(user, 0), num_tokens)
        return list(most.values())

    def labels(self, index: int) -> np.ndarray:
        """Bit sums int16 of the candidates of request number `index`."""
        _, middle, last = self._bounds(index)
        return self._events.action_weights[middle:last]

    def batches(self, batch_size: int, num_steps: int | None) -> Iterator[range]:
        """Consecutive requests of distinct users; a batch closes early at a user who is in it already."""
        start = steps = 0
        while start < len(self) and steps != num_steps:
            users: set[int] = set()
            end = start
            while end < min(start + batch_size, len(self)) and self.timeline.user_id[end] not in users:
                users.add(self.timeline.user_id[end])
                end += 1
            yield range(start, end)
            start, steps = end, steps + 1

    def _bounds(self, index: int) -> tuple[int, int, int]:
        """Where the user's events, the request's candidates and what follows begin."""
        first = self._events.events_of(self.timeline.user_id[index]).start
        middle = first + int(self.timeline.history_end[index])
        return first, middle, middle + int(self.timeline.num_candidates[index])
