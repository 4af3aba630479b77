"""Token batches: which table, id, position and row each token has, against a list of tokens in plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.oracle import CONTEXTUAL_FEATURES, SMALL_CONFIG, Oracle, OracleRequest

from hstu_cli.config import ModelConfig
from hstu_cli.model.tokens import TokenBatch, UserRequest, build_token_batch

ids = st.integers(0, 2**62)


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict, list[OracleRequest]]:
    """A configuration and requests that fit it."""
    features = draw(st.lists(st.sampled_from(CONTEXTUAL_FEATURES), unique=True))
    config = {
        **SMALL_CONFIG,
        "contextual_features": features,
        "max_history": draw(st.sampled_from([4, 8])),
        "position_buckets": draw(st.sampled_from([1, 5, 100])),
    }
    requests = []
    for _ in range(draw(st.integers(0, 4))):
        history = draw(st.lists(st.tuples(ids, st.integers(0, 255)), max_size=20))
        requests.append(
            OracleRequest(
                context_ids=draw(st.lists(ids, min_size=len(features), max_size=len(features))),
                history=[item for item, _ in history],
                actions=[action for _, action in history],
                candidates=draw(st.lists(ids, max_size=6)),
            )
        )
    return config, requests


def build(config: dict, requests: list[OracleRequest], num_cached_tokens: list[int] | None = None) -> TokenBatch:
    arrays = [
        UserRequest(7, *(np.array(v, np.int64) for v in (r.context_ids, r.history, r.actions, r.candidates)))
        for r in requests
    ]
    return build_token_batch(ModelConfig.from_dict(config), arrays, num_cached_tokens)


def tokens_of(batch: TokenBatch) -> list[tuple[str, int]]:
    """(table, id) of every row of a batch; no row may be filled twice or stay empty."""
    tokens: list[tuple[str, int] | None] = [None] * batch.num_tokens
    for table, rows in batch.slots.items():
        for row, raw_id in zip(rows.tolist(), batch.ids[table].tolist(), strict=True):
            assert tokens[row] is None
            tokens[row] = (table, raw_id)
    assert None not in tokens
    return tokens


def lengths_before_candidates(config: dict, requests: list[OracleRequest]) -> list[int]:
    return [Oracle({}, config).tokens(request)[2] for request in requests]


@given(case=batches(), data=st.data())
def test_every_token_has_its_table_id_position_and_row(case, data: st.DataObject) -> None:
    config, requests = case
    lengths = lengths_before_candidates(config, requests)
    cached = data.draw(st.none() | st.tuples(*(st.integers(0, length) for length in lengths)).map(list))
    batch = build(config, requests, cached)
    tokens, positions, offsets = [], [], [0]
    for request, skipped in zip(requests, cached or [0] * len(requests), strict=True):
        names, places, _ = Oracle({}, config).tokens(request)
        tokens += names[skipped:]
        positions += places[skipped:]
        offsets.append(len(tokens))
    assert tokens_of(batch) == tokens
    assert batch.positions.tolist() == positions
    assert batch.seq_offsets.tolist() == offsets
    assert batch.num_candidates.tolist() == [len(request.candidates) for request in requests]
    assert batch.num_tokens == len(tokens)
    assert list(batch.ids) == list(batch.slots) == [*config["contextual_features"], "video_id", "action_weights"]
    everything = (batch.positions, batch.seq_offsets, batch.num_candidates, *batch.ids.values(), *batch.slots.values())
    assert {tensor.dtype for tensor in everything} == {torch.int64}


@given(case=batches(), data=st.data())
def test_rows_of_candidates_and_of_the_last_token_before_them(case, data: st.DataObject) -> None:
    config, requests = case
    lengths = lengths_before_candidates(config, requests)
    cached = [data.draw(st.integers(0, length)) for length in lengths]
    batch = build(config, requests, cached)
    candidate_rows, last_rows, start = [], [], 0
    for request, length, skipped in zip(requests, lengths, cached, strict=True):
        new_history = length - skipped
        last_rows.append(start + new_history - 1 if new_history else -1)
        candidate_rows += range(start + new_history, start + new_history + len(request.candidates))
        start += new_history + len(request.candidates)
    assert batch.candidate_rows().tolist() == candidate_rows
    assert batch.last_rows().tolist() == last_rows


def test_a_short_batch_in_full() -> None:
    config = {**SMALL_CONFIG, "contextual_features": ["user_id"], "position_buckets": 5}
    requests = [OracleRequest([70], [11, 12], [1, 64], [13, 14]), OracleRequest([71], [], [], [15])]
    batch = build(config, requests)
    item, action = "video_id", "action_weights"
    first = [("user_id", 70), (item, 11), (action, 1), (item, 12), (action, 64), (item, 13), (item, 14)]
    assert tokens_of(batch) == [*first, ("user_id", 71), (item, 15)]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 4, 4, 0, 1]  # position 5 is clipped to the last bucket
    assert batch.seq_offsets.tolist() == [0, 7, 9]
    assert batch.candidate_rows().tolist() == [5, 6, 8]
    assert batch.last_rows().tolist() == [4, 7]


@pytest.mark.parametrize("num_events", [0, 3, 8, 9, 30])
def test_cached_tokens_must_lie_before_the_candidates(num_events: int) -> None:
    request = OracleRequest([1] * 6, [5] * num_events, [1] * num_events, [9, 9])
    (length,) = lengths_before_candidates(SMALL_CONFIG, [request])
    assert build(SMALL_CONFIG, [request], [length]).num_tokens == 2
    for cached in (length + 1, length + 2, -1):
        with pytest.raises(ValueError, match=f"^{cached} cached tokens .* {length} before the candidates"):
            build(SMALL_CONFIG, [request], [cached])


@pytest.mark.parametrize("cached", [[], [0, 0]])
def test_one_cached_length_for_each_request(cached: list[int]) -> None:
    with pytest.raises(ValueError, match="zip"):
        build(SMALL_CONFIG, [OracleRequest([1] * 6)], cached)


@pytest.mark.parametrize("num_context", [0, 5, 7])
def test_every_contextual_feature_needs_its_id(num_context: int) -> None:
    with pytest.raises(ValueError, match=f"6 context ids, not {num_context}"):
        build(SMALL_CONFIG, [OracleRequest([1] * num_context, [5], [1], [2])])


def test_a_batch_leaves_its_requests_alone() -> None:
    arrays = [np.arange(n, dtype=np.int64) for n in (6, 20, 20, 3)]
    request = UserRequest(7, *arrays)
    before = [array.copy() for array in arrays]
    batch = build_token_batch(ModelConfig.from_dict(SMALL_CONFIG), [request])
    for tensor in (*batch.ids.values(), batch.positions):
        tensor.fill_(-7)
    for old, new in zip(before, arrays, strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_batch_moves_to_a_device_as_a_whole() -> None:
    moved = build(SMALL_CONFIG, [OracleRequest([1] * 6, [5], [1], [2])]).to(torch.device("meta"))
    everything = (moved.positions, moved.seq_offsets, moved.num_candidates, *moved.ids.values(), *moved.slots.values())
    assert {tensor.device.type for tensor in everything} == {"meta"}
