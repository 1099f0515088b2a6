"""What the server keeps: immutable sessions by id, in memory and in a store, to budgets.

A session that is kept never changes: who goes on from it gets a fork. The least recently used leave
memory first (they stay in the store), then the store. An id that was given and is kept no longer is
told from one that never was.

Several servers may share a store. Each knows it by an index of its own, looks at the store itself
where that lacks an id, and looks at all of it from time to time. Before it drops a session to make
room it asks the store when any server used that last.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cometlm.serve.folder import CHANGING, TURN, Folder, Kept
from cometlm.serve.ids import Ids
from cometlm.serve.index import Index, Listed
from cometlm.serve.objects import ChangedError, Found
from cometlm.serve.trail import beginnings
from cometlm.session.session import Session

__all__ = ["FullError", "Listed", "NotKeptError", "SessionStore"]

_log = logging.getLogger(__name__)
_SWEEP = 60.0  # seconds between two looks for what has expired
_LEFT = 15 / 16  # of the budget, where room was made: else each session would have to make some
_OPEN_SHARE = 4  # of the budget, a quarter is for open chunks before it is for sessions


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
                f"{self.name} was dropped: it was deleted, has expired, made room for others, or "
                "was never finished"
            )
        return f"there is no {self.name}"


class FullError(OSError):
    """A session is larger than all that may be kept."""


class SessionStore:
    """Keeps sessions; see above. Threads may share it.

    Args:
        memory_bytes: what sessions in memory may take.
        folder: where they are kept beyond that; None: nowhere.
        folder_bytes: what its files may take, those of all servers together.
        lifetime: seconds after which a session goes; None: never.
        index: a file of this process's own for what is known of the folder; None: in memory.
        refresh: seconds after which what other servers have written is looked for again.

    Raises:
        OSError: the folder or the index cannot be used.
    """

    def __init__(
        self,
        *,
        memory_bytes: int = 1 << 30,
        folder: Folder | None = None,
        folder_bytes: int = 16 << 30,
        lifetime: float | None = 30 * 24 * 3600.0,
        index: Path | None = None,
        refresh: float = 30.0,
    ) -> None:
        self._folder, self._folder_budget, self._lifetime = folder, folder_bytes, lifetime
        self.ids = Ids(folder.secret() if folder else secrets.token_bytes(32))
        self._lock = threading.RLock()  # never held while the store is waited for
        self._index = Index(index, folder.about if folder else "")
        self._memory = _Memory(memory_bytes)
        self._refresh, self._looked, self._swept = refresh, 0.0, time.monotonic()
        self._looking, self._making_room = threading.Lock(), threading.Lock()
        if folder is not None:
            self._look(folder)
            self._make_room()

    def check_holds(self, nbytes: int) -> None:
        """Refuse budgets that a session of so many bytes is too large for.

        Raises:
            ValueError: names the budget.
        """
        name, budget = self._budget
        if nbytes > budget:
            raise ValueError(
                f"{name} must be at least {nbytes} bytes, which a session of this model takes, "
                f"got {budget}"
            )

    # --- counts -----------------------------------------------------------------------------

    @property
    def _budget(self) -> tuple[str, int]:
        """What all that is kept may take, and what it is called."""
        if self._folder is None:
            return "memory_bytes (--memory-gib)", self._memory.budget
        return "folder_bytes (--store-gib)", self._folder_budget

    @property
    def sessions(self) -> int:
        """How many are kept."""
        return len(self._index)

    @property
    def memory_bytes(self) -> int:
        """Bytes of those in memory. Those that share a part of their memory each count it."""
        return self._memory.nbytes + self._memory.open_bytes

    @property
    def folder_bytes(self) -> int:
        """Bytes of the files."""
        return self._index.nbytes if self._folder is not None else 0

    # --- one session ------------------------------------------------------------------------

    def expiry(self) -> float | None:
        """When a session expires that is kept now."""
        return None if self._lifetime is None else time.time() + self._lifetime

    @contextlib.contextmanager
    def changing(self, name: str) -> Iterator[str | None]:
        """While a session is got, and put anew under its id: for one server at a time.

        Gives the version that `put` replaces.

        Raises:
            ChangedError: another server is at it.
            OSError: the store cannot be changed now.
        """
        with self._folder.changing(name) if self._folder else contextlib.nullcontext() as version:
            yield version

    def put(self, kept: Kept, session: Session, replacing: str | None = None) -> None:
        """Keep a session. When this returns, it is there, whole; nobody changes it any more.

        Args:
            kept: what is known of it.
            session: it.
            replacing: of kinds that change, the version that `changing` gave.

        Raises:
            ChangedError: another server has replaced that.
            FullError: it alone is larger than the budget.
            OSError: its file cannot be written; it is not kept then.
        """
        nbytes = _nbytes(kept, session)
        size, (name, budget) = nbytes, self._budget
        if self._folder is not None:
            size = self._folder.write(kept, session, replacing)
        if size > budget:
            self._forget(kept.id)
            raise FullError(
                f"nothing was kept: the session takes {size} bytes, and {name} are {budget} for all"
            )
        with self._lock:
            self._index.add(kept, size, time.time())
            self._hold(kept, session, nbytes)
        self._sweep()
        self._make_room()

    def hold(self, kept: Kept, session: Session) -> None:
        """Keep a session in memory only, while there is room: nobody was told its id."""
        nbytes = _nbytes(kept, session)
        if nbytes > self._memory.budget:
            return
        with self._lock:
            self._index.add(kept, 0, time.time(), is_passing=True)
            self._memory.hold(kept, session, nbytes, is_passing=True)
        self._make_room()

    def get(self, name: str, owner: str) -> tuple[Kept, Session]:
        """A session that is kept, to be forked, and what is known of it.

        Raises:
            NotKeptError: there is none for this owner, or its file is damaged.
            OSError: the store cannot be read now.
        """
        if not self.ids.was_given(name, owner):
            raise NotKeptError(name, was_given=False)
        with self._lock:
            held = self._memory.get(name)
        if held is None:
            kept, session = self._fetched(name)
        else:
            kept, session = held
            self._check_still_there(name)
        if _is_over(kept.expires) and kept.kind not in CHANGING:  # those may be renewed just now
            with contextlib.suppress(OSError):  # it is not given out in any case
                self._forget(name)
        if kept.owner != owner or _is_over(kept.expires):
            raise NotKeptError(name, was_given=True)
        self._index.use(name, time.time())
        return kept, session

    def delete(self, name: str, owner: str) -> None:
        """Keep a session no longer.

        Raises:
            NotKeptError: there is none for this owner.
            OSError: the store cannot be changed now.
        """
        self.listed(name, owner)
        self._forget(name)

    def listed(self, name: str, owner: str) -> Listed:
        """What a list says of one session.

        Raises:
            NotKeptError, OSError: as `get`.
        """
        known = self._index.listed(name, owner) if self.ids.was_given(name, owner) else None
        if known is None or _is_over(known.expires):
            kept, session = self.get(name, owner)
            return self._index.listed(name, owner) or Listed.of(kept, _nbytes(kept, session))
        self._check_still_there(name)
        return known

    def all_of(self, owner: str) -> list[Listed]:
        """What an owner was given and can go on from, the oldest first.

        What other servers wrote may be missing for as long as `refresh` says.
        """
        self._look_if_due()
        listed = self._index.all_of(owner)
        return [one for one in listed if one.kind != TURN and not _is_over(one.expires)]

    def longest(self, ids: Sequence[int], owner: str) -> tuple[Kept, Session] | None:
        """The session that has read most of what these ids begin with; None: none has."""
        self._look_if_due()
        lengths = self._index.lengths(owner, len(ids))
        for length, digest in reversed(list(beginnings(ids, lengths))):
            name = self._index.with_trail(owner, length, digest)
            if name is None:
                continue
            try:
                return self.get(name, owner)
            except NotKeptError:
                self._forget_here(name)  # it has just gone: a shorter one
        return None

    # --- what the store has -----------------------------------------------------------------

    def _fetched(self, name: str) -> tuple[Kept, Session]:
        """A session that is not in memory; it is held there from now on.

        Raises:
            NotKeptError, OSError: see `get`.
        """
        if self._folder is None:
            raise NotKeptError(name, was_given=True)
        try:
            kept, session = self._folder.read(name)
            found = self._folder.find(name)
        except FileNotFoundError as error:  # another server dropped it
            self._forget_here(name)
            raise NotKeptError(name, was_given=True) from error
        except ValueError as error:
            _log.error("%s cannot be read: %s", name, error)
            raise NotKeptError(name, was_given=True) from error
        with self._lock:
            is_known = self._index.listed(name, kept.owner) is not None
            if found is not None and (kept.kind in CHANGING or not is_known):
                self._index.add(kept, found.nbytes, found.used)  # another server wrote it
            self._hold(kept, session, _nbytes(kept, session))
        self._make_room()
        return kept, session

    def _hold(self, kept: Kept, session: Session, nbytes: int) -> None:
        """In memory, too; but not what another server may write anew."""
        if self._folder is None or kept.kind not in CHANGING:
            self._memory.hold(kept, session, nbytes)

    def _check_still_there(self, name: str) -> None:
        """Note that a session is used, and see whether another server dropped it.

        Raises:
            NotKeptError, OSError: see `get`.
        """
        if self._folder is None or self._index.is_passing(name) or self._folder.touch(name):
            return
        self._forget_here(name)
        raise NotKeptError(name, was_given=True)

    def _look_if_due(self) -> None:
        is_due = time.monotonic() - self._looked >= self._refresh
        if self._folder is None or not is_due or self._looking.locked():
            return
        try:
            self._look(self._folder)
        except OSError as error:
            _log.warning("the store cannot be looked at now: %s", error)

    def _look(self, folder: Folder) -> None:
        """Bring the index in line with the store, which other servers write and drop from, too.

        Raises:
            OSError: the store cannot be read now.
        """
        with self._looking:
            self._looked, began = time.monotonic(), time.time()
            there, known = folder.all(), self._index.names()
            new = (there.keys() - known) | self._written_anew(there)
            for kept, found in folder.describe(there[name] for name in new):
                self._index.add(kept, found.nbytes, found.used)
            for name in there.keys() & known:
                self._index.use(name, there[name].used)
            # What was put since this began is not in the list yet.
            self._index.remove((known & self._index.names(before=began)) - there.keys())

    def _written_anew(self, there: Mapping[str, Found]) -> set[str]:
        """Of kinds that change, what another server has written since, or used."""
        known = self._index.sizes_and_use(CHANGING)
        return {
            name
            for name, seen in known.items()
            if name in there and seen != (there[name].nbytes, there[name].used)
        }

    # --- budgets ----------------------------------------------------------------------------

    def _make_room(self) -> None:
        with self._lock:
            for name in self._memory.make_room(prefers_passing=self._folder is None):
                if self._folder is None or self._index.is_passing(name):
                    self._index.remove([name])
        if self._folder is None or self._index.nbytes <= self._folder_budget:
            return
        if self._making_room.acquire(blocking=False):
            try:
                self._make_room_in(self._folder)
            except OSError as error:
                _log.warning("no room can be made in the store now: %s", error)
            finally:
                self._making_room.release()

    def _make_room_in(self, folder: Folder) -> None:
        self._look(folder)
        if self._index.nbytes <= self._folder_budget:
            return  # another server has made room
        while self._index.nbytes > _LEFT * self._folder_budget:
            oldest = self._index.oldest()
            if oldest is None:
                return
            name, known = oldest
            found = folder.find(name)
            if found is not None and found.used > known:  # by another server, just now
                self._index.use(name, found.used)
            else:
                self._forget(name)

    def _sweep(self) -> None:
        if time.monotonic() - self._swept < _SWEEP:
            return
        self._swept = time.monotonic()
        try:
            for name in self._index.expired():
                self._expire(name)
        except OSError as error:
            _log.warning("what has expired cannot be removed now: %s", error)

    def _expire(self, name: str) -> None:
        """Forget what has expired; another server may have renewed what is written anew.

        Raises:
            OSError: the store cannot be used now.
        """
        if self._folder is None or self._index.kind(name) not in CHANGING:
            self._forget(name)
            return
        with contextlib.suppress(ChangedError), self._folder.changing(name):
            there = self._folder.find(name)
            if there is None:
                self._forget_here(name)
                return
            for kept, found in self._folder.describe([there]):  # none, if it cannot be read now
                if _is_over(kept.expires):
                    self._forget(name)
                else:
                    self._index.add(kept, found.nbytes, found.used)

    def _forget(self, name: str) -> None:
        if self._folder is not None:
            self._folder.remove(name)
        self._forget_here(name)

    def _forget_here(self, name: str) -> None:
        with self._lock:
            self._memory.let_go(name)
            self._index.remove([name])


class _Memory:
    """Sessions in memory, the least recently used first; the caller locks.

    Args:
        budget: bytes that they may take.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._held: OrderedDict[str, tuple[Kept, Session, int]] = OrderedDict()
        self._passing: dict[str, None] = {}  # those that are nowhere else and were told to nobody

    def hold(self, kept: Kept, session: Session, nbytes: int, is_passing: bool = False) -> None:
        """Hold a session; one that is too large is not held."""
        self.let_go(kept.id)
        if nbytes <= self.budget:
            self._held[kept.id] = (kept, session, nbytes)
            self.nbytes += nbytes
            if is_passing:
                self._passing[kept.id] = None

    def get(self, name: str) -> tuple[Kept, Session] | None:
        """A session that is held; it counts as used."""
        if name not in self._held:
            return None
        self._held.move_to_end(name)
        kept, session, _ = self._held[name]
        return kept, session

    def make_room(self, prefers_passing: bool) -> list[str]:
        """Let go of the least recently used while there are too many; which.

        Args:
            prefers_passing: those that pass go first.
        """
        open_bytes, gone = self._give_up_open_chunks(), []
        while self.nbytes + open_bytes > self.budget:
            oldest = next(iter(self._held))
            if prefers_passing:
                oldest = next((name for name in self._held if name in self._passing), oldest)
            open_bytes -= self._held[oldest][1].stats().open_bytes
            self.let_go(oldest)
            gone.append(oldest)
        return gone

    @property
    def open_bytes(self) -> int:
        """Bytes of open chunks as far as they were run, which come on top."""
        return sum(session.stats().open_bytes for _, session, _ in [*self._held.values()])

    def _give_up_open_chunks(self) -> int:
        """Of those not used for longest, which can be run again; bytes of those that stay."""
        room = max(self.budget - self.nbytes, self.budget // _OPEN_SHARE)
        kept = 0
        for _, session, _ in reversed(self._held.values()):
            if kept + session.stats().open_bytes > room:
                session.release()
            kept += session.stats().open_bytes
        return kept

    def let_go(self, name: str) -> None:
        """Hold a session no longer."""
        _, _, nbytes = self._held.pop(name, (None, None, 0))
        self._passing.pop(name, None)
        self.nbytes -= nbytes


def _is_over(expires: float | None) -> bool:
    return expires is not None and expires < time.time()


def _nbytes(kept: Kept, session: Session) -> int:
    """About what a session takes in memory."""
    return (
        session.stats().memory_bytes + 64 * session.open_tokens + len(json.dumps(kept.to_notes()))
    )
