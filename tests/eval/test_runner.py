"""The loop of an evaluation, its file, and what it comes to."""

import dataclasses

import pytest
import torch

from cometlm.eval.report import differences, summarize
from cometlm.eval.runner import OUT_OF_MEMORY, Answer, answer_to, check_fits, evaluate
from cometlm.methods import Foreseen, Reader, TooLongError
from cometlm.session.plain_text import prefix_ids
from cometlm.tasks import Question, Sample, Task
from cometlm.tasks.base import turn_ids
from tests.real import tokenizer
from tests.sessions import tokenizer_of
from tests.tiny import refused


@pytest.fixture(scope="module")
def words():
    return tokenizer("smollm2")


class Counting(Task):
    """How many tokens were read? Asked on the way and at the end."""

    def sample(self, index, tokens):
        half = tokens // 2
        questions = (
            Question("How many?", (str(tokens), "all")),
            Question("How many?", (str(half),), after=half),
        )
        return Sample([index] * tokens, questions, {"decile": index % 2})


class Counter(Reader):
    """Answers with what it has read, up to a limit."""

    def __init__(self, tokenizer, limit=1000):
        self.tokenizer = tokenizer
        self.limit = limit
        self.ids = []
        self.asked = []  # shared by forks

    def read(self, ids):
        if len(self.ids) + len(ids) > self.limit:
            raise TooLongError(f"at most {self.limit}")
        self.ids = [*self.ids, *ids]

    def fork(self):
        fork = type(self)(self.tokenizer, self.limit)
        fork.ids, fork.asked = self.ids, self.asked
        return fork

    def answer(self, ids=(), **generation):
        self.asked.append((len(self.ids), list(ids), generation))
        return f" {len(self.ids)}<|im_end|>"

    def foresee(self, ids):
        return [Foreseen(0.0, True)] * len(ids)

    @property
    def nbytes(self):
        return len(self.ids)


def test_every_question_is_asked_where_it_stands(words):
    reader = Counter(words)
    answers = list(evaluate(reader, Counting(words), [40, 10, 40], 3))  # one length, said twice
    places = [(t, i, n) for t in (40, 10) for i in range(3) for n in (1, 0)]
    assert [answer.place for answer in answers] == places  # the first question comes last
    assert all(answer.scores == {"exact": 1.0} for answer in answers)
    assert [answer.nbytes for answer in answers[:2]] == [20, 40]
    assert [answer.said for answer in answers[:2]] == ["20", "40"]
    assert answers[0].meta == {"decile": 0}
    assert reader.ids == []
    asked, answer = turn_ids(words, "How many?", "40")
    *_, (read, ids, generation) = reader.asked[:2]
    assert (read, ids) == (40, asked)
    assert generation["max_new_tokens"] == len(answer) + 16
    assert answer[-1] in generation["eos_token_id"]


def test_what_is_known_is_not_asked_again(words):
    reader = Counter(words)
    every = {answer.place: answer for answer in evaluate(reader, Counting(words), [10], 3)}
    known = {place: every[place] for place in ((10, 0, 0), (10, 0, 1), (10, 1, 1))}
    left = [answer.place for answer in evaluate(reader, Counting(words), [10], 3, known=known)]
    assert set(left) == every.keys() - known.keys()


class Cut(Counter):
    """Answers with where what it has read was cut, on which some methods depend."""

    cuts = ()

    def read(self, ids):
        super().read(ids)
        self.cuts = (*self.cuts, len(self.ids))

    def fork(self):
        fork = super().fork()
        fork.cuts = self.cuts
        return fork

    def answer(self, ids=(), **generation):
        return f"{self.cuts}<|im_end|>"


def test_a_text_is_read_in_the_same_pieces_whatever_is_known(words):
    every = {one.place: one for one in evaluate(Cut(words), Counting(words), [10], 1)}
    assert [one.said for one in every.values()] == ["(5,)", "(5, 10)"]
    known = {(10, 0, 1): every[10, 0, 1]}
    (left,) = evaluate(Cut(words), Counting(words), [10], 1, known=known)
    assert left.said == every[left.place].said


