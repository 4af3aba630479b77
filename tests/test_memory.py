"""The memory timeline: cases whose bytes are known."""

import torch

from hstu_cli.bench.memory import MemoryTimeline


def test_a_known_case_to_the_byte() -> None:
    x, weight = torch.randn(1000, 64, requires_grad=True), torch.randn(128, 64, requires_grad=True)
    with MemoryTimeline() as timeline:
        out = torch.nn.functional.silu(x @ weight.T)
        assert timeline.live_bytes == 2 * 1000 * 128 * 4  # SiLU keeps its input
        out.sum().backward()
        gradients = x.nbytes + weight.nbytes
        assert timeline.live_bytes == out.nbytes + gradients
        # SiLU's input, its result and that one's gradient; the sum, and the gradient that all of it begins with.
        assert timeline.peak_bytes == 3 * out.nbytes + 2 * 4
        del out
        assert timeline.live_bytes == gradients
        x.grad = weight.grad = None
        assert timeline.live_bytes == 0
    assert timeline.points[0] == (0.0, 0)
    assert max(num_bytes for _, num_bytes in timeline.points) == timeline.peak_bytes
    assert [moment for moment, _ in timeline.points] == sorted(moment for moment, _ in timeline.points)


def test_views_changes_in_place_and_what_was_there_before_cost_nothing() -> None:
    x = torch.zeros(100)
    with MemoryTimeline() as timeline:
        views = [x[3:], x.view(10, 10).T, x.add_(1)]
        assert timeline.points == [(0.0, 0)]
        copy = views[0].clone()
        part = copy[5:]
        del copy
        assert timeline.live_bytes == 97 * 4  # a part keeps the whole alive
        del part
        assert timeline.live_bytes == 0


def test_what_ends_later_is_still_counted_down() -> None:
    with MemoryTimeline() as timeline:
        x = torch.ones(8)
    assert timeline.live_bytes == 32
    del x
    assert timeline.live_bytes == 0
