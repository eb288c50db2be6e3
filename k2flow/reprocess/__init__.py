"""Reprocessing: messages are decoded again, by today's schemas and rules, and their rows replaced.

In the order of the data: `context` selects the messages in scope, `revalidation` finds those that are something else
today, `replacements` the rows that are removed and added. `rewriting` writes the data files, and
k2flow.iceberg.staging commits them.
"""

from k2flow.reprocess.run import Outcome, replay, reprocess

__all__ = ["Outcome", "replay", "reprocess"]