def test_what_answers_something_else_is_asked_again(words):
    """Files that a task is made of may change between two runs."""

    class Changed(Counting):
        def sample(self, index, tokens):
            sample = super().sample(index, tokens)
            first, second = sample.questions
            if index == 0:  # other words
                first = dataclasses.replace(first, text="How long?")
            if index == 1:  # another answer
                second = dataclasses.replace(second, answers=("1",))
            if index == 2:  # fewer questions
                return Sample(sample.context, (first,))
            return Sample([9] * tokens if index == 3 else sample.context, (first, second))

    task = Counting(words)
    known = {answer.place: answer for answer in evaluate(Counter(words), task, [10], 5)}
    # Rows that are older than digests say nothing of the text itself.
    older = {p: dataclasses.replace(one, read=0, digest="") for p, one in known.items()}
    assert not list(evaluate(Counter(words), task, [10], 5, known=older))

    def left(known):
        return {one.place[1:] for one in evaluate(Counter(words), Changed(words), [10], 5,
                                                  known=known)}  # fmt: skip

    assert left(known) == {(0, 0), (1, 1), (3, 0), (3, 1)}
    assert left(older) == {(0, 0), (1, 1)}
    assert known.keys() == {(10, 0, 1), (10, 1, 0), (10, 2, 0), (10, 4, 0), (10, 4, 1)}


def test_answers_that_cannot_be_scored_are_kept(words):
    class Judged(Counting):
        def score(self, question, said):
            raise OSError("the judge x cannot be asked")

    answers = list(evaluate(Counter(words), Judged(words), [10], 2))
    assert [answer.said for answer in answers] == ["5", "10"] * 2
    assert {answer.error for answer in answers} == {"not scored: the judge x cannot be asked"}
    assert all(answer.is_retried and not answer.scores for answer in answers)


def test_what_is_too_long_is_a_row_without_scores(words):
    early, late = evaluate(Counter(words, 25), Counting(words), [40], 1)
    assert early.scores
    assert not early.error
    assert (late.scores, late.error) == ({}, "at most 25")


def test_what_has_no_room_is_not_read(words):
    class Careful(Counter):
        def check_room(self, tokens):
            wanted.append(len(self.ids) + tokens)
            if wanted[-1] >= 45 + len(asked):
                raise TooLongError("no room")

        def fork(self):
            fork = Careful(self.tokenizer, self.limit)
            fork.ids, fork.asked = self.ids, self.asked
            return fork

    wanted = []
    asked, _ = turn_ids(words, "How many?", "40")
    early, late = evaluate(Careful(words), Counting(words), [40], 1, max_new_tokens=5)
    assert wanted == [20 + len(asked) + 5, 40 + len(asked) + 5]
    assert (early.error, late.error) == ("", "no room")


def test_a_text_whose_question_has_no_room_is_not_read(words):
    class Narrow(Counter):
        def check_asked(self, tokens):
            if tokens > len(asked) + 5:
                raise TooLongError("no room")

        def read(self, ids):
            raise AssertionError(ids)

        def fork(self):
            return Narrow(self.tokenizer)

    asked, _ = turn_ids(words, "How many?", "40")
    answers = list(evaluate(Narrow(words), Counting(words), [40], 1, max_new_tokens=6))
    assert [answer.error for answer in answers] == ["no room"] * 2
    with refused("no room"):
        check_fits(Narrow(words), Counting(words).sample(0, 40), 6)
    check_fits(Narrow(words), Counting(words).sample(0, 40), 5)


def test_a_text_that_the_task_cannot_make_so_short_is_a_row(words):
    class Uneven(Counting):
        def sample(self, index, tokens):
            if index == 1:
                raise ValueError("tokens must be at least 50")
            return super().sample(index, tokens)

    answers = list(evaluate(Counter(words), Uneven(words), [40], 3))
    assert [answer.index for answer in answers] == [0, 0, 1, 2, 2]
    assert (answers[2].error, answers[2].scores) == ("tokens must be at least 50", {})
    known = {answer.place: answer for answer in answers}
    assert not list(evaluate(Counter(words), Uneven(words), [40], 3, known=known))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("tried\nmuch"), MemoryError()])
def test_a_text_that_takes_too_much_memory_is_a_row(words, error):
    class Greedy(Guessing):
        def foresee(self, ids):
            raise error

        def fork(self):
            return Greedy(self.tokenizer)

    (one,) = evaluate(Greedy(words), Silent(words), [600], 2)
    assert one.error.startswith(OUT_OF_MEMORY)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("tried\nmuch"), MemoryError()])
