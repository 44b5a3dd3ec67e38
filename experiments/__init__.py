"""The grid of experiments: what is compared (`arms`), how it is run (`runs`), what came of it (`report`)."""
