"""Reading CSV: an invalid cell is named by file, line and column; equivalent spellings read alike."""

from __future__ import annotations

import contextlib
import gzip
import os
from pathlib import Path

import pandas as pd
import pytest
from conftest import user_error_message
from hypothesis import given, settings
from hypothesis import strategies as st

from common.csv_reader import (
    MAX_EXACT_INT,
    NA_VALUES,
    ColumnType,
    as_relation,
    cell_location,
    count_rows,
    normalize_category,
    read_csv_rows,
    read_table,
    scan,
    write_csv,
)
from common.duck import connect
from common.errors import UserError

COLUMNS: dict[str, ColumnType] = {"itemid": "id", "click": "label", "note": "optional_text"}
HEADER = "itemid,click,note\n"


def table_of(path: Path, content: str | bytes) -> pd.DataFrame:
    """Write the content and read it with `COLUMNS`."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, COLUMNS)


# -------------------------------------------------------------------------------------------------------------- errors

INVALID_CELLS = {
    "NaN label": ("1,NaN,x\n", 2, "click"),
    "empty label": ("1,0,x\n2,,x\n", 3, "click"),
    "label 2": ("1,0,x\n2,1,x\n3,2,x\n", 4, "click"),
    "label one half": ("1,0.5,x\n", 2, "click"),
    "label in words": ("1,0,x\n2,yes,x\n", 3, "click"),
    "id in words": ("1,0,x\nmug,1,x\n", 3, "itemid"),
    "id with a fraction": ("1,0,x\n1.5,1,x\n", 3, "itemid"),
    "id with an underscore": ("1,0,x\n1_0,1,x\n", 3, "itemid"),
    "id in fullwidth digits": ("1,0,x\n\uff17,1,x\n", 3, "itemid"),
    "label behind a no-break space": ("1,0,x\n2,\u00a01,x\n", 3, "click"),
    "id missing": ("1,0,x\n,1,x\n", 3, "itemid"),
    "id infinite": ("inf,1,x\n", 2, "itemid"),
    "id of 2^53": (f"1,0,x\n{MAX_EXACT_INT},1,x\n", 3, "itemid"),
    "id above 2^53": ("9007199254740993,1,x\n", 2, "itemid"),
    "id below -2^53": ("-1e300,1,x\n", 2, "itemid"),
    "row too short": ("1,0,x\n2\n3,1,x\n", 3, "click"),
    "last line cut in a row": ("1,0,x\n2,1", 3, "note"),
    "last line cut after one digit": ("1,0,x\n2", 3, "click"),
    "row too long": ("1,0,x\n2,1,x,9\n", 3, "note"),
    "first row too long": ("1,0,x,9\n2,1,x\n", 2, "note"),
    "first row with one comma too many": ("1,0,x,\n2,1,x,\n", 2, "note"),
    "booleans as ids": ("True,0,x\nFalse,1,x\n", 2, "itemid"),
    "booleans as labels": ("1,True,x\n2,False,x\n", 2, "click"),
    "NUL bytes": ("1,0,x\n2,1,\0\0\n", 3, "note"),
    "an empty row of commas": ("1,0,x\n,,\n", 3, "itemid"),
    "bad cell below a cell of two lines": ('1,0,"a\nb"\n2,7,x\n', 4, "click"),
    "a row of two lines, named by its first": ('1,0,x\n2,7,"a\nb"\n', 3, "click"),
    "unterminated quote": ('1,0,x\n2,1,"x\n3,0,y\n', 3, "note"),
    "a quoted blank": ('1,0,"x"\n" "\n2,1,y\n', 3, "click"),
    "a quoted nothing": ('1,0,"x"\n""\n2,1,y\n', 3, "click"),
    "an empty cell moved to the first row": ("1,0,x,\n2,1\n", 2, "note"),
    "a comma moved to another row": ("1,0\n2,1,x,9\n", 2, "note"),
    "bad cell below a blank line": ("1,0,x\n\n2,7,x\n", 4, "click"),
    "bad cell below a quoted comma": ('1,0,"a, b"\n2,7,x\n', 3, "click"),
    "short row below a quoted comma": ('1,0,"a, b"\n2\n', 3, "click"),
}


@pytest.mark.parametrize(("rows", "line", "column"), INVALID_CELLS.values(), ids=INVALID_CELLS.keys())
def test_an_invalid_cell_is_named(tmp_path: Path, rows: str, line: int, column: str) -> None:
    path = tmp_path / "train.csv"
    text = user_error_message(lambda: table_of(path, HEADER + rows))
    assert text.startswith(f"{path}, line {line}, column '{column}': ")


@given(rows=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 1), st.sampled_from(["", "x", "1 n2.0"])),
                     min_size=1, max_size=30), data=st.data())
def test_one_invalid_label_among_valid_rows(tmp_path_factory: pytest.TempPathFactory,
                                            rows: list[tuple[int, int, str]], data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("table") / "test.csv"
    assert table_of(path, HEADER + "".join(f"{a},{b},{c}\n" for a, b, c in rows))["click"].tolist() == [
        b for _, b, _ in rows]
    index = data.draw(st.integers(0, len(rows) - 1))
    bad = data.draw(st.sampled_from(["nan", "2", "-1", "", "click", "1e9", "0.999"]))
    text = "".join(f"{a},{bad if row == index else b},{c}\n" for row, (a, b, c) in enumerate(rows))
    message = user_error_message(lambda: table_of(path, HEADER + text))
    assert message.startswith(f"{path}, line {index + 2}, column 'click': ")


def test_a_byte_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    text = user_error_message(lambda: table_of(path, HEADER.encode() + b"1,0,x\n2,1,caf\xe9\n"))
    assert text.startswith(f"{path}, line 3, column 'note': not UTF-8 text")
    assert "line 1: not UTF-8" in user_error_message(lambda: table_of(path, b"itemid,cl\xefck,note\n1,0,x\n"))


def test_gzip_without_its_suffix_is_refused(tmp_path: Path) -> None:
    text = user_error_message(lambda: table_of(tmp_path / "a.csv", gzip.compress(HEADER.encode() + b"1,0,x\n")))
    assert "gzip: name it a.csv.gz" in text


@pytest.mark.parametrize("header", ['"item\nid",click,note', "itemid\x1b[31m,click,note", "x" * 5000 + ",click,note",
                                    "itemid\0,click,note"], ids=["two lines", "colours", "long", "NUL"])
def test_a_quoted_header_is_one_short_line(tmp_path: Path, header: str) -> None:
    text = user_error_message(lambda: table_of(tmp_path / "a.csv", header + "\n1,0,x\n"))
    assert text.isprintable()
    assert len(text) < 700


def test_a_missing_file_a_directory_and_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "train.csv").mkdir()
    for name, reason in (("absent.csv", "no such file"), ("train.csv", "not a file"), ("pipe", "not a file")):
        path = tmp_path / name
        assert user_error_message(lambda path=path: read_table(path, COLUMNS)) == f"{path}: {reason}"  # type: ignore[misc]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    text = user_error_message(lambda: table_of(tmp_path / "a.csv", "itemid,note\n1,x\n"))
    assert text.startswith(f"{tmp_path / 'a.csv'}, line 1: column 'click' is missing")
    assert "misspelt" not in text


def test_a_header_without_a_comma_is_the_error(tmp_path: Path) -> None:
    message = user_error_message(lambda: table_of(tmp_path / "a.csv", "itemid-click,note\n1,0,x\n"))
    assert "line 1: column 'itemid' is missing" in message


def test_a_misspelt_column_has_a_suggestion(tmp_path: Path) -> None:
    text = user_error_message(lambda: table_of(tmp_path / "a.csv", "itemid,clik,note\n1,0,x\n"))
    assert "line 1" in text
    assert "column 'click' is missing" in text
    assert "is 'clik' misspelt?" in text
    (tmp_path / "a.csv").write_text("click_time\n5\n")
    text = user_error_message(lambda: read_table(tmp_path / "a.csv", {"click": "label", "click_time": "optional_id"}))
    assert text.endswith("(available: click_time)"), "that column is in the schema"


def test_a_duplicate_column_is_refused(tmp_path: Path) -> None:
    text = user_error_message(lambda: table_of(tmp_path / "a.csv", "itemid,click,note,click\n1,0,x,1\n"))
    assert "line 1: duplicate column 'click'" in text


UNREADABLE = {
    "an empty file": (b"", "empty"),
    "only blank lines": (b"\n\n", "empty"),
    "only a header": (HEADER.encode(), "no rows"),
    "Latin-1": (HEADER.encode() + "1,0,café\n".encode("latin-1"), "UTF-8"),
    "Latin-1 far down": (HEADER.encode() + b"1,0,x\n" * 20_000 + "1,0,café\n".encode("latin-1"), "UTF-8"),
    "UTF-16": ((HEADER + "1,0,x\n").encode("utf-16"), "UTF-8"),
    "unterminated quote": (HEADER.encode() + b'1,0,"x\n2,1,y\n', "unterminated quote"),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "val.csv"
    text = user_error_message(lambda: table_of(path, content))
    assert text.startswith(str(path))
    assert reason in text


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.999])
def test_a_truncated_gzip_file_is_refused(tmp_path: Path, fraction: float) -> None:
    content = gzip.compress((HEADER + "".join(f"{i * 7919 % 10007},{i % 2},x\n" for i in range(5_000))).encode())
    path = tmp_path / "events.csv.gz"
    text = user_error_message(lambda: table_of(path, content[: int(len(content) * fraction)]))
    assert text.startswith(str(path))


def test_plain_text_with_a_gzip_suffix_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "a.csv.gz") in user_error_message(lambda: table_of(tmp_path / "a.csv.gz", HEADER + "1,0,x\n"))


# ------------------------------------------------------------------------------------------------------------ accepted


def test_column_types_have_dtypes(tmp_path: Path) -> None:
    table = table_of(tmp_path / "a.csv", HEADER + "1,0,x\n2,1,\n")
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == {
        "itemid": "int64", "click": "float32", "note": table["note"].dtype.name}
    assert table["note"].tolist() == ["x", ""]


@pytest.mark.parametrize(("cell", "value"), [
    ("12", 12), ("12.0", 12), ("1.44E+12", 1_440_000_000_000), ("-5", -5), ("1439399530012", 1_439_399_530_012),
    (str(MAX_EXACT_INT - 1), MAX_EXACT_INT - 1)])
def test_spellings_of_whole_numbers(tmp_path: Path, cell: str, value: int) -> None:
    assert table_of(tmp_path / "a.csv", HEADER + f"{cell},0,x\n")["itemid"].tolist() == [value]


PLAIN = HEADER + "1,0,x\n2,1,y\n"
SAME_TABLE = {
    "a byte order mark": PLAIN.encode("utf-8-sig"),
    "Windows line ends": PLAIN.replace("\n", "\r\n").encode(),
    "blank lines": PLAIN.replace("\n", "\n\n").encode(),
    "no last line end": PLAIN.rstrip().encode(),
    "quotes": PLAIN.replace("x", '"x"').encode(),
    "further columns": b"other,itemid,click,note\n9,1,0,x\nmug,2,1,y\n",
    "another order of columns": b"note,click,itemid\nx,0,1\ny,1,2\n",
}


@pytest.mark.parametrize("content", SAME_TABLE.values(), ids=SAME_TABLE.keys())
def test_spellings_of_the_same_table(tmp_path: Path, content: bytes) -> None:
    expected = {"itemid": [1, 2], "click": [0, 1], "note": ["x", "y"]}
    assert table_of(tmp_path / "a.csv", content).to_dict("list") == expected
    assert table_of(tmp_path / "a.csv.gz", gzip.compress(content)).to_dict("list") == expected


def test_cells_may_contain_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    table = table_of(tmp_path / "a.csv", HEADER + '1,0,"a, b"\n2,1,"say ""hi"""\n3,0,"two\nlines"\n')
    assert table["note"].tolist() == ["a, b", 'say "hi"', "two\nlines"]


