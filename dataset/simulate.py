"""Simulated shopping logs in the raw Kaggle layout of RetailRocket, with the true probabilities written aside.

    python3 -m dataset.simulate --out raw                              # small: a laptop's seconds
    python3 -m dataset.simulate --out raw --events 2756101 --items 417053 --property_rows 20275902    # the real size

It writes `events.csv`, `item_properties_part1.csv`, `item_properties_part2.csv` and `category_tree.csv`, and aside
`truth.csv`: for each impression the probability of a click and of a purchase given all that the shop knows, hidden
intent included. No model can rank better than that, so the best possible AUC is known.

How a visitor behaves (one `Shop.step` is one impression of every visitor still there), at position n with intent z:

    P(click | item i)     = sigmoid(b + appeal_i + z)               b, b': such that at a first impression the mean
    P(buy | click)        = sigmoid(b' + worth_i + BUY_INTENT z)    is FIRST_CLICK, and FIRST_BUY of those buy
    z'                    = m + KEEP (z - m) + CLICK_LIFT click - BUY_DROP buy + DRIFT noise     (m: the visitor's own)
    P(another impression) = sigmoid(STAY_BIAS + STAY_LENGTH log n + STAY_INTENT z')
    log gap in seconds    = GAP_BIAS - GAP_INTENT z' + GAP_NOISE noise

So what happened earlier in a session predicts what comes next, and today's click says something about the session's
later reward. Appeal and worth are sums over the item's property values as they stand that week.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.csv_reader import ColumnType, read_table
from common.errors import UserError, cli_entry_point
from common.fileio import atomic_folder, check_writable, exclusive_lock, require_free_memory, write_json

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

START_MS = 1_430_622_000_000  # 2015-05-03, the first day of the RetailRocket log
WEEK_MS = 7 * 24 * 3600 * 1000
WEEKS = 18  # weekly property snapshots
EVENTS_PER_VISITOR = 2.03  # what the constants below give, over many seeds

FIRST_CLICK, FIRST_BUY, BUY_INTENT = 0.025, 0.25, 0.5
INTENT_SPREAD, KEEP, CLICK_LIFT, BUY_DROP, DRIFT = 0.25, 0.85, 2.1, 2.0, 0.15
STAY_BIAS, STAY_LENGTH, STAY_INTENT, LONGEST = -0.9, 0.75, 0.45, 400
GAP_BIAS, GAP_INTENT, GAP_NOISE, DAYS_LATER = 4.3, 0.8, 0.4, 0.04
LOOK_AGAIN, LATE_CART, LATE_BUY, NO_CART = 0.22, 0.08, 0.35, 0.05
OWN_CATEGORY = 0.6  # share of impressions from the category that the visitor came for

# Property -> (values, spread of its effect on appeal, on worth). 364 and 776 have long tails and little to say.
PROPERTIES: dict[str, tuple[int, float, float]] = {
    "785": (12, 1.2, 1.2),
    "591": (30, 0.4, 0.3),
    "814": (20, 0.4, 0.3),
    "available": (2, 0.0, 0.0),
    "categoryid": (0, 0.3, 0.25),
    "364": (0, 0.0, 0.0),
    "776": (0, 0.0, 0.0),
}
MOST = 1_000_000_000
UNAVAILABLE = -2.5  # on worth, where available is 0
# Columns of truth.csv, one row an impression: p_click and p_pay, and the visitor's hidden state before it.
TRUTH_KINDS: dict[str, ColumnType] = {"timestamp": "id", "visitorid": "id", "itemid": "id", "p_click": "number",
                                "p_pay": "number", "intent": "number", "mood": "number", "category": "id",
                                "position": "id"}
# Of memory, each, at the most: 310 an event and 116 a property row were measured; an item has its state of every week.
BYTES = {"events": 350, "property_rows": 130, "items": 400}
FILLERS = ("790", "888", "283", "6", "202", "159", "112", "678")


@dataclass(frozen=True)
class SimulationConfig:
    """How much to simulate. Everything follows from it, bit for bit."""

    events: int = 300_000
    items: int = 12_000
    property_rows: int = 240_000
    seed: int = 2022

    def __post_init__(self) -> None:
        if self.events < 100 or self.items < 50 or self.property_rows < 0 or self.seed < 0:
            raise UserError("simulate: at least 100 events, 50 items, 0 property rows and seed 0 are needed")
        if max(self.events, self.items, self.property_rows) > MOST or self.seed >= 2**63:
            raise UserError(f"simulate: at most {MOST:,} events, items and property rows, and a seed below 2^63")


@dataclass
class Visitors:
    """The visitors who are still there, one entry each (V,)."""

    ids: Ints
    home: Ints  # the category that they came for
    mood: Floats  # m, where the intent returns to
    intent: Floats  # z
    position: Ints  # n, from 1
    clock: Floats  # ms
    seen: Ints  # (V, n - 1) items met so far

    def keep(self, mask: NDArray[np.bool_]) -> Visitors:
        return Visitors(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))


@dataclass
class Impressions:
    """One step of every visitor (V,): what was shown, what was likely, what happened."""

    items: Ints
    repeated: NDArray[np.bool_]  # met before: only looked at again
    p_click: Floats
    p_pay: Floats
    click: NDArray[np.bool_]
    pay: NDArray[np.bool_]
    gap: Floats  # ms until the next impression
    stays: NDArray[np.bool_]


class Shop:
    """The catalogue and the law of behaviour; `step` moves visitors on, and only reads the shop."""

    def __init__(self, size: SimulationConfig) -> None:
        self.size = size
        rng = np.random.default_rng([size.seed, 1])
        self.categories = num_categories(size)
        tail = max(50, size.items // 15)
        # Category by category, each with its popular items first in the cumulative weights.
        self.category = np.sort(_zipf(rng, self.categories, size.items, 0.9))  # (I,)
        weights = rng.pareto(1.1, size.items) + 0.05
        self.cumulative = np.concatenate([[0.0], np.cumsum(weights)])  # (I + 1,)
        bounds = np.searchsorted(self.category, np.arange(self.categories + 1))
        self.category_bounds = self.cumulative[bounds]  # (C + 1,)
        self.item_ids = rng.permutation(np.arange(1, 2 * size.items))[: size.items].astype(np.int64)

        counts = {name: count or (self.categories if name == "categoryid" else tail)
                  for name, (count, _, _) in PROPERTIES.items()}
        self.values = {name: _zipf(rng, count, size.items, 1.1) for name, count in counts.items()}  # (I,) each
        self.values["categoryid"] = self.category
        self.available = rng.random((WEEKS, size.items)) < np.where(rng.random(size.items) < 0.7, 0.95, 0.3)  # (W, I)
        self.described = rng.random(size.items) < 0.93  # the others have no properties in the log
        appeal = {name: rng.normal(0, PROPERTIES[name][1], count) for name, count in counts.items()}
        worth = {name: rng.normal(0, PROPERTIES[name][2], count) for name, count in counts.items()}
        self.appeal: Floats = np.sum([appeal[name][self.values[name]] for name in counts], axis=0)  # (I,)
        self.worth: Floats = np.sum([worth[name][self.values[name]] for name in counts], axis=0)  # (I,)
        # The popular items and their appeal differ from seed to seed; the shares of carts and purchases should not.
        items = self._draw(rng, np.zeros(20_000), np.full(20_000, self.cumulative[-1]))
        mood = rng.normal(0, INTENT_SPREAD, len(items))
        stock = UNAVAILABLE * ~self.available[rng.integers(0, WEEKS, len(items)), items]
        self.appeal += _bias(self.appeal[items] + mood, np.ones(len(items)), FIRST_CLICK)
        p_click = _sigmoid(self.appeal[items] + mood)
        self.worth += _bias(self.worth[items] + stock + BUY_INTENT * mood, p_click, FIRST_BUY)

    def arrive(self, rng: np.random.Generator, count: int) -> Visitors:
        """Let `count` visitors arrive, spread evenly over the weeks."""
        mood = rng.normal(0, INTENT_SPREAD, count)
        return Visitors(
            ids=rng.permutation(count).astype(np.int64),
            home=self.category[self._draw(rng, np.zeros(count), np.full(count, self.cumulative[-1]))],
            mood=mood,
            intent=mood.copy(),
            position=np.ones(count, np.int64),
            clock=START_MS + rng.random(count) * WEEKS * WEEK_MS,
            seen=np.zeros((count, 0), np.int64),
        )

    def step(self, rng: np.random.Generator, visitors: Visitors,
             shown: Ints | None = None) -> tuple[Impressions, Visitors]:
        """Show one item to each visitor (or those of `shown`); return what happened and who stays, moved on."""
        count = len(visitors.ids)
        own = rng.random(count) < OWN_CATEGORY
        low = np.where(own, self.category_bounds[visitors.home], 0.0)
        high = np.where(own, self.category_bounds[visitors.home + 1], self.cumulative[-1])
        items = self._draw(rng, low, high) if shown is None else shown
        repeated = (visitors.seen == items[:, None]).any(axis=1)

        week = np.minimum((visitors.clock - START_MS) // WEEK_MS, WEEKS - 1).astype(np.int64)
        p_click = _sigmoid(self.appeal[items] + visitors.intent)
        out_of_stock = UNAVAILABLE * ~self.available[week, items]
        p_buy = _sigmoid(self.worth[items] + out_of_stock + BUY_INTENT * visitors.intent)
        click = (rng.random(count) < p_click) & ~repeated
        pay = (rng.random(count) < p_buy) & click

        noise = rng.normal(size=(2, count))
        drawn = visitors.mood + KEEP * (visitors.intent - visitors.mood) + DRIFT * noise[0]
        intent = np.where(repeated, visitors.intent, drawn + CLICK_LIFT * click - BUY_DROP * pay)
        stays = rng.random(count) < _sigmoid(STAY_BIAS + STAY_LENGTH * np.log(visitors.position) + STAY_INTENT * intent)
        stays &= visitors.position < LONGEST
        gap = 1000 * np.exp(GAP_BIAS - GAP_INTENT * intent + GAP_NOISE * noise[1])
        days = rng.random(count) < DAYS_LATER
        gap = np.where(days, gap + rng.exponential(3 * 24 * 3600 * 1000, count), gap)

        moved = Visitors(visitors.ids, visitors.home, visitors.mood, intent, visitors.position + 1,
                         visitors.clock + gap, np.column_stack([visitors.seen, items]))
        return Impressions(items, repeated, p_click, p_click * p_buy, click, pay, gap, stays), moved.keep(stays)

    def _draw(self, rng: np.random.Generator, low: Floats, high: Floats) -> Ints:
        """Draw items by popularity within [low, high) of the cumulative weights."""
        at = low + rng.random(len(low)) * (high - low)
        return np.minimum(np.searchsorted(self.cumulative, at, side="right") - 1, self.size.items - 1)


def simulate(out: Path, size: SimulationConfig) -> None:
    """Write a raw log into the folder `out`, which must not exist. Raises UserError."""
    with exclusive_lock(out):
        if out.exists():
            raise UserError(f"{out} exists already: choose another --out, or remove it first")
        check_writable(out.parent)
        require_free_memory(sum(getattr(size, name) * count for name, count in BYTES.items()),
                     f"a simulated log of {size.events:,} events and {size.property_rows:,} property rows")
        _write(Shop(size), out)


def _write(shop: Shop, out: Path) -> None:
    with atomic_folder(out) as folder:
        events, truth = _log(shop)
        events.to_csv(folder / "events.csv", index=False)
        truth.to_csv(folder / "truth.csv", index=False)
        properties = _properties(shop)
        half = (len(properties) + 1) // 2
        properties[:half].to_csv(folder / "item_properties_part1.csv", index=False)
        properties[half:].to_csv(folder / "item_properties_part2.csv", index=False)
        _category_tree(shop).to_csv(folder / "category_tree.csv", index=False)
        write_json(folder / "simulation.json", {"simulated": True, **asdict(shop.size)})


def config_from_manifest(simulation: Any, file: Path) -> SimulationConfig:
    """The settings of a simulated log, of which `file` says that they are `simulation`. Raises UserError."""
    names = SimulationConfig.__dataclass_fields__
    if not isinstance(simulation, dict) or any(type(simulation.get(name)) is not int for name in names):
        raise UserError(f"{file}: not the settings of a simulated log: {', '.join(names)}, whole numbers each")
    try:
        return SimulationConfig(**{name: simulation[name] for name in names})
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def read_truth(path: Path, size: SimulationConfig, optional: Sequence[str] = ()) -> pd.DataFrame:
    """Read truth.csv of a log of that size. Raises UserError naming line and column where a value cannot be."""
    truth = read_table(path, TRUTH_KINDS, optional)
    rows = {"p_click": (0, 1), "p_pay": (0, 1), "intent": (-1e3, 1e3), "mood": (-1e3, 1e3),
            "category": (0, num_categories(size) - 1), "position": (1, LONGEST), "itemid": (1, 2 * size.items)}
    for name, (low, high) in rows.items():
        bad = ~truth[name].between(low, high).to_numpy()
        if bad.any():
            row = int(bad.argmax())
            raise UserError(f"{path}, row {row + 1} (about line {row + 2}), column '{name}': {truth[name][row]} is not "
                            f"between {low:g} and {high:g}")
    return truth


def num_categories(size: SimulationConfig) -> int:
    return max(20, min(1_200, size.items // 100))


def expected_return(size: SimulationConfig, truth: pd.DataFrame, gamma: float, rollouts: int = 64) -> Floats:
    """The true expected discounted return of ideal predictions in the rows `truth` (n,): (n, 2), clicks and purchases.

    The actions are the true probabilities, the reward minus the cross-entropy. It is the mean over `rollouts` futures
    of the same visitor, simulated from the row's hidden state: what an ideal critic would answer. Sessions of one row
    are not in the tables, so of a session's first row only futures that go on count.
    """
    shop = Shop(size)
    rng = np.random.default_rng([size.seed, 4])
    number = pd.Index(shop.item_ids).get_indexer(pd.Index(truth["itemid"]))
    if (number < 0).any():
        raise UserError(f"truth.csv: item {truth['itemid'].to_numpy()[number < 0][0]} is none of the simulated shop")
    rows = np.tile(np.arange(len(truth)), rollouts)
    columns = {name: truth[name].to_numpy()[rows] for name in ("category", "mood", "intent", "position", "timestamp")}
    visitors = Visitors(rows, columns["category"], columns["mood"], columns["intent"], columns["position"],
                        columns["timestamp"].astype(np.float64), np.zeros((len(rows), 0), np.int64))
    lane, shown = np.arange(len(rows)), number[rows]
    returns, discount, length, first = np.zeros((len(rows), 2)), np.ones(len(rows)), np.zeros(len(rows)), True
    while len(visitors.ids):
        met, moved = shop.step(rng, visitors, shown if first else None)
        p = np.clip(np.column_stack([met.p_click, met.p_pay]), 1e-4, 1 - 1e-4)
        reward = np.where(np.column_stack([met.click, met.pay]), np.log(p), np.log1p(-p))
        new = ~met.repeated  # an item met before makes no row of its own
        returns[lane[new]] += discount[lane[new], None] * reward[new]
        discount[lane[new]] *= gamma
        length[lane[new]] += 1
        lane, visitors, first = lane[met.stays], moved, False
    counts = ((length >= 2) | (columns["position"] > 1)).reshape(rollouts, len(truth), 1)
    futures = returns.reshape(rollouts, len(truth), 2)
    some = np.maximum(counts.sum(axis=0), 1)
    return np.where(counts.any(axis=0), (futures * counts).sum(axis=0) / some, futures.mean(axis=0))


def _log(shop: Shop) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Let everybody shop; return the events and, of every first impression, the truth."""
    rng = np.random.default_rng([shop.size.seed, 2])
    visitors = shop.arrive(rng, max(2, round(shop.size.events / EVENTS_PER_VISITOR)))
    events: list[pd.DataFrame] = []
    truth: list[pd.DataFrame] = []
    while len(visitors.ids):
        now, ids, intent, clock = visitors, visitors.ids, visitors.intent, visitors.clock
        shown, visitors = shop.step(rng, visitors)
        item_ids = shop.item_ids[shown.items]
        events.append(_event_rows("view", clock, ids, item_ids))
        again = np.flatnonzero(rng.random(len(ids)) < LOOK_AGAIN)
        events.append(_event_rows("view", (clock + shown.gap * rng.uniform(0.01, 0.9, len(ids)))[again],
                                  ids[again], item_ids[again]))
        carted = np.flatnonzero(shown.click)
        cart_at = clock + shown.gap * rng.uniform(0.05, 0.5, len(ids))
        cart_at += (rng.random(len(ids)) < LATE_CART) * (shown.gap + rng.exponential(600_000, len(ids)))
        bought = np.flatnonzero(shown.pay)
        buy_at = cart_at + shown.gap * rng.uniform(0.05, 0.4, len(ids))
        buy_at += (rng.random(len(ids)) < LATE_BUY) * (shown.gap + rng.exponential(600_000, len(ids)))
        direct = rng.random(len(ids)) < NO_CART  # bought without a cart
        carted = carted[~(direct & shown.pay)[carted]]
        events.append(_event_rows("addtocart", cart_at[carted], ids[carted], item_ids[carted]))
        events.append(_event_rows("transaction", buy_at[bought], ids[bought], item_ids[bought]))
        first = ~shown.repeated
        truth.append(pd.DataFrame({
            "timestamp": clock.astype(np.int64), "visitorid": ids, "itemid": item_ids, "p_click": shown.p_click,
            "p_pay": shown.p_pay, "intent": intent, "mood": now.mood, "category": now.home, "position": now.position,
        })[first])
    log = pd.concat(events, ignore_index=True)
    buys = log["event"].eq("transaction").to_numpy()
    log["transactionid"] = ""
    log.loc[buys, "transactionid"] = rng.permutation(int(buys.sum())).astype(str)
    # By visitor, as in the published file: not by time.
    log = log.iloc[np.lexsort((log["itemid"], log["timestamp"], log["visitorid"]))]
    facts = pd.concat(truth, ignore_index=True)
    facts = facts.iloc[np.lexsort((facts["timestamp"], facts["visitorid"]))].round(6)
    return log[["timestamp", "visitorid", "event", "itemid", "transactionid"]], facts


