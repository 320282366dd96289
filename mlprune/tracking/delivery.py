"""An outbox: what is put in is delivered in order by one thread, each thing until it has got through.

Who puts something in goes on at once. Ctrl-C, which only the main thread hears, breaks no delivery off.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between two attempts; each is twice the one before


class AwayError(Exception):
    """The other side is not there for the moment: the same thing is tried again."""


class Outbox:
    """Things on their way. A thing is delivered by calling it, from the outbox's own thread, one at a time.

    A thing that raises AwayError is tried again, with growing pauses, for as long as it takes; so it must do no
    harm when it has been done halfway before. One that raises anything else is refused for good: it is dropped,
    the next ones go on, and the error is raised once, by `raise_refused` or `settle`.
    """

    def __init__(self) -> None:
        self.trouble: str | None = None  # why nothing gets through at the moment
        self._things: deque[Callable[[], object]] = deque()  # the first one is under way
        self._changed = threading.Condition()
        self._delivered, self._closed = 0, False
        self._refused: Exception | None = None
        threading.Thread(target=self._deliver, name="outbox", daemon=True).start()

    @property
    def behind(self) -> int:
        """Things that have not been delivered yet."""
        return len(self._things)

    def put(self, thing: Callable[[], object]) -> None:
        assert not self._closed
        with self._changed:
            self._things.append(thing)
            self._changed.notify_all()

    def raise_refused(self) -> None:
        with self._changed:
            refused, self._refused = self._refused, None
        if refused is not None:
            raise refused

    def settle(self, patience: float, waiting: Callable[[int, str], None]) -> bool:
        """Wait until all is delivered; False when nothing got through for `patience` seconds.

        About once a second while the other side is away, `waiting` is told how many things wait, and why.
        Raises the first thing's error that was refused for good, after all others.
        """
        delivered, since = self._delivered, time.monotonic()
        while self._things and (left := since + patience - time.monotonic()) > 0:
            with self._changed:
                self._changed.wait_for(lambda: not self._things, min(1.0, left))
            if self._delivered > delivered:
                delivered, since = self._delivered, time.monotonic()
            trouble = self.trouble
            if self._things and trouble is not None:
                waiting(len(self._things), trouble)
        self.raise_refused()
        return not self._things

    def close(self) -> None:
        """Deliver nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _deliver(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._things or self._closed)
            if self._closed:
                return
            try:
                self._things[0]()
            except AwayError as away:
                self.trouble = str(away)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            except Exception as error:
                self._refused = self._refused or error
            self.trouble, pause = None, FIRST_PAUSE
            with self._changed:
                self._things.popleft()
                self._delivered += 1
                self._changed.notify_all()
