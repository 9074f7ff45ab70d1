"""alpha-entmax attention: most weights are exactly 0, and which ones is learned."""

from nsa.layers.entmax.layer import EntmaxAttention

__all__ = ["EntmaxAttention"]
