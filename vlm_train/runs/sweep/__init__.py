"""Sweeps: Hydra's multirun with a record of its jobs, a table and a page of charts at the end.

`command` is the process that the user started, `job` runs wherever the launcher wants it, `records` is what both leave
in the sweep's folder, `summary` and `page` are made from that.
"""