def _event_rows(event: str, clock: Floats, visitors: Ints, items: Ints) -> pd.DataFrame:
    return pd.DataFrame({"timestamp": clock.astype(np.int64), "visitorid": visitors, "event": event, "itemid": items})


def _properties(shop: Shop) -> pd.DataFrame:
    """Weekly snapshots: constant properties once, availability whenever it changed, fillers to the size asked for."""
    rng = np.random.default_rng([shop.size.seed, 3])
    described = np.flatnonzero(shop.described)
    parts: list[pd.DataFrame] = []
    for name, values in shop.values.items():
        if name == "available":
            for week in range(WEEKS):
                changed = described if week == 0 else described[
                    shop.available[week, described] != shop.available[week - 1, described]]
                parts.append(_property_rows(shop, name, week, changed, shop.available[week, changed].astype(str)))
                parts[-1]["value"] = shop.available[week, changed].astype(int).astype(str)
            continue
        texts = np.array([_hashed(name, value) for value in range(int(values.max()) + 1)], dtype=object)
        has = described[rng.random(len(described)) < (0.97 if PROPERTIES[name][0] else 0.9)]
        if name == "categoryid":
            has = described
        parts.append(_property_rows(shop, name, 0, has, texts[values[has]]))
        # A few descriptions are rewritten, word for word, in a later week.
        again = has[rng.random(len(has)) < 0.05]
        parts.append(_property_rows(shop, name, int(rng.integers(1, WEEKS)), again, texts[values[again]]))
    count = max(0, shop.size.property_rows - sum(map(len, parts)))
    owner = described[rng.integers(0, len(described), count)]
    tokens = rng.integers(1, 1_400_000, (2, 50_000))
    prices = rng.integers(1, 10**6, 50_000)
    words = np.array([f"{a} {b}" if k % 3 else f"n{p}.000 {a}" for k, (a, b, p) in
                      enumerate(zip(*tokens, prices, strict=True))], dtype=object)
    parts.append(pd.DataFrame({
        "timestamp": START_MS + WEEK_MS * rng.integers(0, WEEKS, count),
        "itemid": shop.item_ids[owner],
        "property": np.array(FILLERS, dtype=object)[rng.integers(0, len(FILLERS), count)],
        "value": words[rng.integers(0, len(words), count)],
    }))
    rows = pd.concat(parts, ignore_index=True)
    return rows.iloc[rng.permutation(len(rows))]


