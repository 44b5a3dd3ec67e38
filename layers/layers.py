"""Embeddings, perceptrons, expert banks and gates. B rows, F fields of D numbers each, N numeric features.

The first layer of a network over concatenated embeddings is computed without materializing the concatenation: layers
that take a `LayerInput` call `linear(x, weight, bias)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.distributed import pad_to_longest
from layers.ops import FieldLinear, FieldLookup, GatedSum, dropout, grouped_linear, linear_onednn, relu_dropout


class EmbeddingLayer(nn.Module):
    """One table for all fields: (B, F) ids, each counted from 0 in its own field, to (B, F, D) embeddings.

    Id 0 is a value like any other ("unseen, missing or rare") and trains; no row of the table is frozen.
    """

    def __init__(self, field_dims: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        self.field_dims = list(field_dims)
        self.embedding = nn.Embedding(sum(field_dims), embed_dim)
        self.sharded = False  # whether several processes share the table: `layers.sharding`
        nn.init.xavier_uniform_(self.embedding.weight)
        self.offsets: Tensor  # (F,) where each field begins
        self.register_buffer("offsets", torch.tensor([0, *field_dims[:-1]]).cumsum(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Embed the ids x (B, F) -> (B, F, D). Raises IndexError for an id outside its table; a sharded one gives
        zeros."""
        ids = x + self.offsets
        return self.embedding(pad_to_longest(ids))[:len(ids)] if self.sharded else self.embedding(ids)


STANDARDIZER_BLOCK = 2**21  # rows; more of them are summed in blocks


class Standardizer(nn.Module):
    """(n - mean) / std of numbers (..., N); mean and std (N,) are buffers, 0 and 1 until they are fitted."""

    def __init__(self, numerical_num: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(numerical_num))
        self.register_buffer("std", torch.ones(numerical_num))

    def fit(self, numbers: Tensor) -> None:
        """Take mean and std of the rows of numbers (n, N'); numbers from N' on, the context of an encoder, stay as they
        are. 1e-3 is added to a std, as TD3+BC does; that of a constant number is 1."""
        width, blocks = numbers.shape[1], numbers.split(STANDARDIZER_BLOCK)
        if len(blocks) == 1:
            mean = numbers.double().mean(dim=0)
            std = numbers.double().std(dim=0, correction=min(1, len(numbers) - 1))
        else:
            mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0) / len(numbers)
            squares = torch.stack([((block.double() - mean)**2).sum(dim=0) for block in blocks]).sum(dim=0)
            std = (squares / (len(numbers) - 1)).sqrt()
        self.mean[:width] = mean
        self.std[:width] = torch.where(std > 0, std + 1e-3, 1.0)

    def forward(self, numbers: Tensor) -> Tensor:
        return (numbers - self.mean) / self.std


def standardize(network: nn.Module, numbers: Tensor) -> None:
    """Let a network read its numerical features standardized by the rows of `numbers` (n, N), those of the training
    split: every `Standardizer` in it is fitted. Its `state_dict` has the means and standard deviations."""
    for module in network.modules():
        if isinstance(module, Standardizer):
            module.fit(numbers)


