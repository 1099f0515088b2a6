"""Papers: what computational linguists set out to do, how, and with which outcome.

ACLSum (Takeshita et al., 2024): abstract, introduction and conclusion of papers of the ACL, each
with three summaries of a sentence that experts wrote, and the sentences that these stand on. Its
training and test papers are ours; those for validation are left to others.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from cometlm.data.packages import PipPackage
from cometlm.data.records import read_json_file
from cometlm.tasks.base import Split
from cometlm.tasks.passages import Asked, Pool

Aspect = Literal["challenge", "approach", "outcome"]
ASPECTS: tuple[Aspect, ...] = get_args(Aspect)
# A mark that belongs to the word in front of it; an apostrophe, but not a quote that opens.
_SPACED = re.compile(r" ([.,;:!?)\]%](?!\d)|n't\b|'(?:s|re|ve|ll|d|m)\b|'(?= |$))")
PACKAGE = PipPackage("aclsum", "0.1.2", "papers (ACLSum)")


def papers(folder: Path | None, split: Split) -> Pool:
    """The papers of a split, a passage each.

    Args:
        folder: where `train.jsonl` and `test.jsonl` lie; None: in the installed package.

    Raises:
        OSError: they are not there; says what to install.
        ValueError: no JSON lines.
    """
    name = f"{split}.jsonl"
    return _pool(PACKAGE.file(f"dataset/{name}") if folder is None else folder / name, split)


@lru_cache(maxsize=2)
def _pool(path: Path, split: Split) -> Pool:
    rows = [row for _, row in read_json_file(path)]
    passages: list[tuple[str, ...]] = []
    asked: list[Asked] = []
    for row in rows:
        pieces, places = _pieces(row)
        for aspect in ASPECTS:
            marks = [mark for part in row["sentences"] for mark in row["highlights"][aspect][part]]
            told = tuple(place for place, mark in zip(places, marks, strict=True) if mark)
            texts = tuple(text.format(title=row["title"]) for text in ASKED[split][aspect])
            answers = (row["summary"][aspect].strip(),)
            asked.append(Asked(texts, answers, len(passages), told, {"kind": aspect}))
        passages.append(pieces)
    return Pool(passages, asked)


def _pieces(row: dict[str, Any]) -> tuple[tuple[str, ...], list[int]]:
    """A paper's title, headings and sentences, and which of these are sentences."""
    pieces = [f"{row['title']}\n\n"]
    places = []
    for part, sentences in row["sentences"].items():
        pieces.append(f"{part.capitalize()}:")
        for sentence in sentences:
            places.append(len(pieces))
            pieces.append(f" {_joined(sentence)}")
        pieces.append("\n\n")
    return tuple(pieces), places


def _joined(sentence: str) -> str:
    """A sentence without the spaces that a tokenizer left around its punctuation."""
    sentence = re.sub(
        r" ([.,;:!?)\]%](?!\d)|n't\b|'(?:s|re|ve|ll|d|m)\b|'(?= |$))", r"\1", sentence.strip()
    )
    return re.sub(r"([(\[]) ", r"\1", sentence)


ASKED: dict[Split, dict[Aspect, tuple[str, ...]]] = {
    "train": {
        "challenge": (
            'What is the challenge that the paper "{title}" takes up? Answer in a sentence.',
            'In one sentence, what was lacking before "{title}" was written?',
        ),
        "approach": (
            'What is the approach of the paper "{title}"? Answer in a sentence.',
            'In one sentence, what do the authors of "{title}" do?',
        ),
        "outcome": (
            'What is the outcome of the paper "{title}"? Answer in a sentence.',
            'In one sentence, what does "{title}" show?',
        ),
    },
    "test": {
        "challenge": (
            'Which problem does the paper titled "{title}" address? Write a one-sentence summary.',
        ),
        "approach": (
            'Which method does the paper titled "{title}" propose? Write a one-sentence summary.',
        ),
        "outcome": ('What did the paper titled "{title}" find? Write a one-sentence summary.',),
    },
}
