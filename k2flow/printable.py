r"""Text for terminals and logs: what is no character of a line is shown as an escape.

A value may hold anything. Control characters would drive the terminal, line breaks would forge lines of a log, and
marks of writing direction would reorder what is read. A backslash stays as it is, so `\n` may be two characters of a
value: JSON and CSV are exact.
"""

import re

_NOT_PRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters
    "\u2028\u2029"  # line breaks
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # direction, and no width
    "\U000e0000-\U000e007f"  # tags, which no one sees
    "\ud800-\udfff]"  # surrogates, from bytes of arguments or file names that are not UTF-8
)


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""Return a text as one line in `encoding`: \n, \x1b, \u202e for what cannot be shown.

    Characters that `encoding` lacks are escaped too, so that the text is as wide as it will be.
    """
    shown = _NOT_PRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)
