"""Reprocessing: messages are decoded again, by today's schemas and rules, and their rows replaced.

In the order of the data: `context` selects the messages in scope, `revalidation` finds those that are something else
today, `replacements` the rows that are removed and added. `rewriting` writes the data files, and
k2flow.iceberg.staging commits them. `new_key` replaces the rows of Gold after a change of the deduplication key.
"""

from k2flow.reprocess.new_key import NewKey, set_new_key
from k2flow.reprocess.run import Outcome, replay, reprocess

__all__ = ["NewKey", "Outcome", "replay", "reprocess", "set_new_key"]
