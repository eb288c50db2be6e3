"""Python imports this at the start of every process that has this folder on PYTHONPATH, as the torture's flows have.

TORTURE_HOST       the host name that the process sees: a copy of a flow that runs "on another machine"
TORTURE_MUTATIONS  names of MUTATIONS, separated by commas: what of k2flow's exactly-once is switched off
"""

import os
import socket

if host := os.environ.get("TORTURE_HOST"):
    socket.gethostname = lambda: host

if names := os.environ.get("TORTURE_MUTATIONS"):
    from torture.mutations import MUTATIONS

    for name in names.split(","):
        MUTATIONS[name]()
