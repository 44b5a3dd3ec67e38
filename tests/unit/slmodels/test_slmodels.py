"""The models: what all of them share, and in closed form what the paper of each one says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from conftest import user_error_message
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from layers import ESMM, Experts, FeatureEmbedding, Gate
from slmodels import AITM, MODELS, PLE, MMoE, OMoE, SharedBottom, SingleTask, build
from slmodels.ple import Extraction
from train.run import get_model

FIELD_DIMS, NUMBERS, EMBED, BOTTOM, TOWER, TASKS, EXPERTS = [4, 9, 3], 5, 6, (12, 10), (8, 6), 2, 4
ROWS = 40
SIZES = (FIELD_DIMS, NUMBERS, EMBED, BOTTOM, TOWER, TASKS)


def make(name: str, dropout: float = 0.0) -> nn.Module:
    return build(name, *SIZES, EXPERTS, dropout)


def batch(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Random ids, all ids 0 in the first row, and numbers."""
    ids = torch.stack([torch.randint(dim, (rows,)) for dim in FIELD_DIMS], dim=1)
    ids[0] = 0
    return ids, torch.randn(rows, NUMBERS)


def gradients(loss: Tensor, module: nn.Module) -> list[float]:
    """The largest gradient of each parameter of a module, 0 where there is none."""
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    return [0.0 if gradient is None else float(gradient.abs().max()) for gradient in found]


