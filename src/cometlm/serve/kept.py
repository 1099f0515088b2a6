"""What the server keeps: immutable sessions by id, in memory and in a folder, to budgets.

A session that is kept never changes: who goes on from it gets a fork. The least recently used leave
memory first (they stay in the folder), then the folder. An id that was given and is kept no longer
is told from one that never was.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from cometlm.serve.folder import TURN, Folder, Kept
from cometlm.serve.ids import Ids
from cometlm.serve.trail import beginnings
from cometlm.session.session import Session

_log = logging.getLogger(__name__)
_SWEEP = 60.0  # seconds between two looks for what has expired


class NotKeptError(KeyError):
    """There is no such session, for this owner.

    Attributes:
        name: the id.
        was_given: it was kept once, or would have been.
    """

    def __init__(self, name: str, was_given: bool) -> None:
        super().__init__(name)
        self.name, self.was_given = name, was_given

    def __str__(self) -> str:
        if self.was_given:
            return (
                f"{self.name} is kept no longer: it was deleted, has expired, made room for "
                "others, or was never finished"
            )
        return f"there is no {self.name}"


class FullError(OSError):
    """A session is larger than all that may be kept."""


@dataclass(frozen=True)
class Listed:
    """What a list says of a session that is kept: all but itself and its document.

    Attributes:
        id, kind, created, expires, parent, tokens, title: see `Kept`.
        nbytes: of its file, or in memory where there is no folder.
    """

    id: str
    kind: str
    created: int
    expires: float | None
    parent: str | None
    tokens: int | None
    title: str | None
    nbytes: int

    @classmethod
    def of(cls, kept: Kept, nbytes: int) -> Listed:
        """Of a session and its size."""
        return cls(
            kept.id,
            kept.kind,
            kept.created,
            kept.expires,
            kept.parent,
            kept.tokens,
            kept.title,
            nbytes,
        )


@dataclass
class _Entry:
    """Of one id: everything but its session and its document, which may be in a file only."""

    owner: str
    trail: tuple[int, str] | None  # its length and digest
    listed: Listed
    is_passing: bool = False  # it is in memory only, and goes when it leaves that

    @property
    def expires(self) -> float | None:
        return self.listed.expires

    @property
    def nbytes(self) -> int:
        return self.listed.nbytes


class SessionStore:
    """Keeps sessions; see above. Threads may share it.

    Args:
        memory_bytes: what sessions in memory may take.
        folder: where they are kept beyond that; None: nowhere.
        folder_bytes: what its files may take.
        lifetime: seconds after which a session goes; None: never.
    """

    def __init__(
        self,
        *,
        memory_bytes: int = 1 << 30,
        folder: Folder | None = None,
        folder_bytes: int = 16 << 30,
        lifetime: float | None = 30 * 24 * 3600.0,
    ) -> None:
        self._memory_budget, self._folder_budget = memory_bytes, folder_bytes
        self._folder, self._lifetime = folder, lifetime
        self.ids = Ids(folder.secret() if folder else secrets.token_bytes(32))
        self._lock = threading.RLock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the least recently used first
        self._memory: OrderedDict[str, tuple[Kept, Session, int]] = OrderedDict()
        self._trails: dict[str, dict[int, dict[str, str]]] = {}  # owner, length, digest
        self._memory_bytes = self._folder_bytes = 0
        self._swept = time.monotonic()
        if folder is not None:
            folder.tidy()
            for kept, nbytes, _ in sorted(folder.files(), key=lambda file: file[2]):
                self._enter(kept, nbytes)
            self._make_room()

    # --- counts -----------------------------------------------------------------------------

    @property
    def sessions(self) -> int:
        """How many are kept."""
        return len(self._entries)

    @property
    def memory_bytes(self) -> int:
        """Bytes of those in memory. Those that share a part of their memory each count it."""
        return self._memory_bytes

    @property
    def folder_bytes(self) -> int:
        """Bytes of the files."""
        return self._folder_bytes

    # --- one session ------------------------------------------------------------------------

    def expiry(self) -> float | None:
        """When a session expires that is kept now."""
        return None if self._lifetime is None else time.time() + self._lifetime

    def put(self, kept: Kept, session: Session) -> None:
        """Keep a session. When this returns, it is there, whole; nobody changes it any more.

        Raises:
            FullError: it alone is larger than the budget.
            OSError: its file cannot be written; it is not kept then.
        """
        nbytes = _nbytes(kept, session)
        if self._folder is not None:
            size = self._folder.write(kept, session)
            if size > self._folder_budget:
                self._folder.remove(kept.id)
                raise FullError(f"a session of {size} bytes is larger than the whole store")
        elif nbytes > self._memory_budget:
            raise FullError(f"a session of {nbytes} bytes is larger than the whole store")
        with self._lock:
            self._enter(kept, size if self._folder is not None else nbytes)
            self._hold(kept, session, nbytes)
            self._sweep()
            self._make_room()

    def hold(self, kept: Kept, session: Session) -> None:
        """Keep a session in memory only, while there is room: nobody was told its id."""
        nbytes = _nbytes(kept, session)
        if nbytes > self._memory_budget:
            return
        with self._lock:
            self._enter(kept, 0)
            self._entries[kept.id].is_passing = True
            self._hold(kept, session, nbytes)
            self._make_room()

    def get(self, name: str, owner: str) -> tuple[Kept, Session]:
        """A session that is kept, to be forked, and what is known of it.

        Raises:
            NotKeptError: there is none for this owner, or its file is damaged.
            OSError: the folder cannot be read now.
        """
        if not self.ids.was_given(name, owner):
            raise NotKeptError(name, was_given=False)
        with self._lock:
            self._drop_if_expired(name)
            if name in self._memory:
                self._memory.move_to_end(name)
                self._entries.move_to_end(name)
                kept, session, _ = self._memory[name]
                if self._folder is not None:
                    self._folder.touch(name)
                return kept, session
        if self._folder is None:
            raise NotKeptError(name, was_given=True)
        try:
            kept, session = self._folder.read(name)
        except FileNotFoundError as error:  # another server dropped it
            with self._lock:
                self._forget_entry(name)
            raise NotKeptError(name, was_given=True) from error
        except ValueError as error:
            _log.error("%s cannot be read: %s", name, error)
            raise NotKeptError(name, was_given=True) from error
        if kept.owner != owner or _is_over(kept.expires):
            raise NotKeptError(name, was_given=True)
        with self._lock:
            if name not in self._entries:  # another server wrote it
                self._enter(kept, self._folder.size(name))
            self._entries.move_to_end(name)
            self._hold(kept, session, _nbytes(kept, session))
            self._make_room()
        return kept, session

    def delete(self, name: str, owner: str) -> None:
        """Keep a session no longer.

        Raises:
            NotKeptError: there is none for this owner.
        """
        self.get(name, owner)
        with self._lock:
            self._forget(name)

    def listed(self, name: str, owner: str) -> Listed:
        """What a list says of one session; it does not count as used.

        Raises:
            NotKeptError, OSError: as `get`.
        """
        if self.ids.was_given(name, owner):
            with self._lock:
                self._drop_if_expired(name)
                if name in self._entries:
                    return self._entries[name].listed
        kept, session = self.get(name, owner)
        return Listed.of(kept, _nbytes(kept, session))

    def all_of(self, owner: str) -> list[Listed]:
        """What an owner was given and can go on from, the oldest first."""
        with self._lock:
            for name in list(self._entries):
                self._drop_if_expired(name)
            found = [
                entry.listed
                for entry in self._entries.values()
                if entry.owner == owner and not entry.is_passing and entry.listed.kind != TURN
            ]
        return sorted(found, key=lambda one: (one.created, one.id))

    def longest(self, ids: Sequence[int], owner: str) -> tuple[Kept, Session] | None:
        """The session that has read most of what these ids begin with; None: none has."""
        with self._lock:
            trails = self._trails.get(owner, {})
            lengths = list(trails)
        digests = list(beginnings(ids, lengths))  # of a long text this takes a while
        with self._lock:
            names = [trails.get(length, {}).get(digest) for length, digest in digests]
        found = [name for name in names if name is not None]
        for name in reversed(found):
            try:
                return self.get(name, owner)
            except NotKeptError:
                continue  # it has just gone: a shorter one
        return None

    # --- inside; the lock is held -----------------------------------------------------------

    def _enter(self, kept: Kept, nbytes: int) -> None:
        self._forget_entry(kept.id)
        trail = None if kept.trail is None else (kept.trail.length, kept.trail.digest)
        self._entries[kept.id] = _Entry(kept.owner, trail, Listed.of(kept, nbytes))
        self._folder_bytes += nbytes if self._folder is not None else 0
        if trail is not None:
            length, digest = trail
            self._trails.setdefault(kept.owner, {}).setdefault(length, {})[digest] = kept.id

    def _hold(self, kept: Kept, session: Session, nbytes: int) -> None:
        """Keep it in memory; where there is a folder, one that is too large is not."""
        self._let_go(kept.id)
        if nbytes <= self._memory_budget:
            self._memory[kept.id] = (kept, session, nbytes)
            self._memory_bytes += nbytes

    def _make_room(self) -> None:
        while self._memory_bytes > self._memory_budget:
            name = self._first_to_leave_memory()
            if self._folder is None or self._entries[name].is_passing:
                self._forget(name)
            else:
                self._let_go(name)
        while self._folder is not None and self._folder_bytes > self._folder_budget:
            self._forget(next(iter(self._entries)))

    def _first_to_leave_memory(self) -> str:
        """The least recently used; without a folder, nothing that was told makes room for marks."""
        passing = (name for name in self._memory if self._entries[name].is_passing)
        oldest = next(iter(self._memory))
        return oldest if self._folder is not None else next(passing, oldest)

    def _sweep(self) -> None:
        if time.monotonic() - self._swept < _SWEEP:
            return
        self._swept = time.monotonic()
        for name in list(self._entries):
            self._drop_if_expired(name)

    def _drop_if_expired(self, name: str) -> None:
        entry = self._entries.get(name)
        if entry is not None and _is_over(entry.expires):
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._let_go(name)
        self._forget_entry(name)
        if self._folder is not None:
            self._folder.remove(name)

    def _forget_entry(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is None:
            return
        self._folder_bytes -= entry.nbytes if self._folder is not None else 0
        if entry.trail is not None:
            length, digest = entry.trail
            of_length = self._trails[entry.owner][length]
            if of_length.get(digest) == name:
                del of_length[digest]
            if not of_length:
                del self._trails[entry.owner][length]

    def _let_go(self, name: str) -> None:
        held = self._memory.pop(name, None)
        self._memory_bytes -= 0 if held is None else held[2]


def _is_over(expires: float | None) -> bool:
    return expires is not None and expires < time.time()


def _nbytes(kept: Kept, session: Session) -> int:
    """About what a session takes in memory."""
    return (
        session.stats().memory_bytes + 64 * session.open_tokens + len(json.dumps(kept.to_notes()))
    )
