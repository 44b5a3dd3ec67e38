"""The simulator: bit for bit from its seed, with the marks of the real log, and a truth that is calibrated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, complaint, snapshot

from dataset.simulate import WEEKS, SimulationConfig, simulate

RAW_FILES = ["category_tree.csv", "events.csv", "item_properties_part1.csv", "item_properties_part2.csv",
             "simulation.json", "truth.csv"]


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 60,000 events: enough for statistics."""
    folder = tmp_path_factory.mktemp("larger") / "raw"
    simulate(folder, SimulationConfig(events=60_000, items=3_000, property_rows=40_000, seed=3))
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


def test_the_layout_is_that_of_the_kaggle_files(larger: Path) -> None:
    assert sorted(path.name for path in larger.iterdir()) == RAW_FILES
    heads = {name: (larger / name).read_text().split("\n", 1)[0] for name in RAW_FILES if name.endswith(".csv")}
    assert heads["events.csv"] == "timestamp,visitorid,event,itemid,transactionid"
    assert heads["item_properties_part1.csv"] == heads["item_properties_part2.csv"] == "timestamp,itemid,property,value"
    assert heads["category_tree.csv"] == "categoryid,parentid"


def test_the_same_seed_gives_the_same_bytes(raw_log: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "again", SMALL)
    assert snapshot(tmp_path / "again") == snapshot(raw_log)


def test_another_seed_gives_another_log(raw_log: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "other", SimulationConfig(SMALL.events, SMALL.items, SMALL.property_rows, seed=SMALL.seed + 1))
    one, other = snapshot(raw_log), snapshot(tmp_path / "other")
    assert [name for name in RAW_FILES if one[name] == other[name] and name != "category_tree.csv"] == []


@pytest.mark.parametrize("seed", [3, 4])
def test_the_size_is_about_what_was_asked_for(tmp_path: Path, seed: int) -> None:
    simulate(tmp_path / "raw", SimulationConfig(events=30_000, items=1_500, property_rows=20_000, seed=seed))
    assert len(pd.read_csv(tmp_path / "raw" / "events.csv")) == pytest.approx(30_000, rel=0.1)
    rows = sum(len(pd.read_csv(tmp_path / "raw" / f"item_properties_part{part}.csv")) for part in (1, 2))
    assert rows == 20_000


def test_shares_of_the_events(events: pd.DataFrame) -> None:
    """The real log has 96.7 % views, 2.5 % carts and 0.8 % purchases."""
    shares = events["event"].value_counts(normalize=True)
    assert sorted(shares.index) == ["addtocart", "transaction", "view"]
    assert shares["view"] == pytest.approx(0.967, abs=0.008)
    assert shares["addtocart"] == pytest.approx(0.025, abs=0.006)
    assert shares["transaction"] == pytest.approx(0.008, abs=0.003)


def test_transaction_numbers_belong_to_purchases(events: pd.DataFrame) -> None:
    bought = events["event"] == "transaction"
    assert events.loc[bought, "transactionid"].notna().all()
    assert events.loc[~bought, "transactionid"].isna().all()


@pytest.mark.parametrize(("label", "probability"), [("click", "p_click"), ("pay", "p_pay")])
def test_the_truth_is_calibrated(outcomes: pd.DataFrame, label: str, probability: str) -> None:
    """The sum of y - p has mean 0 and variance sum p (1 - p): altogether, and in each tenth of p."""
    p = outcomes[probability]
    groups = [outcomes.index, *outcomes.groupby(pd.qcut(p.rank(method="first"), 10)).groups.values()]
    for rows in groups:
        surplus = (outcomes.loc[rows, label] - p[rows]).sum()
        assert abs(surplus) < 4 * np.sqrt((p[rows] * (1 - p[rows])).sum()) + 1e-9


def test_the_truth_is_worth_knowing(outcomes: pd.DataFrame) -> None:
    """Clicks are several times as frequent in the tenth where they are likeliest as in the lower half."""
    rank = outcomes["p_click"].rank(pct=True)
    assert outcomes.loc[rank > 0.9, "click"].mean() > 4 * outcomes.loc[rank < 0.5, "click"].mean()


def test_a_purchase_is_never_likelier_than_a_click(outcomes: pd.DataFrame) -> None:
    assert (outcomes["p_pay"] <= outcomes["p_click"]).all()
    assert outcomes["p_click"].between(0, 1).all()


def test_items_are_heavy_tailed(events: pd.DataFrame) -> None:
    views = events["itemid"].value_counts()
    assert views.iloc[: len(views) // 10].sum() > 0.4 * len(events), "a tenth of the items draws much of the attention"
    assert views.median() < views.mean() / 1.5


def test_session_lengths_are_heavy_tailed(events: pd.DataFrame) -> None:
    """Most visitors come for one item; a few see so many that no geometric law of the same mean has them."""
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
    bare = ~events["itemid"].drop_duplicates().isin(properties["itemid"])
    assert 0.01 < bare.mean() < 0.2


def test_properties_change_over_the_weeks(properties: pd.DataFrame) -> None:
    assert 10 < properties["timestamp"].nunique() <= WEEKS
    available = properties[properties["property"] == "available"]
    assert set(available["value"]) == {"0", "1"}
    assert (available.groupby("itemid")["value"].nunique() == 2).mean() > 0.3


def test_values_are_hashed_texts_of_several_words_and_numbers(properties: pd.DataFrame) -> None:
    values = properties["value"]
    assert values.str.contains(r"^\d+ \d+$").any()
    assert values.str.contains(r"\bn\d+\.000").any()


def test_earlier_clicks_predict_later_ones(outcomes: pd.DataFrame) -> None:
    """The hidden intent moves with what happens: after a click the next item is clicked far more often."""
    ordered = outcomes.sort_values(["visitorid", "timestamp"])
    same = ordered["visitorid"].eq(ordered["visitorid"].shift())
    before = ordered["click"].shift()[same] > 0
    after = ordered["click"][same]
    assert before.sum() > 50
    assert after[before].mean() > 2 * after[~before].mean()


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "events.csv").write_text("mine")
    assert "exists already" in complaint(lambda: simulate(tmp_path / "raw", SMALL))
    assert snapshot(tmp_path) == {"raw/events.csv": b"mine"}


@pytest.mark.parametrize("size", [{"events": 5}, {"items": 3}, {"property_rows": -1}, {"seed": -1}],
                         ids=lambda size: next(iter(size)))
def test_a_size_that_makes_no_log_is_refused(size: dict[str, int]) -> None:
    assert "simulate" in complaint(lambda: SimulationConfig(**size))
