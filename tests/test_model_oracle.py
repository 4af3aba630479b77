"""The model against the float64 oracle: scores of candidates, next-item ranks, and what they may depend on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.implementations import EXACT, TRITON_ON_GPU, every_device
from support.oracle import CONTEXTUAL_FEATURES, SMALL_CONFIG, Config, Oracle, OracleRequest, random_state

from hstu_cli.errors import InputError
from hstu_cli.model import ModelConfig, RankingModel, load_checkpoint, ranking
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.layer import JaggedAttention
from hstu_cli.model.tokens import UserRequest, build_token_batch

HISTORY_LENGTHS = (0, 1, 7, 8, 9, 24)  # around the window W = 8, and 3 W
CANDIDATE_COUNTS = (0, 1, 5, 6, 13)  # max_candidates is 5: up to three chunks

# Raw ids in no order; -1 is the default row.
VIDEO_IDS = [700, 3, -1, 41, 2**40, 5, 0, 12, 90, 8, 33, 1]
USER_IDS = [17, 4, -1, 2**33]
ACTION_SUMS = [0, 64, 1, 255, 65, -1, 2]
KEYED = dict.fromkeys(CONTEXTUAL_FEATURES, 5) | {
    "user_id": USER_IDS,
    "video_id": VIDEO_IDS,
    "action_weights": ACTION_SUMS,
}
TABLES = {
    "keys": KEYED,
    "keys without default rows": {
        name: [key for key in keys if key >= 0] if isinstance(keys, list) else keys for name, keys in KEYED.items()
    },
    "no keys": {name: 256 if name == "action_weights" else 9 for name in KEYED},
}
CONTEXTS = {"six": CONTEXTUAL_FEATURES, "none": [], "two": ["register_days_range", "user_id"]}

every_implementation = pytest.mark.parametrize(("impl", "device"), EXACT)


@pytest.fixture(autouse=True)
def _one_thread():
    """These sizes gain nothing from more threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def make_model(
    state: dict[str, np.ndarray], config: Config, folder: Path, device: str, dtype: torch.dtype = torch.float64
) -> RankingModel:
    path = folder / "state.safetensors"
    save_file({name: torch.from_numpy(array) for name, array in state.items()}, path)
    return load_checkpoint(path, config=ModelConfig.from_dict(config), device=device, dtype=dtype)


def make_requests(config: Config, tables: dict, shapes: Sequence[tuple[int, int]], seed: int) -> list[OracleRequest]:
    """One random request per (events, candidates); with keys, some ids are unknown."""
    generator = np.random.default_rng(seed)

    def draw(table: str, count: int) -> list[int]:
        keys = tables[table]
        known = range(keys) if isinstance(keys, int) else [*(key for key in keys if key >= 0), 99, 2**50]
        return [known[i] for i in generator.integers(len(known), size=count)]

    return [
        OracleRequest(
            context_ids=[draw(name, 1)[0] for name in config["contextual_features"]],
            history=draw("video_id", num_events),
            actions=draw("action_weights", num_events),
            candidates=draw("video_id", num_candidates),
        )
        for num_events, num_candidates in shapes
    ]


def to_user_request(request: OracleRequest) -> UserRequest:
    fields = (request.context_ids, request.history, request.actions, request.candidates)
    return UserRequest(7, *(np.array(values, dtype=np.int64) for values in fields))


