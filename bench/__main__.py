"""`scripts/bench`."""

import typer

from bench.audit import audit
from bench.catchup import catchup
from bench.commits import commits
from bench.decode import decode
from bench.dedup import dedup
from bench.isolation import isolation
from bench.stages import stages

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("audit")(audit)
app.command("catchup")(catchup)
app.command("commits")(commits)
app.command("decode")(decode)
app.command("dedup")(dedup)
app.command("isolation")(isolation)
app.command("stages")(stages)


@app.callback()
def _bench() -> None:
    """Measure k2flow on this machine."""


app()
