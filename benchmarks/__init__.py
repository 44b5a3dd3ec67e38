"""`make bench`: throughput beside torch-rechub on the same table, and time and memory against the number of rows."""
