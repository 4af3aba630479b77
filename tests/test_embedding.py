"""Embedding tables: lookup by raw id against a dict, default rows, and the keys and shapes that are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu_cli.model.embedding import EmbeddingTable

LARGEST_ID = 2**63 - 1
raw_ids = st.integers(0, 30) | st.integers(0, LARGEST_ID)
keys = st.lists(raw_ids | st.just(-1), min_size=1, max_size=20, unique=True)
asked_ids = st.lists(st.integers(-3, 33) | st.integers(-(2**63), LARGEST_ID), max_size=30)


def make_table(num_rows: int, raw_keys: list[int] | None = None, dtype: torch.dtype = torch.float32) -> EmbeddingTable:
    """Row r holds r + 1 three times, so that no row looks like zeros."""
    weight = torch.arange(1, num_rows + 1, dtype=dtype)[:, None].repeat(1, 3)
    return EmbeddingTable(weight, None if raw_keys is None else torch.tensor(raw_keys, dtype=torch.int64))


@given(raw_keys=keys, asked=asked_ids, data=st.data())
def test_lookup_is_that_of_a_dict(raw_keys: list[int], asked: list[int], data: st.DataObject) -> None:
    asked += data.draw(st.lists(st.sampled_from(raw_keys)))
    table = make_table(len(raw_keys), raw_keys)
    row_of = {key: row for row, key in enumerate(raw_keys) if key != -1}
    default = raw_keys.index(-1) if -1 in raw_keys else -1
    rows = [row_of.get(raw_id, default) for raw_id in asked]
    tensor = torch.tensor(asked, dtype=torch.int64)
    assert table.has_default == (-1 in raw_keys)
    assert table.rows_of(tensor).tolist() == rows
    assert table.rows_of(tensor).dtype == torch.int64
    assert table.is_known(tensor).tolist() == [raw_id in row_of for raw_id in asked]
    assert table(tensor).tolist() == [[row + 1.0] * 3 for row in rows]  # row -1 is the zero vector
    assert table.out_of_range(tensor) is None
    assert table.item_rows().tolist() == sorted(row_of.values())
    assert table.num_rows == len(raw_keys)


@given(num_rows=st.integers(1, 20), asked=asked_ids)
def test_without_keys_an_id_is_its_row(num_rows: int, asked: list[int]) -> None:
    table = make_table(num_rows)
    outside = [raw_id for raw_id in asked if not 0 <= raw_id < num_rows]
    assert table.out_of_range(torch.tensor(asked, dtype=torch.int64)) == (outside[0] if outside else None)
    assert table.is_known(torch.tensor(asked, dtype=torch.int64)).tolist() == [i not in outside for i in asked]
    inside = [raw_id for raw_id in asked if raw_id not in outside]
    assert table(torch.tensor(inside, dtype=torch.int64)).tolist() == [[raw_id + 1.0] * 3 for raw_id in inside]
    assert table.item_rows().tolist() == list(range(num_rows))
    assert not table.has_default


@pytest.mark.parametrize("raw_keys", [[5, 2, -1], [5, 2, 9], None], ids=["default row", "no default", "no keys"])
def test_ids_keep_their_shape_and_rows_their_dtype(raw_keys: list[int] | None) -> None:
    table = make_table(3, raw_keys, torch.bfloat16)
    asked = torch.tensor([[2, 1], [0, 2]])
    assert table(asked).shape == (2, 2, 3)
    assert table(asked).dtype == torch.bfloat16
    assert table(asked[:0]).shape == (0, 2, 3)


@pytest.mark.parametrize("raw_keys", [[5, 2, -1], [5, 2, 9], None], ids=["default row", "no default", "no keys"])
def test_gradients_reach_the_rows_that_were_asked_for(raw_keys: list[int] | None) -> None:
    table = make_table(3, raw_keys)
    asked = torch.tensor([2, 2, 7] if raw_keys else [1, 1, 2])
    table(asked).sum().backward()
    last = 1.0 if raw_keys is None or table.has_default else 0.0  # the zero vector of an unknown id learns nothing
    assert table.weight.grad.tolist() == [[0.0] * 3, [2.0] * 3, [last] * 3]


def test_only_weight_and_keys_are_saved() -> None:
    assert set(make_table(2, [4, 3]).state_dict()) == {"weight", "keys"}
    assert set(make_table(2).state_dict()) == {"weight"}


@pytest.mark.parametrize(
    ("raw_keys", "message"),
    [
        ([3, 4, 3], "unique, but 3 stands twice"),
        ([-1, 4, -1], "unique, but -1 stands twice"),
        ([0, -2, 5], "-1 for the default row, not -2"),
        ([0, -(2**63), -1], f"not {-(2**63)}"),
        ([1, 2], r"keys must be 3 int64.*\[2\]"),
        ([1, 2, 3, 4], r"keys must be 3 int64.*\[4\]"),
        ([[1, 2, 3]], r"keys must be 3 int64.*\[1, 3\]"),
    ],
)
def test_keys_that_do_not_fit_are_refused(raw_keys: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_table(3, raw_keys)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_keys_are_int64(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"keys must be 1 int64, .* not {dtype}"):
        EmbeddingTable(torch.zeros(1, 3), torch.ones(1, dtype=dtype))


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(0, 3), torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(()), torch.zeros(2, 3, dtype=torch.int64)],
    ids=["no rows", "one dimension", "three dimensions", "a scalar", "integers"],
)
def test_weights_that_are_no_table_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"rows >= 1, dim\] floating point"):
        EmbeddingTable(weight)
