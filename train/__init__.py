"""Training: settings (`Arguments`), the documented functions (`run`), supervised training (`supervised`, `metrics`,
`task_weighting`), critics (`offline_rl`), their weights of the loss (`polish`), stopping rules (`utils`), `plots`."""