def test_repairs_are_counted_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("itemid,parent\n1,\n\n2,NULL\n \t\n3,nan\n4, \n5,7\n")
    table = read_table(path, {"itemid": "id", "parent": "optional_id"})
    assert table["itemid"].tolist() == [1, 2, 3, 4, 5]
    assert table["parent"].isna().tolist() == [True, True, True, True, False]
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: repaired: 2 blank lines skipped",
        f"{path}: repaired: 3 NULL, NA, nan or blank cells read as empty"]
    path.write_text("itemid,parent\n1,\n2,7.5\n")
    assert user_error_message(lambda: read_table(path, {"itemid": "id", "parent": "optional_id"})).startswith(
        f"{path}, line 3, column 'parent': '7.5' is not a whole number")


def test_optional_columns_and_optional_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("itemid,parent\n1,\n2,7\n")
    table = read_table(path, {"itemid": "id", "parent": "optional_id", "click": "label"}, optional=["click"])
    assert list(table) == ["itemid", "parent"]
    assert table["parent"].isna().tolist() == [True, False]


@pytest.mark.parametrize(("value", "normalized"), [
    (" 12.0 ", "12"), ("-124.0", "-124"), ("1.5", "1.5"), ("n12.0", "n12.0"), ("1.0.0", "1.0.0"),
    (".0", ".0"), ("", "")])
