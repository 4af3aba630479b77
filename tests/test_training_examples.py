"""Training examples: every event once, in its window, with the scores that inference gives it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu_cli.backend import Backend
from hstu_cli.bench.setup import random_model_for
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.data.dataset import PreparedDataset
from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.layer import JaggedAttention
from hstu_cli.model.tokens import UserRequest
from hstu_cli.training.examples import ExampleSource, pass_bounds

CONFIG = dataclasses.replace(MODEL_PRESETS["tiny"], max_history=16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Users with histories of one event up to several windows."""
    root = tmp_path_factory.mktemp("data")
    prepare_synthetic(root, SyntheticOptions(num_users=15, num_events=25, num_items=80))
    return PreparedDataset(root, "synthetic")


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 12))
def test_passes_score_every_event_once_in_the_window_of_inference(start: int, count: int, quarter: int) -> None:
    config = dataclasses.replace(CONFIG, max_history=4 * quarter)
    scored = []
    for first, scored_from, end in pass_bounds(config, start, start + count):
        assert first <= scored_from < end
        assert end - 1 - first <= config.max_history
        assert all(config.window_start(event) == first for event in range(scored_from, end))
        scored += range(scored_from, end)
    assert scored == list(range(start, start + count))


def test_a_history_within_the_window_is_one_pass() -> None:
    assert list(pass_bounds(CONFIG, 0, 17)) == [(0, 0, 17)]
    assert list(pass_bounds(CONFIG, 0, 18)) == [(0, 0, 17), (4, 17, 18)]


def test_the_examples_of_two_periods_are_all_events(dataset: PreparedDataset) -> None:
    cut = (dataset.metadata["first_time_ms"] + dataset.metadata["last_time_ms"]) // 2
    whole = ExampleSource(dataset, CONFIG)
    before, after = ExampleSource(dataset, CONFIG, until_ms=cut), ExampleSource(dataset, CONFIG, from_ms=cut)
    assert min(before.num_examples, after.num_examples) > 0
    assert before.num_examples + after.num_examples == whole.num_examples == dataset.metadata["num_events"]
    assert len(whole.labels()) == whole.num_examples
    batches = [whole.batch(passes) for passes in whole.batches_of_tokens(100)]
    assert sum(len(batch.labels) for batch in batches) == whole.num_examples


@pytest.mark.parametrize("features", [CONFIG.contextual_features, ()], ids=["context", "no context"])
def test_an_item_token_scores_like_the_same_item_as_the_only_candidate(
    dataset: PreparedDataset, features: tuple[str, ...]
) -> None:
    config = dataclasses.replace(CONFIG, contextual_features=features)
    model = random_model_for(dataset, config, Backend(), seed=0).double()
    source, engine = ExampleSource(dataset, config), InferenceEngine(model)
    events, users = dataset.events(source.user_ids), dataset.users(["user_id", *features])
    compared = 0
    for passes in source.batches_of_tokens(300):
        batch = source.batch(passes)
        attention = JaggedAttention(config, batch.tokens.plan())
        with torch.no_grad():
            hidden = model(batch.tokens, attention)
            logits = model.rank(hidden[batch.item_rows])
        example = 0
        for one in passes:
            user = source.user_ids[one.user]
            own = events.events_of(user)
            for event in range(one.scored_from, one.end):
                request = UserRequest(
                    user_id=int(user),
                    context=users[users[:, 0] == user][0, 1:],
                    video_ids=events.video_id[own][:event],
                    action_weights=events.action_weights[own][:event],
                    candidates=events.video_id[own][event : event + 1],
                )
                result = engine.step([request])
                torch.testing.assert_close(logits[example], torch.from_numpy(result.logits[0]), rtol=1e-6, atol=1e-6)
                assert batch.labels[example] == events.action_weights[own][event]
                assert batch.video_ids[example] == events.video_id[own][event]
                assert bool(batch.has_previous[example]) == bool(result.has_last[0])
                if result.has_last[0]:
                    last = hidden[batch.item_rows[example] - 1]
                    torch.testing.assert_close(last, result.last_hidden[0], rtol=1e-9, atol=1e-9)
                example += 1
        compared += example
    assert compared == source.num_examples > 10 * config.max_history


def test_a_user_who_is_in_no_table_is_an_error(dataset: PreparedDataset, tmp_path: Path) -> None:
    import shutil

    import pyarrow.parquet as pq

    copy = tmp_path / "synthetic"
    shutil.copytree(dataset.path, copy)
    users = pq.read_table(copy / "users.parquet")
    pq.write_table(users.slice(1), copy / "users.parquet")
    with pytest.raises(ValueError, match="table of users lacks"):
        ExampleSource(PreparedDataset(tmp_path, "synthetic"), CONFIG)


def test_the_order_of_examples_is_that_of_events(dataset: PreparedDataset) -> None:
    source = ExampleSource(dataset, CONFIG)
    passes = source.passes()[:3]
    batch = source.batch(passes)
    events = dataset.events(source.user_ids)
    expected = [
        events.video_id[events.offsets[one.user] + one.scored_from : events.offsets[one.user] + one.end]
        for one in passes
    ]
    assert np.array_equal(batch.video_ids.numpy(), np.concatenate(expected))
