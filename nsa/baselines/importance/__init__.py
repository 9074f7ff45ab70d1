"""How methods rank keys: estimates of the attention, shared by methods."""
