"""Settings (`Arguments`), tools of the loops (`utils`), the books of a run (`checkpoint`, `plots`), loops (`run`)."""
