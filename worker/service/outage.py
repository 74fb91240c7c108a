"""Tells of an outage once when it begins and once when it ends, however often something is tried in between."""

import logging


class Outage:
    """Of one thing that is tried again and again; a worker tries several things every second."""

    def __init__(self, logger: logging.Logger, problem: str, *, over: str) -> None:
        """`problem` and `over` are what to log at its beginning and at its end."""
        self._logger = logger
        self._problem = problem
        self._over = over
        self._is_on = False

    def failed(self, error: Exception) -> None:
        """Warn, if the last try did not fail."""
        if not self._is_on:
            self._logger.warning(self._problem, extra={"error": str(error)})
        self._is_on = True

    def succeeded(self) -> None:
        """Say that it is over, if it was on."""
        if self._is_on:
            self._logger.info(self._over)
        self._is_on = False