def test_what_takes_too_much_memory_ends_its_length(words, error):
    class Greedy(Counter):
        def read(self, ids):
            if len(ids) > 10:
                raise error
            super().read(ids)

        def fork(self):
            return Greedy(self.tokenizer)

    answers = list(evaluate(Greedy(words), Counting(words), [40, 20], 3))
    assert [answer.place for answer in answers if answer.error] == [(40, 0, 1)]
    assert answers[0].error.startswith(OUT_OF_MEMORY)
    assert len(answers) == 1 + 6


def test_the_peak_is_measured_where_a_device_is_named(words):
    (first, *_) = evaluate(Counter(words), Counting(words), [40], 1, device=torch.device("cpu"))
    assert first.peak_bytes is None or first.peak_bytes > 1 << 20
    (first, *_) = evaluate(Counter(words), Counting(words), [40], 1)
    assert first.peak_bytes is None


class Silent(Counting):
    """Asks nothing."""

    def sample(self, index, tokens):
        return Sample(list(range(tokens)), meta={"haystack": "numbers"})


class Guessing(Counter):
    """Foresees a token by its number, if all before it were read."""

    def foresee(self, ids):
        assert ids[0] == len(self.ids)
        return [Foreseen(-float(id_), False) for id_ in ids]


def test_a_text_without_questions_is_foreseen(words):
    answers = list(evaluate(Guessing(words), Silent(words), [600], 2))
    assert [answer.place for answer in answers] == [(600, 0, 0), (600, 1, 0)]
    assert answers[0].scores == {"nats": 300.0}  # the mean of 1 … 599
    assert (answers[0].nbytes, answers[0].meta) == (600, {"haystack": "numbers"})
    (line,) = summarize(answers)
    assert line.scores["nats"] == (300.0, 300.0, 300.0)
    known = {answer.place: answer for answer in answers}
    assert not list(evaluate(Guessing(words), Silent(words), [600], 2, known=known))
    (late,) = evaluate(Guessing(words, 400), Silent(words), [600], 1)
    assert (late.scores, late.error) == ({}, "at most 400")
    with refused("tokens of a text must be at least 2, got 1"):
        list(evaluate(Guessing(words), Silent(words), [1], 1))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_text_foreseen_in_no_number_is_an_error(words, value):
    class Overflowing(Guessing):
        def foresee(self, ids):
            return [Foreseen(value, False)] * len(ids)

        def fork(self):
            return Overflowing(self.tokenizer)

    (one,) = evaluate(Overflowing(words), Silent(words), [600], 1)
    assert one.scores == {}
    assert "nats must be finite" in one.error


class Told(Counting):
    """Questions whose evidence stands at places, and one whose answer is not said."""

    def sample(self, index, tokens):
        questions = (
            Question("Whole?", ("x",), evidence=(range(30, 33), range(10, 12))),
            Question("Half?", ("x",), after=20, evidence=(range(15, 16),)),
            Question("Where?", ("x",), evidence=(range(0),)),
        )
        return Sample([1] * tokens, questions, {"depth": 0.3, "haystack": "ones"})


def test_answers_say_how_far_back_their_evidence_stands(words):
    half, whole, unsaid = evaluate(Counter(words), Told(words), [40], 1)
    assert whole.meta == {"depth": 0.25, "decile": 2, "distance": 30, "haystack": "ones"}
    assert half.meta == {"depth": 0.75, "decile": 7, "distance": 5, "haystack": "ones"}
    assert unsaid.meta == {"depth": 0.3, "haystack": "ones"}  # only what the task says


def test_a_report_groups_by_lists(words):
    answers = [
        dataclasses.replace(ONE, index=i, meta={"needs": needs})
        for i, needs in enumerate([[2, 1], ["a"], [2, 1]])
    ]
    lines = summarize(answers, "needs")
    assert [(line.group, line.count) for line in lines] == [(["a"], 1), ([2, 1], 2)]


def test_a_report_groups_by_what_a_question_says_of_itself(words):
    class Labelled(Counting):
        def sample(self, index, tokens):
            kinds = [Question("?", ("x",), meta={"kind": kind}) for kind in "ab"]
            return Sample([1] * tokens, tuple(kinds), {"decile": 3})

    answers = list(evaluate(Counter(words), Labelled(words), [10], 2))
    assert answers[0].meta == {"decile": 3, "kind": "a"}
    assert [line.group for line in summarize(answers, "kind")] == ["a", "b"]