def test_normalize_category(value: str, normalized: str) -> None:
    assert normalize_category(value) == normalized


def test_count_rows_over_several_blocks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a" * 9 + b"\n" * 2_200_000 + b"b")
    assert count_rows(tmp_path / "a.csv") == 2_200_000


# ----------------------------------------------------------------------------------------------------------- text cells


def test_written_rows_are_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write_csv(path, [{"epoch": 1, "split": "val, test"}, {"epoch": 2.50, "auc": 0.5}])
    assert path.read_text() == 'epoch,split,auc\n1,"val, test",\n2.5,,0.5\n'
    rows = [{"epoch": "1", "split": "val, test", "auc": ""}, {"epoch": "2.5", "split": "", "auc": "0.5"}]
    assert read_csv_rows(path, ["auc"]) == rows
    assert "column 'loss' is missing" in user_error_message(lambda: read_csv_rows(path, ["loss"]))
    path.write_text("epoch,split\n")
    assert read_csv_rows(path, ["split"]) == []


def test_cell_location_counts_blank_lines_and_multiline_cells(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text('item,text\n\n1,"two\nlines"\n2,b\n\n3,c\n')
    assert [cell_location(path, row, "item") for row in range(3)] == [
        f"{path}, line {line}, column 'item'" for line in (3, 5, 7)]


# ------------------------------------------------------------------------------------ numbers, files without names


@pytest.mark.parametrize(("cell", "value"), [("1.5", 1.5), ("-3e38", -3e38), (" 7 ", 7.0), ("", None), ("nan", None),
                                             ("NA", None)])
def test_optional_numbers(tmp_path: Path, cell: str, value: float | None) -> None:
    (tmp_path / "a.csv").write_text(f"id,price\n1,{cell}\n")
    (price,) = read_table(tmp_path / "a.csv", {"id": "id", "price": "optional_number"})["price"]
    assert price == value or (value is None and pd.isna(price))


@pytest.mark.parametrize("cell", ["inf", "-inf", "1e400", "3.5e38", "cheap", "1_0", "True"])
def test_invalid_optional_numbers_are_named(tmp_path: Path, cell: str) -> None:
    (tmp_path / "a.csv").write_text(f"id,price\n1,2\n2,{cell}\n")
    text = user_error_message(lambda: read_table(tmp_path / "a.csv", {"id": "id", "price": "optional_number"}))
    assert text.startswith(f"{tmp_path / 'a.csv'}, line 3, column 'price': '{cell}' is ")


@pytest.mark.parametrize(("first", "told"), [
    ("1,0,x", "line 1: a row, not a header (1,0,x): write the names of the columns into a line above it: "
              "itemid,click,note"),
    ("1,1,x", "line 1: duplicate column '1': rename or remove one; or is this a row, not a header?"),
    ("a,b,c", "line 1: column 'itemid' is missing")])
def test_file_without_header_is_told(tmp_path: Path, first: str, told: str) -> None:
    assert told in user_error_message(lambda: table_of(tmp_path / "a.csv", f"{first}\n2,1,y\n"))


# ----------------------------------------------------------------------------------------- what DuckDB reads otherwise


@pytest.mark.parametrize(("rows", "notes"), [
    ('1,0, "x" \n2,1,y\n', [' "x" ', "y"]), ('1,0,"x"y\n2,1,y\n', ["xy", "y"]), ('1,0,x"y\n2,1,y\n', ['x"y', "y"]),
    ("1,0,x\r\n2,1,y\n", ["x", "y"]), ("1,0,x\r2,1,y\r", ["x", "y"]), ("1,0,x\n \t\n2,1,y\n", ["x", "y"]),
    (f"1,0,{'x' * 5_000_000}\n2,1,y\n", ["x" * 5_000_000, "y"])],
    ids=["blanks around quotes", "text behind a quote", "a quote in text", "mixed line ends", "old line ends",
         "a line of blanks", "a cell of 5 MB"])
def test_unusual_files_are_read_row_by_row(tmp_path: Path, rows: str, notes: list[str]) -> None:
    table = table_of(tmp_path / "a.csv", HEADER + rows)
    assert table["note"].tolist() == notes
    assert table["itemid"].tolist() == [1, 2]
    assert table["click"].tolist() == [0, 1]


@given(cells=st.lists(st.text("0129+-.eE_xnaif \t", max_size=5).filter(str.strip), min_size=1, max_size=40),
       column_type=st.sampled_from(["id", "optional_id", "label", "number", "optional_number"]))
@settings(max_examples=40)
def test_sql_and_python_read_the_same_numbers(tmp_path_factory: pytest.TempPathFactory, cells: list[str],
                                              column_type: ColumnType) -> None:
    """What the fast pass refuses, the slow one names; what it takes has Python's value."""
    path = tmp_path_factory.mktemp("cells") / "a.csv"
    for cell in cells:
        path.write_text(f"a,b\n{cell},x\n")
        with contextlib.suppress(UserError):  # which the slow pass raises: it found the cell invalid, too
            (value,) = read_table(path, {"a": column_type})["a"]
            assert pd.isna(value) if cell.strip() in NA_VALUES else value == float(cell)


def test_parquet_is_checked_as_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    as_relation(pd.DataFrame({"itemid": [1, 2], "click": [0.0, 1.0], "note": ["x", None]})).write_parquet(str(path))
    pd.testing.assert_frame_equal(read_table(path, COLUMNS), table_of(tmp_path / "a.csv", HEADER + "1,0,x\n2,1,\n"))
    as_relation(pd.DataFrame({"itemid": [1, 2], "click": [0, 7], "note": "x"})).write_parquet(str(path))
    text = user_error_message(lambda: read_table(path, COLUMNS))
    assert text == f"{path}, row 2, column 'click': '7' is not a label: 0 or 1"
    path.write_bytes(path.read_bytes()[:-9])
    assert user_error_message(lambda: read_table(path, COLUMNS)).startswith(f"{path}: cannot read as Parquet: ")


def test_names_that_duckdb_would_take_for_patterns(tmp_path: Path) -> None:
    (folder := tmp_path / "day=1" / "[a]*").mkdir(parents=True)
    assert table_of(folder / "a.csv", HEADER + "1,0,x\n")["note"].tolist() == ["x"]


def test_rows_are_numbered_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id\n" + "".join(f"{i * 7 % 100_003}\n" for i in range(100_000)))
    with connect(threads=2) as con:
        rows = scan(con, path, {"id": "id"}).filter("id <> row * 7 % 100003").fetchall()
    assert rows == []
