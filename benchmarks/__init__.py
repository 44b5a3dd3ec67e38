"""`make bench`: how fast this is, beside torch-rechub on the same table, and where the arithmetic ends."""
