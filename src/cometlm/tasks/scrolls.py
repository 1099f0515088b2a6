"""SCROLLS: seven data sets over long texts (Shaham et al., 2022), with its official scores.

Reports, episodes, meetings, stories, papers and contracts: they are summed up, asked about, or said
to entail something or not. Questions that SCROLLS puts in front of a text are asked behind it here,
when it has been read. "train" is its training split and "test" its validation split, since it keeps
the answers of its own test split.

Scores are those of its evaluator, but 0 … 1 where that has percent: each answer's is the best of
all references with the same id. `scrolls_score` is the figure that its leaderboard has.
"""

from __future__ import annotations

import statistics
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cometlm.data.records import json_rows
from cometlm.tasks.base import Question, Split
from cometlm.tasks.scoring import ROUGE, check_rouge, f1_of_words, normalized, rouge
from cometlm.tasks.texts import Text, TextsTask

Data = Literal[
    "gov_report",
    "summ_screen_fd",
    "qmsum",
    "narrative_qa",
    "qasper",
    "quality",
    "contract_nli",
]
DATA: tuple[Data, ...] = get_args(Data)
REPOSITORY = "tau/scrolls"
_FILES: dict[Split, str] = {"train": "train.jsonl", "test": "validation.jsonl"}
_FIELDS = ("id", "input", "output")


@dataclass(frozen=True)
class _Kind:
    """What is asked in a data set.

    Attributes:
        metric: "rouge", "f1" or "exact".
        form: of a question; {query} is what its input begins with.
        ends: the query's end is the first empty line after this.
    """

    metric: Literal["rouge", "f1", "exact"]
    form: str
    ends: str = ""


_KINDS: dict[Data, _Kind] = {
    "gov_report": _Kind("rouge", "Write a summary of the report."),
    "summ_screen_fd": _Kind("rouge", "Write a recap of the episode in a few sentences."),
    "qmsum": _Kind("rouge", "{query}"),
    "narrative_qa": _Kind("f1", "{query} Answer in a few words."),
    "qasper": _Kind(
        "f1",
        '{query} Answer in a few words; if it can be answered with "Yes" or "No", so; and with '
        '"Unanswerable" if the paper does not say it.',
    ),
    "quality": _Kind(
        "exact", "{query}\n\nAnswer with the text of the right option, without its letter.", "(D)"
    ),
    "contract_nli": _Kind(
        "exact",
        'Does the contract entail this? {query}\n\nAnswer with "Entailment", "Contradiction" or '
        '"Not mentioned".',
    ),
}


class Scrolls(TextsTask):
    """One of SCROLLS's data sets; texts have their own lengths.

    Args:
        tokenizer, split, seed: see `Task`.
        data: which.
        path: the published ZIP, the folder that it is unpacked in, or one file of JSON lines; None:
            the ZIP is fetched from the hub.
        max_tokens: texts with more are left out.

    Raises:
        ValueError: an option out of its bounds; rows that are no such data.
        OSError: the data are not there.
        ImportError: ROUGE is needed and not installed.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        data: Data = "qasper",
        path: str | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if data not in DATA:
            raise ValueError(f"data must be one of {', '.join(DATA)}, got {data!r}")
        self.data: Data = data
        if _KINDS[data].metric == "rouge":
            check_rouge()
        place = _fetched(data) if path is None else Path(path)
        rows = _rows(place, data, _FILES[split])
        texts = _texts(rows, _KINDS[data])
        super().__init__(tokenizer, texts, split=split, seed=seed, max_tokens=max_tokens)

    def score(self, question: Question, said: str) -> dict[str, float]:
        """How good an answer is, 0 … 1: `rouge1`, `rouge2` and `rougeL`, or `f1`, or `exact`."""
        metric = _KINDS[self.data].metric
        if metric == "rouge":
            return rouge(said, question.answers)
        pairs = [(normalized(said), normalized(answer)) for answer in question.answers]
        if metric == "exact":
            return {"exact": max(float(ours == theirs) for ours, theirs in pairs)}
        return {"f1": max(_f1(ours.split(), theirs.split()) for ours, theirs in pairs)}


def scrolls_score(scores: Sequence[Mapping[str, float]]) -> float:
    """The figure of SCROLLS's leaderboard for one data set, 0 … 1.

    It is the mean of F1 or of exact matches; of ROUGE the geometric mean of the three means.

    Args:
        scores: what `Scrolls.score` says of each answer.

    Raises:
        ValueError: none.
    """
    if not scores:
        raise ValueError("scores must be at least 1, got none")
    names = ROUGE if ROUGE[0] in scores[0] else tuple(scores[0])
    means = [statistics.fmean(one[name] for one in scores) for name in names]
    product = 1.0
    for mean in means:
        product *= mean
    return float(product ** (1 / len(means)))


def _f1(ours: list[str], theirs: list[str]) -> float:
    """SCROLLS's; of nothing it is 0."""
    return f1_of_words(ours, theirs) if ours and theirs else 0.0


