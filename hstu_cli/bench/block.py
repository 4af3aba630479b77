"""The HSTU block on random tokens, uncached and over a paged cache: what `bench-layer` times."""

import copy
from dataclasses import replace

import torch

from hstu_cli.backend import Backend
from hstu_cli.bench.session import wider
from hstu_cli.config import ModelConfig
from hstu_cli.kernels import BatchPlan, plan_batch, plan_pages
from hstu_cli.kernels.dispatch import exact_impl
from hstu_cli.kvcache.batch import PagedAttention
from hstu_cli.kvcache.storage import PageStorage
from hstu_cli.kvcache.transfers import PageCopy, TransferJob, start_transfer
from hstu_cli.model.layer import HSTUBlock, JaggedAttention

# Shapes: B sequences of n history and c candidate tokens, D hidden_dim.


def random_block(config: ModelConfig, backend: Backend, dtype: torch.dtype, seed: int) -> HSTUBlock:
    """A block with seeded random weights of variance 1 / fan-in."""
    generator = torch.Generator().manual_seed(seed)
    block = HSTUBlock(config)
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
    return block.eval().to(backend.device, dtype)


class BlockWorkload:
    """A batch of equal sequences, of which any part of the history can be taken as cached.

    The pages of a sequence are scattered over the pool, as after many evictions. Sizes and page tables are brought to
    the device before the first run with them: that is work of a step, not of its layers, and `bench-e2e` has it.
    """

    def __init__(
        self,
        block: HSTUBlock,
        config: ModelConfig,
        backend: Backend,
        *,
        batch_size: int,
        num_history: int,
        num_candidates: int,
        page_size: int,
        seed: int,
        append_impl: str = "torch",
    ) -> None:
        """append_impl: what writes new keys and values into pages, a name from `APPEND_IMPLEMENTATIONS`."""
        self.block, self.config, self.backend = block, config, backend
        self.batch_size, self.num_history, self.num_candidates = batch_size, num_history, num_candidates
        self.append_impl = append_impl
        self.page_size, self.pages_each = page_size, -(-num_history // page_size)
        generator = torch.Generator().manual_seed(seed)
        weight = next(block.parameters())
        self.dtype = weight.dtype
        length = num_history + num_candidates
        x = torch.randn(batch_size, length, config.hidden_dim, generator=generator)
        self.x = x.to(weight.device, weight.dtype)  # [B, n + c, D]
        num_pages = batch_size * self.pages_each
        shape = (config.num_layers, num_pages, 2, page_size, config.num_heads, config.head_dim)
        self.storage = PageStorage(backend.device_tensor(shape, weight.dtype))
        self.page_ids = torch.randperm(num_pages, generator=generator).view(batch_size, self.pages_each)  # on the host
        self._host: PageStorage | None = None
        self._uncached_plan: BatchPlan | None = None
        self._attentions: dict[tuple[int, str], PagedAttention] = {}  # by cached tokens and implementation

    def new_tokens(self, num_cached: int) -> torch.Tensor:
        """The tokens that are not cached, [B * (n - num_cached + c), D]."""
        return self.x[:, num_cached:].flatten(0, 1).contiguous()

    @torch.no_grad()
    def uncached(self, x: torch.Tensor, impl: str) -> torch.Tensor:
        """Output for all tokens x [B * (n + c), D]."""
        self._uncached_plan = self._uncached_plan or self._plan(0, self.x.device)
        return self.block(x, JaggedAttention(self.config, self._uncached_plan, impl))

    @torch.no_grad()
    def cached(self, x: torch.Tensor, num_cached: int, impl: str, *, from_host: bool = False) -> torch.Tensor:
        """Output for the new tokens x over num_cached tokens a sequence; their keys and values are stored.

        from_host: the cached pages are copied from host memory first, layer by layer.
        """
        jobs = [self._start_onload(num_cached)] if from_host else []
        key = num_cached, impl
        if key not in self._attentions:
            self._attentions[key] = self._attention(num_cached, impl)
        return self.block(x, replace(self._attentions[key], jobs=jobs))

    def _attention(self, num_cached: int, impl: str) -> PagedAttention:
        """Attention over so many cached tokens a sequence, on the device."""
        token = torch.arange(num_cached, self.num_history)
        length = self.num_history - num_cached + self.num_candidates
        rows = torch.arange(self.batch_size)[:, None] * length + token - num_cached
        slots = self.page_ids[:, token // self.page_size] * self.page_size + token % self.page_size
        page_plan = plan_pages(
            torch.arange(self.batch_size + 1) * self.pages_each,
            self.page_ids.flatten(),
            torch.full((self.batch_size,), num_cached),
            num_sequences=self.batch_size,
            num_pages=self.page_ids.numel(),
            page_size=self.page_size,
            device="cpu",
            history_stored=True,
        )
        attention = PagedAttention(
            config=self.config,
            storage=self.storage,
            jobs=[],
            plan=self._plan(num_cached),
            page_plan=page_plan,
            new_rows=rows.flatten(),
            new_slots=slots.flatten(),
            impl=impl,
            append_impl=self.append_impl,
        )
        return attention.to(self.storage.pages.device)

    @torch.no_grad()
    def exact_first(self, impl: str) -> torch.Tensor:
        """Output of the first sequence, uncached, in the next wider dtype, [n + c, D]."""
        dtype = wider(self.dtype)
        device = self.x.device if dtype == torch.float32 else torch.device("cpu")  # not every device has float64
        block = copy.deepcopy(self.block).to(device, dtype)
        length = self.num_history + self.num_candidates
        plan = plan_batch(torch.tensor([0, length]), torch.tensor([self.num_candidates]), length, device)
        return block(self.x[0].to(device, dtype), JaggedAttention(self.config, plan, exact_impl(impl)))

    def copy_to_host(self) -> None:
        """Keep a copy of all pages in host memory, for `from_host`."""
        pages = self.storage.pages
        self._host = PageStorage(self.backend.host_tensor(pages.shape, pages.dtype))
        self._host.pages.copy_(pages)

    def forget_device_pages(self) -> None:
        """Make the pages useless, so that only what is copied from the host can be right."""
        self.storage.pages.fill_(torch.nan)

    def _start_onload(self, num_cached: int) -> TransferJob:
        if self._host is None:
            raise ValueError("nothing is in host memory; call copy_to_host first")
        ids = self.page_ids[:, : -(-num_cached // self.page_size)].flatten().tolist()
        return start_transfer(self.backend, self._host, self.storage, [PageCopy(ids, ids)], to_host=False)

    def _plan(self, num_cached: int, device: torch.device | str = "cpu") -> BatchPlan:
        """The batch of the tokens that are not cached."""
        length = self.num_history - num_cached + self.num_candidates
        offsets = torch.arange(self.batch_size + 1) * length
        candidates = torch.full((self.batch_size,), self.num_candidates)
        return plan_batch(offsets, candidates, self.batch_size * length, device)
