"""Keeps the tables healthy while flows write to them and people read them.

    retention ─► compaction, manifests ─► expired snapshots ─► orphan files

Each step is a plan (a pure function of a table's metadata and the time) and its execution. Every commit asserts the
table's head, as the flows' own commits do. After a conflict maintenance builds its commit again; after some attempts it
yields until the next run. So a flow never fails because of it, and at worst repeats a commit once.
"""
