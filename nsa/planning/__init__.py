"""Predicts the memory, traffic and speed of a run before it is started."""
