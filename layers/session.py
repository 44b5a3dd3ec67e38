"""Networks that see the session so far, not the present impression alone.

A window is the last W impressions of a session: ids (B, W, F) and numbers (B, W, N), the present one last. Places
before the session's start have ids of -1 and numbers of 0; nothing depends on how many of them there are. An encoder
makes a context of C numbers of it, which join those of the present impression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from layers.critic import CriticNeg
from layers.layers import EmbeddingLayer, FieldInput, Fields

CONTEXT = 32  # C
HEADS = 4  # of attention


class SessionEncoder(nn.Module):
    """Embeds every impression of a window and takes it to C numbers; what reads these in order is a child's.

    Ids are embedded by the table of the network that asks, which is handed over with them; it is shared, not copied.

    Args:
        field_num: F, the categorical fields.
        numerical_num: N, the numeric features of one impression.
        embed_dim: D, size of an embedding.
        window: W, impressions at the most.
    """

    def __init__(self, field_num: int, numerical_num: int, embed_dim: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.numerical = nn.Linear(numerical_num, embed_dim)
        self.step = nn.Linear((field_num + 1) * embed_dim, CONTEXT)

    def forward(self, embedding: EmbeddingLayer, categorical_x: Tensor,
                numerical_x: Tensor) -> tuple[Tensor, Tensor]:
        """Take a window; return the present ids (B, F), and the present numbers joined by the context (B, N + C)."""
        if categorical_x.ndim != 3:
            raise ValueError(f"ids of shape {tuple(categorical_x.shape)}: a network with an encoder takes windows, "
                             "(B, W, F) and (B, W, N), as dataset.rtrl.Batches(..., window=W) makes them")
        known = categorical_x[:, :, 0] >= 0  # (B, W); M of them are impressions
        impressions = Fields(embedding, self.numerical, categorical_x[known], numerical_x[known])
        context = self.read(impressions.linear(self.step.weight, self.step.bias), known)
        return categorical_x[:, -1], torch.cat([numerical_x[:, -1], context], dim=1)

    def read(self, steps: Tensor, known: Tensor) -> Tensor:
        """The context (B, C) of impressions (M, C), row by row of `known` (B, W), which says where they stand."""
        raise NotImplementedError


class GRUEncoder(SessionEncoder):
    """The last state of a gated recurrent unit (Cho et al., EMNLP 2014) that starts at 0 where the window does."""

    def __init__(self, field_num: int, numerical_num: int, embed_dim: int, window: int) -> None:
        super().__init__(field_num, numerical_num, embed_dim, window)
        self.gru = nn.GRU(CONTEXT, CONTEXT, batch_first=True)

    def read(self, steps: Tensor, known: Tensor) -> Tensor:
        lengths = known.sum(dim=1)
        first = torch.arange(known.shape[1], device=known.device) < lengths[:, None]  # every window moved to its left
        packed = pack_padded_sequence(_placed(steps, first), lengths.cpu(), batch_first=True, enforce_sorted=False)
        state: Tensor = self.gru(packed)[1]  # (1, B, C)
        return state[0]


class AttentionEncoder(SessionEncoder):
    """The present impression asks all of the window, itself included (Vaswani et al., NeurIPS 2017); an embedding of
    its age, 0 for the present one, tells where each of them stands."""

    def __init__(self, field_num: int, numerical_num: int, embed_dim: int, window: int) -> None:
        super().__init__(field_num, numerical_num, embed_dim, window)
        self.age = nn.Embedding(window, CONTEXT)
        self.attention = nn.MultiheadAttention(CONTEXT, HEADS, batch_first=True)

    def read(self, steps: Tensor, known: Tensor) -> Tensor:
        placed = _placed(steps, known)  # (B, W, C)
        keys = placed + self.age.weight[: known.shape[1]].flip(0)
        context: Tensor = self.attention(placed[:, -1:], keys, keys, key_padding_mask=~known, need_weights=False)[0]
        return context.squeeze(1)


def _placed(steps: Tensor, places: Tensor) -> Tensor:
    """Impressions (M, C) at the M `places` (B, W), row by row; zeros elsewhere: (B, W, C)."""
    return steps.new_zeros(*places.shape, steps.shape[1]).index_put((places,), steps)


WITH_ENCODER: dict[str, type[SessionEncoder]] = {"gru": GRUEncoder, "attention": AttentionEncoder}
ENCODERS = ("none", *WITH_ENCODER)


class SessionModel(nn.Module):
    """A model of `slmodels` behind an encoder of the session: windows in, predictions (B, T) out.

    Args:
        make: builds the model, given how many numbers it has: those of an impression and the context.
        encoder: one of `WITH_ENCODER`; the other arguments are `SessionEncoder`'s.
    """

    def __init__(self, make: Callable[[int], nn.Module], encoder: str, field_num: int, numerical_num: int,
                 embed_dim: int, window: int) -> None:
        super().__init__()
        self.inner = make(numerical_num + CONTEXT)
        if input_of(self.inner) is None:
            raise ValueError(f"{type(self.inner).__name__} trains without an encoder of the session, which shares the "
                             "embedding of `model.input`, a layers.FieldInput: it has none")
        self.encoder = WITH_ENCODER[encoder](field_num, numerical_num, embed_dim, window)

    def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        """Take ids (B, W, F) and numbers (B, W, N); return predictions (B, T) in (0, 1)."""
        source = input_of(self.inner)
        assert source is not None
        predictions: Tensor = self.inner(*self.encoder(source.embedding, categorical_x, numerical_x))
        return predictions


class SessionCritic(CriticNeg):
    """A `CriticNeg` behind an encoder of the session. Its mean and std normalise the present numbers; the context,
    whose share of them stays 0 and 1, is made of numbers as they are."""

    def __init__(self, encoder: str, window: int, categorical_field_dims: Sequence[int], numerical_num: int,
                 embed_dim: int, bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int],
                 dropout: float = 0.2) -> None:
        super().__init__(categorical_field_dims, numerical_num + CONTEXT, embed_dim, bottom_mlp_dims, tower_mlp_dims,
                         dropout)
        self.encoder = WITH_ENCODER[encoder](len(categorical_field_dims), numerical_num, embed_dim, window)

    def score(self, categorical_x: Tensor, numerical_x: Tensor, action: Tensor) -> Tensor:
        """The last pre-activation (B,) for windows and one action (B, 1)."""
        present, numbers = self.encoder(self.input.embedding, categorical_x, numerical_x)
        return super().score(present, numbers, action)


def make_critic(encoder: str, window: int, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], dropout: float = 0.2) -> CriticNeg:
    """A critic that sees the session through an encoder of `ENCODERS`, or with none the present impression alone."""
    sizes = categorical_field_dims, numerical_num, embed_dim, bottom_mlp_dims, tower_mlp_dims, dropout
    return CriticNeg(*sizes) if encoder == "none" else SessionCritic(encoder, window, *sizes)


def inner_of(model: nn.Module) -> nn.Module:
    """The model of `slmodels` itself, without the encoder before it."""
    return model.inner if isinstance(model, SessionModel) else model


def input_of(model: nn.Module, task: int = 0) -> FieldInput | None:
    """The input of a model of `slmodels`; a single-task model has one for each task. None for a model that reads its
    fields by other means."""
    inputs = getattr(model, "inputs", None)
    found = getattr(model, "input", None) if inputs is None else inputs[task]
    return found if isinstance(found, FieldInput) else None


def window_of(network: nn.Module) -> int:
    """How many impressions a network looks at, at the most; 0: the present one alone, as it is or last in a window."""
    return network.encoder.window if isinstance(network, SessionModel | SessionCritic) else 0
