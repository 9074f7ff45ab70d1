"""Key/value caches for decoding."""

from nsa.cache.indexed import IndexedCache
from nsa.cache.native_sparse import NativeSparseCache
from nsa.cache.rows import FullCache, Rows

Cache = FullCache | NativeSparseCache | IndexedCache

__all__ = ["Cache", "FullCache", "IndexedCache", "NativeSparseCache", "Rows"]
