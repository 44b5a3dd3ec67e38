"""Encoders of the session: no leakage, no influence of padding, and critics with an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import user_error_message
from factories import handmade
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import layers.sequence
from agents import DDPG_ESMM, DDPG_ESMM_BC
from agents.DDPG_ESMM import init_critic_from_actor
from dataset.loader import TensorLoader
from dataset.rtrl import RetailRocketRLDataset
from env import MTEnv
from layers import CriticNeg
from layers.sequence import (
    CONTEXT_DIM,
    ENCODER_CLASSES,
    SequenceCritic,
    SequenceModel,
    make_critic,
)
from slmodels import MODELS, build
from slmodels.model_file import model_metadata, save_model
from train.offline_rl import evaluate_critics, one_iter_offline
from train.polish import RlLossPolisher
from train.run import get_model, slpred, sltrain

FIELD_DIMS, NUMBERS, EMBED = [7, 5], 3, 8
SIZES: tuple[Any, ...] = (EMBED, (16, 8), (8, 4))
with_encoders = pytest.mark.parametrize("encoder", ENCODER_CLASSES)


def encoded_model(encoder: str, window: int, name: str = "esmm", dropout: float = 0.0) -> SequenceModel:
    model = build(name, FIELD_DIMS, NUMBERS, *SIZES, 2, 4, dropout, encoder, window)
    assert isinstance(model, SequenceModel)
    return model


def session(rows: int) -> tuple[Tensor, Tensor]:
    """One session as a window: ids (1, W, F), numbers (1, W, N)."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randint(1, dim, (1, rows), generator=generator) for dim in FIELD_DIMS], dim=2)
    return ids, torch.randn(1, rows, NUMBERS, generator=generator)


def padded(ids: Tensor, numbers: Tensor, window: int, of: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same, preceded by nothing up to `window` places."""
    more = window - ids.shape[1]
    return (torch.cat([ids.new_full((1, more, ids.shape[2]), -1), ids], dim=1),
            torch.cat([numbers.new_full((1, more, NUMBERS), of), numbers], dim=1))


# ----------------------------------------------------------------------------------------------------------- encoders


@with_encoders
@pytest.mark.parametrize("rows", [1, 3])
def test_result_is_independent_of_padding(encoder: str, rows: int) -> None:
    wide, narrow = encoded_model(encoder, 10).eval(), encoded_model(encoder, 5).eval()
    narrow.load_state_dict({name: value[:5] if name == "encoder.age.weight" else value
                            for name, value in wide.state_dict().items()})
    expected = wide(*session(rows))
    for model, window in ((wide, 10), (wide, 4), (narrow, 5)):
        torch.testing.assert_close(model(*padded(*session(rows), window)), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(wide(*padded(*session(rows), 10, of=float("nan"))), expected, rtol=0, atol=1e-6)


@with_encoders
def test_window_is_independent_of_its_batch(encoder: str) -> None:
    model, parts = encoded_model(encoder, 6).eval(), [padded(*session(rows), 6) for rows in (1, 6, 3, 2)]
    whole = model(*(torch.cat(list(one)) for one in zip(*parts, strict=True)))
    torch.testing.assert_close(whole, torch.cat([model(*one) for one in parts]), rtol=0, atol=1e-6)


@with_encoders
def test_encoder_depends_on_items_and_their_order(encoder: str) -> None:
    model, (ids, numbers) = encoded_model(encoder, 4).eval(), session(4)
    answer = model(ids, numbers)
    for place in range(3):
        other = ids.clone()
        other[0, place, 0] = (other[0, place, 0] + 1) % FIELD_DIMS[0]
        assert not torch.equal(model(other, numbers), answer), place
        moved = numbers.clone()
        moved[0, place] += 1
        assert not torch.equal(model(ids, moved), answer), place
    swapped = [0, 2, 1, 3]
    assert not torch.allclose(model(ids[:, swapped], numbers[:, swapped]), answer, rtol=0, atol=1e-7)


@with_encoders
def test_gradients_reach_encoder_and_shown_embedding_rows(encoder: str) -> None:
    """Of the shared table, those in the window and no others: padding embeds nothing, not even id 0."""
    model, (ids, numbers) = encoded_model(encoder, 9), padded(*session(3), 9)
    model.encoder(model.input_layer(0).embedding, ids, numbers)[1].sum().backward()
    missing = [name for name, one in model.encoder.named_parameters() if one.grad is None or not one.grad.any()]
    assert not missing
    gradient = model.input_layer(0).embedding.embedding.weight.grad
    assert gradient is not None
    shown = {int(one) for one in (ids[0, 6:] + model.input_layer(0).embedding.offsets).flatten()}
    assert set(gradient.any(dim=1).nonzero().flatten().tolist()) == shown


@with_encoders
def test_encoder_gradients_equal_plain_torch(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through windows, the shared table and the context, as numbers of the fused first layer."""
    model = encoded_model(encoder, 4)
    parts = [padded(*session(rows), 4) for rows in (1, 3, 4, 2, 4, 4)]
    batch = [torch.cat(list(one)) for one in zip(*parts, strict=True)]
    assert len(model.input_layer(0).embedding.embedding.weight) <= batch[0][:, -1].numel(), "the kernel is chosen"

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad((model(*batch) * torch.linspace(-1, 2, 12).view(6, 2)).sum(),
                                        list(model.parameters())))

    fused = gradients()
    monkeypatch.setattr(layers.sequence.LazyConcat, "linear",
                        lambda self, weight, bias: nn.functional.linear(self.materialize(), weight, bias))
    for got, wanted in zip(fused, gradients(), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


@with_encoders
@pytest.mark.parametrize("name", [name for name in MODELS if name != "metaheac"])
def test_every_model_trains_behind_an_encoder(encoder: str, name: str) -> None:
    model = encoded_model(encoder, 5, name, dropout=0.2)
    batch = [torch.cat(list(one)) for one in zip(*(padded(*session(rows), 5) for rows in (1, 2, 5)), strict=True)]
    predictions = model(*batch)
    assert predictions.shape == (3, 2)
    assert bool(((predictions > 0) & (predictions < 1)).all())
    predictions.sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in model.parameters())
    assert model.window == 5
    assert model.inner.window == 0
    torch.testing.assert_close(model.inner.eval()(batch[0], torch.randn(3, 5, NUMBERS + CONTEXT_DIM)).shape,
                               predictions.shape)


