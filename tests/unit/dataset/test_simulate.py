"""The simulator: a function of its seed, statistics like the real log's, calibrated ground truth, oracle returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, read_tree, user_error_message

import dataset.simulate as simulator
from common.errors import UserError
from dataset.simulate import WEEKS, SimulationConfig, expected_return, read_ground_truth, simulate

CONFIG = SimulationConfig(events=60_000, items=3_000, property_rows=40_000, seed=3)
RAW_FILES = ["category_tree.csv", "events.csv", "item_properties_part1.csv", "item_properties_part2.csv",
             "simulation.json", "truth.csv"]


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 60,000 events: enough for statistics."""
    folder = tmp_path_factory.mktemp("larger") / "raw"
    simulate(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def events(larger: Path) -> pd.DataFrame:
    return pd.read_csv(larger / "events.csv")


@pytest.fixture(scope="module")
def properties(larger: Path) -> pd.DataFrame:
    return pd.concat(pd.read_csv(larger / f"item_properties_part{part}.csv", dtype={"property": str, "value": str})
                     for part in (1, 2))


@pytest.fixture(scope="module")
def outcomes(larger: Path, events: pd.DataFrame) -> pd.DataFrame:
    """The truth of each first impression, with what happened: click and pay, as `dataset.prepare` defines them."""
    truth = pd.read_csv(larger / "truth.csv")
    for label, kinds in (("click", ["addtocart", "transaction"]), ("pay", ["transaction"])):
        happened = events.loc[events["event"].isin(kinds), ["visitorid", "itemid"]].drop_duplicates()
        truth = truth.merge(happened.assign(**{label: 1}), on=["visitorid", "itemid"], how="left")
    return truth.fillna({"click": 0, "pay": 0})


def test_layout_of_the_kaggle_files(larger: Path) -> None:
    assert sorted(path.name for path in larger.iterdir()) == RAW_FILES
    heads = {name: (larger / name).read_text().split("\n", 1)[0] for name in RAW_FILES if name.endswith(".csv")}
    assert heads["events.csv"] == "timestamp,visitorid,event,itemid,transactionid"
    assert heads["item_properties_part1.csv"] == heads["item_properties_part2.csv"] == "timestamp,itemid,property,value"
    assert heads["category_tree.csv"] == "categoryid,parentid"


def test_same_seed_same_bytes(raw_log: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "again", SMALL)
    assert read_tree(tmp_path / "again") == read_tree(raw_log)


def test_a_different_seed_gives_a_different_log(raw_log: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "other", SimulationConfig(SMALL.events, SMALL.items, SMALL.property_rows, seed=SMALL.seed + 1))
    log, different = read_tree(raw_log), read_tree(tmp_path / "other")
    assert [name for name in RAW_FILES if log[name] == different[name] and name != "category_tree.csv"] == []


def test_size_of_the_log(events: pd.DataFrame, properties: pd.DataFrame) -> None:
    assert len(events) == pytest.approx(CONFIG.events, rel=0.1)
    assert len(properties) == CONFIG.property_rows


def test_event_rates(events: pd.DataFrame) -> None:
    """The real log has 96.7 % views, 2.5 % carts and 0.8 % purchases."""
    shares = events["event"].value_counts(normalize=True)
    assert sorted(shares.index) == ["addtocart", "transaction", "view"]
    assert shares["view"] == pytest.approx(0.967, abs=0.008)
    assert shares["addtocart"] == pytest.approx(0.025, abs=0.006)
    assert shares["transaction"] == pytest.approx(0.008, abs=0.003)


def test_only_purchases_have_transaction_ids(events: pd.DataFrame) -> None:
    bought = events["event"] == "transaction"
    assert events.loc[bought, "transactionid"].notna().all()
    assert events.loc[~bought, "transactionid"].isna().all()


@pytest.mark.parametrize(("label", "probability"), [("click", "p_click"), ("pay", "p_pay")])
def test_the_ground_truth_is_calibrated(outcomes: pd.DataFrame, label: str, probability: str) -> None:
    """The sum of y - p has mean 0 and variance sum p (1 - p): overall, and in each decile of p."""
    p = outcomes[probability]
    groups = [outcomes.index, *outcomes.groupby(pd.qcut(p.rank(method="first"), 10)).groups.values()]
    for rows in groups:
        excess = (outcomes.loc[rows, label] - p[rows]).sum()
        assert abs(excess) < 4 * np.sqrt((p[rows] * (1 - p[rows])).sum()) + 1e-9


def test_the_ground_truth_ranks_clicks(outcomes: pd.DataFrame) -> None:
    """The click rate of the top decile is several times that of the lower half."""
    rank = outcomes["p_click"].rank(pct=True)
    assert outcomes.loc[rank > 0.9, "click"].mean() > 4 * outcomes.loc[rank < 0.5, "click"].mean()


def test_p_pay_is_at_most_p_click(outcomes: pd.DataFrame) -> None:
    assert (outcomes["p_pay"] <= outcomes["p_click"]).all()
    assert outcomes["p_click"].between(0, 1).all()


def test_items_are_heavy_tailed(events: pd.DataFrame) -> None:
    views = events["itemid"].value_counts()
    assert views.iloc[: len(views) // 10].sum() > 0.4 * len(events), "a tenth of the items has many of the views"
    assert views.median() < views.mean() / 1.5


def test_session_lengths_are_heavy_tailed(events: pd.DataFrame) -> None:
    """Most visitors view one item; a few view more than a geometric distribution of the same mean would give."""
    items = events.groupby("visitorid")["itemid"].nunique()
    assert (items == 1).mean() > 0.5
    longest_if_geometric = np.log(len(items)) / -np.log1p(-1 / items.mean())
    assert items.max() > 2 * longest_if_geometric


def test_categories_are_heavy_tailed(larger: Path, properties: pd.DataFrame) -> None:
    sizes = properties[properties["property"] == "categoryid"].drop_duplicates("itemid")["value"].value_counts()
    assert sizes.iloc[0] > 3 * sizes.median()
    tree = pd.read_csv(larger / "category_tree.csv")
    assert set(sizes.index.astype(int)) <= set(tree["categoryid"])
    assert set(tree["parentid"].dropna().astype(int)) <= set(tree["categoryid"])


def test_some_items_have_no_properties(events: pd.DataFrame, properties: pd.DataFrame) -> None:
    without_properties = ~events["itemid"].drop_duplicates().isin(properties["itemid"])
    assert 0.01 < without_properties.mean() < 0.2


def test_properties_change_over_the_weeks(properties: pd.DataFrame) -> None:
    assert 10 < properties["timestamp"].nunique() <= WEEKS
    available = properties[properties["property"] == "available"]
    assert set(available["value"]) == {"0", "1"}
    assert (available.groupby("itemid")["value"].nunique() == 2).mean() > 0.3


def test_values_are_hashed_texts(properties: pd.DataFrame) -> None:
    values = properties["value"]
    assert values.str.contains(r"^\d+ \d+$").any()
    assert values.str.contains(r"\bn\d+\.000").any()


def test_earlier_clicks_predict_later_ones(outcomes: pd.DataFrame) -> None:
    """The hidden intent depends on outcomes: after a click the next item is clicked far more often."""
    ordered = outcomes.sort_values(["visitorid", "timestamp"])
    same = ordered["visitorid"].eq(ordered["visitorid"].shift())
    before = ordered["click"].shift()[same] > 0
    after = ordered["click"][same]
    assert before.sum() > 50
    assert after[before].mean() > 2 * after[~before].mean()


def test_a_log_in_blocks(larger: Path, events: pd.DataFrame, properties: pd.DataFrame, tmp_path: Path,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is larger than a block is another draw of the same: the visitors of one block follow those before."""
    monkeypatch.setattr(simulator, "EVENTS_PER_BLOCK", 9_000)
    monkeypatch.setattr(simulator, "PROPERTY_ROWS_PER_BLOCK", 9_000)
    simulate(tmp_path / "raw", CONFIG)
    blocks = pd.read_csv(tmp_path / "raw" / "events.csv")
    assert len(blocks) == pytest.approx(len(events), rel=0.05)
    assert (blocks["visitorid"].diff()[1:] >= 0).all()
    assert blocks["visitorid"].nunique() == events["visitorid"].nunique()
    assert (blocks.groupby("visitorid")["timestamp"].diff().dropna() >= 0).all()
    bought = blocks["transactionid"].dropna()
    assert sorted(bought) == [*range(len(bought))], "each purchase has a number of its own"
    shares = blocks["event"].value_counts(normalize=True)
    assert shares["addtocart"] == pytest.approx(0.025, abs=0.006)
    first = blocks[blocks["event"] == "view"].groupby(["visitorid", "itemid"]).size()
    truth = read_ground_truth(tmp_path / "raw" / "truth.csv", CONFIG)
    assert len(truth) == len(first)
    assert (truth["visitorid"].diff()[1:] >= 0).all()
    rows = pd.concat(pd.read_csv(tmp_path / "raw" / f"item_properties_part{part}.csv", dtype={"value": str})
                     for part in (1, 2))
    assert len(rows) == len(properties)
    used = rows["property"].isin(["785", "categoryid"])
    assert used[:9_000].mean() == pytest.approx(used[-9_000:].mean(), rel=0.2), "spread over the blocks"
    names = ["timestamp", "itemid", "property", "value"]
    of_items = [table[table["property"] == "categoryid"][names].sort_values(names).to_numpy().tolist()
                for table in (rows, properties)]
    assert of_items[0] == of_items[1]


def test_expected_return_in_blocks(larger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ground_truth = read_ground_truth(larger / "truth.csv", CONFIG)[:1_000]
    whole = expected_return(CONFIG, ground_truth, gamma=0.9)
    monkeypatch.setattr(simulator, "ROLLOUTS_PER_BLOCK", 20_000)
    blocks = expected_return(CONFIG, ground_truth, gamma=0.9)
    assert blocks.shape == whole.shape
    assert np.corrcoef(blocks[:, 0], whole[:, 0])[0, 1] > 0.5
    assert not np.array_equal(blocks, whole)


def test_expected_return_of_oracle_predictions(larger: Path) -> None:
    """With gamma 0 the return is the negative entropy of the first impression; later rows add negative rewards."""
    ground_truth = read_ground_truth(larger / "truth.csv", CONFIG).query("position == 2")[:3_000]
    immediate = expected_return(CONFIG, ground_truth, gamma=0.0, rollouts=64)
    p = ground_truth[["p_click", "p_pay"]].clip(1e-4, 1 - 1e-4).to_numpy()
    negative_entropy = p * np.log(p) + (1 - p) * np.log(1 - p)
    assert immediate.mean(axis=0) == pytest.approx(negative_entropy.mean(axis=0), rel=0.08)
    assert (expected_return(CONFIG, ground_truth, gamma=1.0, rollouts=8).mean(axis=0) < immediate.mean(axis=0)).all()
    with pytest.raises(UserError, match="unknown item"):
        expected_return(CONFIG, ground_truth.assign(itemid=10**9), gamma=1.0)


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "events.csv").write_text("mine")
    assert "exists already" in user_error_message(lambda: simulate(tmp_path / "raw", SMALL))
    assert read_tree(tmp_path) == {"raw/events.csv": b"mine"}


@pytest.mark.parametrize("settings", [{"events": 5}, {"items": 3}, {"property_rows": -1}, {"seed": -1}],
                         ids=lambda settings: next(iter(settings)))
def test_an_invalid_config_is_refused(settings: dict[str, int]) -> None:
    assert "simulate" in user_error_message(lambda: SimulationConfig(**settings))
