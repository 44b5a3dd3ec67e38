"""Simulated shopping logs in the raw Kaggle layout of RetailRocket, with the true probabilities in a separate file.

    python3 -m dataset.simulate --out raw                              # small: seconds on a laptop
    python3 -m dataset.simulate --out raw --events 2756101 --items 417053 --property_rows 20275902    # full size

The output is `events.csv`, `item_properties_part1.csv`, `item_properties_part2.csv`, `category_tree.csv` and
`truth.csv`: for each impression the probability of a click and of a purchase given the complete state, hidden intent
included. No model can rank better, so the best possible AUC is known.

The behaviour model (`ShopSimulator.step` is one impression of every active visitor), at position n with intent z:

    P(click | item i)     = sigmoid(b + click_logit_i + z)                 b, b': calibrated to the mean FIRST_CLICK of
    P(buy | click)        = sigmoid(b' + purchase_logit_i + BUY_INTENT z)  a first impression, and FIRST_BUY of those
    z'                    = m + INTENT_DECAY (z - m) + INTENT_AFTER_CLICK click - INTENT_AFTER_BUY buy
                            + INTENT_NOISE noise                           m: the visitor's base intent
    P(another impression) = sigmoid(STAY_BIAS + STAY_LENGTH log n + STAY_INTENT z')
    log gap in seconds    = GAP_BIAS - GAP_INTENT z' + GAP_NOISE noise

So earlier outcomes of a session predict later ones, and a click predicts the session's later reward. The logits of an
item are sums over its property values; an item that is unavailable that week is bought less.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.csv_reader import ColumnType, cell_location, scan, to_frame
from common.duck import connect
from common.errors import UserError, cli_entry_point
from common.fileio import atomic_folder, check_writable, exclusive_lock, write_json

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

START_MS = 1_430_622_000_000  # 2015-05-03, the first day of the RetailRocket log
WEEK_MS = 7 * 24 * 3600 * 1000
WEEKS = 18  # weekly property snapshots
EVENTS_PER_VISITOR = 2.03  # mean of many seeds, given the constants below

FIRST_CLICK, FIRST_BUY, BUY_INTENT = 0.025, 0.25, 0.5
INTENT_STD, INTENT_DECAY, INTENT_AFTER_CLICK, INTENT_AFTER_BUY, INTENT_NOISE = 0.25, 0.85, 2.1, 2.0, 0.15
STAY_BIAS, STAY_LENGTH, STAY_INTENT, MAX_SESSION_LENGTH = -0.9, 0.75, 0.45, 400
GAP_BIAS, GAP_INTENT, GAP_NOISE, P_DAYS_LATER = 4.3, 0.8, 0.4, 0.04
P_REVISIT, P_LATE_CART, P_LATE_BUY, P_NO_CART = 0.22, 0.08, 0.35, 0.05
P_PREFERRED_CATEGORY = 0.6  # of an impression to be of the visitor's preferred category

# Property -> (number of values, 0: of the catalogue's size; std of its effect on the click logit, on the purchase
# logit). 364 and 776 are long-tailed and have no effect.
PROPERTY_EFFECTS: dict[str, tuple[int, float, float]] = {
    "785": (12, 1.2, 1.2),
    "591": (30, 0.4, 0.3),
    "814": (20, 0.4, 0.3),
    "available": (2, 0.0, 0.0),
    "categoryid": (0, 0.3, 0.25),
    "364": (0, 0.0, 0.0),
    "776": (0, 0.0, 0.0),
}
MAX_COUNT = 1_000_000_000
UNAVAILABLE = -2.5  # added to the purchase logit if available is 0
# Columns of truth.csv, one row per impression: p_click and p_pay, and the visitor's hidden state before it.
GROUND_TRUTH_SCHEMA: dict[str, ColumnType] = {
    "timestamp": "id", "visitorid": "id", "itemid": "id", "p_click": "number", "p_pay": "number", "intent": "number",
    "mood": "number", "category": "id", "position": "id"}
# Made at once, so that memory is bounded: 310 bytes an event, 116 a property row, 260 a rollout. Logs of a block each
# are the same whatever the size of a block.
EVENTS_PER_BLOCK = PROPERTY_ROWS_PER_BLOCK = 3_000_000
ROLLOUTS_PER_BLOCK = 2**21
UNUSED_PROPERTIES = ("790", "888", "283", "6", "202", "159", "112", "678")


@dataclass(frozen=True)
class SimulationConfig:
    """How much to simulate. It determines the log, bit for bit."""

    events: int = 300_000
    items: int = 12_000
    property_rows: int = 240_000
    seed: int = 2022

    def __post_init__(self) -> None:
        if self.events < 100 or self.items < 50 or self.property_rows < 0 or self.seed < 0:
            raise UserError("simulate: at least 100 events, 50 items, 0 property rows and seed 0 are needed")
        if max(self.events, self.items, self.property_rows) > MAX_COUNT or self.seed >= 2**63:
            raise UserError(f"simulate: at most {MAX_COUNT:,} events, items and property rows, and a seed below 2^63")


@dataclass
class VisitorState:
    """The active visitors, one entry each (V,)."""

    ids: Ints
    preferred_category: Ints
    base_intent: Floats  # m
    intent: Floats  # z
    position: Ints  # n, from 1
    time_ms: Floats
    viewed_items: Ints  # (V, n - 1)

    def filter(self, mask: NDArray[np.bool_]) -> VisitorState:
        return VisitorState(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))


@dataclass
class StepResult:
    """One impression of every visitor (V,): item, probabilities, outcomes."""

    items: Ints
    is_repeated: NDArray[np.bool_]  # viewed before: neither clicked nor a row of its own
    p_click: Floats
    p_pay: Floats
    click: NDArray[np.bool_]
    pay: NDArray[np.bool_]
    gap_ms: Floats  # until the next impression
    continues: NDArray[np.bool_]


class ShopSimulator:
    """The catalogue and the behaviour model; `step` does not change it."""

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        rng = np.random.default_rng([config.seed, 1])
        self.num_categories = num_categories(config)
        tail = max(50, config.items // 15)
        # Items are ordered by category: a category is an interval of the cumulative popularity.
        self.category = np.sort(_zipf(rng, self.num_categories, config.items, 0.9))  # (I,)
        popularity = rng.pareto(1.1, config.items) + 0.05
        self.cumulative = np.concatenate([[0.0], np.cumsum(popularity)])  # (I + 1,)
        bounds = np.searchsorted(self.category, np.arange(self.num_categories + 1))
        self.category_bounds = self.cumulative[bounds]  # (C + 1,)
        self.item_ids = rng.permutation(np.arange(1, 2 * config.items))[: config.items].astype(np.int64)

        counts = {name: count or (self.num_categories if name == "categoryid" else tail)
                  for name, (count, _, _) in PROPERTY_EFFECTS.items()}
        self.values = {name: _zipf(rng, count, config.items, 1.1) for name, count in counts.items()}  # (I,) each
        self.values["categoryid"] = self.category
        draws, is_stocked = rng.random((WEEKS, config.items)), rng.random(config.items) < 0.7
        self.available = draws < np.where(is_stocked, 0.95, 0.3)  # (W, I)
        self.has_properties = rng.random(config.items) < 0.93  # in the log
        click_effect = {name: rng.normal(0, PROPERTY_EFFECTS[name][1], count) for name, count in counts.items()}
        purchase_effect = {name: rng.normal(0, PROPERTY_EFFECTS[name][2], count) for name, count in counts.items()}
        self.click_logit: Floats = np.sum([click_effect[name][self.values[name]] for name in counts], axis=0)  # (I,)
        self.purchase_logit: Floats = np.sum([purchase_effect[name][self.values[name]] for name in counts], axis=0)
        # The popular items and their logits vary with the seed; the rates of carts and purchases should not.
        items = self._draw_items(rng, np.zeros(20_000), np.full(20_000, self.cumulative[-1]))
        intent = rng.normal(0, INTENT_STD, len(items))
        out_of_stock = UNAVAILABLE * ~self.available[rng.integers(0, WEEKS, len(items)), items]
        self.click_logit += _calibrate_intercept(self.click_logit[items] + intent, np.ones(len(items)), FIRST_CLICK)
        p_click = _sigmoid(self.click_logit[items] + intent)
        self.purchase_logit += _calibrate_intercept(
            self.purchase_logit[items] + out_of_stock + BUY_INTENT * intent, p_click, FIRST_BUY)

    def sample_visitors(self, rng: np.random.Generator, count: int) -> VisitorState:
        """`count` visitors at their first impression, distributed uniformly over the weeks."""
        base_intent = rng.normal(0, INTENT_STD, count)
        return VisitorState(
            ids=rng.permutation(count).astype(np.int64),
            preferred_category=self.category[
                self._draw_items(rng, np.zeros(count), np.full(count, self.cumulative[-1]))],
            base_intent=base_intent,
            intent=base_intent.copy(),
            position=np.ones(count, np.int64),
            time_ms=START_MS + rng.random(count) * WEEKS * WEEK_MS,
            viewed_items=np.zeros((count, 0), np.int64),
        )

    def step(self, rng: np.random.Generator, visitors: VisitorState,
             items: Ints | None = None) -> tuple[StepResult, VisitorState]:
        """Show each visitor an item, that of `items` or a random one; returns the result and the next state of those
        who continue."""
        count = len(visitors.ids)
        is_preferred = rng.random(count) < P_PREFERRED_CATEGORY
        low = np.where(is_preferred, self.category_bounds[visitors.preferred_category], 0.0)
        high = np.where(is_preferred, self.category_bounds[visitors.preferred_category + 1], self.cumulative[-1])
        items = self._draw_items(rng, low, high) if items is None else items
        is_repeated = (visitors.viewed_items == items[:, None]).any(axis=1)

        week = np.minimum((visitors.time_ms - START_MS) // WEEK_MS, WEEKS - 1).astype(np.int64)
        p_click = _sigmoid(self.click_logit[items] + visitors.intent)
        out_of_stock = UNAVAILABLE * ~self.available[week, items]
        p_buy = _sigmoid(self.purchase_logit[items] + out_of_stock + BUY_INTENT * visitors.intent)
        click = (rng.random(count) < p_click) & ~is_repeated
        pay = (rng.random(count) < p_buy) & click

        noise = rng.normal(size=(2, count))
        decayed = (visitors.base_intent + INTENT_DECAY * (visitors.intent - visitors.base_intent)
                   + INTENT_NOISE * noise[0])
        intent = np.where(is_repeated, visitors.intent, decayed + INTENT_AFTER_CLICK * click - INTENT_AFTER_BUY * pay)
        p_continue = _sigmoid(STAY_BIAS + STAY_LENGTH * np.log(visitors.position) + STAY_INTENT * intent)
        continues = (rng.random(count) < p_continue) & (visitors.position < MAX_SESSION_LENGTH)
        gap_ms = 1000 * np.exp(GAP_BIAS - GAP_INTENT * intent + GAP_NOISE * noise[1])
        is_days_later = rng.random(count) < P_DAYS_LATER
        gap_ms = np.where(is_days_later, gap_ms + rng.exponential(3 * 24 * 3600 * 1000, count), gap_ms)

        next_state = VisitorState(visitors.ids, visitors.preferred_category, visitors.base_intent, intent,
                                  visitors.position + 1, visitors.time_ms + gap_ms,
                                  np.column_stack([visitors.viewed_items, items]))
        result = StepResult(items, is_repeated, p_click, p_click * p_buy, click, pay, gap_ms, continues)
        return result, next_state.filter(continues)

    def _draw_items(self, rng: np.random.Generator, low: Floats, high: Floats) -> Ints:
        """Draw items by popularity within [low, high) of the cumulative popularity."""
        position = low + rng.random(len(low)) * (high - low)
        return np.minimum(np.searchsorted(self.cumulative, position, side="right") - 1, self.config.items - 1)


def simulate(out_dir: Path, config: SimulationConfig) -> None:
    """Write a raw log into the folder `out_dir`, which must not exist. Raises UserError."""
    with exclusive_lock(out_dir):
        if out_dir.exists():
            raise UserError(f"{out_dir} exists already: choose another --out, or remove it first")
        check_writable(out_dir.parent)
        shop = ShopSimulator(config)
        with atomic_folder(out_dir) as folder:
            for events, ground_truth in _simulate_events(shop):
                _append_csv(folder / "events.csv", events)
                _append_csv(folder / "truth.csv", ground_truth)
            for properties in _simulate_properties(shop):
                half = (len(properties) + 1) // 2
                _append_csv(folder / "item_properties_part1.csv", properties[:half])
                _append_csv(folder / "item_properties_part2.csv", properties[half:])
            _category_tree(shop).to_csv(folder / "category_tree.csv", index=False)
            write_json(folder / "simulation.json", {"simulated": True, **asdict(config)})


def _append_csv(path: Path, rows: pd.DataFrame) -> None:
    rows.to_csv(path, mode="a", header=not path.exists(), index=False)


def _block_sizes(count: int, block: int) -> list[int]:
    """`count` in parts of nearly the same size, at most `block` each; one part at least."""
    parts = max(1, -(-count // block))
    return [count // parts + (part < count % parts) for part in range(parts)]


def config_from_manifest(simulation: Any, path: Path) -> SimulationConfig:
    """The settings of a simulated log from the JSON value `simulation` of the file `path`. Raises UserError."""
    names = SimulationConfig.__dataclass_fields__
    if not isinstance(simulation, dict) or any(type(simulation.get(name)) is not int for name in names):
        raise UserError(f"{path}: not the settings of a simulated log: {', '.join(names)}, whole numbers each")
    try:
        return SimulationConfig(**{name: simulation[name] for name in names})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_ground_truth(path: Path, config: SimulationConfig, optional: Sequence[str] = ()) -> pd.DataFrame:
    """The table of `scan_ground_truth` in memory."""
    with connect() as con:
        return to_frame(scan_ground_truth(con, path, config, optional))


def scan_ground_truth(con: DuckDBPyConnection, path: Path, config: SimulationConfig,
                      optional: Sequence[str] = ()) -> DuckDBPyRelation:
    """`scan` truth.csv of a simulated log. Raises UserError naming row and column of a value that is out of range."""
    ground_truth = scan(con, path, GROUND_TRUTH_SCHEMA, optional)
    ranges = {"p_click": (0, 1), "p_pay": (0, 1), "intent": (-1e3, 1e3), "mood": (-1e3, 1e3),
              "category": (0, num_categories(config) - 1), "position": (1, MAX_SESSION_LENGTH),
              "itemid": (1, 2 * config.items)}
    invalid = ground_truth.aggregate(", ".join(
        f"min(CASE WHEN {name} NOT BETWEEN {low} AND {high} THEN row END)" for name, (low, high) in ranges.items()))
    for (name, (low, high)), row in zip(ranges.items(), invalid.fetchall()[0], strict=True):
        if row is not None:
            (value,) = ground_truth.filter(f"row = {row}").project(name).fetchall()[0]
            raise UserError(f"{cell_location(path, row, name)}: {value} is not between {low:g} and {high:g}")
    return ground_truth


def num_categories(config: SimulationConfig) -> int:
    return max(20, min(1_200, config.items // 100))


def expected_return(config: SimulationConfig, ground_truth: pd.DataFrame, gamma: float, rollouts: int = 64) -> Floats:
    """The true expected discounted return of oracle predictions in the rows `ground_truth` (n,): (n, 2), for clicks
    and purchases.

    The actions are the true probabilities, the reward is the negative cross-entropy. The return is the mean of
    `rollouts` simulated continuations from the row's hidden state: the target of an ideal critic. The tables contain
    no sessions of one row, so for the first row of a session only continuations of two rows or more count.
    """
    shop = ShopSimulator(config)
    rng = np.random.default_rng([config.seed, 4])
    item_index = pd.Index(shop.item_ids).get_indexer(pd.Index(ground_truth["itemid"]))
    unknown = ground_truth["itemid"].to_numpy()[item_index < 0]
    if len(unknown):
        raise UserError(f"truth.csv: unknown item {unknown[0]}: it is not in the simulated catalogue")
    parts = max(1, -(-len(ground_truth) * rollouts // ROLLOUTS_PER_BLOCK))
    blocks = np.array_split(np.arange(len(ground_truth)), parts)
    return np.concatenate([_mean_returns(shop, rng, ground_truth.iloc[block], item_index[block], gamma, rollouts)
                           for block in blocks])


def _mean_returns(shop: ShopSimulator, rng: np.random.Generator, ground_truth: pd.DataFrame, item_index: Ints,
                  gamma: float, rollouts: int) -> Floats:
    """`expected_return` of rows (n,) whose items are `item_index` (n,): (n, 2)."""
    rows = np.tile(np.arange(len(ground_truth)), rollouts)
    start = {name: ground_truth[name].to_numpy()[rows]
             for name in ("category", "mood", "intent", "position", "timestamp")}
    visitors = VisitorState(rows, start["category"], start["mood"], start["intent"], start["position"],
                            start["timestamp"].astype(np.float64), np.zeros((len(rows), 0), np.int64))
    rollout, items = np.arange(len(rows)), item_index[rows]
    returns, discount, length = np.zeros((len(rows), 2)), np.ones(len(rows)), np.zeros(len(rows))
    is_first_step = True
    while len(visitors.ids):
        step, next_state = shop.step(rng, visitors, items if is_first_step else None)
        p = np.clip(np.column_stack([step.p_click, step.p_pay]), 1e-4, 1 - 1e-4)
        # The reward `bce` of env.compute_reward, in float64.
        reward = np.where(np.column_stack([step.click, step.pay]), np.log(p), np.log1p(-p))
        is_row = ~step.is_repeated  # a repeated item is no row of its own
        returns[rollout[is_row]] += discount[rollout[is_row], None] * reward[is_row]
        discount[rollout[is_row]] *= gamma
        length[rollout[is_row]] += 1
        rollout, visitors, is_first_step = rollout[step.continues], next_state, False
    counts = ((length >= 2) | (start["position"] > 1)).reshape(rollouts, len(ground_truth), 1)
    rollout_returns = returns.reshape(rollouts, len(ground_truth), 2)
    mean_of_counted = (rollout_returns * counts).sum(axis=0) / np.maximum(counts.sum(axis=0), 1)
    return np.where(counts.any(axis=0), mean_of_counted, rollout_returns.mean(axis=0))


def _simulate_events(shop: ShopSimulator) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """The events of all visitors, block by block, and the ground truth of each first impression of an item."""
    rng = np.random.default_rng([shop.config.seed, 2])
    num_visitors = max(2, round(shop.config.events / EVENTS_PER_VISITOR))
    first_visitor, first_transaction = 0, 0
    for count in _block_sizes(num_visitors, round(EVENTS_PER_BLOCK / EVENTS_PER_VISITOR)):
        visitors = shop.sample_visitors(rng, count)
        visitors.ids += first_visitor
        events, ground_truth = _events_of(shop, rng, visitors, first_transaction)
        first_visitor += count
        first_transaction += int(events["event"].eq("transaction").sum())
        yield events, ground_truth
        del events, ground_truth


def _events_of(shop: ShopSimulator, rng: np.random.Generator, visitors: VisitorState,
               first_transaction: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All events of these visitors, and the ground truth, by visitor and time."""
    event_tables: list[pd.DataFrame] = []
    truth_tables: list[pd.DataFrame] = []
    while len(visitors.ids):
        state, ids, time_ms = visitors, visitors.ids, visitors.time_ms
        step, visitors = shop.step(rng, visitors)
        item_ids = shop.item_ids[step.items]
        event_tables.append(_event_rows("view", time_ms, ids, item_ids))
        is_revisited = rng.random(len(ids)) < P_REVISIT
        revisit_time = time_ms + step.gap_ms * rng.uniform(0.01, 0.9, len(ids))
        event_tables.append(_event_rows("view", revisit_time, ids, item_ids, is_revisited))
        cart_time = time_ms + step.gap_ms * rng.uniform(0.05, 0.5, len(ids))
        cart_time += (rng.random(len(ids)) < P_LATE_CART) * (step.gap_ms + rng.exponential(600_000, len(ids)))
        purchase_time = cart_time + step.gap_ms * rng.uniform(0.05, 0.4, len(ids))
        purchase_time += (rng.random(len(ids)) < P_LATE_BUY) * (step.gap_ms + rng.exponential(600_000, len(ids)))
        without_cart = (rng.random(len(ids)) < P_NO_CART) & step.pay
        event_tables.append(_event_rows("addtocart", cart_time, ids, item_ids, step.click & ~without_cart))
        event_tables.append(_event_rows("transaction", purchase_time, ids, item_ids, step.pay))
        truth_tables.append(pd.DataFrame({
            "timestamp": time_ms.astype(np.int64), "visitorid": ids, "itemid": item_ids, "p_click": step.p_click,
            "p_pay": step.p_pay, "intent": state.intent, "mood": state.base_intent,
            "category": state.preferred_category, "position": state.position,
        })[~step.is_repeated])
    events = pd.concat(event_tables, ignore_index=True)
    is_purchase = events["event"].eq("transaction").to_numpy()
    events["transactionid"] = ""
    transactions = first_transaction + rng.permutation(int(is_purchase.sum()))
    events.loc[is_purchase, "transactionid"] = transactions.astype(str)
    # By visitor, as in the published file: not by time.
    events = events.iloc[np.lexsort((events["itemid"], events["timestamp"], events["visitorid"]))]
    ground_truth = pd.concat(truth_tables, ignore_index=True)
    order = np.lexsort((ground_truth["timestamp"], ground_truth["visitorid"]))
    return (events[["timestamp", "visitorid", "event", "itemid", "transactionid"]],
            ground_truth.iloc[order].round(6))


