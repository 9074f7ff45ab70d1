"""Pretraining of decoder language models whose attention is sparse from the first step."""

__version__ = "0.1.0"
