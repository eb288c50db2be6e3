"""Metrics that take longer to find than a scrape may wait: a thread of their own looks for them."""

import logging
import threading
from abc import abstractmethod

from prometheus_client.registry import Collector

from k2flow.errors import one_line

log = logging.getLogger(__name__)


class BackgroundCollector(Collector):
    """Calls `update` every `every_seconds` in a thread. A scrape exports what the last call found."""

    def __init__(self, name: str, failure: str, every_seconds: float) -> None:
        """`name` is the thread's, `failure` the text of a warning, before the error."""
        self._name = name
        self._failure = failure
        self._every_seconds = every_seconds
        self._stopped = threading.Event()

    @abstractmethod
    def update(self) -> None:
        """Look again, and keep what is found. Any error is logged, and does not end the thread."""

    def start(self) -> None:
        """Start to look, until `stop` or the end of the process."""
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def stop(self) -> None:
        """Stop to look. A look under way logs no warning any more."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.update()
            except Exception as error:  # without this thread, what was found last would be exported forever
                log.debug("%s", self._name, exc_info=True)
                if not self._stopped.is_set():
                    log.warning("%s: %s", self._failure, one_line(error))
            self._stopped.wait(self._every_seconds)
