"""Session features: by hand, and never from the future."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset import features as features_module
from dataset.features import (
    Floats,
    features_version,
    running_rates,
    session_feature_names,
    session_features,
    user_history_features,
)
from dataset.rtrl import RetailRocketRLDataset, Splits, load_splits

LABELS = ["click", "pay"]
ITEMS = pd.DataFrame({"itemid": range(10), "785": [str(item % 3) for item in range(10)]})


@pytest.fixture(scope="module")
def splits(rt_tables: Path) -> Splits:
    return load_splits(rt_tables)


def features(table: pd.DataFrame) -> Floats:
    """The numerical features of a table in any order, by the data set."""
    return RetailRocketRLDataset(table, ITEMS, ["785"], LABELS).numerical


SESSION = pd.DataFrame(
    [  # Seconds: shown, then when it was clicked and paid. Item 0 is clicked late, item 1 at once, item 2 much later.
        (0, 1, 0, 1, 1, 15, 200),
        (10, 1, 1, 0, 1, 10, None),
        (30, 1, 2, 0, 1, 150, None),
        (100, 1, 3, 0, 0, None, None),
        (300, 1, 4, 0, 0, None, None),
        (1, 2, 5, 0, 0, None, None),  # another session, in between
        (4, 2, 6, 0, 0, None, None),
    ],
    columns=["timestamp", "sessionid", "itemid", "pay", "click", "click_time", "pay_time"],
).astype({"click_time": float, "pay_time": float})
SESSION[["timestamp", "click_time", "pay_time"]] *= 1000


def log_gap(seconds: float) -> float:
    return float(np.log1p(seconds) / 10)


def test_names_of_the_features() -> None:
    assert session_feature_names() == ["position", "click_rate", "pay_rate", "last_click", "last_pay", "log_gap"]
    assert session_feature_names(["like"]) == ["position", "like_rate", "last_like", "log_gap"]


def test_a_session_by_hand() -> None:
    """An outcome counts once it has happened: item 0's purchase, at 200 s, counts in the last row only."""
    expected = [
        [0, 0, 0, 0, 0, 0],
        [np.log(2), 0, 0, 0, 0, log_gap(10)],  # at 10 s neither item 0 (15 s) nor anything else is clicked
        [np.log(3), 2 / 3, 0, 1, 0, log_gap(20)],
        [np.log(4), 2 / 4, 0, 0, 0, log_gap(70)],  # item 2, of the previous row, is clicked at 150 s
        [np.log(5), 3 / 5, 1 / 5, 0, 0, log_gap(200)],
        [0, 0, 0, 0, 0, 0],
        [np.log(2), 0, 0, 0, 0, log_gap(3)],
    ]
    assert session_features(SESSION) == pytest.approx(np.array(expected), abs=1e-6)


def test_without_times_outcomes_count_from_the_next_row() -> None:
    """The published tables have no times of clicks."""
    numerical = features(SESSION.drop(columns=["click_time", "pay_time"]))
    assert numerical[:, 1] == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4, 3 / 5, 0, 0])
    assert numerical[:, 2] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 0, 0])
    assert numerical[:, 3].tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert numerical[:, 4].tolist() == [0, 1, 0, 0, 0, 0, 0]


def test_features_depend_on_the_session_only() -> None:
    assert features(SESSION.sample(frac=1, random_state=3)) == pytest.approx(features(SESSION))
    assert features(SESSION[SESSION["sessionid"] == 1]) == pytest.approx(features(SESSION)[:5])


def test_features_of_the_simulated_log(splits: Splits) -> None:
    """The first row of a session has zeros only; each feature takes several values."""
    for split in (splits.train, splits.val, splits.test):
        is_first = np.append(True, split.session[1:] != split.session[:-1])
        assert not split.numerical[is_first].any()
        assert (split.numerical[~is_first, 0] > 0).all()
        assert np.isfinite(split.numerical).all()
    assert (splits.train.numerical.std(axis=0) > 0.001).all()


def test_features_version_changes_with_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    version = features_version()
    assert version == features_version()
    assert len(version) == 16
    monkeypatch.setattr(features_module, "session_features", lambda *args: 2 * session_features(*args))
    assert features_version() != version


def test_user_history_crosses_sessions_and_splits() -> None:
    first = SESSION[:2].assign(user=5)
    second = SESSION[2:5].assign(user=5, sessionid=3)
    history = user_history_features({"train": first, "val": second}, "user", LABELS)
    assert np.concatenate([history["train"], history["val"]]) == pytest.approx(session_features(SESSION[:5]))


