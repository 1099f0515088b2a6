"""The loop of an evaluation: a reader reads each sample of a task and is asked.

Every answer says, beside its scores, what was held, how long it took, and in `meta` how far back
stands what it needs: `distance` (tokens from the beginning of its evidence to the question),
`depth` (0 is the start of what was read, 1 its end) and `decile`, the tenth that the depth lies in.
"""

from __future__ import annotations

import hashlib
import math
import time
from array import array
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cometlm.device import peak_memory, reset_peak_memory
from cometlm.eval.metrics import NATS
from cometlm.methods.base import Reader, TooLongError, parted
from cometlm.tasks.base import Question, Sample, Task, asked_ids, turn_ids
from cometlm.tasks.story import DECILES

OUT_OF_MEMORY = "out of memory"  # what an answer's error begins with, where there was too little
NOT_SCORED = "not scored"  # likewise, where the task could not score it now
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
        read: tokens that the context has; 0 in rows that are older than the field.
        digest: of the context's token ids; "" in such rows.
        open_nbytes: those of `nbytes` that are an open chunk's; 0 in such rows, whose `nbytes` do
            not have them.
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
    read: int = 0
    digest: str = ""
    open_nbytes: int = 0

    @property
    def is_retried(self) -> bool:
        """Whether a later run asks again: another machine may have enough memory, say."""
        is_number = all(map(math.isfinite, self.scores.values()))
        return not is_number or self.error.startswith((OUT_OF_MEMORY, NOT_SCORED))

    def is_of(self, sample: Sample, digest: str) -> bool:
        """Whether it answers what stands in its place in a sample, as far as the row says.

        Args:
            digest: of the sample's context, see `digest_of`.
        """
        if self.digest and self.digest != digest:
            return False
        if not sample.questions:
            return self.number == 0 and not self.question
        asked = sample.questions[self.number : self.number + 1]
        return [(self.question, *self.answers)] == [(one.text, *one.answers) for one in asked]

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
    known: MutableMapping[Place, Answer] | None = None,
    max_new_tokens: int | None = None,
    device: torch.device | None = None,
) -> Iterator[Answer]:
    """Each answer as it is given.

    What a method has no room for, the machine no memory, or the task no text of that length, is an
    answer with an error. The first is known before anything is read; after the second no more texts
    of that length are.

    Args:
        empty: a reader that has read nothing; it stays so.
        task: whose samples are read.
        tokens: lengths of contexts.
        samples: of each length.
        known: answers by place that are known already, and not asked for again. Those that do not
            answer what a sample asks now, since a file of the task has changed, are taken out.
        max_new_tokens: of an answer. Default: what the longest right one takes, and 16 more.
        device: whose peak of memory is measured; None measures none.

    A sample without questions is one row: how well its text is foreseen (`nats` per token).

    Raises:
        ValueError: a text of less than two tokens, to be foreseen; a tokenizer without a chat
            template.
        OSError: as the task raises.
    """
    known = {} if known is None else known
    for length in dict.fromkeys(tokens):
        for index in range(samples):
            own = [one for place, one in known.items() if place[:2] == (length, index)]
            try:
                sample = task.sample(index, length)
            except ValueError as error:  # what has to stand in this text is longer
                if not own:
                    yield Answer(length, index, 0, "", [], error=str(error))
                continue
            digest = digest_of(sample.begun(empty.tokenizer).context) if own else ""
            for one in own:
                if not one.is_of(sample, digest):
                    del known[one.place]
            numbers = range(max(1, len(sample.questions)))
            missing = [n for n in numbers if (length, index, n) not in known]
            lacks_memory = False
            if missing:
                wanted = answers_to(
                    empty.fork(),
                    task,
                    sample,
                    missing,
                    max_new_tokens=max_new_tokens,
                    device=device,
                )
                for answer in wanted:
                    yield replace(answer, tokens=length, index=index)
                    lacks_memory = answer.error.startswith(OUT_OF_MEMORY)
            if lacks_memory:
                break


def answers_to(
    reader: Reader,
    task: Task | None,
    sample: Sample,
    numbers: Sequence[int] | None = None,
    *,
    max_new_tokens: int | None = None,
    device: torch.device | None = None,
) -> Iterator[Answer]:
    """Answers to some questions about one sample, in the order of their places; or its one row.

    Args:
        reader: has read nothing; it reads the sample, behind what its tokenizer begins texts with.
        task: scores the answers; None: they have no scores.
        numbers: of the questions; all of them if None.
        max_new_tokens, device: see `evaluate`.
    """
    if device is not None:
        reset_peak_memory(device)
    sample = sample.begun(reader.tokenizer)
    if sample.questions:
        chosen = list(range(len(sample.questions)) if numbers is None else numbers)
        chosen.sort(key=lambda n: place_of(sample, sample.questions[n]))
        answers = _asked(reader, task, sample, chosen, max_new_tokens)
    else:
        answers = iter([_foreseen(reader, sample)])
    read, digest = len(sample.context), digest_of(sample.context)
    for answer in answers:
        peak = None if device is None else peak_memory(device)
        yield replace(_with_finite_scores(answer), peak_bytes=peak, read=read, digest=digest)


def digest_of(context: Sequence[int]) -> str:
    """What tells a context's token ids from others."""
    return hashlib.sha256(array("I", context).tobytes()).hexdigest()[:16]


