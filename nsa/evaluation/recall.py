"""Accuracy on recall tasks over token ids (`nsa.data.tasks`), every token with the answers before it given."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nsa.data.base_tokenizer import BaseTokenizer
from nsa.data.tasks import IGNORED, Task
from nsa.evaluation.bits_per_byte import BATCH_TOKENS
from nsa.models import Decoder

TASKS = ("mqar", "passkey", "copy")  # that every evaluation has
SEED = "evaluation"  # differs from every training seed, since those are numbers
Z = 1.96  # 95 %


@dataclass(frozen=True)
class Recall:
    """Accuracy of the most likely token as the answer, with its 95 % interval.

    chance: accuracy of a guess among the values that the task uses. length: tokens of an episode.
    """

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
]  # tokens (B, T), counted (B, T) bool -> (A,), the predicted next token at each counted position


def measure(predict: Predict, task: Task, tokenizer: BaseTokenizer, length: int, episodes: int) -> Recall:
    """Recall over ``episodes`` episodes of ``length`` tokens."""
    size = max(1, BATCH_TOKENS // length)
    right: list[np.ndarray] = []
    for first in range(0, episodes, size):
        made = [task.episode(tokenizer, length, SEED, i) for i in range(first, min(first + size, episodes))]
        tokens = torch.from_numpy(np.stack([e.tokens for e in made]))
        targets = torch.from_numpy(np.stack([e.targets for e in made]))
        counted = targets != IGNORED
        right.append((predict(tokens, counted) == targets[counted]).view(len(made), -1).numpy())
    correct = np.concatenate(right)
    low, high = interval(correct)
    accuracy = float(correct.mean())
    return Recall(task.name, length, episodes, correct.size, accuracy, low, high, made[0].chance)


def predictor(decoder: Decoder) -> Predict:
    """Predicts the most likely next token. Computes logits at the counted positions only."""

    @torch.no_grad()
    def predict(tokens: Tensor, counted: Tensor) -> Tensor:
        device = decoder.embedding.weight.device
        counted = counted.to(device)
        hook = decoder.head.register_forward_pre_hook(lambda _, inputs: (inputs[0][counted], *inputs[1:]))
        try:
            return decoder(tokens.to(device)).argmax(-1).cpu()
        finally:
            hook.remove()

    return predict


def interval(correct: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of ``correct`` (episodes, answers) bool.

    Answers of one episode are correlated. So the number of answers is divided by the design effect of cluster sampling,
    estimated from the variance over episodes. If all answers are equal, each episode counts as one.
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
