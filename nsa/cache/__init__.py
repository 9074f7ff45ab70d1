"""Key/value caches for decoding."""

from nsa.cache.full import FullCache
from nsa.cache.native_sparse import NativeSparseCache

Cache = FullCache | NativeSparseCache

__all__ = ["Cache", "FullCache", "NativeSparseCache"]