def _with_finite_scores(answer: Answer) -> Answer:
    """An answer whose scores are numbers, or else an error: no mean can be made of NaN."""
    for name, score in answer.scores.items():
        if not math.isfinite(score):
            return replace(answer, scores={}, error=f"{name} must be finite, got {score}")
    return answer


def place_of(sample: Sample, question: Question) -> int:
    """Tokens of the context that are read before a question."""
    return len(sample.context) if question.after is None else question.after


def whereabouts(sample: Sample, question: Question) -> dict[str, Any]:
    """Where the evidence of a question stands, as `meta` has it; nothing where nothing says.

    Of several pieces of evidence it is the first one's beginning: all of them are needed.
    """
    place = place_of(sample, question)
    begins = [where.start for where in question.evidence if len(where)]
    if not begins or place < 1:
        return {}
    begin = min(*begins, place)
    depth = begin / place
    decile = min(DECILES - 1, int(depth * DECILES))
    return {"depth": depth, "decile": decile, "distance": place - begin}


def _asked(
    reader: Reader,
    task: Task | None,
    sample: Sample,
    numbers: Sequence[int],
    max_new_tokens: int | None,
) -> Iterator[Answer]:
    """Answers to some questions about one sample, whose places do not decrease.

    The text is read in the same pieces whichever are asked: what some methods hold depends on them.
    """
    read, seconds = 0, 0.0
    stops = sorted({place_of(sample, question) for question in sample.questions})
    for number in numbers:
        question = sample.questions[number]
        place = place_of(sample, question)
        meta = {**sample.meta, **question.meta, **whereabouts(sample, question)}
        unsaid = Answer(0, 0, number, question.text, list(question.answers), meta=meta)
        asked = _Asked.of(reader.tokenizer, question, max_new_tokens)
        start = time.perf_counter()
        try:
            reader.check_room(place - read + asked.num_tokens)
            reader.check_asked(asked.num_tokens)
            for stop in stops:
                if read < stop <= place:
                    reader.read(sample.context[read:stop])
                    read = stop
            seconds += time.perf_counter() - start
            start = time.perf_counter()
            said = asked.answered(reader)
            took = time.perf_counter() - start
            held = _held(reader)  # some methods build now what they hold, and have built it here
        except TooLongError as error:
            yield replace(unsaid, error=str(error))
            continue
        except (torch.OutOfMemoryError, MemoryError) as error:
            yield replace(unsaid, error=_out_of_memory(error))
            return  # some of the text may have been read, and the rest takes no less
        answer = replace(unsaid, said=said, read_seconds=seconds, answer_seconds=took, **held)
        yield answer if task is None else _scored(answer, task, question)


def _scored(answer: Answer, task: Task, question: Question) -> Answer:
    """An answer with its scores; an error that keeps it where a judge cannot be asked."""
    try:
        return replace(answer, scores=task.score(question, answer.said))
    except OSError as error:
        return replace(answer, error=f"{NOT_SCORED}: {error}")


def _foreseen(reader: Reader, sample: Sample) -> Answer:
    """Mean nats per token of a text, each token after all that stand before it.

    The first token follows nothing, so it is only read, as are all that a tokenizer begins with.
    """
    context = sample.context
    unsaid = Answer(0, 0, 0, "", [], meta=dict(sample.meta))
    start = time.perf_counter()
    found: list[float] = []
    try:
        reader.check_room(len(context))
        first = max(1, len(parted(reader.tokenizer, context)[0]))
        reader.read(context[:first])
        found = [token.loglikelihood for token in reader.read_foreseen(context[first:])]
        held = _held(reader)
    except TooLongError as error:
        return replace(unsaid, error=str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        return replace(unsaid, error=_out_of_memory(error))
    if not found:
        raise ValueError(f"tokens of a text must be at least 2, got {len(context)}")
    return replace(
        unsaid,
        scores={NATS: -sum(found) / len(found)},
        read_seconds=time.perf_counter() - start,
        **held,
    )


def _held(reader: Reader) -> dict[str, Any]:
    """What an answer says of the bytes that are held."""
    return {"nbytes": reader.nbytes, "open_nbytes": reader.open_nbytes}


def _out_of_memory(error: Exception) -> str:
    why = " ".join(str(error).split())
    return f"{OUT_OF_MEMORY}: {why}" if why else OUT_OF_MEMORY


def answer_to(reader: Reader, question: Question, max_new_tokens: int | None = None) -> str:
    """What a reader answers, greedily, in the tokenizer's chat template; it stays as it is.

    Args:
        max_new_tokens: see `evaluate`.

    Raises:
        TooLongError: there is no room for the question and the answer.
    """
    return _Asked.of(reader.tokenizer, question, max_new_tokens).answered(reader)


def check_fits(reader: Reader, sample: Sample, max_new_tokens: int | None = None) -> None:
    """Say before a sample is read whether all of it is for nothing.

    Args:
        reader: has read nothing.
        max_new_tokens: see `evaluate`.

    Raises:
        TooLongError: the text is too long, or each of its questions.
    """
    reader.check_room(len(sample.context))
    refused: list[TooLongError] = []
    for question in sample.questions:
        try:
            reader.check_asked(_Asked.of(reader.tokenizer, question, max_new_tokens).num_tokens)
        except TooLongError as error:
            refused.append(error)
    if refused and len(refused) == len(sample.questions):
        raise refused[0]


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
