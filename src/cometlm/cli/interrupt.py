"""Signals that ask a long read to end: Ctrl-C, SIGTERM (`docker stop`, systemd), SIGHUP.

The first one lets work end at its next border; a second one interrupts at once. Where the work only
waits for input, the first one does, too.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last is Windows' own
_FAILED = 128  # a shell's exit code of a command that a signal ended begins here


class InterruptLater:
    """Lets work end at its next border on the first signal; the second one interrupts at once.

    A signal that is ignored stays ignored: `nohup` wants it so.

    Args:
        say: called with what a person should know; its OSError is no reason to stop, since a
            terminal that is closed cannot be written to.

    Attributes:
        asked: the signal that came, or 0.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked = 0
        self._say = say
        self._waits = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> InterruptLater:
        if threading.current_thread() is threading.main_thread():  # elsewhere none arrives
            for name in _NAMES:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What a command ends with that was asked to: 130 after Ctrl-C."""
        return _FAILED + (self.asked or signal.SIGINT)

    def listening(self, file: Any) -> Any:
        """A file of bytes; while it is waited for, the first signal interrupts."""
        return _Listening(file, self)

    def _note(self, number: int, frame: Any) -> None:
        again, self.asked = self.asked, number
        if again or self._waits:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):
            self._say("ending with this chunk; once more ends at once")

    def _wait_for(self, read: Callable[[int], bytes], size: int) -> bytes:
        self._waits = True
        try:
            if self.asked:
                raise KeyboardInterrupt
            return read(size)
        finally:
            self._waits = False


class _Listening:
    """A file of bytes that gives what has come."""

    def __init__(self, file: Any, interrupt: InterruptLater) -> None:
        self._read = getattr(file, "read1", None) or file.read
        self._interrupt = interrupt

    def read(self, size: int = -1) -> bytes:
        return self._interrupt._wait_for(self._read, size) if size else b""