def _event_rows(event: str, time_ms: Floats, visitors: Ints, items: Ints,
                mask: NDArray[np.bool_] | None = None) -> pd.DataFrame:
    rows = pd.DataFrame({"timestamp": time_ms.astype(np.int64), "visitorid": visitors, "event": event,
                         "itemid": items})
    return rows if mask is None else rows[mask]


def _simulate_properties(shop: ShopSimulator) -> Iterator[pd.DataFrame]:
    """Weekly snapshots: constant properties once, availability when it changes, unused properties up to the size.
    Block by block, each with its fraction of the used properties."""
    rng = np.random.default_rng([shop.config.seed, 3])
    described = np.flatnonzero(shop.has_properties)
    tables: list[pd.DataFrame] = []
    for name, values in shop.values.items():
        if name == "available":
            for week in range(WEEKS):
                changed = described if week == 0 else described[
                    shop.available[week, described] != shop.available[week - 1, described]]
                available = shop.available[week, changed].astype(int).astype(str)
                tables.append(_property_rows(shop, name, week, changed, available))
            continue
        texts = np.array([_hash_value(name, value) for value in range(int(values.max()) + 1)], dtype=object)
        items = described[rng.random(len(described)) < (0.97 if PROPERTY_EFFECTS[name][0] else 0.9)]
        if name == "categoryid":
            items = described
        tables.append(_property_rows(shop, name, 0, items, texts[values[items]]))
        # A few values are written again, unchanged, in a later week.
        rewritten = items[rng.random(len(items)) < 0.05]
        tables.append(_property_rows(shop, name, int(rng.integers(1, WEEKS)), rewritten, texts[values[rewritten]]))
    used = pd.concat(tables, ignore_index=True)
    sizes = _block_sizes(max(len(used), shop.config.property_rows), PROPERTY_ROWS_PER_BLOCK)
    for block, size in enumerate(sizes):
        part = used[block::len(sizes)]
        rows = pd.concat([part, _unused_properties(shop, rng, max(0, size - len(part)))], ignore_index=True)
        yield rows.iloc[rng.permutation(len(rows))]


