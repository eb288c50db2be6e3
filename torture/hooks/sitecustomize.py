"""Python imports this module at the start of every process with this folder on PYTHONPATH: the torture's flows.

TORTURE_HOST       the host name that the process sees: a copy of a flow that runs "on another machine"
TORTURE_MUTATIONS  names in MUTATIONS, separated by commas: the safeguards that are switched off
"""

import os
import socket

if host := os.environ.get("TORTURE_HOST"):
    socket.gethostname = lambda: host

if names := os.environ.get("TORTURE_MUTATIONS"):
    from torture.mutations import MUTATIONS

    for name in names.split(","):
        MUTATIONS[name]()
