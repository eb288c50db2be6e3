"""PyIceberg: its private classes that k2flow extends, a REST catalog with timeouts, cached and compressed metadata."""

import pyiceberg

from k2flow.compat import require_version

require_version("pyiceberg", pyiceberg.__version__, (0, 12, 0), (0, 12, 1))
