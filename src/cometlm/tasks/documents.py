"""Documents: questions about papers, countries or a manual, packed to any length.

What is asked stands whole in one passage, and other passages of the same kind and split are around
it, in any order. Where the data come from, and how they are split, is in `tasks.papers`,
`tasks.countries` and `tasks.manual`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

from cometlm.tasks.base import Question, Sample, Split, Task
from cometlm.tasks.countries import countries
from cometlm.tasks.manual import manual
from cometlm.tasks.papers import papers
from cometlm.tasks.passages import Asked, Pool, pack
from cometlm.tasks.scoring import check_rouge, exact_found_f1, f1, rouge
from cometlm.tasks.story import bounds, decile

Data = Literal["papers", "countries", "manual"]
DATA: tuple[Data, ...] = get_args(Data)
_MISSES = 16  # passages that are too long for what is left, before a context is done


def _explanation(said: str, answers: Sequence[str]) -> dict[str, float]:
    return {**rouge(said, answers), "f1": f1(said, answers)}


@dataclass(frozen=True)
class _Source:
    """Where passages come from, and how answers about them are scored."""

    pool: Callable[[Path | None, Split], Pool]
    score: Callable[[str, Sequence[str]], dict[str, float]]
    needs_rouge: bool = True


_SOURCES: dict[Data, _Source] = {
    "papers": _Source(papers, rouge),
    "countries": _Source(countries, exact_found_f1, needs_rouge=False),
    "manual": _Source(manual, _explanation),
}


def _pool(name: Data, folder: Path | None, split: Split) -> Pool:
    """The documents of one source.

    Raises:
        OSError, ImportError: as `Documents`.
    """
    source = _SOURCES[name]
    if source.needs_rouge:
        check_rouge()
    return source.pool(folder, split)


class Documents(Task):
    """Questions about documents that stand among others.

    Args:
        tokenizer, split, seed: see `Task`.
        data: "papers" (what they set out to do, how and with which outcome, in a sentence),
            "countries" (short facts), "manual" (questions of Perl's FAQ), or several, taken in
            turn; all of them if empty, and to measure with (the split "test") those that can be
            had: `lacking` says which cannot.
        questions: of a text at most, each about a passage of its own.
        folder: of `data`, which is then one: where it lies, instead of where it is installed.

    Raises:
        ValueError: an option out of its bounds.
        OSError: data are not there; says what to install.
        ImportError: ROUGE is needed and not installed.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        data: Data | Sequence[Data] = (),
        questions: int = 1,
        folder: str | None = None,
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed)
        asked: tuple[Data, ...] = (data,) if isinstance(data, str) else tuple(data)
        for name in asked:
            if name not in DATA:
                raise ValueError(f"data must be of {', '.join(DATA)}, got {name!r}")
        wanted = asked or DATA
        if folder is not None and len(wanted) > 1:
            raise ValueError(f"folder must come with one data, got {', '.join(wanted)}")
        self.questions = bounds("questions", questions, 64)[0]
        place = None if folder is None else Path(folder)
        self._pools: dict[Data, Pool] = {}
        lacking: dict[str, Exception] = {}
        for name in wanted:
            try:
                self._pools[name] = _pool(name, place, split)
            except (OSError, ImportError) as error:
                if asked or split != "test":
                    raise
                lacking[name] = error
        if not self._pools:
            raise next(iter(lacking.values()))
        self.data, self.lacking = tuple(self._pools), lacking
        self._ids = cache(self._encoded)

    def sample(self, index: int, tokens: int) -> Sample:
        """Passages of at most `tokens` tokens; see `Task.sample`.

        Only passages that fit whole are asked about; nothing is cut. Where a split has no more of
        them, the context is shorter.

        A question's `meta` says of which `data` and `kind` it is, and where no evidence is known,
        in which `decile` of the context its passage begins.
        """
        rng = self.rng(index)
        data = self.data[index % len(self.data)]
        asked = self._draw(rng, data, tokens)
        wanted = [one.passage for one in asked]
        told = [[i for piece in self._ids(data, number) for i in piece] for number in wanted]
        others = self._others(rng, data, set(wanted))
        context, places, count = pack(rng, told, others, tokens, _MISSES)
        questions = []
        for one, place in zip(asked, places, strict=True):
            lengths = [len(piece) for piece in self._ids(data, one.passage)]
            starts = [place.start + start for start in accumulate(lengths, initial=0)]
            evidence = tuple(range(starts[i], starts[i + 1]) for i in one.pieces)
            meta = {"data": data, **one.meta}
            if not evidence:  # then the passage is the best that is known
                meta["decile"] = decile(place, len(context))
            text = rng.choice(one.texts)
            questions.append(Question(text, one.answers, evidence=evidence, meta=meta))
        return Sample(context, tuple(questions), {"passages": count})

    def score(self, question: Question, said: str) -> dict[str, float]:
        """How good an answer is.

        Returns:
            Of papers `rouge1`, `rouge2` and `rougeL`; of countries `exact`, `found` and `f1`; of
            the manual ROUGE and `f1`.
        """
        return _SOURCES[question.meta["data"]].score(said, question.answers)

    def _draw(self, rng: random.Random, data: Data, tokens: int) -> list[Asked]:
        """Questions about different passages that fit together."""
        pool = self._pools[data]
        order = list(range(len(pool.asked)))
        rng.shuffle(order)
        drawn: list[Asked] = []
        room, shortest = tokens, 0
        for number in order:
            one = pool.asked[number]
            length = sum(map(len, self._ids(data, one.passage)))
            shortest = min(shortest or length, length)
            if length <= room and all(one.passage != other.passage for other in drawn):
                drawn.append(one)
                room -= length
                if len(drawn) == self.questions:
                    break
        if not drawn:
            raise ValueError(f"tokens must be at least {shortest} for {data}, got {tokens}")
        return drawn

    def _others(self, rng: random.Random, data: Data, without: set[int]) -> Iterator[list[int]]:
        """Ids of all passages but some, in any order."""
        order = [i for i in range(len(self._pools[data].passages)) if i not in without]
        rng.shuffle(order)
        return ([i for piece in self._ids(data, number) for i in piece] for number in order)

    def _encoded(self, data: Data, number: int) -> list[list[int]]:
        """Ids of each piece of a passage."""
        return [self.encode(piece) for piece in self._pools[data].passages[number]]
