"""`k2flow run`."""

from collections.abc import Sequence

from k2flow.cli.process import exit_on_error
from k2flow.config.settings import PREFIX, load_settings
from k2flow.errors import SettingsError
from k2flow.exchange import exchange_names, find_exchange
from k2flow.layers import CANDLES
from k2flow.observability.logs import set_up_logging
from k2flow.process_exit import EXIT_FAILED, EXIT_UNAVAILABLE
from k2flow.supervisor.plan import plan_processes
from k2flow.supervisor.supervise import supervise


@exit_on_error(EXIT_FAILED, retryable_code=EXIT_UNAVAILABLE)
def run_flows(
    flows: Sequence[str],
    processes: int | None,
    trigger: float | None,
    until_caught_up: bool,
    addresses: str | None,
    process_id: int | None,
) -> None:
    """Supervise flows, of exchanges or the candles, until they end. Options that are None come from the settings.

    The exit code of an error says whether another start may help.
    """
    settings = load_settings(exchange_names())
    set_up_logging(settings.log_level, settings.log_format)
    names = list(dict.fromkeys(flows))
    cluster = addresses or settings.cluster
    if cluster and len(names) > 1:
        raise SettingsError("a cluster runs one exchange: run each exchange with its own addresses")
    if names == [CANDLES.name] and (cluster or processes not in (None, 1)):
        raise SettingsError("the candles flow is one process: run it without --addresses and --processes")
    number = settings.process_id if process_id is None else process_id
    plans = [plan_processes(name, _processes(name, processes), cluster, number) for name in names]
    extra = {f"{PREFIX}UNTIL_CAUGHT_UP": "1"} if until_caught_up else {}
    if trigger is not None:
        extra |= {f"{PREFIX}{name.upper()}_TRIGGER_SECONDS": f"{trigger:g}" for name in names}
    supervise(plans, settings, extra)


def _processes(flow: str, wanted: int | None) -> int:
    return 1 if flow == CANDLES.name else wanted or find_exchange(flow).settings.processes
