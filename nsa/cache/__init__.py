"""Key/value caches for decoding."""

from nsa.cache.delayed import DelayedCache
from nsa.cache.entries import EntryCache
from nsa.cache.indexed import IndexedCache
from nsa.cache.native_sparse import NativeSparseCache
from nsa.cache.rows import FullCache, Position, Rows

Cache = FullCache | NativeSparseCache | IndexedCache | DelayedCache | EntryCache

__all__ = ["Cache", "DelayedCache", "EntryCache", "FullCache", "IndexedCache", "NativeSparseCache", "Position", "Rows"]
