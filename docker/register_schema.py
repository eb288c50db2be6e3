"""Register TradeV2 with a schema registry (Confluent's API): `register_schema.py URL ID SUBJECT...`.

The messages of `k2flow produce` carry a schema id in their header. The registry must assign that id to every subject;
otherwise this script fails. It is idempotent.
"""

import json
import sys
from collections.abc import Sequence

import requests

from k2flow.trades.schema import trade_schema

TIMEOUT_SECONDS = (5, 20)  # connect, read
CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"


def register(url: str, subject: str) -> int:
    """Register TradeV2 as the newest schema of `subject` and return its id. Raises requests' errors, ValueError."""
    answer = requests.post(
        f"{url.rstrip('/')}/subjects/{subject}/versions",
        data=json.dumps({"schema": json.dumps(trade_schema())}),
        headers={"Content-Type": CONTENT_TYPE},
        timeout=TIMEOUT_SECONDS,
    )
    answer.raise_for_status()
    return int(answer.json()["id"])


def main(url: str, wanted: str, subjects: Sequence[str]) -> None:
    """Register and print the id of each subject. Exit with 1 if an id is not `wanted`."""
    for subject in subjects:
        found = register(url, subject)
        print(f"{subject}: schema id {found}", flush=True)
        if found != int(wanted):
            sys.exit(
                f"{subject}: TradeV2 has schema id {found}, not {wanted}: use `k2flow produce --schema-id {found}`"
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
