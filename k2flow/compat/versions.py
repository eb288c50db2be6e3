"""The check that each module of this package begins with."""

from k2flow.errors import UnsupportedVersionError

Version = tuple[int, ...]


def require_version(library: str, found: str, oldest: Version, before: Version) -> None:
    """Refuse a version of a library that is not in the tested range.

    Args:
        library: Its name on PyPI, or of the library inside.
        found: The installed version.
        oldest: The oldest tested version.
        before: The first version that is not tested.

    Raises:
        UnsupportedVersionError: The version is not in [oldest, before).
    """
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split(".")[:3])
    if not oldest <= numbers < before:
        raise UnsupportedVersionError(
            f"{library} {found} is installed, but k2flow was tested with {_text(oldest)} up to, not including, "
            f"{_text(before)}: install with -c constraints.txt, or run the tests and extend the range in k2flow/compat"
        )


def _text(version: Version) -> str:
    return ".".join(map(str, version))
