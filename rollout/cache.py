"""The paged cache of keys, values and indexer keys.

One pool of pages for all sequences. A page belongs to every sequence that counts a reference to it: the samples of one prompt share
the pages that the prompt fills, and copy the one it fills in part. Page numbers are the same in every layer, so one block table serves
K, V and indexer keys.

    free -> allocate -> held -> publish (a full page, under the key of all tokens up to its end) -> match: held by others too
      ^                   |
      └── reclaim, oldest <- kept (nobody holds it, its key still finds it)          forget: no key finds anything any more

Keys and values depend on the weights, so a key is valid for one policy version: the engine calls `forget` with every update.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

# What is recorded of a page's tokens: `records`, the index sets of its queries past position k, and `routes`, the experts of all of
# them, each [layers, rows, k] and only where it is recorded.
PageRecord = Mapping[str, np.ndarray]


class OutOfPagesError(RuntimeError):
    """No free page is left: the engine answers by preempting a sequence, a user never sees it."""


class PagedCache:
    """`.k[layer]`, `.v[layer]` [pages + 1, page, Hkv, D]; `.index[layer]` [pages + 1, page, D_I] of the layers with an indexer.

    With latent_dim (MLA) a token is one row for all heads: `.k[layer]` [pages + 1, page, latent_dim], and `.v` holds nothing. Each of
    the three is a view of one tensor with a leading layer dimension, so that copying a page is one operation.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        latent_dim: int = 0,
        index_dim: int = 0,
        index_layers: Sequence[int] | None = None,  # None: every layer
        dtype: torch.dtype = torch.float32,
        index_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        record_limit: int = 1 << 30,  # bytes of host memory for the records of published pages
    ) -> None:
        for name, value in {"num_pages": num_pages, "page_size": page_size}.items():
            if value < 1:
                raise ValueError(f"rollout.{name} is {value}, but the cache needs at least one: set it >= 1")
        self.page_size, self.num_pages, self.index_dim = page_size, num_pages, index_dim
        self.scratch_page = (
            num_pages  # one more than there are: rows that only fill up a batch write there, and nobody reads it
        )
        pool = (num_layers, num_pages + 1, page_size)
        kv_shape = (*pool, latent_dim) if latent_dim else (*pool, num_kv_heads, head_dim)
        owners = list(index_layers if index_layers is not None else range(num_layers)) if index_dim else []
        # zeros, not empty: a padded gather multiplies what it reads by an attention weight of 0, and 0 * NaN is NaN
        self._k = torch.zeros(kv_shape, dtype=dtype, device=device)
        self._v = torch.zeros((*pool, 0) if latent_dim else kv_shape, dtype=dtype, device=device)
        self._index = torch.zeros((len(owners), *pool[1:], index_dim), dtype=index_dtype, device=device)
        self.k: list[Tensor] = list(self._k.unbind(0))
        self.v: list[Tensor] = list(self._v.unbind(0))
        self.index: dict[int, Tensor] = dict(zip(owners, self._index.unbind(0), strict=True))
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # popped from the end: low pages first
        self._kept: OrderedDict[int, None] = OrderedDict()  # nobody's, but their keys still find them; the oldest first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._records: dict[int, PageRecord] = {}  # of published pages, see `publish`
        self._record_bytes, self._record_limit = 0, record_limit

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give: the free ones, and those that are only kept in case somebody asks for their tokens."""
        return len(self._free) + len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._k, self._v, self._index))

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def check_fits(self, num_tokens: int, what: str) -> None:
        """ValueError when a sequence of `num_tokens` could not be held even alone."""
        needed = self.pages_for(num_tokens)
        if needed > self.num_pages:
            raise ValueError(
                f"{what} may grow to {num_tokens} tokens, which takes {needed} cache pages of {self.page_size} tokens, but there are "
                f"{self.num_pages}: set rollout.num_pages >= {needed}, or lower max_tokens or max_total_tokens"
            )

    def allocate(self, count: int) -> list[int]:
        """`count` fresh pages, each with one reference. Raises OutOfPagesError, taking nothing, when there are not so many."""
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages wanted, {self.num_free} of {self.num_pages} free")
        pages = [self._free.pop() if self._free else self._reclaim() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> list[int]:
        """One more reference to each page."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free and cannot be shared"
            self._references[page] += 1
        return list(pages)

    def free(self, pages: Sequence[int]) -> None:
        """One reference fewer to each page; a page that nobody holds returns to the pool, a published one is kept for a while."""
        for page in reversed(
            pages
        ):  # the end of a prefix is of use to fewer than its beginning, so it is reclaimed first
            assert self._references[page] > 0, f"page {page} freed twice"
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._key_of:
                self._kept[page] = None
            else:
                self._free.append(page)

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int], num_pages: int) -> list[bytes]:
        """Grows `keys` to those of the first `num_pages` full pages: key i is a hash of the key before it and of page i's tokens."""
        for number in range(len(keys), num_pages):
            page = np.array(tokens[number * self.page_size : (number + 1) * self.page_size], dtype=np.int64)
            assert len(page) == self.page_size, f"page {number} is not full"
            keys.append(blake2b((keys[-1] if keys else b"") + page.tobytes(), digest_size=16).digest())
        return keys

    def publish(self, key: bytes, page: int, record: PageRecord | None = None) -> bool:
        """Lets `match` find a held, full page, which nobody may write any more. False where the key finds an equal page already, or
        where the record has no room.

        record: what is recorded of the page's tokens; who reuses the page gets it too. It can be larger than the page itself, so kept
        pages make room for it, the oldest first.
        """
        assert self._references[page] > 0, f"page {page} is free and cannot be published"
        if key in self._page_of or page in self._key_of:
            return False
        if record:
            size = _nbytes(record)
            while self._record_bytes + size > self._record_limit and self._kept:
                self._free.append(self._reclaim())
            if self._record_bytes + size > self._record_limit:
                return False
            self._records[page] = record
            self._record_bytes += size
        self._page_of[key], self._key_of[page] = page, key
        return True

    def published(self, key: bytes) -> bool:
        return key in self._page_of

    def match(self, keys: Sequence[bytes]) -> tuple[list[int], list[PageRecord]]:
        """The longest run of pages, from the first on, that the keys find, each with one more reference; and their records."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._kept.pop(page, None)
            self._references[page] += 1
            pages.append(page)
        return pages, [self._records[page] for page in pages if page in self._records]

    def forget(self) -> None:
        """No key finds a page any more; pages that nobody holds are free."""
        self._free += reversed(self._kept)
        for store in (self._kept, self._page_of, self._key_of, self._records):
            store.clear()
        self._record_bytes = 0

    def _reclaim(self) -> int:
        """The page that has been kept longest, without its key."""
        page, _ = self._kept.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        if (record := self._records.pop(page, None)) is not None:
            self._record_bytes -= _nbytes(record)
        return page

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """The contents of `sources` into `targets`, page by page, in every layer."""
        if not sources:
            return
        source = torch.tensor(list(sources), device=self._k.device)
        target = torch.tensor(list(targets), device=self._k.device)
        for store in (self._k, self._v, self._index):
            store[:, target] = store[:, source]


def _nbytes(record: PageRecord) -> int:
    return sum(array.nbytes for array in record.values())
