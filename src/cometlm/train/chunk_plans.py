"""Where training samples are cut into chunks, so that nothing learned depends on borders.

A `ChunkPlan` cuts one row of text; SPEC §5 names the plans that the paper mixes. `Chunking` draws
a plan for each row of a batch, and maybe another budget, from a generator of its own: what it
draws depends on its seed and on how many batches came before, so a run that is resumed at the
same batch draws the same.

To add a plan, write a class with `cut` and put it into `PLANS`, or name it as an entry point of the
group `cometlm.plans`.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from cometlm.registry import Registry

Lengths = list[int]  # of one text's chunks, in order


class ChunkPlan(ABC):
    """A way of cutting a text into chunks."""

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """The plan for a tokenizer's ids; most plans do not look at them."""
        return cls()

    @abstractmethod
    def cut(self, ids: Sequence[int], size: int, rng: random.Random) -> Lengths:
        """Lengths of the chunks of one text, in order.

        Args:
            ids: its tokens, at least one.
            size: the longest chunk allowed.
            rng: where chance comes from.

        Returns:
            Lengths between 1 and `size` that add up to `len(ids)`.
        """


class Fixed(ChunkPlan):
    """Full chunks and a shorter rest: what reading does."""

    def cut(self, ids: Sequence[int], size: int, rng: random.Random) -> Lengths:
        """See `ChunkPlan.cut`."""
        full, rest = divmod(len(ids), size)
        return [size] * full + [rest] * (rest > 0)


class RightAligned(ChunkPlan):
    """A shorter chunk first, then full ones: the text's end is the end of a full chunk."""

    def cut(self, ids: Sequence[int], size: int, rng: random.Random) -> Lengths:
        """See `ChunkPlan.cut`."""
        return Fixed().cut(ids, size, rng)[::-1]