def check_step(model: RankingModel, impl: str, oracle: Oracle, requests: Sequence[OracleRequest]) -> None:
    """One step over all requests agrees with the oracle; the model is float64."""
    results = [oracle.run(request) for request in requests]
    step = InferenceEngine(model, impl=impl).step([to_user_request(request) for request in requests])
    assert step.logits.dtype == np.float32
    np.testing.assert_allclose(step.logits, np.concatenate([r.logits for r in results]), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(step.has_last, [r.num_before > 0 for r in results])
    last = np.array([r.hidden[r.num_before - 1] for r in results if r.num_before]).reshape(-1, model.config.hidden_dim)
    np.testing.assert_allclose(step.last_hidden.cpu().numpy(), last, rtol=1e-11, atol=1e-12)


@every_implementation
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("tables", TABLES)
def test_every_request_scores_as_the_oracle_says(
    tables: str, context: str, impl: str, device: str, tmp_path: Path
) -> None:
    config = {**SMALL_CONFIG, "contextual_features": CONTEXTS[context]}
    state = random_state(config, TABLES[tables], seed=1)
    model, oracle = make_model(state, config, tmp_path, device), Oracle(state, config)
    shapes = [(events, candidates) for events in HISTORY_LENGTHS for candidates in CANDIDATE_COUNTS]
    requests = make_requests(config, TABLES[tables], shapes, seed=2)
    check_step(model, impl, oracle, requests)
    for request in requests[::7]:
        check_step(model, impl, oracle, [request])


@every_implementation
def test_a_hundred_candidates_beside_other_requests(impl: str, device: str, tmp_path: Path) -> None:
    state = random_state(SMALL_CONFIG, KEYED, seed=3)
    requests = make_requests(SMALL_CONFIG, KEYED, [(3, 0), (24, 100), (0, 6), (8, 1)], seed=4)
    check_step(make_model(state, SMALL_CONFIG, tmp_path, device), impl, Oracle(state, SMALL_CONFIG), requests)


@every_implementation
@pytest.mark.parametrize("buckets", [1, 7, 22])
def test_positions_stop_at_the_last_bucket(buckets: int, impl: str, device: str, tmp_path: Path) -> None:
    config = {**SMALL_CONFIG, "position_buckets": buckets}
    state = random_state(config, KEYED, seed=5)
    requests = make_requests(config, KEYED, [(0, 3), (1, 3), (8, 3), (9, 6)], seed=6)
    check_step(make_model(state, config, tmp_path, device), impl, Oracle(state, config), requests)


@every_implementation
@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 1, "head_dims": [8]},
        {"num_layers": 3, "head_dims": [4, 12, 8], "norm_eps": 0.1},
        {"num_heads": 1, "head_dim": 20, "scaling_seqlen": 1},
        {"num_heads": 4, "head_dim": 4, "max_history": 4, "next_item_temperature": 2.0},
    ],
    ids=str,
)
def test_other_shapes_of_model(changes: dict, impl: str, device: str, tmp_path: Path) -> None:
    config = {**SMALL_CONFIG, **changes}
    state = random_state(config, KEYED, seed=7)
    requests = make_requests(config, KEYED, [(5, 3), (13, 2)], seed=8)
    check_step(make_model(state, config, tmp_path, device), impl, Oracle(state, config), requests)


@every_device
def test_ids_without_a_row_take_the_default_row_or_zeros(device: str, tmp_path: Path) -> None:
    unknown = OracleRequest([99, 0, 0, 0, 0, 0], [98, 700], [77, 1], [97, -1, 2**62, 5])
    for tables, folder in (("keys", tmp_path / "with"), ("keys without default rows", tmp_path / "without")):
        folder.mkdir()
        state = random_state(SMALL_CONFIG, TABLES[tables], seed=9)
        check_step(make_model(state, SMALL_CONFIG, folder, device), "blocked", Oracle(state, SMALL_CONFIG), [unknown])


@every_device
@pytest.mark.parametrize("field", ["user_id", "fans_user_num_range", "video_id", "candidate", "action_weights"])
@pytest.mark.parametrize("outside", [-1, 256, 2**40])
def test_an_id_outside_a_table_without_keys_is_an_input_error(
    field: str, outside: int, device: str, tmp_path: Path
) -> None:
    model = make_model(random_state(SMALL_CONFIG, TABLES["no keys"], seed=10), SMALL_CONFIG, tmp_path, device)
    request = OracleRequest([0] * 6, [1, 2], [1, 255], [3] * 11)  # the candidate lies in the last of three chunks
    match field:
        case "video_id":
            request.history[1] = outside
        case "candidate":
            request.candidates[10] = outside
        case "action_weights":
            request.actions[0] = outside
        case _:
            request.context_ids[CONTEXTUAL_FEATURES.index(field)] = outside
    with pytest.raises(InputError, match=f"{field.replace('candidate', 'video_id')} {outside}\\b") as raised:
        InferenceEngine(model).step([to_user_request(request)])
    assert raised.value.exit_code == 4


