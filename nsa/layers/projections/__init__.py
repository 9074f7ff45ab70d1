"""Projections: how a layer of attention makes queries, keys and values from the hidden state."""