def copy(source: Tensor, target: Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def linears(layers: Iterable[nn.Module]) -> list[nn.Linear]:
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


# ------------------------------------------------------------------------------------------------- what all have to do


def test_the_eight_models() -> None:
    assert list(MODELS) == ["singletask", "sharedbottom", "esmm", "omoe", "mmoe", "ple", "aitm", "metaheac"]


@pytest.mark.parametrize("name", MODELS)
def test_one_probability_a_row_and_task(name: str) -> None:
    predictions = make(name)(*batch())
    assert predictions.shape == (ROWS, TASKS)
    assert predictions.dtype == torch.float32
    assert ((predictions > 0) & (predictions < 1)).all()


@pytest.mark.parametrize("task_num", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_tasks(name: str, task_num: int) -> None:
    model = build(name, *SIZES[:-1], task_num, EXPERTS, 0.0)
    assert model(*batch()).shape == (ROWS, task_num)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_moves_in_one_step(name: str) -> None:
    model = make(name)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    labels = (torch.rand(ROWS, TASKS) < 0.5).float()
    F.binary_cross_entropy(model(*batch()), labels).backward()
    optimizer.step()
    assert [key for key, value in model.named_parameters() if torch.equal(value, before[key])] == []


@pytest.mark.parametrize("name", MODELS)
def test_id_0_of_every_field_trains(name: str) -> None:
    model = make(name)
    inputs = [module for module in model.modules() if isinstance(module, FeatureEmbedding)]
    starts = [0, *torch.tensor(FIELD_DIMS).cumsum(0)[:-1].tolist()]
    before = [module.embedding.embedding.weight.detach()[starts].clone() for module in inputs]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    F.binary_cross_entropy(model(*batch()), torch.ones(ROWS, TASKS)).backward()
    optimizer.step()
    for module, old in zip(inputs, before, strict=True):
        assert (module.embedding.embedding.weight.detach()[starts] != old).any(dim=1).all()


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_deterministic_and_training_is_not(name: str) -> None:
    model, x = make(name, dropout=0.5), batch()
    model.train()
    assert not torch.equal(model(*x), model(*x))
    model.eval()
    assert torch.equal(model(*x), model(*x))


@pytest.mark.parametrize("name", MODELS)
def test_prediction_is_independent_of_the_batch(name: str) -> None:
    """Also where a batch is so small that the first layer is computed another way."""
    model = make(name, dropout=0.5).eval()
    ids, numbers = batch()
    whole = model(ids, numbers)
    for rows in (slice(0, 1), slice(5, 8), slice(20, 40)):
        torch.testing.assert_close(model(ids[rows], numbers[rows]), whole[rows], atol=1e-6, rtol=1e-5)
    order = torch.randperm(ROWS)
    torch.testing.assert_close(model(ids[order], numbers[order]), whole[order], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_weights_there_and_back(name: str) -> None:
    one, two, x = make(name).eval(), make(name).eval(), batch()
    assert not torch.equal(one(*x), two(*x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(*x), two(*x))


@pytest.mark.parametrize("name", MODELS)
def test_every_input_matters(name: str) -> None:
    model = make(name).eval()
    ids, numbers = batch()
    for column in range(NUMBERS):
        other_numbers = numbers + F.one_hot(torch.tensor(column), NUMBERS)
        assert (model(ids, other_numbers) != model(ids, numbers)).any(dim=0).all()
    for field, dim in enumerate(FIELD_DIMS):
        other = ids.clone()
        other[:, field] = (ids[:, field] + 1) % dim
        assert (model(other, numbers) != model(ids, numbers)).any(dim=0).all()


def test_an_unknown_name_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="unknown model 'esm': one of " + ", ".join(MODELS)):
        make("esm")
    text = user_error_message(lambda: get_model("esm", FIELD_DIMS, NUMBERS, TASKS, EXPERTS, EMBED))
    assert all(name in text for name in MODELS)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "aitm"])
def test_a_calibrator_is_for_aitm_alone(name: str) -> None:
    assert "--calibrator_weight" in user_error_message(
        lambda: get_model(name, FIELD_DIMS, NUMBERS, TASKS, EXPERTS, EMBED, calibrator_weight=0.6))


# ---------------------------------------------------------------------------------------------------------------- ESMM


@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 30.0))
def test_esmm_ctcvr_is_at_most_ctr(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    model = ESMM(*SIZES, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    predictions = model(*batch())
    assert (predictions[:, 1] <= predictions[:, 0]).all()


def test_esmm_is_the_product_of_two_rates() -> None:
    """pCTCVR = pCTR x pCVR, the paper's equation (1)."""
    model, x = ESMM(*SIZES, 0.0), batch()
    h = model.bottom(model.input(*x).materialize())
    p_ctr, p_cvr = (torch.sigmoid(tower(h)[:, 0]) for tower in model.towers)
    torch.testing.assert_close(model(*x), torch.stack([p_ctr, p_ctr * p_cvr], dim=1))


def test_esmm_conversion_loss_trains_click_tower() -> None:
    model = ESMM(*SIZES, 0.0)
    predictions = model(*batch())
    assert min(gradients(predictions[:, 1].sum(), model.towers[0])) > 0
    assert max(gradients(predictions[:, 0].sum(), model.towers[1])) == 0


# ----------------------------------------------------------------------------------------- shared bottom, single tasks


def test_shared_bottom_is_towers_on_one_representation() -> None:
    model, x = SharedBottom(*SIZES, 0.0), batch()
    h = model.bottom(model.input(*x).materialize())
    torch.testing.assert_close(model(*x), torch.cat([torch.sigmoid(tower(h)) for tower in model.towers], dim=1))


def test_single_tasks_share_nothing() -> None:
    model = SingleTask(*SIZES, 0.0)
    predictions = model(*batch())
    for task, other in ((0, 1), (1, 0)):
        loss = predictions[:, task].sum()
        for parts in (model.inputs, model.networks):
            assert min(gradients(loss, parts[task])) > 0
            assert max(gradients(loss, parts[other])) == 0
    assert sum(1 for _ in model.parameters()) == sum(
        1 for parts in (model.inputs, model.networks) for part in parts for _ in part.parameters())


# ---------------------------------------------------------------------------------------------------------- MMoE, OMoE


def test_mmoe_with_one_expert_is_shared_bottom() -> None:
    """Each gate is a softmax over one expert, hence 1."""
    mixed, shared = MMoE(*SIZES, 1, 0.0), SharedBottom(*SIZES, 0.0)
    shared.input.load_state_dict(mixed.input.state_dict())
    shared.towers.load_state_dict(mixed.towers.state_dict())
    first, *later = linears(shared.bottom.hidden)
    copy(mixed.experts.first.weight, first.weight)
    copy(mixed.experts.first.bias, first.bias)
    for layer, weight, bias in zip(later, mixed.experts.weights, mixed.experts.biases, strict=True):
        copy(weight[0], layer.weight)
        copy(bias[0], layer.bias)
    x = batch()
    torch.testing.assert_close(mixed(*x), shared(*x))


def test_omoe_is_mmoe_with_tied_gates() -> None:
    one, multi = OMoE(*SIZES, EXPERTS, 0.0), MMoE(*SIZES, EXPERTS, 0.0)
    for part in ("input", "experts", "towers"):
        getattr(multi, part).load_state_dict(getattr(one, part).state_dict())
    x = batch()
    assert not torch.allclose(multi(*x), one(*x)), "gates of their own make a difference"
    for gate in multi.gates:
        gate.load_state_dict(one.gate.state_dict())
    torch.testing.assert_close(multi(*x), one(*x))


def test_mmoe_is_the_mixture_of_its_experts() -> None:
    model, x = MMoE(*SIZES, EXPERTS, 0.0), batch()
    fields = model.input(*x).materialize()
    experts = model.experts(fields)
    scores = []
    for gate, tower in zip(model.gates, model.towers, strict=True):
        shares = torch.softmax(F.linear(fields, gate.layer.weight, gate.layer.bias), dim=1)
        scores.append(tower(sum(shares[:, e, None] * experts[:, e] for e in range(EXPERTS))))
    torch.testing.assert_close(model(*x), torch.sigmoid(torch.cat(scores, dim=1)))


@pytest.mark.parametrize("name", ["omoe", "mmoe", "ple"])
def test_gates_sum_to_one_wherever_they_stand(name: str) -> None:
    model = make(name)
    sums: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Gate):
            module.register_forward_hook(lambda _module, _inputs, output: sums.append(output.sum(dim=1)))
    model(*batch())
    assert len(sums) == {"omoe": 1, "mmoe": 2, "ple": 5}[name]
    for total in sums:
        torch.testing.assert_close(total, torch.ones(ROWS))


@pytest.mark.parametrize("name", ["omoe", "mmoe", "ple"])
def test_each_bank_of_experts_is_evaluated_once(name: str) -> None:
    model = make(name)
    calls: Counter[nn.Module] = Counter()
    banks = [module for module in model.modules() if isinstance(module, Experts)]
    for bank in banks:
        bank.register_forward_hook(lambda module, _inputs, _output: calls.update([module]))
    model(*batch())
    assert [calls[bank] for bank in banks] == [1] * {"omoe": 1, "mmoe": 1, "ple": 6}[name]


# ----------------------------------------------------------------------------------------------------------------- PLE


@pytest.fixture
def ple() -> PLE:
    return PLE(*SIZES, EXPERTS, 0.0)


def levels(model: PLE) -> list[Extraction]:
    return [level for level in model.levels if isinstance(level, Extraction)]


@pytest.mark.parametrize(("task", "other"), [(0, 1), (1, 0)])
def test_ple_loss_reaches_other_tasks_first_experts(ple: PLE, task: int, other: int) -> None:
    """By way of the shared path, and by that alone: the last level's experts of the other task get nothing."""
    loss = ple(*batch())[:, task].sum()
    first, last = levels(ple)
    assert min(gradients(loss, first.specific[other])) > 0
    assert max(gradients(loss, last.specific[other])) == 0
    assert max(gradients(loss, first.task_gates[other])) == 0


def test_ple_shared_gates_train() -> None:
    model = PLE(FIELD_DIMS, NUMBERS, EMBED, (12, 10, 8), TOWER, TASKS, EXPERTS, 0.0)
    *earlier, last = levels(model)
    assert last.shared_gate is None
    for task in range(TASKS):
        loss = model(*batch())[:, task].sum()
        for level in earlier:
            assert level.shared_gate is not None
            assert min(gradients(loss, level.shared_gate)) > 0


def test_ple_task_loss_reaches_all_task_parameters(ple: PLE) -> None:
    for task in range(TASKS):
        loss = ple(*batch())[:, task].sum()
        for level in levels(ple):
            for part in (level.specific[task], level.shared, level.task_gates[task]):
                assert min(gradients(loss, part)) > 0


def test_ple_level_by_level(ple: PLE) -> None:
    """Equations (4) to (6), written out: each path mixes the experts it may see, each fed by its own path."""
    x = batch()
    tasks, shared = [ple.input(*x).materialize()] * TASKS, ple.input(*x).materialize()
    for level in levels(ple):
        own, common = [bank(h) for bank, h in zip(level.specific, tasks, strict=True)], level.shared(shared)
        outputs = []
        for task, gate in enumerate(level.task_gates):
            seen = torch.cat([own[task], common], dim=1)
            outputs.append(torch.einsum("be,beh->bh", gate(tasks[task]), seen))
        if level.shared_gate is not None:
            shared = torch.einsum("be,beh->bh", level.shared_gate(shared), torch.cat([*own, common], dim=1))
        tasks = outputs
    scores = [tower(h) for tower, h in zip(ple.towers, tasks, strict=True)]
    torch.testing.assert_close(ple(*x), torch.sigmoid(torch.cat(scores, dim=1)))


@pytest.mark.parametrize(("experts", "specific", "shared"), [(2, 1, 1), (5, 2, 3), (8, 4, 4)])
def test_ple_shares_half_of_its_experts(experts: int, specific: int, shared: int) -> None:
    for level in levels(PLE(*SIZES, experts, 0.0)):
        assert [bank.expert_num for bank in level.specific if isinstance(bank, Experts)] == [specific] * TASKS
        assert level.shared.expert_num == shared


def test_ple_of_one_expert_is_refused() -> None:
    assert "expert_num" in user_error_message(lambda: get_model("ple", FIELD_DIMS, NUMBERS, TASKS, 1, EMBED))


# ---------------------------------------------------------------------------------------------------------------- AITM


@pytest.fixture
def aitm() -> AITM:
    return AITM(*SIZES, 0.0)


def test_aitm_attention_is_a_distribution(aitm: AITM) -> None:
    """Where both values are the constant c, their attention-weighted sum is c: the weights sum to 1."""
    value = aitm.values[0]
    assert isinstance(value, nn.Linear)
    constant = torch.randn(value.out_features)
    copy(torch.zeros_like(value.weight), value.weight)
    copy(constant, value.bias)
    reached: list[Tensor] = []
    aitm.towers[1].register_forward_pre_hook(lambda _module, inputs: reached.append(inputs[0]))
    aitm(*batch())
    torch.testing.assert_close(reached[0], constant.expand(ROWS, -1))


def test_aitm_step_by_step(aitm: AITM) -> None:
    """Equations (6) to (8), written out for two tasks."""
    x = batch()
    fields = aitm.input(*x).materialize()
    z0, q1 = (bottom(fields) for bottom in aitm.bottoms)
    p = aitm.transfers[0](z0)
    query, key, value = aitm.queries[0], aitm.keys[0], aitm.values[0]
    scores = torch.stack([(query(u) * key(u)).sum(dim=1) / BOTTOM[-1] ** 0.5 for u in (p, q1)], dim=1)
    weights = torch.softmax(scores, dim=1)
    z1 = weights[:, :1] * value(p) + weights[:, 1:] * value(q1)
    expected = torch.sigmoid(torch.cat([aitm.towers[0](z0), aitm.towers[1](z1)], dim=1))
    torch.testing.assert_close(aitm(*x), expected)


def test_in_aitm_knowledge_flows_from_clicks_to_conversions(aitm: AITM) -> None:
    predictions = aitm(*batch())
    assert min(gradients(predictions[:, 1].sum(), aitm.bottoms[0])) > 0
    assert min(gradients(predictions[:, 1].sum(), aitm.transfers[0])) > 0
    assert max(gradients(predictions[:, 0].sum(), aitm.bottoms[1])) == 0


def test_the_calibrator_by_hand() -> None:
    """Mean over rows of alpha max(p_1 - p_0, 0): rows of 0, 0.2 and 0 at alpha 0.6."""
    model = AITM(*SIZES, 0.0, calibrator_weight=0.6)
    predictions = torch.tensor([[0.5, 0.3], [0.4, 0.6], [0.1, 0.1]])
    assert float(model.calibration_loss(predictions)) == pytest.approx(0.6 * 0.2 / 3)
    three = torch.tensor([[0.1, 0.4, 0.9], [0.9, 0.5, 0.6]])
    chain = AITM(*SIZES[:-1], 3, 0.0, calibrator_weight=0.6)
    assert float(chain.calibration_loss(three)) == pytest.approx(0.6 * ((0.3 + 0.5) + 0.1) / 2)
    fan = AITM(*SIZES[:-1], 3, 0.0, calibrator_weight=0.6, given=[-1, 0, 0])
    assert float(fan.calibration_loss(three)) == pytest.approx(0.6 * (0.3 + 0.8) / 2)


def test_aitm_transfers_along_given_tasks() -> None:
    """Task 1 is given none; task 2 is given task 0."""
    model, x = AITM(*SIZES[:-1], 3, 0.0, given=[-1, -1, 0]), batch()
    predictions = model(*x)
    reads = [[max(gradients(predictions[:, task].sum(), bottom)) > 0 for bottom in model.bottoms] for task in range(3)]
    assert reads == [[True, False, False], [False, True, False], [True, False, True]]
    fields = model.input(*x).materialize()
    torch.testing.assert_close(predictions[:, 1:2], torch.sigmoid(model.towers[1](model.bottoms[1](fields))))


@pytest.mark.parametrize(("given_tasks", "factors"), [
    ([-1, 0, 1], [[0], [0, 1], [0, 1, 2]]), ([-1, -1, -1], [[0], [1], [2]]), ([-1, -1, 0], [[0], [1], [0, 2]]),
    (None, [[0], [0, 1], [0, 2]])], ids=str)
def test_esmm_multiplies_along_given_tasks(given_tasks: list[int] | None, factors: list[list[int]]) -> None:
    model, x = ESMM(*SIZES[:-1], 3, 0.0, given_tasks), batch()
    h = model.bottom(model.input(*x))
    rates = [torch.sigmoid(tower(h))[:, 0] for tower in model.towers]
    expected = torch.stack([torch.stack([rates[number] for number in numbers]).prod(dim=0) for numbers in factors], 1)
    torch.testing.assert_close(model(*x), expected)


@pytest.mark.parametrize("given_tasks", [[-1], [-1, 1], [0, -1], [-1, -2], [-1, 0.0], [-1, 0, 0]], ids=str)
def test_only_earlier_tasks_are_given(given_tasks: list[int]) -> None:
    for cls in (ESMM, AITM):
        with pytest.raises(ValueError, match="given"):
            cls(*SIZES, 0.0, given=given_tasks)


def test_calibrator_weight_is_0_unless_set() -> None:
    predictions = torch.tensor([[0.1, 0.9]])
    assert float(AITM(*SIZES, 0.0).calibration_loss(predictions)) == 0
    model = get_model("aitm", FIELD_DIMS, NUMBERS, TASKS, EXPERTS, EMBED, calibrator_weight=0.5)
    assert isinstance(model, AITM)
    assert float(model.calibration_loss(predictions)) == pytest.approx(0.4)


def test_the_calibrator_pushes_conversions_below_clicks() -> None:
    model, x = AITM(*SIZES, 0.0, calibrator_weight=1.0), batch()
    copy(torch.tensor([2.0]), model.towers[1].output.bias)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = float(model.calibration_loss(model(*x)).detach())
    assert before > 0.2
    for _ in range(60):
        optimizer.zero_grad()
        model.calibration_loss(model(*x)).backward()
        optimizer.step()
    assert float(model.calibration_loss(model(*x)).detach()) < before / 2
