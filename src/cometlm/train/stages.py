"""What generated batches are made of: stages of steps, and the hay and gates of each."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """Where samples are cut: `chunking.Chunking`. Without plans, as reading does."""

    plans: dict[str, float] = field(default_factory=lambda: {"fixed": 1.0})
    sizes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    capacities: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HayShares:
    """How often keys hide in each kind of hay, relative to the others.

    Attributes:
        texts, code: running text of either.
        strewn: one of these with numbers strewn in that nobody asks to keep.
        numbered: passages of either around their numbers.
        words: random words.
        filler: the usual sentences over and over, from any word on.
        same: the filler from its first word on, so that nothing but the key varies.
    """

    texts: float = 0.0
    code: float = 0.0
    strewn: float = 0.0
    numbered: float = 0.0
    words: float = 0.0
    filler: float = 0.0
    same: float = 0.0

    def __post_init__(self) -> None:
        shares = dataclasses.astuple(self)
        if min(shares) < 0 or not sum(shares):
            raise ValueError(f"hay must have shares of at least 0, and one of more, got {self}")


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What gates are fitted to before a stage; see `start.fit_gates`.

    Attributes:
        keep: the share of the state that is kept at a chunk of hay.
        keep_at_key: the same where a key is said. With both alike, gates look at nothing.
        key_share: what chunks with a key count in the fit, of 1, however many there are. More of it
            opens a gate at keys more surely, and at hay that looks like one more often.
        sharpness: what the logits of `keep` and `keep_at_key` are multiplied by, which shares that
            round to 0 or 1 could not say. A gate that half opens at hay leaves half of a key
            behind, which the next such chunk halves again; a sharp one opens or not.
        ridge: keeps what is fitted small, as a share of the mean square of what gates look at.
            With more of it fits to two draws of texts differ less, and gates open less at keys.
        near: let the ridge draw to the gates that the model has, rather than to none. What another
            fit or training found is then kept where these texts say little.
        chunk_size: of the texts that they are fitted to; the model's own if None.
        texts: how many; four are read at once.
        tokens: of each.
        keys: in each text, one in each of as many parts of it.
        history: tokens that memories have read before these texts, at most. A state that has read
            for long is another thing than one of a few chunks, and gates fitted to those alone
            leak and jam at it. Hay, and hay with a key, in four rows each.
        fresh: share of the texts that new memories read where others have a history.
        first_layer: layers below keep the gates that they have.
    """

    keep: float = 0.998
    keep_at_key: float = 0.3
    key_share: float = 0.5
    sharpness: float = 1.0
    ridge: float = 5e-4
    near: bool = False
    chunk_size: int | None = None
    texts: int = 144
    tokens: int = 768
    keys: int = 1
    history: int = 0
    fresh: float = 0.0
    first_layer: int = 0

    def __post_init__(self) -> None:
        if self.texts < 4:
            raise ValueError(f"stages.gates.texts must be at least 4, got {self.texts}")
        for name, least in (("keys", 1), ("history", 0), ("first_layer", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"stages.gates.{name} must be at least {least}, got {getattr(self, name)}"
                )
        if not 0 <= self.fresh <= 1:
            raise ValueError(f"stages.gates.fresh must be between 0 and 1, got {self.fresh}")
        for name in ("sharpness", "ridge"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"stages.gates.{name} must be more than 0, got {getattr(self, name)}"
                )
        for name in ("keep", "keep_at_key", "key_share"):
            share = getattr(self, name)
            if not 0 < share < 1:
                raise ValueError(f"stages.gates.{name} must be between 0 and 1, got {share}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some steps on generated samples of certain lengths.

    Attributes:
        steps: optimiser steps; each takes a batch for every group of ranks that share one, times
            `trainer.gradient_accumulation_steps`.
        tokens: shortest and longest sample.
        batch_tokens: tokens of one batch, which is as many samples of one length as fit.
        learning_rate: of the backbone's adapters here; the run's own if None.
        fresh_optimizer: forget the moments of the steps before, and warm up again: they are of
            another task, or of a memory whose gates were other ones.
        passkey: share of batches that are passkey samples.
        repeat: share of batches in which a text is read twice, and learned the second time. Where
            an answer of six tokens teaches little, this teaches to read the memory with every
            token. All other batches are plain text.
        keys: fewest and most keys in one sample.
        depth: where the key that is asked for is hidden, between 0 (start of the text) and 1.
        distinct: fewest and most different digits in a key, 2 to 10.
        ask: "end" puts the question at the end of the text. "borders" asks it again and again on
            the way, each time of a fork of the memory that is then forgotten, and learns the text
            too: many answers for one reading, from one border away to as many as the text has.
        before_question: with "borders", most tokens of text between the border and the question. A
            session is asked anywhere in a chunk, so before the end this should come near its size;
            what fits into a chunk beside the question is taken.
        answer_weight: with "borders", what the answers' loss counts beside the text's.
        told_weight: with "borders", what it counts that readout tokens say the key, digit by digit
            and over again, at the end of the chunk that says it; 0 asks nothing of them.
        silent_hay: with `told_weight`, readout tokens are to say the end of a text at the end of
            all other chunks. Without, they may well spell any number there, and gates are left
            to tell it from a key.
        wordings: use only so many of the sentences and questions; all if None. Few of them, in
            plain hay, are learned first. Where a text has several keys, as many that name an owner
            come with them.
        hay: as in `Generated`, for these steps.
        chunks: as in the run, for these steps; the run's own if None.
        gates: set the gates before the first of these steps.
        gate_flips: share of the slots whose gate does the opposite, drawn for each chunk, layer and
            slot. Gates err where words or hay are new; so a key comes to stand in more slots than
            reading it needs.
        history: tokens that memories have read when these batches begin, at most; 0 for new
            memories. A state that has read for long, and may hold another key, is another thing
            to write to than one of a few chunks. They are read without a gradient, by the weights
            as they stand, and anew at each checkpoint.
    """

    steps: int
    tokens: tuple[int, int]
    batch_tokens: int
    learning_rate: float | None = None
    fresh_optimizer: bool = False
    passkey: float = 0.85
    repeat: float = 0.0
    keys: tuple[int, int] = (1, 1)
    depth: tuple[float, float] = (0.0, 1.0)
    distinct: tuple[int, int] = (10, 10)
    ask: Literal["end", "borders"] = "end"
    before_question: int = 8
    answer_weight: float = 1.0
    told_weight: float = 0.0
    silent_hay: bool = False
    wordings: int | None = None
    hay: HayShares | None = None
    chunks: ChunkSettings | None = None
    gates: Gates | None = None
    gate_flips: float = 0.0
    history: int = 0

    def __post_init__(self) -> None:
        low, high = self.tokens
        if not 0 < low <= high:
            raise ValueError(f"stages.tokens must be [shortest, longest], got {list(self.tokens)}")
        if self.passkey < 0 or self.repeat < 0 or self.passkey + self.repeat > 1:
            raise ValueError(
                f"stages.passkey and stages.repeat must be shares that add up to at most 1, got "
                f"{self.passkey} and {self.repeat}"
            )
        fewest, many = self.keys
        if not 1 <= fewest <= many:
            raise ValueError(f"stages.keys must be [fewest, most] from 1, got {list(self.keys)}")
        if self.wordings is not None and self.wordings < 1:
            raise ValueError(f"stages.wordings must be at least 1, got {self.wordings}")
        if self.batch_tokens < 1:
            raise ValueError(f"stages.batch_tokens must be at least 1, got {self.batch_tokens}")
        fewest, many = self.distinct
        if not 2 <= fewest <= many <= 10:
            raise ValueError(
                "stages.distinct must be [fewest, most] between 2 and 10, got "
                f"{list(self.distinct)}"
            )
        least, most = self.depth
        if not 0 <= least <= most <= 1:
            raise ValueError(
                f"stages.depth must be [least, most] between 0 and 1, got {list(self.depth)}"
            )
        for name in ("before_question", "answer_weight", "told_weight", "history"):
            if getattr(self, name) < 0:
                raise ValueError(f"stages.{name} must be at least 0, got {getattr(self, name)}")
        if self.silent_hay and not (self.told_weight and self.ask == "borders"):
            raise ValueError(
                "stages.silent_hay needs ask: borders and a told_weight of more than 0, got "
                f"{self.ask!r} and {self.told_weight}"
            )
        if not 0 <= self.gate_flips < 1:
            raise ValueError(
                f"stages.gate_flips must be at least 0 and less than 1, got {self.gate_flips}"
            )
        if self.steps < 1:
            raise ValueError(f"stages.steps must be at least 1, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Samples made on this machine: passkeys hidden in texts, and the texts themselves.

    Attributes:
        stages: one after the other; together they are the run.
        texts: names in `data.texts`, files or directories: what is read and hidden in.
        code: the same, of program text.
        hay: how often keys hide in each kind of hay.
        digits: shortest and longest key.
    """

    stages: tuple[Stage, ...]
    texts: tuple[str, ...] = ("anarchism", "austen", "perl")
    code: tuple[str, ...] = ("transformers",)
    hay: HayShares = HayShares(texts=5.0, code=2.0, words=1.0, filler=1.0)
    digits: tuple[int, int] = (5, 5)

    def __post_init__(self) -> None:
        fewest, most = self.digits
        if not 1 <= fewest <= most:
            raise ValueError(
                f"generated.digits must be [shortest, longest], got {list(self.digits)}"
            )
        if not self.stages:
            raise ValueError("generated.stages must have at least one stage")
