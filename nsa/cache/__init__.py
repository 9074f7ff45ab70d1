"""Key/value caches for decoding."""

from nsa.cache.delayed import DelayedCache
from nsa.cache.indexed import IndexedCache
from nsa.cache.native_sparse import NativeSparseCache
from nsa.cache.rows import FullCache, Position, Rows

Cache = FullCache | NativeSparseCache | IndexedCache | DelayedCache

__all__ = ["Cache", "DelayedCache", "FullCache", "IndexedCache", "NativeSparseCache", "Position", "Rows"]