def test_encoder_delegates_losses_and_metaheac_refuses_it() -> None:
    text = user_error_message(lambda: get_model("metaheac", FIELD_DIMS, NUMBERS, 2, 4, EMBED, encoder="gru"))
    assert "MetaHeac" in text
    model = get_model("aitm", FIELD_DIMS, NUMBERS, 2, 4, EMBED, 0.0, 0.7, "gru", 4)
    assert isinstance(model, SequenceModel)
    dataset, losses = windows_of([3, 2, 4]), []
    nn.init.constant_(model.inner.towers[1].output.bias, 3.0)  # type: ignore[index, union-attr]
    for calibrator_weight in (0.0, 0.7):
        model.inner.calibrator_weight = calibrator_weight  # type: ignore[assignment]
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
        losses.append(sltrain(model, optimizer, TensorLoader(dataset, 9, window=4), nn.BCELoss(), "cpu"))
    assert losses[1] > losses[0], "the penalty counts"


# ------------------------------------------------------------------------------------------------------------ windows


def windows_of(lengths: list[int], seed: int = 0) -> RetailRocketRLDataset:
    """Sessions of these lengths with random ids, numbers and labels."""
    rng, rows = np.random.default_rng(seed), sum(lengths)
    click = rng.integers(2, size=rows)
    labels = np.column_stack([click, click * rng.integers(2, size=rows)]).tolist()
    dataset = handmade(lengths, labels, rng.integers([7, 5], size=(rows, 2)).tolist(), FIELD_DIMS)
    dataset.numerical = rng.normal(size=(rows, NUMBERS)).astype(np.float32)
    return dataset


lengths_of = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@given(lengths=lengths_of, window=st.integers(1, 9), seed=st.one_of(st.none(), st.integers(0, 9)))
def test_loader_windows_equal_environment_observations(lengths: list[int], window: int, seed: int | None) -> None:
    dataset = windows_of(lengths)
    loader = TensorLoader(dataset, 4, seed=seed, window=window)
    order = np.arange(len(dataset)) if seed is None else np.random.default_rng([seed, 0]).permutation(len(dataset))
    observed = MTEnv(dataset, is_seq=True, window=window).sessions.observe(order)
    ids, numbers, labels = (torch.cat(list(one)).numpy() for one in zip(*loader, strict=True))
    np.testing.assert_array_equal(ids, observed[..., :2])
    np.testing.assert_array_equal(numbers, observed[..., 2:])
    np.testing.assert_array_equal(labels, dataset.labels[order])


