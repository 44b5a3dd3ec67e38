"""Spark runs the SQL steps of an importer: the same text, translated by sqlglot.

DuckDB checks the raw files and hands them over as Parquet; it takes the resulting tables back in the same way and
writes them. So errors and bytes are those of the DuckDB engine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.duck import temporary_folder
from common.errors import UserError
from dataset.engine import Engine

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation


class SparkEngine(Engine):
    """Spark, whose driver and workers read and write Parquet files in `folder`; made by `open_spark`."""

    def __init__(self, con: DuckDBPyConnection, spark: Any, folder: Path) -> None:
        super().__init__(con)
        self.spark, self.folder = spark, folder

    def view(self, name: str, relation: DuckDBPyRelation) -> None:
        super().view(name, relation)
        (self.folder / name).mkdir()
        self.con.table(name).write_parquet(str(self.folder / name / "part-0.parquet"))
        self.spark.read.parquet(str(self.folder / name)).createOrReplaceTempView(name)

    def step(self, name: str, query: str, drop: Sequence[str] = ()) -> None:
        table = self._sql(query)
        table.write.parquet(str(self.folder / name))
        self.spark.read.schema(table.schema).parquet(str(self.folder / name)).createOrReplaceTempView(name)
        for table in drop:
            self.spark.catalog.dropTempView(table)
            shutil.rmtree(self.folder / table)

    def query(self, query: str) -> tuple[Any, ...]:
        result = self._sql(query)
        return tuple(result.first() or (None,) * len(result.columns))

    def result(self, name: str) -> DuckDBPyRelation:
        # Files that Spark names in the order of the rows.
        return self.con.read_parquet(sorted(map(str, (self.folder / name).glob("part-*.parquet"))))

    def _sql(self, query: str) -> Any:
        import sqlglot

        (translated,) = sqlglot.transpile(query, read="duckdb", write="spark")
        return self.spark.sql(translated)


@contextlib.contextmanager
def open_spark(con: DuckDBPyConnection, parent: Path) -> Iterator[SparkEngine]:
    """An engine with a folder of its own in `parent`, which all workers must see. The master is Spark's own setting
    (`PYSPARK_SUBMIT_ARGS`), by default all cores of this machine. Raises UserError if Spark or Java is missing."""
    try:
        import sqlglot  # noqa: F401
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise UserError(f"--engine=spark: {error.name} is not installed: pip install -r "
                        "requirements/cluster.txt") from None
    if not (shutil.which("java") or shutil.which(str(Path(os.environ.get("JAVA_HOME", ""), "bin", "java")))):
        raise UserError("--engine=spark: Java is not installed: Spark 4 needs Java 17 or later (apt-get install "
                        "default-jre-headless)")
    with temporary_folder(parent) as folder:
        settings: dict[str, Any] = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
        spark = SparkSession.builder.appName("dataset.prepare").config(map=settings).getOrCreate()
        spark.sparkContext.setLogLevel("ERROR")
        try:
            yield SparkEngine(con, spark, Path(folder))
        finally:
            spark.stop()