# --- data ---------------------------------------------------------------------------------------


def _fetched(data: Data) -> Path:
    """A data set's ZIP, from the hub or the hub's cache.

    Raises:
        OSError: neither has it; says how else to give it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    name = f"{data}.zip"
    try:
        return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset"))
    except (OSError, HfHubHTTPError) as error:
        raise OSError(
            f"{name} cannot be fetched from {REPOSITORY} on the hub: {error}; elsewhere run: "
            f"curl -LO https://huggingface.co/datasets/{REPOSITORY}/resolve/main/{name} and say "
            f"path={name}"
        ) from error


def _rows(place: Path, data: Data, file: str) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and the row."""
    if place.is_dir():
        known = [place / data / file, place / file, place / f"{data}.zip"]
        found = next((path for path in known if path.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{place} holds none of {data}/{file}, {file}, {data}.zip")
        place = found
    if not zipfile.is_zipfile(place):
        return json_rows(place.read_bytes(), str(place))
    with zipfile.ZipFile(place) as archive:
        name = next((n for n in archive.namelist() if Path(n).parts[-2:] == (data, file)), None)
        if name is None:
            raise FileNotFoundError(f"{place} holds no {data}/{file}")
        return json_rows(archive.read(name), f"{place}/{name}")


def _texts(rows: Iterator[tuple[str, Any]], kind: _Kind) -> list[Text]:
    """Rows of the same text as one, and those of the same id as one question."""
    asked: dict[str, dict[str, tuple[str, list[str]]]] = {}
    where = ""
    for where, row in rows:
        wrong = [name for name in _FIELDS if not _is_text(row, name)]
        if wrong:
            raise ValueError(
                f"{where} must have {', '.join(_FIELDS)} as text, got none of {', '.join(wrong)} "
                "(SCROLLS keeps the output of its test split)"
            )
        query, context = _parted(row["input"], kind)
        if not context:
            raise ValueError(f"{where} must have a query, an empty line and a text as its input")
        questions = asked.setdefault(context, {})
        questions.setdefault(row["id"], (query, []))[1].append(row["output"])
    if not asked:
        raise ValueError("path must hold rows, got none")
    return [
        Text(
            context,
            tuple(
                Question(kind.form.format(query=query), tuple(answers), meta={"id": name})
                for name, (query, answers) in questions.items()
            ),
        )
        for context, questions in asked.items()
    ]


def _is_text(row: Any, name: str) -> bool:
    return isinstance(row, dict) and isinstance(row.get(name), str) and bool(row[name].strip())


def _parted(given: str, kind: _Kind) -> tuple[str, str]:
    """The query of an input, and its text."""
    if "{query}" not in kind.form:
        return "", given.strip()
    query, end, context = given.partition("\n\n")
    if kind.ends:
        before, mark, behind = given.partition(kind.ends)
        option, end, context = behind.partition("\n\n")
        query = before + mark + option
    return query.strip(), context.strip() if end else ""
