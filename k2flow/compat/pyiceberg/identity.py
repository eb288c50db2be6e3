"""Keys of caches that compare PyIceberg's objects by identity."""

from typing import Any


class Same:
    """Compares a schema or spec by identity: to compare two takes as long as to derive what is cached."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
