"""Errors of table properties that hold JSON."""

from pydantic import ValidationError


def first_error(error: ValidationError) -> str:
    """Return the first error in a property's JSON on one line, with the place in the JSON where it is."""
    found = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, found["loc"]))
    return f"{place}: {found['msg']}" if place else found["msg"]