def round_to(dtype: torch.dtype):
    return lambda values: torch.from_numpy(np.asarray(values)).to(dtype).double().numpy()


@pytest.mark.parametrize(("impl", "device"), [*EXACT, TRITON_ON_GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_err_as_plain_formulas_in_that_dtype(
    dtype: torch.dtype, impl: str, device: str, tmp_path: Path
) -> None:
    rounding = round_to(dtype)
    state = {
        name: array if array.dtype == np.int64 else rounding(array).astype(np.float32)
        for name, array in random_state(SMALL_CONFIG, KEYED, seed=11).items()
    }
    requests = make_requests(SMALL_CONFIG, KEYED, [(0, 5), (1, 5), (8, 5), (24, 13)], seed=12)
    exact, narrow = (
        [oracle.run(request) for request in requests]
        for oracle in (Oracle(state, SMALL_CONFIG), Oracle(state, SMALL_CONFIG, rounding))
    )
    model = make_model(state, SMALL_CONFIG, tmp_path, device, dtype)
    step = InferenceEngine(model, impl=impl).step([to_user_request(request) for request in requests])
    assert step.last_hidden.dtype == dtype
    quantities = {
        "logits": (lambda result: result.logits, step.logits),
        "last rows": (lambda result: result.hidden[[result.num_before - 1]], step.last_hidden.double().cpu().numpy()),
    }
    for name, (of_result, actual) in quantities.items():
        expected, plain = (np.concatenate([of_result(result) for result in results]) for results in (exact, narrow))
        scale = np.abs(expected).max()
        plain_error = np.abs(plain - expected).max()
        assert plain_error < 0.1 * scale, "the budget says nothing"
        # The plain formulas round a sum once. float32 sums round at each of some 16 terms, a random walk of 4 steps;
        # narrower ones are summed in float32.
        plain_error *= 4 if dtype == torch.float32 else 1
        assert np.abs(actual - expected).max() <= 2 * (plain_error + torch.finfo(dtype).eps * scale), name


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_request_scores_the_same_alone_and_in_a_batch(
    dtype: torch.dtype, impl: str, device: str, tmp_path: Path
) -> None:
    model = make_model(random_state(SMALL_CONFIG, KEYED, seed=13), SMALL_CONFIG, tmp_path, device, dtype)
    shapes = [(24, 1), (0, 0), (0, 13), (8, 6), (1, 5), (9, 0)]
    requests = [to_user_request(request) for request in make_requests(SMALL_CONFIG, KEYED, shapes, seed=14)]
    engine = InferenceEngine(model, impl=impl)
    alone = [engine.step([request]) for request in requests]
    for order in (range(6), (5, 2, 0, 4, 1, 3)):
        together = engine.step([requests[i] for i in order])
        logits = np.concatenate([alone[i].logits for i in order])
        np.testing.assert_allclose(together.logits, logits, rtol=1e-5, atol=1e-6)
        last = torch.cat([alone[i].last_hidden for i in order])
        torch.testing.assert_close(together.last_hidden, last, rtol=1e-5, atol=1e-5)


@every_implementation
def test_chunks_of_candidates_change_nothing(impl: str, device: str, tmp_path: Path) -> None:
    state = random_state(SMALL_CONFIG, KEYED, seed=15)
    shapes = [(24, 13), (0, 7), (3, 0)]
    requests = [to_user_request(request) for request in make_requests(SMALL_CONFIG, KEYED, shapes, seed=16)]
    steps = []
    for limit in (100, 1, 4, 13):
        model = make_model(state, {**SMALL_CONFIG, "max_candidates": limit}, tmp_path, device)
        steps.append(InferenceEngine(model, impl=impl).step(requests))
    assert steps[0].logits.shape == (20, 8)
    for step in steps[1:]:
        np.testing.assert_allclose(step.logits, steps[0].logits, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(step.last_hidden, steps[0].last_hidden, rtol=1e-12, atol=1e-12)


@every_implementation
@pytest.mark.parametrize("buckets", [64, 9])
def test_a_history_item_has_the_row_of_a_lone_candidate_at_its_moment(
    buckets: int, impl: str, device: str, tmp_path: Path
) -> None:
    config = {**SMALL_CONFIG, "position_buckets": buckets}
    model = make_model(random_state(config, KEYED, seed=17), config, tmp_path, device)
    (whole,) = make_requests(config, KEYED, [(8, 0)], seed=18)
    moments = [
        dataclasses.replace(whole, history=whole.history[:i], actions=whole.actions[:i], candidates=[whole.history[i]])
        for i in range(8)
    ]
    batch = build_token_batch(model.config, [to_user_request(request) for request in [whole, *moments]])
    with torch.no_grad():
        hidden = model(batch.to(device), JaggedAttention(model.config, batch.plan(device), impl))
    items_of_whole = hidden[6 : 6 + 16 : 2]
    torch.testing.assert_close(items_of_whole, hidden[batch.candidate_rows().to(device)], rtol=1e-11, atol=1e-12)
    assert (items_of_whole.std(0) > 0.01).all()


def last_rows(model: RankingModel, requests: Sequence[OracleRequest]) -> torch.Tensor:
    return InferenceEngine(model).step([to_user_request(request) for request in requests]).last_hidden


@every_device
@pytest.mark.parametrize("tables", TABLES)
def test_next_items_are_ranked_as_the_oracle_says(tables: str, device: str, tmp_path: Path) -> None:
    state = random_state(SMALL_CONFIG, TABLES[tables], seed=19)
    requests = make_requests(SMALL_CONFIG, TABLES[tables], [(0, 0), (4, 1), (24, 6)], seed=20)
    model = make_model(state, SMALL_CONFIG, tmp_path, device)
    results = [Oracle(state, SMALL_CONFIG).run(request) for request in requests]
    rows = last_rows(model, requests)
    scores = np.array([list(result.item_scores.values()) for result in results])
    np.testing.assert_allclose(model.next_item_scores(rows).detach().cpu().numpy(), scores, rtol=1e-10)
    ids = [*VIDEO_IDS, *range(12), 99, 2**62, -1]
    for row, result in zip(rows, results, strict=True):
        ranks = model.next_item_rank(row.expand(len(ids), -1), torch.tensor(ids, device=device))
        assert ranks.dtype == torch.int64
        assert ranks.tolist() == [result.rank(raw_id) for raw_id in ids]
        assert set(ranks.tolist()) == set(range(len(result.item_scores) + 1))
    for k in (1, 4, scores.shape[1]):
        best, best_scores = model.next_item_top_k(rows, k)
        assert best.tolist() == [result.best_items()[:k] for result in results]
        np.testing.assert_allclose(best_scores.cpu(), -np.sort(-scores, axis=1)[:, :k], rtol=1e-10)


def state_with_ties() -> dict[str, np.ndarray]:
    """Three groups of equal items, and a default row equal to an item."""
    state = random_state(SMALL_CONFIG, KEYED, seed=21)
    weight = state["embeddings.video_id.weight"]
    for copy, original in ((5, 1), (8, 1), (9, 0), (11, 3), (2, 1)):
        weight[copy] = weight[original]
    return state


@every_device
def test_equal_items_rank_in_the_order_of_the_table(device: str, tmp_path: Path) -> None:
    state = state_with_ties()
    requests = make_requests(SMALL_CONFIG, KEYED, [(0, 0), (4, 1), (24, 6)], seed=22)
    model = make_model(state, SMALL_CONFIG, tmp_path, device)
    for row, request in zip(last_rows(model, requests), requests, strict=True):
        result = Oracle(state, SMALL_CONFIG).run(request)
        ranks = model.next_item_rank(row.expand(12, -1), torch.tensor(VIDEO_IDS, device=device)).tolist()
        assert ranks == [result.rank(raw_id) for raw_id in VIDEO_IDS]


@every_device
def test_the_top_k_orders_equal_items_as_their_ranks_do(device: str, tmp_path: Path) -> None:
    state = state_with_ties()
    requests = make_requests(SMALL_CONFIG, KEYED, [(0, 0), (4, 1), (24, 6)], seed=22)
    model = make_model(state, SMALL_CONFIG, tmp_path, device)
    best, _ = model.next_item_top_k(last_rows(model, requests), 11)
    assert best.tolist() == [Oracle(state, SMALL_CONFIG).run(request).best_items() for request in requests]


@every_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_items", [5, 33])
def test_the_rank_among_equal_items_does_not_depend_on_the_batch(
    num_items: int, dtype: torch.dtype, device: str, tmp_path: Path
) -> None:
    # Items that were never trained share one row; a score that differs in its last bit would order them at random.
    config = {**SMALL_CONFIG, "hidden_dim": 64}
    state = random_state(config, {**KEYED, "video_id": num_items}, seed=23)
    state["embeddings.video_id.weight"][:] = state["embeddings.video_id.weight"][0]
    model = make_model(state, config, tmp_path, device, dtype)
    rows = torch.randn(30, 64, dtype=dtype).to(device)
    targets = torch.full((30,), num_items - 1, device=device)
    alone = [model.next_item_rank(rows[i : i + 1], targets[:1]).item() for i in range(30)]
    assert alone == model.next_item_rank(rows, targets).tolist() == [num_items] * 30


@every_device
@pytest.mark.parametrize(("vocabulary_chunk", "score_elements"), [(3, 1), (1, 25), (11, 10**6), (5, 11)])
def test_chunks_of_the_vocabulary_change_nothing(
    vocabulary_chunk: int, score_elements: int, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(state_with_ties(), SMALL_CONFIG, tmp_path, device)
    rows = torch.randn(12, 16, dtype=torch.float64).to(device)
    targets = torch.tensor(VIDEO_IDS, device=device)

    def outcome() -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                model.next_item_scores(rows),
                model.next_item_top_k(rows, 1)[1],
                model.next_item_rank(rows, targets),
            ]

    whole = outcome()
    monkeypatch.setattr(ranking, "VOCABULARY_CHUNK", vocabulary_chunk)
    monkeypatch.setattr(ranking, "SCORE_ELEMENTS", score_elements)
    for before, after in zip(whole, outcome(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-13, atol=1e-13)


@every_device
def test_nothing_before_the_candidates_means_no_prediction(device: str, tmp_path: Path) -> None:
    config = {**SMALL_CONFIG, "contextual_features": []}
    state = random_state(config, KEYED, seed=24)
    model = make_model(state, config, tmp_path, device)
    requests = make_requests(config, KEYED, [(0, 6), (2, 6), (0, 0)], seed=25)
    step = InferenceEngine(model).step([to_user_request(request) for request in requests])
    assert step.has_last.tolist() == [False, True, False]
    assert step.last_hidden.shape == (1, 16)
    only_first = InferenceEngine(model).step([to_user_request(requests[0])])
    assert only_first.last_hidden.shape == (0, 16)
    assert model.next_item_rank(only_first.last_hidden, torch.empty(0, dtype=torch.int64, device=device)).tolist() == []


@every_device
def test_a_table_of_only_the_default_row_has_no_items(device: str, tmp_path: Path) -> None:
    state = random_state(SMALL_CONFIG, {**KEYED, "video_id": [-1]}, seed=26)
    model = make_model(state, SMALL_CONFIG, tmp_path, device)
    rows = last_rows(model, [OracleRequest([0] * 6, [3], [1], [5])])
    assert len(model.vocabulary) == 0
    assert model.next_item_rank(rows, torch.tensor([5], device=device)).tolist() == [0]


@every_device
def test_a_row_that_is_not_finite_is_never_a_hit(device: str, tmp_path: Path) -> None:
    # Narrow dtypes overflow; a comparison with NaN is false, which must not read as "no item is better".
    model = make_model(random_state(SMALL_CONFIG, KEYED, seed=27), SMALL_CONFIG, tmp_path, device)
    rows = torch.randn(3, 16, dtype=torch.float64).to(device)
    clean = model.next_item_rank(rows, torch.tensor([3, 3, 3], device=device))
    rows[1, 4] = torch.nan
    ranks = model.next_item_rank(rows, torch.tensor([3, 3, 3], device=device))
    assert ranks.tolist() == [clean[0], 0, clean[2]]
