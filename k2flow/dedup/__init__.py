"""Exact deduplication in bounded memory: no Python object per id, and no state besides Gold.

An id is the deduplication key of a row, by default its `message_id`. The modules, in the order of a batch:

    keys         the key column, and ids encoded without loss as fixed-width integers
    sorted_runs  sets of encoded ids, and the search in them
    index        which rows of a batch have a new id
"""

from k2flow.dedup.index import SeenIds
from k2flow.dedup.keys import owners_of

__all__ = ["SeenIds", "owners_of"]
