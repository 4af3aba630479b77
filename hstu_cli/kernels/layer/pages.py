"""What of a layer is cached."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hstu_cli.kernels.append_pages import append_to_pages, check_places
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.paged_attention import check_pages, check_pool
from hstu_cli.kernels.paged_attention.plan import PagePlan

# Shapes: T tokens, H heads, d head_dim.


@dataclass(frozen=True, slots=True)
class LayerPages:
    """The cached keys and values of one layer, and which of the batch's join them.

    pages: [num_pages, 2, page_size, H, d]. plan: where in them the cached tokens are.
    new_rows, new_slots: int64 [n], which of the batch's tokens are stored and where, before attention reads the pages;
      see `append_to_pages`, append_impl is its impl.
    wait: called before the pages are touched, as they may still be on their way.
    """

    pages: torch.Tensor
    plan: PagePlan
    new_rows: torch.Tensor
    new_slots: torch.Tensor
    append_impl: str
    wait: Callable[[], None]

    def check(self, x: torch.Tensor, num_heads: int, head_dim: int, plan: BatchPlan) -> None:
        """ValueError unless all this fits a batch of x [T, D] with such heads."""
        check_pages(x, num_heads, head_dim, self.pages)
        check_pool(self.pages, self.plan, plan)
        check_places(self.new_rows, self.new_slots, x.device)

    def store(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the new ones of k and v [T, H, d] into the pages, once these are there."""
        self.wait()
        if len(self.new_rows):
            append_to_pages(k, v, self.new_rows, self.pages, self.new_slots, impl=self.append_impl)
