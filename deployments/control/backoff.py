"""How often somebody tries again who has no answer, and what the log says of it: once each way."""

from __future__ import annotations

import logging

from select_n_core.errors import UnavailableError

_log = logging.getLogger(__name__)

_FIRST_S = 0.1
_MOST_S = 0.5  # a controller that comes back must hear everybody soon
_ABSENT_S = 2.0


class Backoff:
    """The time between two tries grows with every failure in a row.

    Args:
        what: is affected, for the log.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._wait_s = _FIRST_S
        self._down = False

    def failed(self, error: Exception) -> float:
        """Seconds to wait before the next try; the first failure in a row is logged.

        An UnavailableError says that there is no controller at all: it may come, but not soon.
        """
        if not self._down:
            self._down = True
            if isinstance(error, UnavailableError):
                _log.info("no %s: %s", self._what, error)
            else:
                _log.warning("no %s for now: %r", self._what, error)
        if isinstance(error, UnavailableError):
            return _ABSENT_S
        wait_s, self._wait_s = self._wait_s, min(2 * self._wait_s, _MOST_S)
        return wait_s

    def worked(self) -> None:
        """The next failure is a first one again."""
        if self._down:
            _log.info("%s again", self._what)
        self._down, self._wait_s = False, _FIRST_S
