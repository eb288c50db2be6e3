"""`k2flow run`."""

from collections.abc import Sequence

from k2flow.cli.process import exit_on_error
from k2flow.config.settings import PREFIX, load_settings
from k2flow.errors import SettingsError
from k2flow.exchange import exchange_names, find_exchange
from k2flow.observability.logs import set_up_logging
from k2flow.process_exit import EXIT_FAILED, EXIT_UNAVAILABLE
from k2flow.supervisor.plan import plan_processes
from k2flow.supervisor.supervise import supervise


@exit_on_error(EXIT_FAILED, retryable_code=EXIT_UNAVAILABLE)
def run_flows(
    exchanges: Sequence[str],
    processes: int | None,
    trigger: float | None,
    until_caught_up: bool,
    addresses: str | None,
    process_id: int | None,
) -> None:
    """Supervise the flows of `exchanges` until they end. Options that are None come from the settings.

    The exit code of an error says whether another start may help.
    """
    settings = load_settings(exchange_names())
    set_up_logging(settings.log_level, settings.log_format)
    found = [find_exchange(name) for name in dict.fromkeys(exchanges)]
    cluster = addresses or settings.cluster
    if cluster and len(found) > 1:
        raise SettingsError("a cluster runs one exchange: run each exchange with its own addresses")
    number = settings.process_id if process_id is None else process_id
    plans = [plan_processes(each.name, processes or each.settings.processes, cluster, number) for each in found]
    extra = {f"{PREFIX}UNTIL_CAUGHT_UP": "1"} if until_caught_up else {}
    if trigger is not None:
        extra |= {f"{PREFIX}{each.name.upper()}_TRIGGER_SECONDS": f"{trigger:g}" for each in found}
    supervise(plans, settings, extra)
