"""Every table of the paper: `conditions` (what is compared), `runner`, `statistics`, `report` and `plots`."""