def _property_rows(shop: Shop, name: str, week: int, items: Ints, values: NDArray[np.object_]) -> pd.DataFrame:
    return pd.DataFrame({"timestamp": START_MS + WEEK_MS * week, "itemid": shop.item_ids[items], "property": name,
                         "value": values})


def _hashed(name: str, value: int) -> str:
    """Give value number `value` of a property its hashed text: several tokens, or a number behind an n."""
    if name == "categoryid":
        return str(value)
    token = (value * 7919 + len(name) * 104_729 + int(name) * 1_299_709) % 1_400_000
    if name == "591":
        return f"{token} n{12 * (value + 1)}.000"
    return f"{token} {(token * 31) % 1_400_000}" if name in ("814", "364") else str(token)


def _category_tree(shop: Shop) -> pd.DataFrame:
    """Two floors of parents over the categories, and some that no item is in."""
    count = shop.categories + max(5, shop.categories // 3)
    parents = [str(shop.categories + child % (count - shop.categories)) for child in range(shop.categories)]
    roots = [""] * (count - shop.categories)
    return pd.DataFrame({"categoryid": np.arange(count), "parentid": parents + roots})


def _zipf(rng: np.random.Generator, values: int, count: int, power: float) -> Ints:
    """Draw `count` of `values` numbers, number k with weight (k + 1)^-power."""
    weights = (1.0 + np.arange(values)) ** -power
    return rng.choice(values, size=count, p=weights / weights.sum()).astype(np.int64)


def _bias(score: Floats, weight: Floats, mean: float) -> float:
    """Find b such that the weighted mean of sigmoid(b + score) is `mean`, by bisection."""
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
                        help="rows of item properties, at least those that are used (default %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="same seed, same files (default %(default)s)")
    args = parser.parse_args()
    simulate(args.out, SimulationConfig(args.events, args.items, args.property_rows, args.seed))
    print(f"wrote a simulated log to {args.out}")


if __name__ == "__main__":
    cli()
