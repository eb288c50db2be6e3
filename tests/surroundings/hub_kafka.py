"""`python -m tests.surroundings.hub_kafka HOME PORT ADDRESS TOPIC PARTITIONS`: run a broker for all hosts.

It listens on ADDRESS, prints `ready` when it answers, and runs until its standard input is closed.
"""

import sys
from pathlib import Path

from k2flow.sandbox.kafka.local import LocalKafka, free_port


def main(home: str, port: str, address: str, topic: str, partitions: str) -> None:
    listeners = f"HOSTS://{address}:{port}"
    properties = {
        "listeners": listeners,
        "advertised.listeners": listeners,
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,HOSTS:PLAINTEXT",
    }
    with LocalKafka(Path(home), free_port(), properties=properties) as kafka:
        kafka.start({topic: int(partitions)})
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
