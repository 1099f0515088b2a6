"""CoMeT: a session, which holds the same however much was read."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cometlm.config import position_limit
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.footprint import bytes_of_item, bytes_of_memory
from cometlm.core.foreseen import Foreseen
from cometlm.methods.base import Bounds, Budget, Method, Reader, generation_options
from cometlm.methods.loader import Loader
from cometlm.session.session import Session


class Comet(Method):
    """Reads chunk by chunk into a memory; questions are not cut by a chunk's end.

    A budget in tokens changes nothing: what is held is the memory's sizes. Under one in bytes the
    memory has the largest `capacity` that fits, unless the loader was given one, which then has to
    fit. The open chunk's keys and values come on top.
    """

    @classmethod
    def open(cls, loader: Loader, budget: Budget | None = None) -> CometReader:
        """See `Method.open`."""
        if budget is not None and budget.unit == "bytes":
            model = _within(loader, budget.amount)
        else:
            model = loader.with_memory()
        return CometReader(Session(model, loader.tokenizer))


def check_trained(loader: Loader, method: str, **switches: bool | int) -> None:
    """Refuse a memory that was not trained as a method's, or is not read as it was.

    An untrained memory finds nothing, and one that was trained otherwise has learned to write what
    the method would not read: neither says what the method can do.

    Args:
        method: its name.
        switches: fields of `CometConfig` that make the method.

    Raises:
        ValueError: names the method, the switches and what the model has.
    """
    source = loader.source
    wanted = _listed(switches)
    where = 'docs/evaluation.md, "Trained rivals", says how to train one'
    trained, read = source.memory_config(), source.memory_config(**loader.sizes)
    if trained is None or read is None:
        raise ValueError(
            f"{method} needs a memory that was trained with {wanted}, and {source.name} would have "
            f"an untrained one; {where}"
        )
    for config, verb in ((trained, "was trained"), (read, "would be read")):
        own = config.comet_config
        if any(getattr(own, name) != value for name, value in switches.items()):
            found = _listed({name: getattr(own, name) for name in switches})
            raise ValueError(
                f"{method} needs a memory that was trained with {wanted}; that of {source.name} "
                f"{verb} with {found}; {where}"
            )


def _listed(switches: Mapping[str, bool | int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in switches.items())


def _within(loader: Loader, nbytes: int) -> CometForCausalLM:
    """The model with as much memory as so many bytes hold."""
    is_given = "capacity" in loader.sizes
    # The paper's own capacity may be more than the backbone has positions for.
    model = loader.with_memory(**({} if is_given else {"capacity": 1}))
    sizes = model.config.comet_config
    state, entry = bytes_of_memory(model)
    least = state + entry * sizes.temporary_slots
    if nbytes < least:
        raise ValueError(
            f"budget of comet must be at least {least} bytes, {state} of global memory and "
            f"{least - state} of temporary memory, got {nbytes}"
        )
    if is_given or not sizes.temporary_memory:
        return model
    capacity = (nbytes - state) // entry
    positions = position_limit(model.config.backbone_config)
    if positions is not None:  # where a chunk with its memory has to fit
        capacity = min(capacity, positions - sizes.row_length + sizes.capacity)
    del model  # two need not fit into memory
    return loader.with_memory(capacity=capacity)


class CometReader(Reader):
    """A session as a reader."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tokenizer = session.tokenizer
        self._item_nbytes: int | None = None  # until it is asked for

    def read(self, ids: Sequence[int]) -> None:
        """See `Reader.read`; no text is too long."""
        self.session.read(list(ids))

    def read_question(self, ids: Sequence[int]) -> None:
        """See `Reader.read_question`; it stands in one chunk, if it fits."""
        self.session.ask_in_one_chunk(list(ids))

    def fork(self) -> CometReader:
        """See `Reader.fork`."""
        fork = copy.copy(self)
        fork.session = self.session.fork()
        return fork

    def answer(self, ids: Sequence[int] = (), **generation: Any) -> str:
        """See `Reader.answer`."""
        self.session.prepare()  # of several questions of a text each would run the open chunk
        asked = self.fork()
        asked.read_question(ids)
        said = asked.session.ask("", template=False, **generation_options(generation))
        assert isinstance(said, str)
        return said

    def foresee(self, ids: Sequence[int]) -> list[Foreseen]:
        """See `Reader.foresee`."""
        return self.session.fork().read_foreseen(ids)

    def read_foreseen(self, ids: Sequence[int]) -> list[Foreseen]:
        """See `Reader.read_foreseen`."""
        return self.session.read_foreseen(ids)

    @property
    def nbytes(self) -> int:
        """Bytes of memory, and of the open chunk's keys and values."""
        return self.session.stats().memory_bytes + self.open_nbytes

    @property
    def open_nbytes(self) -> int:
        """Bytes of keys and values of the open chunk as it is: text and compression tokens.

        A session makes them when it is first asked about the chunk; until then it has token ids.
        """
        if self._item_nbytes is None:
            self._item_nbytes = bytes_of_item(self.session.model)
        sizes, text = self.session.model.config.comet_config, self.session.open_tokens
        compressions = text // sizes.stride if sizes.temporary_memory else 0
        return (text + compressions) * self._item_nbytes

    @property
    def bounds(self) -> Bounds:
        """See `Reader.bounds`: a chunk is run when it is full, the open one by an answer."""
        sizes = self.session.model.config.comet_config
        chunk = sizes.chunk_size - sizes.overlap
        entries = sizes.compression_tokens(sizes.chunk_size)
        filling = math.ceil(sizes.capacity / entries) if entries else 1  # chunks
        return Bounds(held=filling * chunk + sizes.overlap + 1, chunk=chunk, overlap=sizes.overlap)
