"""Paired tests, Holm's correction, results.csv and the report that is written from it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, user_error_message
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from common.csv_reader import write_csv
from experiments.__main__ import cli
from experiments.plots import plot_differences
from experiments.report import difference_table, headline, main_table, write_report
from experiments.statistics import MAIN_PAIRS, PairedTest, Results, holm, paired_t_test, read_results, write_results

Row = dict[str, str]
DOCS = REPOSITORY / "docs" / "results"


@given(st.lists(st.tuples(st.floats(0.5, 0.9), st.floats(0.5, 0.9)), min_size=2, max_size=12))
def test_paired_t_test_matches_its_equation(pairs: list[tuple[float, float]]) -> None:
    """mean ± t s / sqrt(n), with t of n - 1 degrees of freedom."""
    values, control = map(list, zip(*pairs, strict=True))
    d = np.subtract(values, control)
    assume(np.std(d) > 1e-9)
    error, df = d.std(ddof=1) / len(d) ** 0.5, len(d) - 1
    half_width, p = stats.t.ppf(0.975, df) * error, 2 * stats.t.sf(abs(d.mean()) / error, df)
    assert paired_t_test(values, control) == pytest.approx(
        (d.mean(), d.mean() - half_width, d.mean() + half_width, p, len(d)), rel=1e-6, abs=1e-12)


def test_paired_t_test_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t_0.975 of two degrees of freedom 4.3027."""
    test = paired_t_test([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (test.mean, test.n) == (2.0, 3)
    assert test.high - test.mean == pytest.approx(4.30265 / 3**0.5, abs=1e-4)


def test_paired_t_test_of_degenerate_samples() -> None:
    assert paired_t_test([0.7] * 3, [0.7] * 3) == (0, 0, 0, 1, 3)
    assert paired_t_test([0.75] * 3, [0.5] * 3) == (0.25, 0.25, 0.25, 0, 3)
    assert math.isnan(paired_t_test([0.7], [0.6]).p)
    assert math.isnan(paired_t_test([], []).mean)


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.2: times 4, 3, 2, 1, never falling."""
    assert holm([0.03, 0.01, 0.2, 0.02]) == pytest.approx([0.06, 0.04, 0.2, 0.06])
    assert holm([0.01, math.nan]) == [0.02, 1]


def make_rows(gain: float, noise: float) -> list[Row]:
    """Results of one model, in which RMTL is better than its control by `gain`, up to `noise`."""
    rng = np.random.default_rng(5)
    rows = []
    for seed in range(1, 6):
        baseline = 0.72 + 0.005 * rng.standard_normal()
        for condition, control, better in (("baseline", "", 0.0), ("constant", "baseline", 0.002),
                                           ("shuffled", "constant", 0.002), ("RMTL", "constant", 0.002 + gain)):
            weighted = condition in ("RMTL", "shuffled")
            row = {"dataset": "made", "tasks": "CTR CTCVR", "table": "main", "model": "esmm", "condition": condition,
                   "control": control, "critics": "esmm critics" if weighted else "", "seed": str(seed), "epoch": "1",
                   "epochs": "1", "seconds": "1.0", "command": "c", "fingerprint": "f", "machine": "m"}
            for task in ("CTR", "CTCVR"):
                row |= {f"auc_{task}": str(baseline + better + noise * rng.standard_normal()),
                        f"logloss_{task}": "0.5", f"session_logloss_{task}": "0.5",
                        f"session_gauc_{task}": "0.625", f"user_gauc_{task}": "0.6", f"curve_auc_{task}": "0.70 0.71",
                        f"deciles_weight_{task}": "1 2 3" if weighted else "",
                        f"deciles_loss_{task}": "0.2 0.3 0.4" if weighted else "",
                        **{f"weight_{name}_{task}": "0.9" if weighted else "" for name in ("q05", "q50", "q95", "ess")}}
            rows.append(row)
        rows.append({**rows[-1], "condition": "critics", "control": "", "critics": "", **{
            f"val_{name}_{task}": "0.25" for name in ("rank_correlation", "zero_fraction")
            for task in ("CTR", "CTCVR")}})
    return rows


@pytest.mark.parametrize(("gain", "message"), [
    (0.003, "RMTL is significantly better than its control on esmm CTR"),
    (-0.003, "RMTL is significantly worse than its control on esmm CTR"),
    (0.0, "no significant difference from its control** (2 comparisons, Holm, α = 0.05)")])
def test_headline_follows_the_tests(gain: float, message: str) -> None:
    assert message in headline(Results.by_dataset(make_rows(gain, 0.0003))["made"])


def test_report_contains_differences_and_plots(tmp_path: Path) -> None:
    write_report(make_rows(0.003, 0.0003), tmp_path, "python3 -m experiments")
    text = (tmp_path / "report.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| esmm | RMTL | constant |")]
    mean, low, high = map(float, re.findall(r"[+-]\d\.\d\d", line)[:3])
    assert low <= mean <= high
    assert mean == pytest.approx(3, abs=0.5)
    assert "| esmm | critics | 0.250 | 25.0% | 0.250 | 25.0% |" in text
    for picture in re.findall(r"\((.*?\.png)\)", text):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_forest_plot_has_the_rows_of_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run against the same control, model by model."""
    drawn: list[tuple[str, str, str]] = []
    paired, results = Results.paired, Results.by_dataset(make_rows(0.003, 0.0003))["made"]
    table = difference_table(results, [(model, *pair) for model in results.models for pair in MAIN_PAIRS])

    def record(self: Results, model: str, condition: str, control: str, metric: str) -> PairedTest:
        drawn.append((model, condition, control))
        return paired(self, model, condition, control, metric)

    monkeypatch.setattr(Results, "paired", record)
    plot_differences(results, tmp_path / "gain.png", "made")
    listed = [tuple(line.strip("| ").split(" | ")[:3]) for line in table.splitlines()[2:]]
    assert drawn == listed * len(results.tasks)


def test_rows_without_gauc_remain_reportable(tmp_path: Path) -> None:
    """Those of an earlier version: alone the report leaves the columns out; among others their cells are empty."""
    rows = make_rows(0.003, 0.0003)
    assert "| 0.6250 ± 0.0000 | 0.6000 ± 0.0000 |" in main_table(Results.by_dataset(rows)["made"])
    old = [{name: value for name, value in row.items() if "gauc" not in name} for row in rows]
    assert "GAUC" not in main_table(Results.by_dataset(old)["made"])
    mixed = [one if one["condition"] == "RMTL" else other for one, other in zip(rows, old, strict=True)]
    write_results(tmp_path / "results.csv", mixed)
    table = main_table(Results.by_dataset(read_results(tmp_path / "results.csv"))["made"])
    assert [line.count(" 0.6250 ± 0.0000 ") for line in table.splitlines()[2:]] == [0, 0, 0, 2]
    assert [line.count(" - ") for line in table.splitlines()[2:]] == [4, 4, 4, 0]


def test_boosting_is_beside_every_model(tmp_path: Path) -> None:
    """One row of metrics, and the differences of each model's baseline, in a table and correction of their own."""
    rows = make_rows(0.003, 0.0003)
    baselines = [row for row in rows if row["condition"] == "baseline"]
    boosted = [{**row, "model": "scikit-learn", "condition": "boosting",
                **{f"auc_{task}": str(float(row[f"auc_{task}"]) + 0.01) for task in ("CTR", "CTCVR")}}
               for row in baselines]
    write_report(rows, tmp_path / "without", "c")
    write_report([*rows, *boosted], tmp_path / "with", "c")
    without, text = ((tmp_path / name / "report.md").read_text() for name in ("without", "with"))
    assert "boosting" not in without
    assert len([line for line in text.splitlines() if line.startswith("| scikit-learn | boosting |")]) == 1
    difference = r" \| \d\.\d{4} ± \d\.\d{4} \| -10\.00 \(-10\.00 to -10\.00\) \| 0\.000 \| 0\.000"
    row = r" \| baseline \| boosting" + 2 * difference + r" \|"
    assert re.search("esmm" + row, text)
    alone = [{**row, "model": "ple"} for row in baselines]  # a model without the other runs
    write_report([*rows, *boosted, *alone], tmp_path / "more", "c")
    assert re.search("ple" + row, (tmp_path / "more" / "report.md").read_text())
    assert set(without.splitlines()) - set(text.splitlines()) == {
        line for line in without.splitlines() if line.startswith("from 25 runs")}


def test_controls_have_a_table(tmp_path: Path) -> None:
    rows = make_rows(0.003, 0.0003)
    averages = [{**row, "table": "controls", "condition": "average", "control": "constant"}
                for row in rows if row["condition"] == "constant"]
    write_report([*rows, *averages], tmp_path, "c")
    section = (tmp_path / "report.md").read_text().split("### Controls without critics\n")[1].split("###")[0]
    (line,) = [line for line in section.splitlines() if line.startswith("| esmm | average | constant |")]
    assert line.count("+0.00 (+0.00 to +0.00) | 1.000 | 1.000") == 2


@pytest.mark.parametrize("count", [1, 3])
def test_report_of_incomplete_results(tmp_path: Path, count: int) -> None:
    write_report(make_rows(0.003, 0.0003)[:count], tmp_path, "python3 -m experiments")
    assert "No model has a complete set of runs" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("folder", [DOCS, DOCS / "replication", DOCS / "kr", DOCS / "rt"],
                         ids=["results", "replication", "kr", "rt"])
def test_published_report_matches_published_results(folder: Path, tmp_path: Path) -> None:
    published = (folder / "report.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    (python3 -m experiments .*)$", published, re.MULTILINE)
    write_report(read_results(folder / "results.csv"), tmp_path, command)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == published
    assert {path.name for path in tmp_path.glob("*.png")} <= {path.name for path in folder.glob("*.png")}


def test_report_only_writes_the_report_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "results.csv", make_rows(0.003, 0.0003)[:3])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["experiments", "--report_only", "--out=.", "--publish_to=published", "--seeds=3"])
    cli()
    assert "    python3 -m experiments --seeds=3\n" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "published" / "report.md").read_text() == (tmp_path / "report.md").read_text()
    assert read_results(tmp_path / "published" / "results.csv") == read_results(tmp_path / "results.csv")


@pytest.mark.parametrize(("old", "new", "message"), [
    (",seed,", ",sead,", "column 'seed' is missing"), ("esmm", "es,mm", "cells, but the header has"),
    (",0.5,", ",half,", "'half' is not a number"), (",1.0,", ",,", "'' is not a number"),
    ("esmm", '"esmm', "is the file cut short?")])
def test_damaged_results_give_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "results.csv"
    write_csv(path, make_rows(0.0, 0.1))
    assert len(read_results(path)) == 25
    path.write_text(path.read_text().replace(old, new, 1))
    text = user_error_message(lambda: read_results(path))
    assert message in text
    assert str(path) in text
