"""People's own questions about their own texts: JSON lines of a context, a question and its answer.

    {"context": "… the whole text …", "question": "Who paid?", "answer": "Ada"}
    {"context_file": "contract.txt", "question": "When does it end?", "answer": ["May", "in May"]}

A `context_file` is UTF-8 text; its path is relative to the JSON lines. Of a list of answers each is
right; a number, true or false is taken as its text. Further fields with a word, a number, true or
false are what a report may group by. Rows with the same context and the same further fields are one
sample, so the text is read once for all its questions, which are asked when it has been read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cometlm.data.records import read_json_file
from cometlm.tasks.base import Question, Split
from cometlm.tasks.scoring import exact_found_f1
from cometlm.tasks.texts import Text, TextsTask

_FIELDS = ("context", "context_file", "question", "answer")
_SHOWN = 5


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
        kept = [
            (text.context, text.meta, [(one.text, one.answers) for one in text.questions])
            for text in texts
        ]
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
    rows = [(where.removeprefix(f"{path} "), row) for where, row in read_json_file(path)]
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
    texts: dict[tuple[str, str], tuple[dict[str, Any], list[Question]]] = {}
    for _, row in rows:
        more = {key: value for key, value in row.items() if key not in _FIELDS}
        meta = {key: value for key, value in more.items() if isinstance(value, str | int | float)}
        key = (context_of(row), json.dumps(meta, sort_keys=True))
        texts.setdefault(key, (meta, []))[1].append(Question(row["question"], _answers(row)))
    return [
        Text(context, tuple(questions), meta) for (context, _), (meta, questions) in texts.items()
    ]


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
    texts = [json.dumps(one) if isinstance(one, int | float) else one for one in given]
    return tuple(texts) if all(map(_is_text, texts)) else ()


def _read(path: Path, where: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no file {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {path} is not UTF-8 text: {error.reason}") from error
