"""The loop of an evaluation: a reader reads each sample and is asked; every answer is a row.

Rows go to a JSON Lines file as they are done. A run that finds its own rows there makes only those
that are missing, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from cometlm.device import peak_memory, reset_peak_memory
from cometlm.eval.metrics import NATS
from cometlm.methods.base import Reader, TooLongError
from cometlm.tasks.base import Question, Sample, Task, asked_ids, turn_ids

OUT_OF_MEMORY = "out of memory"  # what an answer's error begins with, where there was too little
_SPARE = 16  # tokens that an answer may be longer than what it should be

Place = tuple[int, int, int]


@dataclass(frozen=True)
class Answer:
    """What a method said to one question.

    Attributes:
        tokens: most tokens of the context.
        index: of the sample.
        number: of the question in the sample, in the order in which they are given.
        question: as it was asked.
        answers: each of them is right.
        said: what was answered.
        scores: figures between 0 and 1 by name, and `nats` of a text without questions; none if
            there is an error.
        nbytes: bytes that were held of the text when it was asked.
        peak_bytes: most that were in use since the sample began to be read: of the device, or of
            the process on a CPU; None where nothing says.
        read_seconds: to read up to the question.
        answer_seconds: to read the question and answer.
        meta: the sample's and the question's.
        error: why there is no answer, "" if there is one.
    """

    tokens: int
    index: int
    number: int
    question: str
    answers: list[str]
    said: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    nbytes: int = 0
    peak_bytes: int | None = None
    read_seconds: float = 0.0
    answer_seconds: float = 0.0
    meta: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def place(self) -> Place:
        """What tells it from other answers of the same method to the same task."""
        return self.tokens, self.index, self.number


def evaluate(
    empty: Reader,
    task: Task,
    tokens: Sequence[int],
    samples: int,
    *,
    done: Collection[Place] = (),
    max_new_tokens: int | None = None,
    device: torch.device | None = None,
) -> Iterator[Answer]:
    """Each answer as it is given.

    What a method has no room for, or the machine no memory, is an answer with an error; of the
    first it is known before anything is read; after the second no more texts of that length are.

    Args:
        empty: a reader that has read nothing; it stays so.
        task: whose samples are read.
        tokens: lengths of contexts.
        samples: of each length.
        done: places of answers that are known already.
        max_new_tokens: of an answer. Default: what the longest right one takes, and 16 more.
        device: whose peak of memory is measured; None measures none.

    A sample without questions is one row: how well its text is foreseen (`nats` per token).

    Raises:
        ValueError: a bound of the task's; a tokenizer without a chat template.
        OSError: as the task raises.
    """
    for length in dict.fromkeys(tokens):
        for index in range(samples):
            sample = task.sample(index, length)
            if not sample.questions:
                if (length, index, 0) not in done:
                    yield _foreseen(empty.fork(), sample, length, index)
                continue
            numbers = range(len(sample.questions))
            missing = [n for n in numbers if (length, index, n) not in done]
            missing.sort(key=lambda n: _place_of(sample, sample.questions[n]))
            if missing and device is not None:
                reset_peak_memory(device)
            fork = empty.fork()
            lacks_memory = False
            for answer in _asked(fork, task, sample, length, index, missing, max_new_tokens):
                peak = None if device is None else peak_memory(device)
                yield replace(answer, peak_bytes=peak)
                lacks_memory = answer.error.startswith(OUT_OF_MEMORY)
            if lacks_memory:
                break


def _place_of(sample: Sample, question: Question) -> int:
    """Tokens of the context that are read before a question."""
    return len(sample.context) if question.after is None else question.after


def _asked(
    reader: Reader,
    task: Task,
    sample: Sample,
    tokens: int,
    index: int,
    numbers: Sequence[int],
    max_new_tokens: int | None,
) -> Iterator[Answer]:
    """Answers to some questions about one sample, in the order of their places."""
    read, seconds = 0, 0.0
    for number in numbers:
        question = sample.questions[number]
        place = _place_of(sample, question)
        known: dict[str, Any] = {"question": question.text, "answers": list(question.answers)}
        known |= {"tokens": tokens, "index": index, "number": number}
        known["meta"] = {**sample.meta, **question.meta}
        asked = _Asked.of(reader.tokenizer, question, max_new_tokens)
        start = time.perf_counter()
        try:
            reader.check_room(place - read + asked.num_tokens)
            reader.read(sample.context[read:place])
            seconds += time.perf_counter() - start
            read = place
            start = time.perf_counter()
            said = asked.answered(reader)
            took = time.perf_counter() - start
            nbytes = reader.nbytes  # some methods build now what they hold, and have built it here
        except TooLongError as error:
            yield Answer(**known, error=str(error))
            continue
        except (torch.OutOfMemoryError, MemoryError) as error:
            why = " ".join(str(error).split())
            yield Answer(**known, error=f"{OUT_OF_MEMORY}: {why}" if why else OUT_OF_MEMORY)
            return  # some of the text may have been read, and the rest takes no less
        scores = task.score(question, said)
        yield Answer(
            **known,
            said=said,
            scores=scores,
            nbytes=nbytes,
            read_seconds=seconds,
            answer_seconds=took,
        )


def _foreseen(reader: Reader, sample: Sample, tokens: int, index: int) -> Answer:
    """Mean nats per token of a text, each token after all that stand before it.

    The first token follows nothing, so it is only read.
    """
    context = sample.context
    known: dict[str, Any] = {"tokens": tokens, "index": index, "number": 0}
    known |= {"question": "", "answers": [], "meta": dict(sample.meta)}
    start = time.perf_counter()
    found: list[float] = []
    try:
        reader.read(context[:1])
        found = [token.loglikelihood for token in reader.read_foreseen(context[1:])]
        nbytes = reader.nbytes
    except TooLongError as error:
        return Answer(**known, error=str(error))
    if not found:
        raise ValueError(f"tokens of a text must be at least 2, got {len(context)}")
    return Answer(
        **known,
        scores={NATS: -sum(found) / len(found)},
        nbytes=nbytes,
        read_seconds=time.perf_counter() - start,
    )


def answer_to(reader: Reader, question: Question, max_new_tokens: int | None = None) -> str:
    """What a reader answers, greedily, in the tokenizer's chat template; it stays as it is.

    Args:
        max_new_tokens: see `evaluate`.

    Raises:
        TooLongError: there is no room for the question and the answer.
    """
    return _Asked.of(reader.tokenizer, question, max_new_tokens).answered(reader)


@dataclass(frozen=True)
class _Asked:
    """A question as token ids, and how its answer ends.

    Attributes:
        ids: the question in the chat template.
        max_new_tokens: of the answer.
        end: the token that ends an answer in the chat template.
    """

    ids: list[int]
    max_new_tokens: int
    end: int

    @classmethod
    def of(cls, tokenizer: Any, question: Question, max_new_tokens: int | None) -> _Asked:
        """How a question is asked."""
        turns = [turn_ids(tokenizer, question.text, answer) for answer in question.answers]
        (_, right), *_ = turns
        longest = max(len(answer) for _, answer in turns)
        most = max_new_tokens or question.max_new_tokens or longest + _SPARE
        return cls(asked_ids(tokenizer, question), most, right[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of question and answer at most."""
        return len(self.ids) + self.max_new_tokens

    def answered(self, reader: Reader) -> str:
        """What a reader answers."""
        tokenizer = reader.tokenizer
        ends = sorted({self.end, tokenizer.eos_token_id} - {None})
        said = reader.answer(self.ids, max_new_tokens=self.max_new_tokens, eos_token_id=ends)
        return said.removesuffix(tokenizer.decode([self.end])).strip()


class ResultsFile:
    """Rows of evaluations, of one run or of several; each is settings of its run and an answer.

    Args:
        path: a JSON Lines file, made if it is missing; None keeps the rows in this process.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._rows: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        if path is not None:
            self._file = path.open("a+b")
            self._read(path)

    def answers(self, settings: Mapping[str, Any]) -> list[Answer]:
        """Those of the run with these settings."""
        wanted = _plain(settings)
        found = [row["answer"] for row in self._rows if row["settings"] == wanted]
        return [Answer(**answer) for answer in found]

    def append(self, settings: Mapping[str, Any], answer: Answer) -> None:
        """Keep an answer, on disk before this returns.

        Args:
            settings: whatever the answer depends on, as JSON has it.

        Raises:
            OSError: it cannot be written.
        """
        row = {"settings": _plain(settings), "answer": _plain(asdict(answer))}
        self._rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path) -> None:
        assert self._file is not None
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break  # a process was killed while it wrote
            try:
                row = json.loads(line)
                Answer(**row["answer"])
                row["settings"].items()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} must hold rows of evaluations, got {line[:60]!r}"
                ) from error
            self._rows.append(row)
            end += len(line)
        self._file.truncate(end)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are read back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
