"""How good an answer is: whether it is the same, whether it holds it, how many words it shares."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from cometlm.extras import EVAL, lacks

ROUGE = ("rouge1", "rouge2", "rougeL")
# Punctuation, quotes, brackets and Markdown's emphasis and code: no part of the word they surround.
_AROUND = ".,;:!?\"'()[]{}<>*_`"
_AROUND_TOO = {"Pc", "Pe", "Pf", "Pi", "Po", "Ps"}  # categories of Unicode: ¿ « 。 」
_BESIDE_NUMBERS = "%‰‱&@#§/\\"  # which are of these categories, and part of what is said
# Signs of scripts without spaces, each a word by itself: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)

# How one may say that a text does not answer; the first is taught.
NOT_SAID = (
    "Not said",
    "It is not said",
    "It's not said",
    "This is not said",
    "That is not said",
    "The text does not say",
    "The text doesn't say",
    "It does not say",
    "It doesn't say",
    "Not stated",
    "Not mentioned",
    "It is not mentioned",
    "Not in the text",
    "Not known",
    "Unknown",
    "I do not know",
    "I don't know",
)


def exact(said: str, answers: Iterable[str]) -> float:
    """1 if one of the answers was said and nothing else.

    Case, spaces, and punctuation, quotes, brackets and Markdown around words do not count.
    """
    return float(any(_plain(said) == _plain(answer) for answer in answers))


def found(said: str, answers: Iterable[str]) -> float:
    """1 if one of the answers was said, maybe in a sentence, as whole words.

    Words are compared as by `exact`. A long reply finds it easily; look at `f1` too.
    """
    words = f" {_plain(said)} "
    return float(any(f" {_plain(answer)} " in words for answer in answers))


def exact_found_f1(said: str, answers: Sequence[str]) -> dict[str, float]:
    """The scores `exact`, `found` and `f1` of short answers."""
    return {"exact": exact(said, answers), "found": found(said, answers), "f1": f1(said, answers)}


def share_found(said: str, parts: Sequence[str]) -> float:
    """The share of the parts of an answer that were said, in any order, 0 … 1.

    Raises:
        ValueError: no parts.
    """
    if not parts:
        raise ValueError("parts must be at least 1, got none")
    return sum(found(said, [part]) for part in parts) / len(parts)


def words_in_order(said: str, answers: Iterable[str]) -> float:
    """The share of an answer's words that were said in their order, 0 … 1, for the best answer.

    The longest common subsequence, as in ROUGE-L, over the words of the answer; other words may
    stand between them, so look at `f1` too.
    """
    ours = _plain(said).split()
    theirs = [_plain(answer).split() for answer in answers]
    return max((_common(ours, words) / len(words) for words in theirs if words), default=0)


def _common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = row
        row = [0]
        for place, other in enumerate(theirs):
            longest = max(row[place], before[place + 1])
            row.append(before[place] + 1 if word == other else longest)
    return row[-1]


def f1(said: str, answers: Iterable[str]) -> float:
    """The harmonic mean of precision and recall of words, 0 … 1, for the answer where it is best.

    Two empty texts have an F1 of 1.
    """
    pairs = ((_plain(said).split(), _plain(answer).split()) for answer in answers)
    return max((f1_of_words(ours, theirs) for ours, theirs in pairs), default=0)


def f1_of_words(ours: list[str], theirs: list[str]) -> float:
    """The same of two lists of words; nothing against nothing is 1."""
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def normalized(answer: str) -> str:
    """An answer as the official scorers of SQuAD and its followers compare it.

    No case, no punctuation, no articles, single spaces.
    """
    text = "".join(sign for sign in answer.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def check_rouge() -> None:
    """Say before anything is read that ROUGE cannot be computed.

    Raises:
        ImportError: `rouge-score` is not installed.
    """
    if message := lacks("ROUGE", ["rouge_score"], EVAL):
        raise ImportError(message, name="rouge_score")


def rouge(said: str, answers: Iterable[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L: the F-measures of `rouge-score`, 0 … 1, words as they are.

    Each is of the answer where it is best.

    Raises:
        ImportError: `rouge-score` is not installed.
    """
    found = [_rouge_scorer().score(answer, said) for answer in answers]
    return {name: max((one[name].fmeasure for one in found), default=0.0) for name in ROUGE}


@cache
def _rouge_scorer() -> Any:
    check_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=False)


def _plain(text: str) -> str:
    """Text in one form of Unicode, without case, extra white space, and what is around words.

    A text that has no words stays as it is, so an answer "*" is not the same as no answer.
    """
    text = unicodedata.normalize("NFC", "".join(map(_usual, text)))
    spaced = _UNSPACED.sub(r" \g<0> ", text.casefold().replace("’", "'"))
    return " ".join(filter(None, map(_bare, spaced.split()))) or text.strip()


def _usual(sign: str) -> str:
    """A sign in its usual form: not as wide as others, no ligature; 10² stays what it is."""
    if unicodedata.decomposition(sign).startswith(("<wide>", "<narrow>", "<compat>")):
        return unicodedata.normalize("NFKC", sign)
    return sign


def _bare(word: str) -> str:
    """A word without punctuation, quotes, brackets and Markdown's emphasis and code around it."""
    inside = [place for place, sign in enumerate(word) if not _is_around(sign)]
    return word[inside[0] : inside[-1] + 1] if inside else ""


def _is_around(sign: str) -> bool:
    if sign in _AROUND or sign in _BESIDE_NUMBERS:
        return sign in _AROUND
    return not sign.isascii() and unicodedata.category(sign) in _AROUND_TOO
