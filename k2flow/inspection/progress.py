"""How long reads report their progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Takes the name of a table or step, the rows read since the last call, and the rows to read in all."""
