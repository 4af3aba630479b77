"""A small model and users whose histories grow, for tests of whole steps."""

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from hstu_cli.config import MODEL_PRESETS
from hstu_cli.model.ranking import RankingModel, random_model
from hstu_cli.model.tokens import UserRequest

CONFIG = dataclasses.replace(MODEL_PRESETS["tiny"], max_history=16, max_candidates=6, contextual_features=("user_id",))
NUM_ITEMS, NUM_USERS = 50, 8


def user_steps(most: int) -> st.SearchStrategy[list[dict[int, tuple[int, int]]]]:
    """Up to so many steps: new events and candidates of some users."""
    numbers = st.tuples(st.integers(0, 12), st.integers(1, 14))
    step = st.dictionaries(st.integers(0, NUM_USERS - 1), numbers, min_size=1, max_size=5)
    return st.lists(step, min_size=1, max_size=most)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """How far apart, as a share of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def small_model(seed: int) -> RankingModel:
    """Random weights for `CONFIG`."""
    return random_model(CONFIG, {}, {"video_id": NUM_ITEMS, "user_id": NUM_USERS}, seed=seed)


@dataclass
class Users:
    """Users whose histories grow from request to request."""

    rng: np.random.Generator
    events: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(NUM_USERS), 0))

    def requests(self, sizes: dict[int, tuple[int, int]]) -> list[UserRequest]:
        """A request of each user, after so many new events, with so many candidates."""
        found = []
        for user, (num_new, num_candidates) in sizes.items():
            self.events[user] += num_new
            history = np.random.default_rng(user).integers(0, NUM_ITEMS, (2, 500))
            videos, actions = history[:, : self.events[user]]
            candidates = self.rng.integers(0, NUM_ITEMS, num_candidates)
            found.append(UserRequest(user, np.array([user]), videos, actions, candidates))
        return found
