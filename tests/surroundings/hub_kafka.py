"""`python -m tests.surroundings.hub_kafka HOME PORT ADDRESS TOPIC PARTITIONS`: a broker that hosts reach at an address.

It runs until its standard input is closed, on the host that it is started on; `ready` is printed when it answers.
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