def test_a_text_begins_as_its_tokenizer_begins_texts():
    gemma = tokenizer_of("like gemma")
    (first,) = prefix_ids(gemma)

    class Beginning(Counter):
        def answer(self, ids=(), **generation):
            assert self.ids.count(first) == 1
            assert self.ids[0] == first
            return super().answer(ids, **generation)

    class Told(Counting):
        def sample(self, index, tokens):
            told = Question("Where?", ("x",), after=tokens - 4, evidence=(range(2, 3),))
            return Sample([300 + index] * tokens, (told, Question("Where?", ("x",))))

    reader = Beginning(gemma)
    answers = list(evaluate(reader, Told(gemma), [20], 1))
    assert [read for read, *_ in reader.asked] == [17, 21]
    assert [answer.meta.get("distance") for answer in answers] == [14, None]
    bare = next(evaluate(Counter(tokenizer("smollm2")), Told(gemma), [20], 1))
    assert bare.digest != answers[0].digest  # so that rows of texts without it are asked again


def test_answers_may_be_longer_if_told(words):
    reader = Counter(words)
    assert answer_to(reader, Question("Why?", ("x",)), 99) == "0"
    assert reader.asked[0][2]["max_new_tokens"] == 99


ONE = Answer(10, 0, 0, "Why?", ["ü"], "x", {"exact": 0.0}, meta={"depth": 0.5})


# --- the report ---------------------------------------------------------------------------------


def test_lines(words):
    answers = list(evaluate(Counter(words, 25), Counting(words), [40, 20], 4))
    short, long = summarize(answers)
    assert (short.tokens, short.count, short.num_errors) == (20, 8, 0)
    assert (long.tokens, long.count, long.num_errors, long.error) == (40, 4, 4, "at most 25")
    mean, low, high = short.scores["exact"]
    assert mean == high == 1
    assert 0.5 < low < 1
    assert short.nbytes == 20
    by = summarize(answers, "decile")
    assert [(line.tokens, line.group) for line in by] == [(20, 0), (20, 1), (40, 0), (40, 1)]
    with refused("by must be one of decile, got 'depth'"):
        summarize(answers, "depth")
    assert summarize([]) == []


def test_errors_need_no_field_to_be_grouped_by():
    unmade = Answer(10, 1, 0, "", [], error="tokens must be at least 50")
    line, error = summarize([ONE, unmade], "depth")
    assert (line.group, line.count, line.num_errors) == (0.5, 1, 0)
    assert (error.group, error.count, error.error) == (None, 0, unmade.error)


def test_questions_that_differ_are_no_pairs():
    """With another tokenizer a task may ask something else in the same place."""
    ours = [dataclasses.replace(ONE, index=i) for i in range(4)]
    theirs = [
        ours[0],
        dataclasses.replace(ours[1], question="When?"),
        dataclasses.replace(ours[2], answers=["o"]),
        dataclasses.replace(ours[3], digest="other"),  # the same text in other tokens
    ]
    assert [one.count for one in differences(ours, theirs)] == [2]

    def text(index, digest):
        nats = {"nats": 1.0}
        return dataclasses.replace(
            ONE, index=index, question="", answers=[], scores=nats, digest=digest
        )

    ours = [text(0, "a"), text(1, "a"), text(2, "a")]
    theirs = [text(0, "a"), text(1, "b"), text(2, "")]  # rows of before have no digest
    assert [one.count for one in differences(ours, theirs)] == [2]


def test_differences_are_of_questions_that_both_have_answered():
    def answers(scores, **more):
        return [
            dataclasses.replace(ONE, index=i, scores={"exact": score}, **more)
            for i, score in enumerate(scores)
        ]

    ours = answers([1.0, 1.0, 0.0, 1.0])
    theirs = answers([0.0, 1.0, 0.0])
    theirs[2] = dataclasses.replace(theirs[2], scores={}, error="too long")
    (one,) = differences(ours, theirs)
    assert (one.tokens, one.count) == (10, 2)
    mean, low, high = one.scores["exact"]
    assert (mean, low, high) == (0.5, 0, 1)
    assert differences(ours, theirs, "depth")[0].group == 0.5
    assert differences(ours, []) == []
