"""The critics' weights of the loss, `--polish_method`: a formula each, and its control, which follows by itself.

A new method is a line in `CRITIC_WEIGHTS`: the flag, its help and the `shuffled` control are made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from common import distributed

if TYPE_CHECKING:
    from torch import Tensor


class CriticWeights(NamedTuple):
    """A method: its formula, as `--help` shows it, and its function of Q (B, T), labels (B, T) and lambda: w (B, T)."""

    formula: str
    weights: Callable[[Tensor, Tensor, float], Tensor]


def _contrast(q: Tensor, labels: Tensor, lambda_: float) -> Tensor:
    import torch

    std, mean = torch.std_mean(distributed.all_gather_rows(q), dim=0, correction=0)
    return torch.exp(-lambda_ * (q - mean) / std.clamp(min=1e-6))


CRITIC_WEIGHTS = {
    "full": CriticWeights("1 - lambda Q", lambda q, labels, lambda_: 1 - lambda_ * q),
    "label": CriticWeights("1 - lambda y Q", lambda q, labels, lambda_: 1 - lambda_ * (labels * q)),
    "critic": CriticWeights("-Q", lambda q, labels, lambda_: -q),
    "inverse": CriticWeights("1 / (1 - lambda Q)", lambda q, labels, lambda_: 1 / (1 - lambda_ * q)),
    "contrast": CriticWeights("exp(-lambda z), z the batch's standardized Q", _contrast),
}
# the control of each method: its weights on the wrong samples
SHUFFLED = {name: "shuffled" if name == "full" else f"{name}_shuffled" for name in CRITIC_WEIGHTS}
UNSHUFFLED = {control: name for name, control in SHUFFLED.items()}
POLISH_METHODS = (*CRITIC_WEIGHTS, "constant", *UNSHUFFLED)


def controls_of(method: str) -> tuple[str, str]:
    """The controls that a method is compared with: constant weights, and its own weights on the wrong samples."""
    return "constant", SHUFFLED.get(UNSHUFFLED.get(method, method), "shuffled")
