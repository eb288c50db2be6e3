"""`scripts/bench`."""

import os

import typer

from bench.age import age
from bench.audit import audit
from bench.candles import candles
from bench.catchup import catchup
from bench.commits import commits
from bench.decode import decode
from bench.dedup import dedup
from bench.endurance import endurance
from bench.freshness import freshness
from bench.isolation import isolation
from bench.maintain import maintain
from bench.peers.compare import peers
from bench.profile import profile
from bench.query import query
from bench.run_all import all_
from bench.scale import scale
from bench.smoke import smoke
from bench.soak import soak
from bench.stages import stages
from bench.window import window

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("all")(all_)
app.command("age")(age)
app.command("audit")(audit)
app.command("candles")(candles)
app.command("catchup")(catchup)
app.command("commits")(commits)
app.command("decode")(decode)
app.command("dedup")(dedup)
app.command("endurance")(endurance)
app.command("freshness")(freshness)
app.command("isolation")(isolation)
app.command("maintain")(maintain)
app.command("peers")(peers)
app.command("profile")(profile)
app.command("query")(query)
app.command("scale")(scale)
app.command("smoke")(smoke)
app.command("soak")(soak)
app.command("stages")(stages)
app.command("window")(window)


@app.callback()
def _bench() -> None:
    """Measure k2flow on this machine, with a private Kafka and private tables."""
    for name in list(os.environ):
        if name.startswith(("K2FLOW_", "PYICEBERG_")):  # or simulated trades would end in the caller's tables
            del os.environ[name]


app()
