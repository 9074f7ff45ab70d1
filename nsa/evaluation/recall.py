"""Accuracy on the recall tasks of `nsa.data.synthetic`."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nsa.data.synthetic import IGNORED, Task
from nsa.evaluation.bits_per_byte import BATCH_TOKENS
from nsa.models import Decoder

SEED = "evaluation"  # episodes that no training seed, a number, can make
Z = 1.96  # 95 %


@dataclass(frozen=True)
class Recall:
    """Share of answers that are the most likely of all tokens, with its 95 % interval; chance: of a guess among the
    values that the task uses. length: tokens of an episode."""

    task: str
    length: int
    episodes: int
    answers: int
    accuracy: float
    low: float
    high: float
    chance: float


Predict = Callable[
    [Tensor, Tensor], Tensor
]  # tokens (B, T), asked (B, T) bool -> the tokens predicted where asked (A,)


def measure(predict: Predict, task: Task, length: int, episodes: int) -> Recall:
    """Ask ``episodes`` episodes of ``length`` tokens."""
    size = max(1, BATCH_TOKENS // length)
    right: list[np.ndarray] = []
    for first in range(0, episodes, size):
        made = [task.generate(length, SEED, i) for i in range(first, min(first + size, episodes))]
        tokens = torch.from_numpy(np.stack([e.tokens for e in made]))
        targets = torch.from_numpy(np.stack([e.targets for e in made]))
        asked = targets != IGNORED
        right.append((predict(tokens, asked) == targets[asked]).view(len(made), -1).numpy())
    correct = np.concatenate(right)
    low, high = interval(correct)
    accuracy = float(correct.mean())
    return Recall(task.name, length, episodes, correct.size, accuracy, low, high, made[0].chance)


def predictor(decoder: Decoder) -> Predict:
    """The most likely next token; logits are made where they are asked for only."""

    @torch.no_grad()
    def predict(tokens: Tensor, asked: Tensor) -> Tensor:
        device = decoder.embedding.weight.device
        asked = asked.to(device)
        hook = decoder.head.register_forward_pre_hook(lambda _, inputs: (inputs[0][asked], *inputs[1:]))
        try:
            return decoder(tokens.to(device)).argmax(-1).cpu()
        finally:
            hook.remove()

    return predict


def interval(correct: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of ``correct`` (episodes, answers) bool.

    Answers of one episode stand and fall together: they count for as many as their scatter over episodes says (the
    design effect of cluster sampling), and, where all are alike, for one an episode.
    """
    episodes, answers = correct.shape
    p = correct.mean()
    spread = p * (1 - p) / answers
    effect = float(answers)
    if episodes > 1 and spread > 0:
        effect = float(np.clip(correct.mean(1).var(ddof=1) / spread, 1, answers))
    n = episodes * answers / effect
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))