class FeatureEmbedding(nn.Module):
    """The input of every network here: embedded fields, then the numbers, standardized, through one linear layer of D
    outputs."""

    def __init__(self, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = EmbeddingLayer(categorical_field_dims, embed_dim)
        self.standardizer = Standardizer(numerical_num)
        self.numerical = nn.Linear(numerical_num, embed_dim)
        self.output_dim = (len(categorical_field_dims) + 1) * embed_dim
        self.dropout = 0.0  # of embeddings: `set_embedding_dropout`

    def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> LayerInput:
        """Take ids (B, F) and numbers (B, N); return the (B, (F + 1) D) concatenation, or what stands for it.

        Of windows over a session, (B, W, F) and (B, W, N), only the present impression, the last, is looked at.
        """
        if categorical_x.ndim == 3:
            categorical_x, numerical_x = categorical_x[:, -1], numerical_x[:, -1]
        numerical_x = self.standardizer(numerical_x)
        if self.training and self.dropout:
            embedded = dropout(self.embedding(categorical_x).flatten(1), self.dropout)
            return torch.cat([embedded, self.numerical(numerical_x)], dim=1)
        concat = LazyConcat(self.embedding, self.numerical, categorical_x, numerical_x)
        return concat.materialize() if self.embedding.sharded else concat  # looked up once


def set_embedding_dropout(network: nn.Module, p: float) -> None:
    """Let a network drop each number of an embedding with this probability in training; numerical features stay."""
    for module in network.modules():
        if isinstance(module, FeatureEmbedding):
            module.dropout = p


class LazyConcat:
    """concat(e_1[x_1], ..., e_F[x_F], A n + c), not yet written out. Shape (B, (F + 1) D)."""

    def __init__(self, embedding: EmbeddingLayer, numerical: nn.Linear, categorical_x: Tensor,
                 numerical_x: Tensor) -> None:
        self.embedding, self.numerical = embedding, numerical
        self.categorical_x, self.numerical_x = categorical_x, numerical_x
        self._lookup: FieldLookup | None = None

    def materialize(self) -> Tensor:
        """Write it out: (B, (F + 1) D)."""
        embedded = self.embedding(self.categorical_x).flatten(1)
        return torch.cat([embedded, self.numerical(self.numerical_x)], dim=1)

    def linear(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return W concat + b, W (H, (F + 1) D) -> (B, H).

        By `ops.FieldLinear`, unless the tables have more rows than the batch has ids: then the plain product is
        cheaper. An exported graph and sharded tables have that one, whatever the batch.
        """
        embedding, numerical = self.embedding, self.numerical
        table = embedding.embedding.weight  # (V, D), all fields
        if embedding.sharded or torch.compiler.is_exporting() or len(table) > self.categorical_x.numel():
            return linear_onednn(self.materialize(), weight, bias)
        if self._lookup is None:
            self._lookup = FieldLookup(self.categorical_x + embedding.offsets, len(table))
        return FieldLinear.apply(self._lookup, embedding.field_dims, self.numerical_x, table, numerical.weight,
                                 numerical.bias, weight, bias)


LayerInput = Tensor | LazyConcat


def linear(x: LayerInput, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + b, for a tensor or for fields."""
    return x.linear(weight, bias) if isinstance(x, LazyConcat) else linear_onednn(x, weight, bias)


class MultiLayerPerceptron(nn.Module):
    """Linear, ReLU, Dropout for each of `embed_dims`; then one linear output, unless `output_layer` is False."""

    def __init__(self, input_dim: int, embed_dims: Sequence[int], dropout: float, output_layer: bool = True) -> None:
        super().__init__()
        dims = [input_dim, *embed_dims]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(dims))
        self.output = nn.Linear(dims[-1], 1) if output_layer else None
        self.dropout = dropout

    def forward(self, x: LayerInput) -> Tensor:
        """Take (B, input_dim); return (B, 1), or (B, embed_dims[-1]) without an output layer."""
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            x = relu_dropout(linear(x, layer.weight, layer.bias), self.dropout, self.training)
        if self.output is not None:
            return linear(x, self.output.weight, self.output.bias)
        assert isinstance(x, Tensor)  # at least one hidden layer
        return x


class Experts(nn.Module):
    """E perceptrons side by side on the same input, each layer one product for all of them.

    The same as E `MultiLayerPerceptron(..., output_layer=False)`: expert e's first layer is rows e H to (e + 1) H of
    `first`, its later layers are `weights[l][e]` (out, in) and `biases[l][e]`.
    """

    def __init__(self, expert_num: int, input_dim: int, embed_dims: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.expert_num, self.dropout = expert_num, dropout
        self.first = nn.Linear(input_dim, expert_num * embed_dims[0])  # its bounds depend on input_dim alone
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise(embed_dims):
            bound = i**-0.5  # as nn.Linear draws them
            self.weights.append(torch.empty(expert_num, o, i).uniform_(-bound, bound))
            self.biases.append(torch.empty(expert_num, o).uniform_(-bound, bound))

    def forward(self, x: LayerInput) -> Tensor:
        """Take (B, input_dim); return (B, E, embed_dims[-1])."""
        h = relu_dropout(linear(x, self.first.weight, self.first.bias), self.dropout, self.training)  # (B, E H)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            h = relu_dropout(grouped_linear(h, weight, bias), self.dropout, self.training)
        return h.unflatten(1, (self.expert_num, -1))


class Gate(nn.Module):
    """softmax(W x + b) over E experts: (B, input_dim) -> (B, E), each row a distribution."""

    def __init__(self, input_dim: int, expert_num: int) -> None:
        super().__init__()
        self.layer = nn.Linear(input_dim, expert_num)

    def forward(self, x: LayerInput) -> Tensor:
        return F.softmax(linear(x, self.layer.weight, self.layer.bias), dim=1)


def gated_sums(gates: Sequence[Tensor], expert_outputs: Tensor) -> list[Tensor]:
    """sum_e g_e h_e for each of several gates (B, E) over the same experts (B, E, H); each result is (B, H)."""
    product = torch.bmm if torch.compiler.is_exporting() else GatedSum.apply
    return list(product(torch.stack(list(gates), dim=1), expert_outputs).unbind(dim=1))
