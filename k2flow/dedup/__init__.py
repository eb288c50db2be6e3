"""Exact deduplication of message ids in bounded memory: no Python object for an id, no state but Gold's.

keys.py turns ids into fixed-width integers without loss, runs.py keeps and finds them, and index.py says
which row brings an id for the first time.
"""

from k2flow.dedup.index import SeenIds
from k2flow.dedup.keys import owner

__all__ = ["SeenIds", "owner"]
