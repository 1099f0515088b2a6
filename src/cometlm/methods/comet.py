"""CoMeT: a session, which holds the same however much was read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cometlm.methods.base import Method, Reader, generation_options
from cometlm.methods.loader import Loader
from cometlm.session.session import Session


class Comet(Method):
    """Reads chunk by chunk into a memory; questions are not cut by a chunk's end."""

    @classmethod
    def open(cls, loader: Loader, budget: int | None = None) -> CometReader:
        """See `Method.open`; what is held is the memory's sizes, whatever the budget."""
        return CometReader(Session(loader.with_memory(), loader.tokenizer))


class CometReader(Reader):
    """A session as a reader."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tokenizer = session.tokenizer

    def read(self, ids: Sequence[int]) -> None:
        """See `Reader.read`; no text is too long."""
        self.session.read(list(ids))

    def read_question(self, ids: Sequence[int]) -> None:
        """See `Reader.read_question`; it stands in one chunk, if it fits."""
        self.session.ask_in_one_chunk(list(ids))

    def fork(self) -> CometReader:
        """See `Reader.fork`."""
        return CometReader(self.session.fork())

    def answer(self, ids: Sequence[int] = (), **generation: Any) -> str:
        """See `Reader.answer`."""
        asked = self.fork()
        asked.read_question(ids)
        said = asked.session.ask("", template=False, **generation_options(generation))
        assert isinstance(said, str)
        return said

    def loglikelihood(self, ids: Sequence[int]) -> list[float]:
        """See `Reader.loglikelihood`."""
        return self.session.loglikelihood(ids)

    @property
    def nbytes(self) -> int:
        """Bytes of memory; the open chunk is held as token ids, which are not counted."""
        return self.session.stats().memory_bytes