@given(lengths=lengths_of, window=st.integers(1, 9), seed=st.integers(0, 9), data=st.data())
def test_window_has_no_leakage(lengths: list[int], window: int, seed: int, data: st.DataObject) -> None:
    one, other = windows_of(lengths, seed), windows_of(lengths, seed + 100)
    row = data.draw(st.integers(0, len(one) - 1))
    mine = (np.arange(len(one)) <= row) & (one.session == one.session[row])
    other.categorical[mine], other.numerical[mine] = one.categorical[mine], one.numerical[mine]
    for got, wanted in zip(TensorLoader(other, 4, window=window).take(torch.tensor([row]))[:2],
                           TensorLoader(one, 4, window=window).take(torch.tensor([row]))[:2], strict=True):
        assert torch.equal(got, wanted)


@given(lengths=lengths_of, window=st.integers(1, 5), seed=st.integers(0, 9))
def test_unique_windows_equal_numpy_unique(lengths: list[int], window: int, seed: int) -> None:
    dataset, rng = windows_of(lengths), np.random.default_rng(seed)
    dataset.set_ids(rng.integers(2, size=(len(dataset), 1)), [2])
    dataset.numerical = np.zeros((len(dataset), 1), np.float32)
    loader = TensorLoader(dataset, 4, window=window)
    windows = loader.take(torch.arange(len(dataset)))[0].flatten(1).numpy()
    distinct, place = (one.numpy() for one in loader.unique_rows)
    assert len(distinct) == len(np.unique(windows, axis=0))
    np.testing.assert_array_equal(windows[distinct][place], windows)


@with_encoders
def test_encoder_learns_what_features_cannot(encoder: str) -> None:
    """A click is which of two items was met two rows before, a coin in a session's first two rows; items are drawn
    alone. The best AUC that there is: a click from the three quarters of the rows that can be known is always above,
    one of the others above three quarters and level with the last."""
    rng = np.random.default_rng(5)
    items = rng.integers(2, size=(1500, 8))
    clicks = np.hstack([rng.integers(2, size=(1500, 2)), items[:, :-2]])

    def split(part: slice) -> RetailRocketRLDataset:
        one = handmade([8] * 750, np.repeat(clicks[part].reshape(-1, 1), 2, axis=1).tolist(),
                       items[part].reshape(-1, 1).tolist(), [2])
        one.numerical = np.zeros((6000, 1), np.float32)
        return one

    train, test = split(slice(750)), split(slice(750, None))

    def auc(encoder: str) -> float:
        torch.manual_seed(1)
        model = build("esmm", [2], 1, 8, (64, 32), (16,), 2, 2, 0.0, encoder, 4)
        optimizer, window = torch.optim.Adam(model.parameters(), 0.01), model.window
        loader = TensorLoader(train, 256, seed=1, window=window)
        for loader.epoch in range(5):
            sltrain(model, optimizer, loader, nn.BCELoss(reduction="none"), "cpu")
        predictions = slpred(model, TensorLoader(test, 512, window=window), 2, "cpu")
        return float(roc_auc_score(test.labels[:, 0], predictions[0]))

    best = 3 / 4 + 1 / 4 * (3 / 4 + 1 / 8)
    assert auc(encoder) > 0.5 + 0.9 * (best - 0.5)
    assert abs(auc("none") - 0.5) < 3 * (12 * 1500) ** -0.5, "within three standard errors of a coin: 3,000 a class"


# ------------------------------------------------------------------------------------------------------------ critics


def agent_of(folder: Path, encoder: str, critic_encoder: str, lengths: list[int], window: int = 3,
             cls: type[DDPG_ESMM] = DDPG_ESMM_BC, **hyparams: Any) -> DDPG_ESMM:
    dataset = windows_of(lengths)
    actor = build("esmm", FIELD_DIMS, NUMBERS, *SIZES, 2, 2, 0.2, encoder, window)
    save_model(folder / ("rt_esmm.pt" if encoder == "none" else f"rt_esmm_{encoder}.pt"), actor,
               model_metadata(dataset.metadata, "esmm", 2, EMBED, 2, (16, 8), (8, 4), encoder, window))
    return cls(MTEnv(dataset, is_seq=True, window=window), pretrain_path=folder, memory_size=200, batch_size=16,
               encoder=encoder, critic_encoder=critic_encoder, **hyparams)


@pytest.mark.parametrize(("encoder", "critic_encoder"), [("gru", "gru"), ("attention", "attention"), ("none", "gru"),
                                                         ("gru", "none"), ("gru", "attention")])
