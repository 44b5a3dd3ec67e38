"""Encoders of the session: networks that read its last impressions, not the current one alone.

A window is the last W impressions of a session: ids (B, W, F) and numbers (B, W, N), the current one last. Padding
before the session's start has ids of -1 and numbers of 0; results do not depend on it. An encoder turns the window into
a context of C numbers, which join the numbers of the current impression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from layers.base import Batch, Criterion, MultiTaskModel, Weights
from layers.critic import CriticNeg
from layers.layers import EmbeddingLayer, FeatureEmbedding, LazyConcat, Standardizer

CONTEXT_DIM = 32  # C
NUM_HEADS = 4  # of attention


class SequenceEncoder(nn.Module):
    """Embeds every impression of a window and maps it to C numbers; a child encodes their sequence.

    Ids are embedded by the table of the network behind the encoder; it is shared, not copied.

    Args:
        field_num: F, the categorical fields.
        numerical_num: N, the numeric features of one impression.
        embed_dim: D, size of an embedding.
        window: W, impressions at the most.
    """

    def __init__(self, field_num: int, numerical_num: int, embed_dim: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.standardizer = Standardizer(numerical_num)
        self.numerical = nn.Linear(numerical_num, embed_dim)
        self.step = nn.Linear((field_num + 1) * embed_dim, CONTEXT_DIM)

    def forward(self, embedding: EmbeddingLayer, categorical_x: Tensor,
                numerical_x: Tensor) -> tuple[Tensor, Tensor]:
        """Take a window; return the current ids (B, F), and the current numbers joined by the context (B, N + C)."""
        if categorical_x.ndim != 3:
            raise ValueError(f"ids of shape {tuple(categorical_x.shape)}: a network with an encoder takes windows, "
                             "(B, W, F) and (B, W, N), as dataset.loader.TensorLoader(..., window=W) makes them")
        mask = categorical_x[:, :, 0] >= 0  # (B, W); M of them are impressions
        if torch.compiler.is_exporting():  # shapes must not depend on the data: padding is embedded too, as id 0
            ids, numbers = categorical_x.clamp(min=0).flatten(0, 1), numerical_x.flatten(0, 1)
        else:
            ids, numbers = categorical_x[mask], numerical_x[mask]  # (M, F), (M, N)
        impressions = LazyConcat(embedding, self.numerical, ids, self.standardizer(numbers))
        context = self.encode(impressions.linear(self.step.weight, self.step.bias), mask)
        return categorical_x[:, -1], torch.cat([numerical_x[:, -1], context], dim=1)

    def encode(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """The context (B, C) of impressions (M, C), row by row of `mask` (B, W), which is False at padding; in an
        exported graph M = B W, and those at padding have no meaning."""
        raise NotImplementedError


class GRUEncoder(SequenceEncoder):
    """The last state of a gated recurrent unit (Cho et al., EMNLP 2014) that starts at 0 where the window does."""

    def __init__(self, field_num: int, numerical_num: int, embed_dim: int, window: int) -> None:
        super().__init__(field_num, numerical_num, embed_dim, window)
        self.gru = nn.GRU(CONTEXT_DIM, CONTEXT_DIM, batch_first=True)

    def encode(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(dim=1)
        if torch.compiler.is_exporting():
            return self._encode_unpacked(embeddings.unflatten(0, mask.shape), lengths)
        first = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]  # padding moved to the end
        packed = pack_padded_sequence(_scatter_padded(embeddings, first), lengths.cpu(), batch_first=True,
                                      enforce_sorted=False)
        state: Tensor = self.gru(packed)[1]  # (1, B, C)
        return state[0]

    def _encode_unpacked(self, placed: Tensor, lengths: Tensor) -> Tensor:
        """The same for a window (B, W, C) whose last `lengths` (B,) places are impressions."""
        first, width = placed.shape[1] - lengths, placed.shape[2]  # (B,)
        places = (torch.arange(placed.shape[1], device=placed.device) + first[:, None]).clamp(max=placed.shape[1] - 1)
        states: Tensor = self.gru(placed.gather(1, places.unsqueeze(2).expand(-1, -1, width)))[0]  # (B, W, C)
        return states.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, width)).squeeze(1)


class AttentionEncoder(SequenceEncoder):
    """Attends from the current impression over the window, self included (Vaswani et al., NeurIPS 2017), with an
    embedding of the age of each impression, 0 for the current one."""

    def __init__(self, field_num: int, numerical_num: int, embed_dim: int, window: int) -> None:
        super().__init__(field_num, numerical_num, embed_dim, window)
        self.age = nn.Embedding(window, CONTEXT_DIM)
        self.attention = nn.MultiheadAttention(CONTEXT_DIM, NUM_HEADS, batch_first=True)

    def encode(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        placed = _scatter_padded(embeddings, mask)  # (B, W, C)
        keys = placed + self.age.weight[: mask.shape[1]].flip(0)
        context: Tensor = self.attention(placed[:, -1:], keys, keys, key_padding_mask=~mask, need_weights=False)[0]
        return context.squeeze(1)


def _scatter_padded(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Embeddings (M, C) where `mask` (B, W) is True, row by row; zeros elsewhere: (B, W, C)."""
    if torch.compiler.is_exporting():
        return embeddings.unflatten(0, mask.shape) * mask.unsqueeze(2)
    return embeddings.new_zeros(*mask.shape, embeddings.shape[1]).index_put((mask,), embeddings)


