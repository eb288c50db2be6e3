"""Patches and private parts of third-party libraries: one module or package per library.

Each checks, when it is imported, that the library's version is one that it was tested with. An unknown version could
break a patch without an error.
"""

from k2flow.errors import UnsupportedVersionError

Version = tuple[int, ...]


def require_version(library: str, found: str, oldest: Version, before: Version) -> None:
    """Refuse a version `found` that is not in the tested range [`oldest`, `before`). Raises UnsupportedVersionError."""
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split(".")[:3])
    if not oldest <= numbers < before:
        raise UnsupportedVersionError(
            f"{library} {found} is installed, but k2flow was tested with {_text(oldest)} up to, not including, "
            f"{_text(before)}: install with -c constraints.txt, or run the tests and extend the range in k2flow/compat"
        )


def _text(version: Version) -> str:
    return ".".join(map(str, version))
