"""People's own questions about their own texts: JSON lines of a context, a question and its answer.

    {"context": "… the whole text …", "question": "Who paid?", "answer": "Ada"}
    {"context_file": "contract.txt", "question": "When does it end?", "answer": ["May", "in May"]}

A `context_file` is UTF-8 text; its path is relative to the JSON lines. Of a list of answers each is
right; a number, true or false is taken as it is written. Further fields with a word, a number, true
or false are what a report may group by. Rows with the same context are one sample, so the text is
read once for all its questions, which are asked when it has been read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cometlm.data.records import read_json_file
from cometlm.tasks.base import Question, Split
from cometlm.tasks.scoring import exact_found_f1
from cometlm.tasks.texts import Text, TextsTask

_FIELDS = ("context", "context_file", "question", "answer")
_OF_REPORTS = {"depth", "decile", "distance"}  # where evidence stands, which nobody knows here
_LISTED = ", ".join(sorted(_OF_REPORTS))
_SHOWN = 5


class _Number(float):
    """A number with its text: 12.50 is a price."""

    def __new__(cls, text: str) -> _Number:
        self = super().__new__(cls, text)
        self.text = text
        return self

    text: str


class Own(TextsTask):
    """Samples as they stand in a file; their lengths are their own.

    Args:
        path: the JSON lines, or one JSON list.

    Attributes:
        digest: of all contexts, questions and answers.

    Raises:
        ValueError: a line that is not JSON; rows without a context, a question or an answer, each
            with where it stands.
        OSError: a file cannot be read.
    """

    def __init__(
        self, tokenizer: Any, *, path: str | Path, split: Split = "test", seed: int = 0
    ) -> None:
        texts = _texts(Path(path))
        kept: list[Any] = [(text.context, {}, list(map(_kept, text.questions))) for text in texts]
        self.digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:32]
        super().__init__(tokenizer, texts, split=split, seed=seed)

    def score(self, question: Question, said: str) -> dict[str, float]:
        """How good an answer is.

        Returns:
            `exact`: an answer was said and nothing else. `found`: it was said, maybe in a sentence.
            `f1`: of its words.
        """
        return exact_found_f1(said, question.answers)


def _texts(path: Path) -> list[Text]:
    """What a file holds, by context, in the order in which the contexts come."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} must be a file of JSON lines, it is a directory")
    placed = read_json_file(path, parse_float=_Number)
    rows = [(where.removeprefix(f"{path} "), row) for where, row in placed]
    if not rows:
        raise ValueError(f"{path} holds no rows")

    def refuse(is_bad: Callable[[Any], bool], what: str) -> None:
        bad = [where for where, row in rows if is_bad(row)]
        if bad:
            shown = ", ".join(bad[:_SHOWN]) + (", …" if len(bad) > _SHOWN else "")
            raise ValueError(f"{path}: {len(bad)} of {len(rows)} rows {what}: {shown}")

    refuse(lambda row: not isinstance(row, dict), "are no objects")
    refuse(_is_no_unicode, "hold half of a surrogate pair, which is no Unicode text")
    refuse(lambda row: not _is_text(row.get("question")), "have no question")
    refuse(lambda row: "answer" not in row, "have no answer")
    refuse(lambda row: not _answers(row), "have an answer that is no text, number or list of them")
    refuse(
        lambda row: ("context" in row) == ("context_file" in row),
        "do not have one of context and context_file",
    )
    refuse(
        lambda row: not isinstance(row.get("context", row.get("context_file")), str),
        "have a context that is no string",
    )
    contexts: dict[str, str] = {}
    for where, row in rows:
        name = row.get("context_file")
        if name is not None and name not in contexts:
            contexts[name] = _read(path.parent / name, f"{path} {where}")

    def context_of(row: dict[str, Any]) -> str:
        return contexts[row["context_file"]] if "context_file" in row else str(row["context"])

    refuse(lambda row: not context_of(row).strip(), "have an empty context")
    refuse(lambda row: bool(_OF_REPORTS & row.keys()), f"have a field of reports ({_LISTED})")
    fields = dict.fromkeys(name for _, row in rows for name in _meta(row))
    texts: dict[str, list[Question]] = {}
    for _, row in rows:
        meta = {**dict.fromkeys(fields), **_meta(row)}  # a report may group by what a row lacks
        asked = Question(row["question"], _answers(row), meta=meta)
        texts.setdefault(context_of(row), []).append(asked)
    return [Text(context, tuple(questions)) for context, questions in texts.items()]


def _meta(row: dict[str, Any]) -> dict[str, Any]:
    """Further fields of a row."""
    return {
        name: _plain(value)
        for name, value in row.items()
        if name not in _FIELDS and isinstance(value, str | int | float)
    }


def _plain(value: str | float) -> str | float:
    """A value as JSON has it."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    return value


def _kept(question: Question) -> tuple[Any, ...]:
    """What of a question decides whether earlier answers are to it."""
    meta = {name: value for name, value in question.meta.items() if value is not None}
    return (question.text, question.answers, *([meta] if meta else []))


def _is_no_unicode(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _answers(row: dict[str, Any]) -> tuple[str, ...]:
    """The answers of a row as text; none if one of them has none."""
    given = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    texts = [_written(one) for one in given]
    return tuple(texts) if all(map(_is_text, texts)) else ()


def _written(value: Any) -> Any:
    """A number, true or false as its text."""
    if isinstance(value, _Number):
        return value.text
    return json.dumps(value) if isinstance(value, int) else value


def _read(path: Path, where: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no file {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {path} is not UTF-8 text: {error.reason}") from error