ENCODER_CLASSES: dict[str, type[SequenceEncoder]] = {"gru": GRUEncoder, "attention": AttentionEncoder}


class SequenceModel(MultiTaskModel):
    """A model of `slmodels` behind an encoder of the session: windows in, predictions (B, T) out.

    Args:
        factory: builds the model, given how many numbers it has: those of an impression and the context.
        encoder: one of `ENCODER_CLASSES`; the other arguments are `SequenceEncoder`'s.
    """

    encodable = False

    def __init__(self, factory: Callable[[int], MultiTaskModel], encoder: str, field_num: int, numerical_num: int,
                 embed_dim: int, window: int) -> None:
        super().__init__()
        self.inner, self.window = factory(numerical_num + CONTEXT_DIM), window
        if not getattr(self.inner, "encodable", False) or self.inner.input_layer(0) is None:
            raise ValueError(f"{type(self.inner).__name__} trains without an encoder of the session")
        self.encoder = ENCODER_CLASSES[encoder](field_num, numerical_num, embed_dim, window)

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        """Take ids (B, W, F) and numbers (B, W, N); return predictions (B, T) in (0, 1)."""
        predictions: Tensor = self.inner(*self._encode(categorical_x, numerical_x))
        return predictions

    def losses(self, batch: Batch, criterion: Criterion, weights: Weights | None = None) -> Tensor:
        """Those of the model itself."""
        categorical_x, numerical_x, labels = batch
        return self.inner.losses((*self._encode(categorical_x, numerical_x), labels), criterion, weights)

    def input_layer(self, task: int) -> FeatureEmbedding | None:
        return self.inner.input_layer(task)

    def _encode(self, categorical_x: Tensor, numerical_x: Tensor) -> tuple[Tensor, Tensor]:
        source = self.inner.input_layer(0)
        assert source is not None
        current: tuple[Tensor, Tensor] = self.encoder(source.embedding, categorical_x, numerical_x)
        return current


class SequenceCritic(CriticNeg):
    """A `CriticNeg` behind an encoder of the session."""

    def __init__(self, encoder: str, window: int, categorical_field_dims: Sequence[int], numerical_num: int,
                 embed_dim: int, bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int],
                 dropout: float = 0.2) -> None:
        super().__init__(categorical_field_dims, numerical_num + CONTEXT_DIM, embed_dim, bottom_mlp_dims,
                         tower_mlp_dims, dropout)
        self.window = window
        self.encoder = ENCODER_CLASSES[encoder](len(categorical_field_dims), numerical_num, embed_dim, window)

    def pre_activation(self, categorical_x: Tensor, numerical_x: Tensor, action: Tensor) -> Tensor:
        """The last pre-activation (B,) for windows and one action (B, 1)."""
        current, numerical = self.encoder(self.input.embedding, categorical_x, numerical_x)
        return super().pre_activation(current, numerical, action)


def make_critic(encoder: str, window: int, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], dropout: float = 0.2) -> CriticNeg:
    """A critic that reads the session through an encoder, or with "none" the current impression alone."""
    sizes = categorical_field_dims, numerical_num, embed_dim, bottom_mlp_dims, tower_mlp_dims, dropout
    return CriticNeg(*sizes) if encoder == "none" else SequenceCritic(encoder, window, *sizes)
