"""Key/value caches for decoding."""

from nsa.cache.native_sparse import NativeSparseCache
from nsa.cache.rows import FullCache, Rows

Cache = FullCache | NativeSparseCache

__all__ = ["Cache", "FullCache", "NativeSparseCache", "Rows"]
