"""Evaluates a trained model: bits per byte by position, recall at and beyond the training length."""

from nsa.evaluation.runner import evaluate

__all__ = ["evaluate"]
