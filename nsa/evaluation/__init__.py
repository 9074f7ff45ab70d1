"""Evaluates a trained model: bits per byte by position, recall at and beyond the training length, decoding."""

from nsa.evaluation.disagreement import decode_disagreement
from nsa.evaluation.runner import evaluate

__all__ = ["decode_disagreement", "evaluate"]