def test_agent_with_encoder_stores_windows_and_learns(tmp_path: Path, encoder: str, critic_encoder: str) -> None:
    agent = agent_of(tmp_path, encoder, critic_encoder, [1, 3, 5, 2])
    assert isinstance(agent, DDPG_ESMM_BC)
    dataset = windows_of([1, 3, 5, 2])
    for critic, target, _ in agent.critics():
        source = agent.actor.input_layer(0)
        assert torch.equal(critic.input.embedding.embedding.weight, source.embedding.embedding.weight)
        assert torch.equal(critic.input.numerical.weight[:, :NUMBERS], source.numerical.weight[:, :NUMBERS])
        assert isinstance(critic, SequenceCritic) == isinstance(target, SequenceCritic) == (critic_encoder != "none")
        if isinstance(critic, SequenceCritic) and encoder == critic_encoder:
            assert isinstance(agent.actor, SequenceModel)
            for one, other in zip(critic.encoder.parameters(), agent.actor.encoder.parameters(), strict=True):
                assert torch.equal(one, other)
                assert one is not other

    assert one_iter_offline(agent) == len(dataset) == len(agent.memory)
    np.testing.assert_array_equal(
        np.unique(agent.memory.data["state"][: len(dataset)], axis=0),
        np.unique(agent.env.sessions.observe(np.arange(len(dataset))).reshape(len(dataset), -1), axis=0))
    observation, _ = agent.env.reset(options={"session": 2})
    assert observation.shape == (3, 2 + NUMBERS)
    single, batch = (agent.select_action(one, noise=False) for one in (observation, observation[None]))
    np.testing.assert_allclose(single, batch[0], atol=1e-6)
    assert single.shape == (2,)

    agent.fit_normalizer_and_cache()
    for critic, _, _ in agent.critics():
        current = critic.input.standardizer
        np.testing.assert_allclose(current.mean[:NUMBERS], dataset.numerical.mean(axis=0), atol=1e-5)
        assert not current.mean[NUMBERS:].any()
        assert (current.std[NUMBERS:] == 1).all()
    before = {name: one.clone() for name, one in agent.critic1.named_parameters()}
    losses = agent.update()
    assert all(bool(one.isfinite()) for one in losses)
    assert any(not torch.equal(one, before[name]) for name, one in agent.critic1.named_parameters()
               if name.startswith("encoder" if critic_encoder != "none" else "first"))
    assert all(np.isfinite(list(evaluate_critics(agent.env, agent).values())))
    agent.critic1.reset_head()


@with_encoders
def test_ddpg_trains_the_encoder_through_the_critics(tmp_path: Path, encoder: str) -> None:
    agent = agent_of(tmp_path, encoder, encoder, [1, 3, 5, 2], cls=DDPG_ESMM, init_training_step=0)
    one_iter_offline(agent)
    assert isinstance(agent.actor, SequenceModel)
    before = agent.actor.encoder.step.weight.clone()
    for _ in range(2):
        agent.update()
    assert not torch.equal(agent.actor.encoder.step.weight, before)


def test_critic_encoder_starts_from_actor_encoder() -> None:
    """Where the actor sees none, from its embedding and its layer of numbers alone."""
    critic = make_critic("gru", 3, FIELD_DIMS, NUMBERS, *SIZES)
    fresh = [one.clone() for one in critic.input.numerical.weight.split([NUMBERS, CONTEXT_DIM], dim=1)]
    init_critic_from_actor(critic, build("singletask", FIELD_DIMS, NUMBERS, *SIZES, 2, 2, 0.0), 1)
    assert not torch.equal(critic.input.numerical.weight[:, :NUMBERS], fresh[0])
    assert torch.equal(critic.input.numerical.weight[:, NUMBERS:], fresh[1])


def test_critics_with_encoder_weight_model_without() -> None:
    """The model takes the present impression of the window; the weights are those of asking each with its own."""
    model, critics = build("esmm", FIELD_DIMS, NUMBERS, *SIZES, 2, 2, 0.0), []
    for _ in range(2):
        critics.append(make_critic("gru", 4, FIELD_DIMS, NUMBERS, *SIZES))
    polisher = RlLossPolisher(model, critics, 1.0)
    assert polisher.window == 4
    ids, numbers, labels = TensorLoader(windows_of([3, 5]), 8, window=4).take(torch.arange(8))
    action = model.eval()(ids[:, -1], numbers[:, -1])
    q = torch.stack([critic.eval()(ids, numbers, action[:, [task]]) for task, critic in enumerate(critics)], dim=1)
    torch.testing.assert_close(polisher.weights(ids, numbers, labels), 1 - q.detach())
    assert RlLossPolisher(model, [CriticNeg(FIELD_DIMS, NUMBERS, *SIZES)], 1.0).window == 0
