"""The building blocks against their plain definitions: same values, same gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from layers import (
    Critic,
    CriticNeg,
    EmbeddingLayer,
    Experts,
    FeatureEmbedding,
    Gate,
    MultiLayerPerceptron,
    set_embedding_dropout,
    standardize,
)
from layers.critic import NegReLU, zero_fraction
from layers.layers import Standardizer, gated_sums, linear
from layers.ops import relu_dropout

FEW = [3, 5, 2]  # fewer ids in the tables than in the batch
MANY = [300, 5, 200]  # more of them
ROWS, NUMBERS, WIDTH = 64, 4, 6


def batch(field_dims: list[int], rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Random ids (rows, F), all ids 0 in the first row, and numbers (rows, N)."""
    ids = torch.stack([torch.randint(dim, (rows,)) for dim in field_dims], dim=1)
    ids[0] = 0
    return ids, torch.randn(rows, NUMBERS)


def assert_close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------- embedding


def test_one_table_equals_a_table_per_field() -> None:
    layer = EmbeddingLayer(FEW, 4)
    tables = [nn.Embedding.from_pretrained(part) for part in layer.embedding.weight.detach().split(FEW)]
    ids, _ = batch(FEW)
    expected = torch.stack([table(ids[:, field]) for field, table in enumerate(tables)], dim=1)
    assert torch.equal(layer(ids), expected)
    assert layer(ids).shape == (ROWS, 3, 4)


def test_id_0_of_every_field_trains() -> None:
    """No row is frozen as padding: an id 0 that occurs has a gradient."""
    layer = EmbeddingLayer(FEW, 4)
    layer(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    gradient = layer.embedding.weight.grad
    assert gradient is not None
    assert torch.equal(gradient.abs().sum(dim=1) > 0, torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1, 0]).bool())


def test_an_id_outside_the_whole_table_is_refused() -> None:
    with pytest.raises(IndexError):
        EmbeddingLayer(FEW, 4)(torch.tensor([[0, 0, 2]]))


def test_the_offsets_are_no_part_of_a_checkpoint() -> None:
    assert list(EmbeddingLayer(FEW, 4).state_dict()) == ["embedding.weight"]


# ------------------------------------------------------------------------------------------- the first layer on fields


def test_concat_is_fields_then_numbers() -> None:
    source = FeatureEmbedding(FEW, NUMBERS, 4)
    ids, numbers = batch(FEW)
    expected = torch.cat([source.embedding(ids).flatten(1), source.numerical(numbers)], dim=1)
    assert torch.equal(source(ids, numbers).materialize(), expected)
    assert expected.shape == (ROWS, source.output_dim)


@pytest.mark.parametrize(("field_dims", "by_products"), [(FEW, True), (MANY, False)],
                         ids=["small tables", "large tables"])
def test_linear_on_fields_is_linear_on_their_concatenation(field_dims: list[int], by_products: bool) -> None:
    """In value and in the gradient of everything that trains, whichever of the two ways is taken."""
    source = FeatureEmbedding(field_dims, NUMBERS, 4)
    first = nn.Linear(source.output_dim, WIDTH)
    ids, numbers = batch(field_dims)
    assert (sum(field_dims) <= ids.numel()) is by_products
    trained = [*source.parameters(), *first.parameters()]
    upstream = torch.randn(ROWS, WIDTH)

    fast = source(ids, numbers).linear(first.weight, first.bias)
    slow = F.linear(source(ids, numbers).materialize(), first.weight, first.bias)
    assert_close(fast, slow)
    for one, two in zip(torch.autograd.grad((fast * upstream).sum(), trained),
                        torch.autograd.grad((slow * upstream).sum(), trained), strict=True):
        assert two.abs().max() > 0
        assert_close(one, two)


