"""Data: raw logs (`simulate`), raw logs to MDP tables (`prepare`), MDP tables to arrays (`rtrl`), ids and batches.

This package depends on `common` only.
"""
