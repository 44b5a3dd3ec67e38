"""Data: raw logs (`simulate`), raw logs to MDP tables (`prepare`), MDP tables to arrays (`rtrl`). No model code.

`files` is everything that touches the disk: checked reading, atomic writing, the one-line errors.
"""
