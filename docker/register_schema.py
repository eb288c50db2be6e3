"""Registers TradeV2 with a schema registry that speaks Confluent's API: `register_schema.py URL ID SUBJECT...`.

The messages of `k2flow produce` carry an id in their header, so that the registry must give the schema that very one
for every subject; where it gives another one, this says so and fails. Doing it again changes nothing.
"""

import json
import sys
from collections.abc import Sequence

import requests

from k2flow.trades.schema import trade_schema

TIMEOUT_SECONDS = (5, 20)  # connect, read
CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"


def register(url: str, subject: str) -> int:
    """The id that the registry gives TradeV2 as the newest schema of `subject`. Raises requests' errors, ValueError."""
    answer = requests.post(
        f"{url.rstrip('/')}/subjects/{subject}/versions",
        data=json.dumps({"schema": json.dumps(trade_schema())}),
        headers={"Content-Type": CONTENT_TYPE},
        timeout=TIMEOUT_SECONDS,
    )
    answer.raise_for_status()
    return int(answer.json()["id"])


def main(url: str, wanted: str, subjects: Sequence[str]) -> None:
    """Registers for each subject, and says what came of it. Ends the program with 1 where an id is not `wanted`."""
    for subject in subjects:
        found = register(url, subject)
        print(f"{subject}: schema id {found}", flush=True)
        if found != int(wanted):
            sys.exit(
                f"{subject}: TradeV2 has schema id {found}, not {wanted}: tell `k2flow produce --schema-id {found}`"
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