class SessionStrategy:
    """A session: per row the item, the wait since the row before, and when it is clicked and paid (None: never)."""

    def __init__(self, rows: list[tuple[int, int, int | None, int | None]]) -> None:
        self.items, waits, clicks, pays = zip(*rows, strict=True)
        self.times = np.cumsum(waits).tolist()
        self.click_times = [None if delay is None else time + delay
                            for time, delay in zip(self.times, clicks, strict=True)]
        self.pay_times = [None if delay is None or click is None else click + delay
                          for click, delay in zip(self.click_times, pays, strict=True)]

    def table(self, session: int = 1) -> pd.DataFrame:
        return pd.DataFrame({
            "timestamp": self.times, "sessionid": session, "itemid": self.items,
            "click": [int(time is not None) for time in self.click_times],
            "pay": [int(time is not None) for time in self.pay_times],
            "click_time": np.array(self.click_times, float), "pay_time": np.array(self.pay_times, float)})


session_rows = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 4).map(lambda wait: wait * 1000),
              st.none() | st.integers(0, 9).map(lambda delay: delay * 1000),
              st.none() | st.integers(0, 9).map(lambda delay: delay * 1000)),
    min_size=1, max_size=8)


@given(before=session_rows, after=session_rows, other=session_rows, data=st.data())
def test_features_do_not_depend_on_the_future(before: list[Any], after: list[Any], other: list[Any],
                                              data: st.DataObject) -> None:
    """Row i keeps its features if later rows, its own labels, or outcomes from its time on change."""
    original = SessionStrategy(before)
    i = data.draw(st.integers(0, len(before) - 1), label="row")
    now = original.times[i]
    altered = SessionStrategy(before[: i + 1] + after)

    def alter(times: list[int | None], row: int) -> None:
        """Move an outcome that is unknown at row i to a different time that is unknown at row i, or to never."""
        known = times[row]
        if row == i or known is None or known >= now:
            times[row] = data.draw(st.none() | st.integers(0, 9).map(lambda delay: now + delay * 1000))

    for row in range(i + 1):
        alter(altered.click_times, row)
        alter(altered.pay_times, row)
    table = pd.concat([original.table(), SessionStrategy(other).table(session=2)])
    altered_table = pd.concat([SessionStrategy(after).table(session=2), altered.table()])

    def features_of_row_i(table: pd.DataFrame) -> Floats:
        data_set = RetailRocketRLDataset(table, ITEMS, ["785"], LABELS)
        return data_set.numerical[np.flatnonzero(data_set.session == 1)[i]]

    np.testing.assert_array_equal(features_of_row_i(table), features_of_row_i(altered_table))


@given(before=session_rows, after=session_rows, data=st.data())
def test_published_features_do_not_depend_on_the_future(before: list[Any], after: list[Any],
                                                        data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(before) - 1), label="row")
    table = SessionStrategy(before).table()[["timestamp", "sessionid", "itemid", *LABELS]]
    altered = SessionStrategy(before[: i + 1] + after).table()[list(table)]
    click = data.draw(st.integers(0, 1))
    altered.loc[i, LABELS] = [click, click * data.draw(st.integers(0, 1))]
    np.testing.assert_array_equal(features(table)[i], features(altered)[i])


def log_odds(rate: float) -> float:
    return float(np.log(rate / (1 - rate)))


def test_running_rates_by_hand() -> None:
    """A click counts from its time on, in all later rows of the value, whatever their session."""
    table = pd.DataFrame({"timestamp": [0, 10, 20, 30], "click": [1, 0, 1, 0],
                          "click_time": [12.0, np.nan, 20.0, np.nan]})
    expected = []
    for shown, clicks, all_shown, all_clicks in ((0, 0, 0, 0), (1, 0, 1, 0), (0, 0, 2, 1), (2, 1, 3, 2)):
        prior = (all_clicks + 0.5) / (all_shown + 1)
        expected.append([np.log1p(shown), log_odds((clicks + 20 * prior) / (shown + 20))])
    got = running_rates(table, {"song": np.array([4, 4, -1, 4])}, ["click"])
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@given(st.data())
def test_running_rates_ignore_the_present_and_future(data: st.DataObject) -> None:
    """Rows that are not earlier may have any outcome; so may earlier rows whose outcome is not known yet."""
    count = data.draw(st.integers(2, 12))
    numbers = st.lists(st.integers(0, 8), min_size=count, max_size=count)
    time, delay, click, value = (np.array(data.draw(numbers)) for _ in range(4))
    row = data.draw(st.integers(0, count - 1))
    table = pd.DataFrame({"timestamp": time, "click": (click > 4).astype(float)})
    table["click_time"] = (time + delay).astype(float)
    changed = table.copy()
    unknown = table["click_time"] >= time[row]
    changed.loc[unknown, "click"] = 1 - changed.loc[unknown, "click"]
    first, second = (running_rates(one, {"value": value % 3}, ["click"]).iloc[row] for one in (table, changed))
    np.testing.assert_array_equal(first, second)
