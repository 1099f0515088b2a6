"""Sessions in a folder, or in a bucket that is used like one: one object for each id.

An object is a session's own file (`session.file`), with what the server knows of it as its notes:
owner, parent, expiry, the ids that were read, and the answer. So everything else, such as an index,
can be made from the objects again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.serve.objects import Found, objects_at
from cometlm.serve.trail import Trail
from cometlm.session.file import document_of, notes_of, read_notes
from cometlm.session.header import read_metadata
from cometlm.session.identity import identity
from cometlm.session.session import Session

TURN = "turn"  # the kind of what only says where a chat went on; see `start`
CHANGING = ("conversation", TURN)  # kinds that are written anew under their id
_TITLE = 80  # characters
_SECRET = "secret"
_AT_ONCE = 16  # objects whose beginning is looked at

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """What is known of a session that is kept.

    Attributes:
        id: what it is found by.
        owner: who may see it.
        kind: "response", "chat", "completion", "file", "session" (uploaded, or a fork),
            "conversation", "turn" or "mark" (a place in a prompt).
        created: seconds since 1970.
        expires: seconds since 1970; None: never.
        parent: the id that it went on from.
        trail: the ids that were read; None where they are not known (files).
        document: JSON values that are given back: a response, and what was said to it.
        tokens: that the session has read; None where an older server wrote it.
    """

    id: str
    owner: str
    kind: str
    created: int
    expires: float | None = None
    parent: str | None = None
    trail: Trail | None = None
    document: dict[str, Any] | None = None
    tokens: int | None = None

    @property
    def title(self) -> str | None:
        """What people know it by, out of what is kept in any case: a file's name, first words."""
        document = self.document or {}
        named = document.get("title") or document.get("filename")
        if named is None:
            texts = (
                part["text"]
                for item in document.get("input", ())
                if item.get("role") == "user"
                for part in item["content"]
            )
            named = next(texts, None)
        return " ".join(named.split())[:_TITLE] or None if isinstance(named, str) else None

    def to_notes(self) -> dict[str, Any]:
        """As JSON values."""
        values = dict(vars(self))
        values["trail"] = None if self.trail is None else self.trail.to_json()
        return values

    @classmethod
    def from_notes(cls, notes: dict[str, Any]) -> Kept:
        """What `to_notes` gave.

        Raises:
            ValueError: something else.
        """
        try:
            trail = None if notes["trail"] is None else Trail.from_json(notes["trail"])
            return cls(**{**notes, "trail": trail})
        except (TypeError, KeyError) as error:
            raise ValueError(f"its notes are not a server's: {error!r}") from error


class Folder:
    """Reads and writes the sessions of a model.

    Args:
        place: a folder, which is made if it is missing, or a URL of fsspec.
        model: whose sessions they are; it must not change any more.
        tokenizer: its tokenizer.

    Raises:
        ValueError: a URL of an unknown kind.
        OSError: it cannot be made or written to.
    """

    def __init__(self, place: Path | str, model: CometForCausalLM, tokenizer: Any) -> None:
        self._objects = objects_at(place)
        self._model, self._tokenizer = model, tokenizer
        self._made_by = identity(model)  # looks at all weights, so it is done once
        self._others: set[str] = set()  # what was left alone, and said
        self.about = f"{place} {self._made_by['backbone']}"

    def secret(self) -> bytes:
        """What ids of this folder are made with; drawn by the first server that opens it."""
        return self._objects.create(_SECRET, secrets.token_bytes(32))

    def check(self) -> None:
        """See that the folder is there: one that is not mounted looks like an empty one.

        Raises:
            OSError: it is not.
        """
        if not self._objects.exists(_SECRET):
            raise OSError(errno.ENODEV, "the store is gone")

    def all(self) -> dict[str, Found]:
        """All objects by their names.

        Raises:
            OSError: the folder cannot be read now.
        """
        self.check()
        return {one.name: one for one in self._objects.all() if one.name not in self._others}

    def describe(self, objects: Iterable[Found]) -> Iterator[tuple[Kept, Found]]:
        """What is known of some objects; those that are no sessions of this model are left out."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for found, kept in pool.map(self._described, objects):
                if kept is not None:
                    yield kept, found

    @contextlib.contextmanager
    def changing(self, name: str) -> Iterator[str | None]:
        """While a session is read, and written anew under its id; see `Objects`.

        Raises:
            ChangedError: another server is at it.
            OSError: the folder cannot be changed now.
        """
        self.check()
        with self._objects.changing(name) as version:
            yield version

    def write(self, kept: Kept, session: Session, replacing: str | None = None) -> int:
        """Keep a session; bytes of its file.

        Args:
            kept: what is known of it.
            session: it.
            replacing: the version that `changing` gave.

        Raises:
            ChangedError: another server has replaced that.
            OSError: it cannot be written; then nothing is there.
        """
        notes = kept.to_notes()
        self.check()  # else it would be put where nobody finds it once the folder is back
        return self._objects.write(
            kept.id,
            lambda path: session.save(path, notes=notes, made_by=self._made_by),
            replacing,
        )

    def read(self, name: str) -> tuple[Kept, Session]:
        """A session and what is known of it; it counts as used.

        Raises:
            OSError: there is none.
            ValueError: the file is damaged, or of another model.
        """
        try:
            kept, session = self._objects.read(name, self._load)
        except FileNotFoundError:
            self.check()
            raise
        self._objects.touch(name)
        return kept, session

    def touch(self, name: str) -> bool:
        """Note that a session is used now; whether it is there.

        Raises:
            OSError: the folder cannot be read now.
        """
        is_there = self._objects.touch(name)
        if not is_there:
            self.check()
        return is_there

    def find(self, name: str) -> Found | None:
        """A session's object, and when any server used it last; None: it is not there.

        Raises:
            OSError: the folder cannot be read now.
        """
        found = self._objects.find(name)
        if found is None:
            self.check()
        return found

    def remove(self, name: str) -> None:
        """Forget a session, if it is there.

        Raises:
            OSError: the folder cannot be changed now.
        """
        self._objects.remove(name)

    def _load(self, path: Path) -> tuple[Kept, Session]:
        kept = Kept.from_notes(read_notes(path))
        session = Session.load(path, self._model, self._tokenizer, made_by=self._made_by)
        return kept, session

    def _described(self, found: Found) -> tuple[Found, Kept | None]:
        try:
            with self._objects.open(found.name) as file:
                metadata = read_metadata(file, found.nbytes, found.name)
            made_by = document_of(metadata, found.name)["made_by"]
            if made_by["backbone"] != self._made_by["backbone"]:
                raise ValueError("it is a session of another model")
            kept = Kept.from_notes(notes_of(metadata, found.name))
            if kept.id != found.name:
                raise ValueError(f"it is {kept.id}")
        except FileNotFoundError:
            return found, None
        except OSError as error:
            _log.warning("%s cannot be read now: %s", found.name, error)
            return found, None
        except ValueError as error:
            _log.warning("%s is left alone: %s", found.name, error)
            self._others.add(found.name)
            return found, None
        return found, kept
