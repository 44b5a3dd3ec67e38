"""What importers share: sessions, the order of the rows, times of outcomes, an existing folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import user_error_message
from hypothesis import given
from hypothesis import strategies as st

from dataset.tables import (
    CountRow,
    FeatureTable,
    PreparedDataset,
    number_sessions,
    order_rows,
    print_row_counts,
    validation_start,
    write_dataset,
)

# Two train sessions that interleave, and ties in time; the column `row` is the expected place of a row.
ROWS = pd.DataFrame(
    [(1, 7, 50, 5), (0, 3, 20, 3), (0, 4, 10, 0), (0, 3, 15, 2), (0, 4, 20, 1), (2, 5, 90, 8), (0, 3, 20, 4),
     (1, 7, 50, 6), (2, 6, 80, 7)],
    columns=["split", "sessionid", "timestamp", "row"])


def test_order_by_hand() -> None:
    """By split, session start, session and time; rows of one time keep their order."""
    rows = order_rows(ROWS)
    assert rows["row"].tolist() == list(range(len(ROWS)))
    assert rows.index.tolist() == list(range(len(ROWS)))
    assert validation_start(rows) == 50
    pd.testing.assert_frame_equal(order_rows(rows), rows)


def test_sessions_that_start_together_stay_apart() -> None:
    rows = pd.DataFrame({"split": [0, 0, 0, 0, 1, 2], "sessionid": [2, 1, 2, 1, 3, 4], "timestamp": [5, 5, 5, 6, 7, 8]})
    assert order_rows(rows)["sessionid"].tolist() == [1, 1, 2, 2, 3, 4]


@pytest.mark.parametrize("splits", [[0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 2, 2]])
def test_a_split_is_empty_or_unknown(splits: list[int]) -> None:
    rows = pd.DataFrame({"split": splits, "sessionid": range(4), "timestamp": range(4)})
    assert "the remaining 4 sessions (4 rows) cannot be cut" in user_error_message(lambda: order_rows(rows))


def test_a_session_is_in_two_splits() -> None:
    rows = pd.DataFrame({"split": [0, 1, 2], "sessionid": [8, 9, 9], "timestamp": range(3)})
    assert "session 9 is in two splits" in user_error_message(lambda: order_rows(rows))


def test_session_numbers_by_hand() -> None:
    """Users interleave; a session ends with its split, and after a gap of more than one minute if one is given."""
    user, time, split = [5, 2, 5, 2, 5, 2], [0, 10_000, 60_000, 70_001, 60_000, 99_000], [0, 0, 0, 0, 1, 2]
    assert number_sessions(user, time, split).tolist() == [1, 0, 1, 0, 2, 3]
    assert number_sessions(user, time, split, gap_minutes=1).tolist() == [2, 0, 2, 1, 3, 4]
    assert number_sessions(user, time).tolist() == [1, 0, 1, 0, 1, 0]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 2)), min_size=1))
def test_sessions_are_the_groups(rows: list[tuple[int, int, int]]) -> None:
    user, time, split = np.array(rows).T
    session = number_sessions(user, 60_000 * time, split)
    expected = pd.DataFrame({"split": split, "user": user}).groupby(["split", "user"]).ngroup()
    np.testing.assert_array_equal(session, expected)
    with_gaps = pd.DataFrame({"session": session, "number": number_sessions(user, 60_000 * time, split, 2.0),
                              "time": time}).sort_values(["session", "time"])
    starts = (with_gaps["session"].diff() != 0) | (with_gaps["time"].diff() > 2)
    np.testing.assert_array_equal(with_gaps["number"], np.cumsum(starts) - 1)


def example(**columns: object) -> PreparedDataset:
    """One row a session and split, in seconds 1 to 4; all but the first were clicked, the last was paid."""
    rows = pd.DataFrame({"split": [0, 0, 1, 2], "sessionid": range(4), "timestamp": [1000, 2000, 3000, 4000],
                         "itemid": 1, "click": [0, 1, 1, 1], "pay": [0, 0, 0, 1], **columns})
    return PreparedDataset(
        source="by hand", rows=order_rows(rows), row_counts=[CountRow("rows read", 4, 0)], inputs=[],
        feature_tables={"item_feadf.csv": FeatureTable("itemid", pd.DataFrame({"itemid": [1], "color": ["red"]}))},
        context=[], long_tailed=[], tasks=[{"name": "CTR", "label": "click"}, {"name": "CTCVR", "label": "pay"}])


def test_outcome_times_default_to_the_row(tmp_path: Path) -> None:
    """A label without times is known directly after its row; a time where the label is 0 is not written."""
    write_dataset(example(pay_time=[9000.0, np.nan, np.nan, 7000.0]), tmp_path / "mine", settings={})
    rows = pd.concat(pd.read_csv(tmp_path / "mine" / f"{name}.csv", dtype=str) for name in ("train", "val", "test"))
    assert rows.columns.tolist() == ["timestamp", "sessionid", "itemid", "pay", "click", "click_time", "pay_time"]
    assert rows["click_time"].fillna("").tolist() == ["", "2000", "3000", "4000"]
    assert rows["pay_time"].fillna("").tolist() == ["", "", "", "7000"]


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    text = user_error_message(lambda: write_dataset(example(), tmp_path / "mine", settings={}))
    assert text.startswith(f"{tmp_path / 'mine'} exists already")
    assert not [*(tmp_path / "mine").iterdir()]


def test_printed_statistics_of_the_splits(capsys: pytest.CaptureFixture[str]) -> None:
    print_row_counts(example())
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train", "2", "2", "50.00%", "0.00%", "1,", "1,", "1"] in printed
    assert ["all", "4", "4", "75.00%", "25.00%", "1,", "1,", "1"] in printed
