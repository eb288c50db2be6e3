"""Doing it over: messages are judged again, by today's schemas and rules, and the rows that came of them replaced.

In the order of the data: `scope` says which messages, `difference` what becomes of each that did not before, and which
rows go; `rewriting` writes the data files without them and with the new ones, and k2flow.iceberg.staging commits those.
"""

from k2flow.reprocess.run import Outcome, replay, reprocess

__all__ = ["Outcome", "replay", "reprocess"]