def test_fields_may_feed_several_layers() -> None:
    """What one layer prepares for the next may not change the gradients of either."""
    source = FeatureEmbedding(FEW, NUMBERS, 4)
    layers = [nn.Linear(source.output_dim, WIDTH) for _ in range(2)]
    fields = source(*batch(FEW))
    trained = [*source.parameters(), *layers[0].parameters(), *layers[1].parameters()]
    fast = sum(fields.linear(layer.weight, layer.bias).square().sum() for layer in layers)
    slow = sum(layer(fields.materialize()).square().sum() for layer in layers)
    for one, two in zip(torch.autograd.grad(fast, trained), torch.autograd.grad(slow, trained), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_linear_takes_a_plain_tensor_too() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    assert torch.equal(linear(x, layer.weight, layer.bias), layer(x))


# --------------------------------------------------------------------------------------------------------- perceptrons


@pytest.mark.parametrize("output_layer", [True, False])
def test_a_perceptron_is_linear_relu_linear(output_layer: bool) -> None:
    network = MultiLayerPerceptron(7, [5, 4], dropout=0.5, output_layer=output_layer).eval()
    plain = nn.Sequential(network.hidden[0], nn.ReLU(), network.hidden[1], nn.ReLU(), network.output or nn.Identity())
    x = torch.randn(ROWS, 7)
    assert_close(network(x), plain(x))
    assert network(x).shape == (ROWS, 1 if output_layer else 4)


def test_a_bank_of_experts_is_as_many_perceptrons() -> None:
    bank = Experts(3, 7, [6, 5, 4], dropout=0.5).eval()
    x = torch.randn(ROWS, 7)
    assert bank(x).shape == (ROWS, 3, 4)
    for expert in range(3):
        alone = MultiLayerPerceptron(7, [6, 5, 4], dropout=0.5, output_layer=False).eval()
        first, *later = (layer for layer in alone.hidden if isinstance(layer, nn.Linear))
        with torch.no_grad():
            first.weight.copy_(bank.first.weight[expert * 6:(expert + 1) * 6])
            first.bias.copy_(bank.first.bias[expert * 6:(expert + 1) * 6])
            for layer, weight, bias in zip(later, bank.weights, bank.biases, strict=True):
                layer.weight.copy_(weight[expert])
                layer.bias.copy_(bias[expert])
        assert_close(bank(x)[:, expert], alone(x))


def test_experts_start_as_perceptrons_do() -> None:
    """Each layer within the bounds of nn.Linear, and using their whole range."""
    bank = Experts(4, 50, [40, 30], dropout=0.0)
    for parameters, inputs in (([bank.first.weight, bank.first.bias], 50), ([*bank.weights, *bank.biases], 40)):
        for parameter in parameters:
            assert 0.8 * inputs**-0.5 < parameter.abs().max() <= inputs**-0.5


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.01, 1.0, 100.0]))
def test_a_gate_is_a_distribution(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    gate = Gate(7, 5)(scale * torch.randn(8, 7))
    assert gate.shape == (8, 5)
    assert (gate >= 0).all()
    assert_close(gate.sum(dim=1), torch.ones(8))


@pytest.mark.parametrize("gate_num", [1, 2, 3])
def test_mixtures_are_the_weighted_sums_over_a_bank(gate_num: int) -> None:
    gates = [torch.rand(8, 5, requires_grad=True) for _ in range(gate_num)]
    bank = torch.randn(8, 5, 4, requires_grad=True)
    upstream = torch.randn(gate_num, 8, 4)
    plain = [(gate[:, :, None] * bank).sum(dim=1) for gate in gates]
    mixed = gated_sums(gates, bank)
    for one, two in zip(mixed, plain, strict=True):
        assert_close(one, two)
    for one, two in zip(torch.autograd.grad((torch.stack(mixed) * upstream).sum(), [*gates, bank]),
                        torch.autograd.grad((torch.stack(plain) * upstream).sum(), [*gates, bank]), strict=True):
        assert_close(one, two)


# ------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout_drops_a_share_and_keeps_the_mean(p: float) -> None:
    dropped = relu_dropout(torch.ones(400, 500), p, training=True)
    assert float((dropped == 0).float().mean()) == pytest.approx(p, abs=0.005)
    kept = dropped[dropped != 0]
    assert [float(kept.min()), float(kept.max())] == pytest.approx([1 / (1 - p)] * 2, rel=1e-3)


def test_dropout_masks_are_independent() -> None:
    """Of neighbours, in a row and in a column, both are dropped in p^2 of the cases."""
    zero = relu_dropout(torch.ones(400, 500), 0.5, training=True) == 0
    for one, two in ((zero[:, 1:], zero[:, :-1]), (zero[1:], zero[:-1])):
        assert float((one & two).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(zero, relu_dropout(torch.ones(400, 500), 0.5, training=True) == 0)


def test_dropout_follows_the_seed_of_torch() -> None:
    def draw() -> Tensor:
        torch.manual_seed(5)
        return relu_dropout(torch.ones(30, 40), 0.5, training=True)

    assert torch.equal(draw(), draw())


def test_dropout_rests_in_evaluation_and_at_0() -> None:
    x = torch.randn(30, 40)
    assert torch.equal(relu_dropout(x, 0.5, training=False), F.relu(x))
    assert torch.equal(relu_dropout(x, 0.0, training=True), F.relu(x))


def test_the_gradient_of_dropout_is_its_mask() -> None:
    """1 / (1 - p) where a positive number was kept, 0 elsewhere; the input is left as it was."""
    x = torch.randn(30, 40, requires_grad=True)
    before = x.detach().clone()
    dropped = relu_dropout(x, 0.5, training=True)
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2.0 * (dropped > 0))
    assert torch.equal(dropped, 2.0 * x * (dropped > 0))
    assert (dropped[x < 0] == 0).all()
    assert torch.equal(x, before)


def test_embedding_dropout_spares_the_numerical_part() -> None:
    """In training an embedding's numbers are 0 or doubled, and so are their gradients; in evaluation nothing is."""
    source, (ids, numbers) = FeatureEmbedding(FEW, NUMBERS, 4), batch(FEW)
    plain = source(ids, numbers).materialize()
    set_embedding_dropout(nn.Sequential(source), 0.5)
    dropped = source(ids, numbers)
    width = len(FEW) * 4
    assert torch.equal(dropped[:, width:], plain[:, width:])
    kept = dropped[:, :width] != 0
    assert torch.equal(dropped[:, :width], 2.0 * plain[:, :width] * kept)
    assert 0.3 < float(kept.float().mean()) < 0.7
    dropped[:, :width].sum().backward()
    expected = torch.zeros_like(source.embedding.embedding.weight).index_add(
        0, (ids + source.embedding.offsets).flatten(), 2.0 * kept.float().reshape(-1, 4))
    assert_close(source.embedding.embedding.weight.grad, expected)
    assert torch.equal(source.eval()(ids, numbers).materialize(), plain)


# ------------------------------------------------------------------------------------------------------------- critics


def plain_score(critic: Critic, ids: Tensor, numbers: Tensor, action: Tensor) -> Tensor:
    """The critic as one network on the concatenation of state and embedded action."""
    x = torch.cat([critic.input(ids, numbers).materialize(), critic.action(action)], dim=1)
    x = critic.bottom(F.relu(critic.first(x))) if len(critic.bottom.hidden) else F.relu(critic.first(x))
    return critic.tower(x).squeeze(1)


@pytest.mark.parametrize("bottom", [(8,), (8, 7), (8, 7, 6)], ids=len)
@pytest.mark.parametrize("field_dims", [FEW, MANY], ids=["small tables", "large tables"])
def test_critic_equals_one_network_on_concatenation(field_dims: list[int], bottom: tuple[int, ...]) -> None:
    critic = Critic(field_dims, NUMBERS, 4, bottom, (5, 3), dropout=0.3).eval()
    ids, numbers = batch(field_dims)
    action = torch.rand(ROWS, 1)
    assert_close(critic(ids, numbers, action), plain_score(critic, ids, numbers, action))
    assert critic(ids, numbers, action).shape == (ROWS,)


def test_many_rows_are_standardized_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.randn(1000, 3) * torch.tensor([1.0, 20.0, 0.0]) + 5
    whole, blocks = Standardizer(3), Standardizer(3)
    whole.fit(numbers)
    monkeypatch.setattr("layers.layers.STANDARDIZER_BLOCK", 64)
    blocks.fit(numbers)
    torch.testing.assert_close(blocks.state_dict(), whole.state_dict())


def test_a_critic_reads_standardized_numbers() -> None:
    critic = Critic(FEW, NUMBERS, 4, (8,), (5,), dropout=0.0).eval()
    ids, numbers = batch(FEW)
    action = torch.rand(ROWS, 1)
    before = critic(ids, (numbers - numbers.mean(dim=0)) / (numbers.std(dim=0) + 1e-3), action)
    standardize(critic, numbers)
    assert_close(critic(ids, numbers, action), before)


def test_constant_numbers_are_only_shifted() -> None:
    standardizer = Standardizer(3)
    standardizer.fit(torch.tensor([[5.0, 1.0], [5.0, 3.0]]))
    assert_close(standardizer(torch.tensor([6.0, 2.0, 7.0])), torch.tensor([1.0, 0.0, 7.0]))


def test_a_critic_listens_to_the_action() -> None:
    critic = Critic(FEW, NUMBERS, 8, (32, 24), (16, 12), dropout=0.0)
    ids, numbers = batch(FEW)
    action = torch.rand(ROWS, 1, requires_grad=True)
    critic(ids, numbers, action).sum().backward()
    assert action.grad is not None
    assert (action.grad != 0).float().mean() > 0.9


def critic_neg(seed: int) -> tuple[CriticNeg, Tensor]:
    torch.manual_seed(seed)
    critic = CriticNeg(FEW, NUMBERS, 8, (16, 12), (10, 6), dropout=0.2)
    return critic, critic(*batch(FEW), torch.rand(ROWS, 1))


@given(seed=st.integers(0, 10_000))
def test_critic_neg_is_never_positive(seed: int) -> None:
    critic, q = critic_neg(seed)
    assert (q <= 0).all()
    assert zero_fraction(q) == 0.0
    q.sum().backward()
    assert critic.first.weight.grad is not None
    assert critic.first.weight.grad.abs().max() > 0


def test_critic_neg_is_minus_relu_of_critic() -> None:
    critic = CriticNeg(FEW, NUMBERS, 8, (32, 24), (16, 12), dropout=0.0)
    assert critic.tower.output is not None
    ids, numbers = batch(FEW)
    action = torch.rand(ROWS, 1)
    with torch.no_grad():  # so that half of the scores are negative
        critic.tower.output.bias -= critic.pre_activation(ids, numbers, action).median()
    score = critic.pre_activation(ids, numbers, action)
    assert 0.3 < float((score < 0).float().mean()) < 0.7
    assert torch.equal(critic(ids, numbers, action), -score.clamp(min=0))


def test_neg_relu_gradient_is_the_projections() -> None:
    z = torch.tensor([2.0, 2.0, -1.0, -1.0], requires_grad=True)
    q = NegReLU.apply(z)
    assert torch.equal(q, torch.tensor([-2.0, -2.0, 0.0, 0.0]))
    ((q - torch.tensor([-3.0, -1.0, -3.0, 3.0])) ** 2).sum().backward()
    assert torch.equal(z.grad, torch.tensor([-2.0, 2.0, -6.0, 0.0]))


def test_collapsed_critic_recovers_its_targets() -> None:
    """The ReLU alone would stay at 0 for ever."""
    critic, _ = critic_neg(seed=0)
    assert critic.tower.output is not None
    with torch.no_grad():
        critic.tower.output.bias.fill_(-0.5)
        critic.tower.output.weight.zero_()
    (ids, numbers), action = batch(FEW), torch.rand(ROWS, 1)
    assert zero_fraction(critic(ids, numbers, action)) == 1.0
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        (critic(ids, numbers, action) + 0.06).square().mean().backward()
        optimizer.step()
    assert float((critic.eval()(ids, numbers, action).detach() + 0.06).abs().mean()) < 0.02


def test_zero_fraction_and_head_reset() -> None:
    critic, _ = critic_neg(seed=0)
    assert critic.tower.output is not None
    ids, numbers = batch(FEW)
    with torch.no_grad():
        critic.tower.output.bias.fill_(-100.0)
    assert zero_fraction(critic(ids, numbers, torch.rand(ROWS, 1))) == 1.0
    critic.reset_head()
    assert zero_fraction(critic(ids, numbers, torch.rand(ROWS, 1))) == 0.0


def test_zero_share_counts_exact_zeros() -> None:
    assert zero_fraction(torch.tensor([0.0, -0.0, -1e-30, -2.0])) == 0.5


def test_widths_of_the_layers_are_those_asked_for() -> None:
    network = MultiLayerPerceptron(9, [8, 7, 6], dropout=0.0)
    shapes = [(layer.in_features, layer.out_features) for layer in network.hidden if isinstance(layer, nn.Linear)]
    assert shapes == list(pairwise([9, 8, 7, 6]))
    assert network.output is not None
    assert (network.output.in_features, network.output.out_features) == (6, 1)
