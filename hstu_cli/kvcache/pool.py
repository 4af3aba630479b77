"""A pool of page ids with reference counts: which pages are free, and who still needs one."""

from collections.abc import Iterable


class PagePool:
    """Ids 0 to num_pages - 1. A page is free while its count is 0; ids alone, no memory."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool needs at least one page, not {num_pages}")
        self.num_pages = num_pages
        self._ref_counts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: low ids first, so runs are consecutive

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def num_shared(self) -> int:
        """Pages with more than one holder."""
        return sum(count > 1 for count in self._ref_counts)

    def ref_count(self, page: int) -> int:
        """Holders of a page."""
        return self._ref_counts[page]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each with one reference. The caller has made sure that they are there."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Add a reference to pages that have one."""
        for page in pages:
            assert self._ref_counts[page] > 0, f"page {page} is free"
            self._ref_counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take a reference away; a page without any is free again."""
        for page in pages:
            assert self._ref_counts[page] > 0, f"page {page} is free"
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                self._free.append(page)

    def check_invariants(self) -> None:
        """Free and used pages are all the pages, and no page is free twice."""
        assert len(set(self._free)) == len(self._free)
        assert all(self._ref_counts[page] == 0 for page in self._free)
        assert sum(count == 0 for count in self._ref_counts) == len(self._free)
        assert min(self._ref_counts) >= 0