def _unused_properties(shop: ShopSimulator, rng: np.random.Generator, count: int) -> pd.DataFrame:
    described = np.flatnonzero(shop.has_properties)
    items = described[rng.integers(0, len(described), count)]
    tokens = rng.integers(1, 1_400_000, (2, 50_000))
    prices = rng.integers(1, 10**6, 50_000)
    texts = np.array([f"{a} {b}" if k % 3 else f"n{p}.000 {a}" for k, (a, b, p) in
                      enumerate(zip(*tokens, prices, strict=True))], dtype=object)
    return pd.DataFrame({
        "timestamp": START_MS + WEEK_MS * rng.integers(0, WEEKS, count),
        "itemid": shop.item_ids[items],
        "property": np.array(UNUSED_PROPERTIES, dtype=object)[rng.integers(0, len(UNUSED_PROPERTIES), count)],
        "value": texts[rng.integers(0, len(texts), count)],
    })


def _property_rows(shop: ShopSimulator, name: str, week: int, items: Ints, values: NDArray[Any]) -> pd.DataFrame:
    return pd.DataFrame({"timestamp": START_MS + WEEK_MS * week, "itemid": shop.item_ids[items], "property": name,
                         "value": values})


def _hash_value(name: str, value: int) -> str:
    """The hashed text of value number `value` of a property: one or two tokens, or a token and a number after an n."""
    if name == "categoryid":
        return str(value)
    token = (value * 7919 + len(name) * 104_729 + int(name) * 1_299_709) % 1_400_000
    if name == "591":
        return f"{token} n{12 * (value + 1)}.000"
    return f"{token} {(token * 31) % 1_400_000}" if name in ("814", "364") else str(token)


