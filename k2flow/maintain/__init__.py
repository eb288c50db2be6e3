"""Keeps the tables healthy while flows write to them and people read them.

    retention ─► compaction, manifests ─► snapshot expiry ─► files that nothing reaches

Each step is a plan (a pure function of a table's metadata and the time) and what carries it out. Every commit asserts
the table's head, as the flows' own do; where a flow was first, maintenance makes its commit anew, and after some
attempts leaves it for the next time. So a flow is never made to fail, and at worst commits again once.
"""
