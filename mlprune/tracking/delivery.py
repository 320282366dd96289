"""DeliveryQueue: updates for a server that may be unavailable, delivered in order by one thread.

What an update does, and which errors mean that the server is unavailable, is decided by the caller.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between two attempts; each pause is twice the previous one


class UnavailableError(Exception):
    """The server is unavailable at the moment: the same update is tried again later."""


class DeliveryQueue:
    """Updates waiting to be delivered. An update is a function; the queue's own thread calls one at a time.

    An update that raises UnavailableError is retried, with growing pauses, until it succeeds. It must therefore be
    safe to repeat, even after it was carried out in part. An update that raises anything else is rejected: it is
    dropped, the following ones are delivered, and its error is raised once, by `raise_rejected` or `flush`.

    `submit` returns at once. Ctrl-C, which Python delivers to the main thread only, interrupts no delivery.
    """

    def __init__(self) -> None:
        self.last_error: str | None = None  # why the server is unavailable at the moment; None if it is available
        self._updates: deque[Callable[[], object]] = deque()  # the first one is being delivered
        self._changed = threading.Condition()
        self._delivered, self._closed = 0, False
        self._rejected: Exception | None = None
        threading.Thread(target=self._deliver_all, name="delivery", daemon=True).start()

    @property
    def pending(self) -> int:
        """The number of updates that have not been delivered yet."""
        return len(self._updates)

    def submit(self, update: Callable[[], object]) -> None:
        """Queue an update."""
        assert not self._closed
        with self._changed:
            self._updates.append(update)
            self._changed.notify_all()

    def raise_rejected(self) -> None:
        """Raise the error of the first rejected update, if it has not been raised yet."""
        with self._changed:
            rejected, self._rejected = self._rejected, None
        if rejected is not None:
            raise rejected

    def flush(self, patience: float, on_wait: Callable[[int, str], None]) -> bool:
        """Wait until all updates are delivered. Returns False if none was delivered for `patience` seconds.

        While the server is unavailable, `on_wait(pending, last_error)` is called about once a second. Raises the
        error of the first rejected update, after all others were delivered.
        """
        delivered, since = self._delivered, time.monotonic()
        while self._updates and (remaining := since + patience - time.monotonic()) > 0:
            with self._changed:
                self._changed.wait_for(lambda: not self._updates, min(1.0, remaining))
            if self._delivered > delivered:
                delivered, since = self._delivered, time.monotonic()
            last_error = self.last_error
            if self._updates and last_error is not None:
                on_wait(len(self._updates), last_error)
        self.raise_rejected()
        return not self._updates

    def close(self) -> None:
        """Stop delivering; pending updates are dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _deliver_all(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._updates or self._closed)
            if self._closed:
                return
            try:
                self._updates[0]()
            except UnavailableError as error:
                self.last_error = str(error)
                logger.debug("retry in %.1f s: %s", pause, error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            except Exception as error:
                logger.debug("rejected: %s", error)
                self._rejected = self._rejected or error
            self.last_error, pause = None, FIRST_PAUSE
            with self._changed:
                self._updates.popleft()
                self._delivered += 1
                self._changed.notify_all()
