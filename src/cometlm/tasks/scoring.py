"""How good an answer is: is it the same, was it said at all, how many words does it share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def exact(said: str, answers: Iterable[str]) -> float:
    """1 if one of the answers was said, whatever the case, the spaces and what stands around it."""
    return float(any(_plain(said) == _plain(answer) for answer in answers))


def found(said: str, answers: Iterable[str]) -> float:
    """1 if one of the answers was said, maybe in a sentence, whatever the case.

    It is easily had by saying much; look at `f1` too.
    """
    words = f" {_plain(said)} "
    return float(any(f" {_plain(answer)} " in words for answer in answers))


def f1(said: str, answers: Iterable[str]) -> float:
    """The harmonic mean of precision and recall of words, 0 … 1, for the answer where it is best.

    Two empty texts have an F1 of 1.
    """
    return max((_f1(_plain(said).split(), _plain(answer).split()) for answer in answers), default=0)


def _f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def _plain(text: str) -> str:
    """Text without case, punctuation around its words and white space."""
    words = (word.strip(" .,;:!?\"'()") for word in text.casefold().split())
    return " ".join(filter(None, words))