class Uniform(ChunkPlan):
    """Chunks of one length, drawn between half the size and the size, that differ by 1 at most."""

    def cut(self, ids: Sequence[int], size: int, rng: random.Random) -> Lengths:
        """See `ChunkPlan.cut`."""
        count = math.ceil(len(ids) / rng.randint(max(1, size // 2), size))
        length, longer = divmod(len(ids), count)
        return [length + 1] * longer + [length] * (count - longer)


class RandomSizes(ChunkPlan):
    """A random number of chunks of random lengths.

    Args:
        shortest: lower end of the lengths drawn, as a share of the size.
    """

    def __init__(self, shortest: float = 0.125) -> None:
        if not 0 < shortest <= 1:
            raise ValueError(f"shortest must be more than 0 and at most 1, got {shortest}")
        self._shortest = shortest

    def cut(self, ids: Sequence[int], size: int, rng: random.Random) -> Lengths:
        """See `ChunkPlan.cut`."""
        lengths: Lengths = []
        left = len(ids)
        while left:
            drawn = rng.randint(max(1, round(size * self._shortest)), size)
            lengths.append(min(drawn, left))
            left -= lengths[-1]
        return lengths


class SentenceEnds(ChunkPlan):
    """Cuts after the last sentence, line or turn end that a full chunk holds, if it holds one.

    Args:
        ends: ids of tokens after which text may be cut; `sentence_ends` finds a tokenizer's.
    """

    def __init__(self, ends: Collection[int] = ()) -> None:
        self._ends = frozenset(ends)

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """See `ChunkPlan.of`."""
        return cls(sentence_ends(tokenizer) if tokenizer is not None else ())

    def cut(self, ids: Sequence[int], size: int, rng: random.Random) -> Lengths:
        """See `ChunkPlan.cut`."""
        lengths: Lengths = []
        start = 0
        while len(ids) - start > size:
            # Not in a chunk's first quarter: many borders would come to stand close together.
            places = range(start + size, start + max(1, size // 4), -1)
            end = next((p for p in places if ids[p - 1] in self._ends), start + size)
            lengths.append(end - start)
            start = end
        return [*lengths, len(ids) - start]


PLANS: Registry[type[ChunkPlan]] = Registry(
    "chunk plan",
    "cometlm.plans",
    {
        "fixed": Fixed,
        "right_aligned": RightAligned,
        "random": RandomSizes,
        "uniform": Uniform,
        "sentence_ends": SentenceEnds,
    },
)
PAPER = {"fixed": 0.6, "right_aligned": 0.1, "random": 0.2, "uniform": 0.05, "sentence_ends": 0.05}


@dataclass(frozen=True)
class Drawn:
    """What one batch is read with.

    Attributes:
        chunk_lengths: of each row.
        stride, capacity: the budget, or None for the model's own.
    """

    chunk_lengths: list[Lengths]
    stride: int | None = None
    capacity: int | None = None


@dataclass
class Chunking:
    """Draws how each training batch is cut, and with which budget it is read.

    Args:
        plans: plans and how often each is drawn, relative to the others.
        seed: of the draws.
        sizes: longest chunks to draw from, per batch; the model's own if empty. Short ones teach
            many updates of the memory at the price of few tokens.
        strides: compression strides to draw from, per batch; the model's own if empty.
        capacities: capacities to draw from, per batch; the model's own if empty.

    Attributes:
        batches: how many were drawn. Set it to go on where another run stopped.

    Raises:
        ValueError: no plan, a weight below 0 or none above, a size below 1.
    """

    plans: Mapping[str, tuple[ChunkPlan, float]]
    seed: int = 0
    sizes: Sequence[int] = ()
    strides: Sequence[int] = ()
    capacities: Sequence[int] = ()
    batches: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        weights = {name: weight for name, (_, weight) in self.plans.items()}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"the weight of plan {name!r} must be at least 0, got {weight}")
        if not sum(weights.values()):
            raise ValueError(f"at least one plan needs a weight above 0, got {weights}")
        for name in ("sizes", "strides", "capacities"):
            for value in getattr(self, name):
                if value < 1:
                    raise ValueError(f"{name} must be at least 1, got {value}")

    @classmethod
    def of(
        cls, weights: Mapping[str, float] | None = None, tokenizer: Any = None, **options: Any
    ) -> Chunking:
        """Plans by their names in `PLANS`; default the paper's mixture.

        Args:
            weights: how often each plan is drawn.
            tokenizer: whose ids are cut; for "sentence_ends".
            options: further arguments of `Chunking`.

        Raises:
            ValueError: a name that is not in `PLANS`; as the class.
        """
        drawn = {name: w for name, w in (PAPER if weights is None else weights).items() if w}
        plans = {name: (PLANS.find(name).of(tokenizer), w) for name, w in drawn.items()}
        return cls(plans, **options)

    def draw(self, rows: Sequence[Sequence[int]], size: int) -> Drawn:
        """Cut the rows of one batch.

        Rows of one length are cut alike where the plan looks at lengths only: a batch whose rows
        stand at the same place is read faster.

        Args:
            rows: token ids of each row.
            size: the model's chunk size, which no chunk exceeds.
        """
        rng = random.Random(f"{self.seed}/{self.batches}")
        self.batches += 1
        plans, weights = zip(*self.plans.values(), strict=True)
        (plan,) = rng.choices(plans, weights)
        longest = min(size, rng.choice(self.sizes)) if self.sizes else size
        stride = rng.choice(self.strides) if self.strides else None
        capacity = rng.choice(self.capacities) if self.capacities else None
        seed = rng.random()
        lengths = [plan.cut(row, longest, random.Random(seed)) for row in rows]
        return Drawn(lengths, stride, capacity)


def sentence_ends(tokenizer: object) -> frozenset[int]:
    """Ids whose text ends a sentence, a line or a chat turn."""
    ends = set(getattr(tokenizer, "all_special_ids", ()))
    for id_ in range(len(tokenizer)):  # type: ignore[arg-type]
        text: str = tokenizer.decode([id_])  # type: ignore[attr-defined]
        if text.endswith("\n") or text.strip() in {".", "!", "?", "。", "！", "？"}:
            ends.add(id_)
    return frozenset(ends)
