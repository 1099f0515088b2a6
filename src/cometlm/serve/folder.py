"""Sessions in a folder: one file for each id, which is whole or not there at all.

A file is a session's own (`session.file`), with what the server knows of it as its notes: owner,
parent, expiry, the ids that were read, and the answer. So there is no index that could be wrong:
who opens the folder looks at the notes of each file.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cometlm.checkpoints.atomic_write import write_whole
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.serve.trail import Trail
from cometlm.session.file import identity, read_document, read_notes
from cometlm.session.session import Session

_SUFFIX = ".safetensors"
TURN = "turn"  # the kind of what only says where a chat went on; see `start`
_TITLE = 80  # characters
_LEFT_BEHIND = 3600  # seconds after which a file that is written still is of a killed process

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
    """Reads and writes the files.

    Args:
        path: made if it is missing.
        model: whose sessions they are; it must not change any more.
        tokenizer: its tokenizer.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, path: Path, model: CometForCausalLM, tokenizer: Any) -> None:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "cannot be written to", str(path))
        self.path = path
        self._model, self._tokenizer = model, tokenizer
        self._made_by = identity(model)  # looks at all weights, so it is done once

    def secret(self) -> bytes:
        """What ids of this folder are made with; drawn by the first server that opens it."""
        path = self.path / "secret"
        if not path.exists():
            write_whole(path, secrets.token_bytes(32))
            path.chmod(0o600)
        return path.read_bytes()

    def files(self) -> Iterator[tuple[Kept, int, float]]:
        """All sessions of this model: what is known, bytes, and when each was used last.

        Others are left alone, and said.
        """
        for path in sorted(self.path.glob(f"*{_SUFFIX}")):
            try:
                made_by = read_document(path)["made_by"]
                if made_by["backbone"] != self._made_by["backbone"]:
                    raise ValueError("it is a session of another model")
                kept = Kept.from_notes(read_notes(path))
                if kept.id != path.stem:
                    raise ValueError(f"it is {kept.id}")
                about = path.stat()
            except (OSError, ValueError) as error:
                _log.warning("%s is left alone: %s", path, error)
                continue
            yield kept, about.st_size, about.st_mtime

    def write(self, kept: Kept, session: Session) -> int:
        """Keep a session; bytes of its file.

        Raises:
            OSError: it cannot be written; then nothing is there.
        """
        path = self._path(kept.id)
        session.save(path, notes=kept.to_notes(), made_by=self._made_by)
        return path.stat().st_size

    def read(self, name: str) -> tuple[Kept, Session]:
        """A session and what is known of it.

        Raises:
            OSError: there is none.
            ValueError: the file is damaged, or of another model.
        """
        path = self._path(name)
        kept = Kept.from_notes(read_notes(path))
        session = Session.load(path, self._model, self._tokenizer, made_by=self._made_by)
        self.touch(name)
        return kept, session

    def touch(self, name: str) -> None:
        """Note that a session was used now; who opens the folder later sees it."""
        with contextlib.suppress(OSError):
            os.utime(self._path(name))

    def size(self, name: str) -> int:
        """Bytes of a file; 0 if it is not there."""
        with contextlib.suppress(OSError):
            return self._path(name).stat().st_size
        return 0

    def remove(self, name: str) -> None:
        """Forget a session, if it is there."""
        with contextlib.suppress(OSError):
            self._path(name).unlink()

    def tidy(self) -> None:
        """Remove what a killed process left half written."""
        for part in self.path.glob(f".*{_SUFFIX}.*.part"):
            with contextlib.suppress(OSError):
                if time.time() - part.stat().st_mtime > _LEFT_BEHIND:
                    part.unlink()

    def _path(self, name: str) -> Path:
        return self.path / f"{name}{_SUFFIX}"