def _category_tree(shop: ShopSimulator) -> pd.DataFrame:
    """The categories of items, and their parents, which are roots without items."""
    num_roots = max(5, shop.num_categories // 3)
    parents = [str(shop.num_categories + category % num_roots) for category in range(shop.num_categories)]
    return pd.DataFrame({"categoryid": np.arange(shop.num_categories + num_roots),
                         "parentid": parents + [""] * num_roots})


def _zipf(rng: np.random.Generator, values: int, count: int, power: float) -> Ints:
    """Draw `count` numbers below `values`; number k has weight (k + 1)^-power."""
    weights = (1.0 + np.arange(values)) ** -power
    return rng.choice(values, size=count, p=weights / weights.sum()).astype(np.int64)


def _calibrate_intercept(score: Floats, weight: Floats, mean: float) -> float:
    """b such that the weighted mean of sigmoid(b + score) is `mean`, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        if np.average(_sigmoid(middle + score), weights=weight) < mean:
            low = middle
        else:
            high = middle
    return low


def _sigmoid(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-x))


@cli_entry_point
def cli() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m dataset.simulate",
                                     description="Write a simulated shopping log in the raw RetailRocket layout.")
    default = SimulationConfig()
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet")
    parser.add_argument("--events", type=int, default=default.events, help="events, about (default %(default)s)")
    parser.add_argument("--items", type=int, default=default.items, help="items in the catalogue (default %(default)s)")
    parser.add_argument("--property_rows", type=int, default=default.property_rows,
                        help="rows of item properties, at least those of the used properties (default %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="same seed, same files (default %(default)s)")
    args = parser.parse_args()
    simulate(args.out, SimulationConfig(args.events, args.items, args.property_rows, args.seed))
    print(f"wrote a simulated log to {args.out}")


if __name__ == "__main__":
    cli()
