"""RULER's thirteen tasks, made and scored by its authors' own code.

Their package has a script for each family of tasks, which writes a whole data set: it finds out how
much haystack fits by tokenising longer and longer texts, then makes 500 samples one after another.
Here a script is run once as a module, and the function in it that makes one sample is called. How
much haystack fits is estimated, so that a sample of a million tokens takes seconds.

Their prompt is kept whole. What stands in front of its question is the context, its question is
asked, and the beginning of an answer that they give away is read behind the head of the answer.
Scores are theirs, and so is how long an answer may be.

What is not as in their data sets:

- Sample i has a seed of its own instead of its place in a stream of random numbers. A seed is one
  of their data sets: 500 of the questions of qa_1 and qa_2, in their order.
- Needles stand between sentences of essays, which here end at a full stop before a space; theirs
  are found by a model of nltk's that has to be fetched.
- Essays and SQuAD's paragraphs begin again where a text is longer than all of them. There are some
  8,000 words for common words to stand among; where these run out, all are said twice as often, or
  three times, and so on.
- The chat template and the answer have room within a text's tokens, in all tasks.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
import re
import sys
from argparse import Namespace
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from cometlm.extras import RULER, lacks
from cometlm.session.plain_text import PlainText, Spans
from cometlm.tasks.base import Question, Sample, Split, Task, asked_ids
from cometlm.tasks.questions import PACKAGE as QUESTIONS

PACKAGE = dataclasses.replace(QUESTIONS, about="RULER's scripts")
_TASKS = "long_context_eval/synthetic.yaml"  # names its tasks
NEEDED = ("numpy", "scipy", "wonderwords")  # what their scripts import
_MARK = "\x1e"  # stands in front of a prompt's question, and of its answer's beginning
_SEED = 42  # theirs
_SAMPLES = 500  # of one of their data sets
_SPARE = 0.01  # of a text's tokens that may be missing
_TRIES = 16  # sizes of a haystack until one fits
_FASTER = 16  # by how much a size grows at most from try to try

Made = tuple[str, list[str]]
Span = tuple[int, int]


class Ruler(Task):
    """One of RULER's tasks.

    Args:
        tokenizer, split, seed: see `Task`; there is only the split "test".
        task: its name in RULER.
        folder: where the package `long_context_eval` lies; None: where it is installed.

    Raises:
        ValueError: another task or split.
        OSError: the package is not there; says what to install.
        ImportError: what its scripts need is not installed.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        task: str = "niah_single_1",
        folder: str | None = None,
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed)
        if split != "test":
            raise ValueError(
                f"split of ruler must be test, got {split}: it only measures; the task keys has "
                "samples like it to train on"
            )
        if message := lacks("the task ruler", NEEDED, RULER):
            raise ImportError(message, name="wonderwords")
        root = Path(folder) if folder is not None else PACKAGE.file(_TASKS).parent
        self._family = _family(root, task, seed, tokenizer)
        self._name = task
        self._sizes: dict[int, int] = {}  # of a haystack, by tokens

    @property
    def fills(self) -> bool:
        """See `Task.fills`: the question and the answer count among a text's tokens, too."""
        return False

    def sample(self, index: int, tokens: int) -> Sample:
        """A text that has at most `tokens` tokens together with its question and the answer.

        That is their `max_seq_length`. See `Task.sample`. `meta` says the `task`.

        Raises:
            ValueError: `tokens` is too few; a tokenizer without a chat template.
        """
        if tokens not in self._sizes:
            self._sizes[tokens] = self._most(tokens)
        size, least = self._sizes[tokens], self._family.least
        made = self._made(index, size, tokens)
        while (over := made.num_tokens - tokens) > 0:
            if size == least:
                raise ValueError(f"tokens must be at least {made.num_tokens}, got {tokens}")
            size = max(least, size - -(-over * size // made.num_tokens))
            made = self._made(index, size, tokens)
        found = tuple(self._evidence(index, made))
        question = dataclasses.replace(made.question, evidence=found)
        return Sample(made.ids, (question,), {"task": self._name})

    def score(self, question: Question, said: str) -> dict[str, float]:
        """`match`: the share of what is asked for that was said; of qa_1 and qa_2, whether it was.

        Theirs: `string_match_all` and `string_match_part`.
        """
        return {"match": self._family.score(said, question.answers)}

    def rng(self, index: int) -> random.Random:
        """See `Task.rng`; each of RULER's tasks has its own."""
        return random.Random(f"ruler/{self._name}/{self.seed}/{index}")

    # --- inside -----------------------------------------------------------------------------

    def _made(self, index: int, size: int, tokens: int) -> _Prompt:
        """A prompt with so much haystack."""
        family = self._family
        with _draws(self.rng(index).getrandbits(32)):
            text, wanted = family.make(self._number(index), size, tokens)
        context, asked, begun = text.rsplit(_MARK, 2)
        blank = asked[: len(asked) - len(asked.lstrip())]
        question = Question(
            asked.strip(),
            family.as_answers(wanted),
            answer_prefix=begun.lstrip(),
            max_new_tokens=family.tokens_to_generate,
        )
        context = context.replace(_MARK, "") + blank
        ids, spans = PlainText.of(self.tokenizer).encode_with_spans(context)
        rest = len(asked_ids(self.tokenizer, question)) + family.tokens_to_generate
        return _Prompt(context, ids, spans, question, len(ids) + rest)

    def _number(self, index: int) -> int:
        return index + self.seed * _SAMPLES

    def _most(self, tokens: int) -> int:
        """A size of the haystack with which a text has nearly so many tokens, or the least."""
        size = best = self._family.least
        too_much = sys.maxsize
        before, used_before = 0, 0
        for _ in range(_TRIES):
            used = self._made(0, size, tokens).num_tokens
            each = max((used - used_before) / (size - before), 0.01)
            if used > tokens:
                too_much = min(too_much, size)
            else:
                best = max(best, size)
            if 0 <= tokens - used <= _SPARE * tokens or too_much - best <= 1:
                break
            before, used_before = size, used
            # A text grows in proportion to its haystack, behind what stands there anyway.
            size = min(size + int((tokens - used) // each), size * _FASTER)
            if not best < size < too_much:
                size = best + 1 if too_much == sys.maxsize else (best + too_much) // 2
        return best

    def _evidence(self, index: int, made: _Prompt) -> Iterator[range]:
        """Where in a context the answers stand, in tokens; slow tokenizers do not say."""
        if not made.spans:
            return
        begins, ends = zip(*made.spans, strict=True)
        answers = made.question.answers
        for begin, end in self._family.evidence(self._number(index), made.context, answers):
            yield range(bisect_right(ends, begin), bisect_left(begins, end))


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A context, its token ids and where they stand in it, its question, and tokens of all."""

    context: str
    ids: list[int]
    spans: Spans
    question: Question
    num_tokens: int


# --- families of tasks ---------------------------------------------------------------------------


class _Family:
    """What one of their scripts makes, and of how much haystack.

    Args:
        module: the script.
        args: of its command line.
        metric: scores of predictions, under references of each, in percent.
        tokenizer: where the script counts tokens.

    Attributes:
        least: of haystack, without which the script fails.
    """

    least = 1
    wants_all = True  # the answers, not one of them

    def __init__(
        self, module: Any, args: Namespace, metric: Callable[..., list[float]], tokenizer: Any
    ) -> None:
        self.module = module
        self.args = args
        self.metric = metric
        self.tokenizer = tokenizer

    @property
    def tokens_to_generate(self) -> int:
        """Of an answer at most."""
        return int(self.args.tokens_to_generate)

    def make(self, number: int, size: int, tokens: int) -> Made:
        """A prompt with so much haystack, and what is asked for; from global random numbers.

        Args:
            number: of the sample, in a task that has a fixed list of questions.
            tokens: of the text at most.
        """
        return self._call(size)

    def evidence(self, number: int, context: str, answers: Sequence[str]) -> Iterator[Span]:
        """Where in a context the answers stand, in characters."""
        yield from ()

    def as_answers(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """What is asked for, as a `Question` has it."""
        return (", ".join(wanted),) if self.wants_all else tuple(dict.fromkeys(wanted))

    def score(self, said: str, answers: Sequence[str]) -> float:
        """0 … 1."""
        wanted = answers[0].split(", ") if self.wants_all else list(answers)
        return self.metric([said], [wanted])[0] / 100

    def _call(self, *given: Any, **options: Any) -> Any:
        """Their function that makes a sample."""
        self.module.args = self.args  # other tasks of the same script have others
        return self.module.generate_input_output(*given, **options)


class _Needles(_Family):
    """Values of keys, in essays, in a repeated sentence, or among others of their kind."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.args.num_needle_k = max(self.args.num_needle_k, self.args.num_needle_q)
        self.least = self.args.num_needle_k * self.args.num_needle_v
        haystack = self.module.haystack
        self._words: list[str] | None = haystack if isinstance(haystack, list) else None  # essays'

    def make(self, number: int, size: int, tokens: int) -> Made:
        """See `_Family.make`."""
        while self._words is not None and len(self._words) < size:
            self._words += self._words
        return super().make(number, size, tokens)

    def evidence(self, number: int, context: str, answers: Sequence[str]) -> Iterator[Span]:
        """See `_Family.evidence`."""
        head, _, _ = self.module.needle.partition("{")
        for value in answers[0].split(", "):
            end = context.find(f" is: {value}.") + len(f" is: {value}.")
            yield context.rindex(head, 0, end), end


class _Variables(_Family):
    """A chain of variables in a repeated sentence, behind an example."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        marked = self.args.template
        self.args.template = marked.replace(_MARK, "")  # which they look for in the example
        with _draws(self.args.random_seed):
            self._example = self._an_example()
        self.args.template = marked
        self.least = self.args.num_hops + 2

    def make(self, number: int, size: int, tokens: int) -> Made:
        """See `_Family.make`."""
        text, names = self._call(size, *self._chains)
        # The example has other names in each sample.
        return f" {self.module.randomize_icl(self._example)}\n\n{text}", names

    def evidence(self, number: int, context: str, answers: Sequence[str]) -> Iterator[Span]:
        """See `_Family.evidence`."""
        for name in answers[0].split(", "):
            yield from (found.span() for found in re.finditer(rf"VAR {name} = [VAR ]*\w+", context))

    def _an_example(self) -> str:
        """A short text with its question and answer: the longest within 500 tokens, as theirs."""
        found = ""
        for size in range(5, 500, 5):
            text, names = self._call(size, *self._chains, is_icl=True)
            example = f"{text} {' '.join(names)}\n\n"
            length = len(PlainText.of(self.tokenizer).encode(example))
            if found and length + self.tokens_to_generate > 500:
                break
            found = example
        return found

    @property
    def _chains(self) -> tuple[int, int]:
        return self.args.num_chains, self.args.num_hops


class _CommonWords(_Family):
    """A list in which ten words stand more often than all others, behind an example."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.least = self.args.num_cw
        self._often = self.args.freq_cw, self.args.freq_ucw

    def make(self, number: int, size: int, tokens: int) -> Made:
        """See `_Family.make`."""
        times = -(-size // len(self.module.words))
        self.args.freq_cw, self.args.freq_ucw = (often * times for often in self._often)
        self.args.max_seq_length = tokens
        return super().make(number, max(self.least, size // times), tokens)


class _FrequentWords(_Family):
    """Made-up words, three of which stand more often than all others."""

    def make(self, number: int, size: int, tokens: int) -> Made:
        """See `_Family.make`."""
        text, answers, _ = self._call(
            sys.maxsize,
            num_words=size,
            coded_wordlen=self.args.coded_wordlen,
            vocab_size=tokens // 50,
            alpha=self.args.alpha,
        )
        return text, answers


class _Questions(_Family):
    """A question of SQuAD or HotpotQA, whose paragraphs stand among others."""

    wants_all = False

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.least = max(len(one["context"]) for one in self.module.QAS)
        self._docs: list[str] = self.module.DOCS

    def make(self, number: int, size: int, tokens: int) -> Made:
        """See `_Family.make`."""
        # With all of them their function would shuffle its own list.
        self.module.DOCS = self._docs * (1 + size // len(self._docs))
        try:
            made: Made = self._call(number % len(self.module.QAS), size)
        finally:
            self.module.DOCS = self._docs
        return made

    def evidence(self, number: int, context: str, answers: Sequence[str]) -> Iterator[Span]:
        """See `_Family.evidence`; of HotpotQA they do not say which two of ten paragraphs."""
        own = self.module.QAS[number % len(self.module.QAS)]["context"]
        if len(own) == 1:
            begin = context.index(self._docs[own[0]])
            yield begin, begin + len(self._docs[own[0]])


_FAMILIES: dict[str, type[_Family]] = {
    "niah": _Needles,
    "variable_tracking": _Variables,
    "common_words_extraction": _CommonWords,
    "freq_words_extraction": _FrequentWords,
    "qa": _Questions,
}


def _family(root: Path, task: str, seed: int, tokenizer: Any) -> _Family:
    """What makes the samples of a task.

    Raises:
        ValueError: there is no such task; says which is nearest.
        OSError: the package's files are not there.
    """
    tasks = yaml.safe_load((root / "synthetic.yaml").read_text(encoding="utf-8"))
    if task not in tasks:
        close = difflib.get_close_matches(str(task), tasks, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"task must be one of {', '.join(tasks)}, got {task!r}{hint}")
    kind, options = tasks[task]["task"], tasks[task]["args"]
    prompts = _run(root / "data/synthetic/constants.py").TASKS[kind]
    metric = _run(root / "eval/synthetic/constants.py").TASKS[kind]["metric_fn_per_sample"]
    marked = prompts["template"].replace("{context}", f"{{context}}{_MARK}")
    template = f"{marked}{_MARK}{prompts['answer_prefix']}"
    given = {"template": template, "tokens_to_generate": prompts["tokens_to_generate"]}
    given |= {"random_seed": _SEED + seed, **options}
    data = tuple((key, options[key]) for key in _READ_AT_ONCE if key in options)
    module = _script(root, kind, data)
    args = module.parser.parse_args(_command_line({**_REQUIRED, **given}))
    return _FAMILIES[kind](module, args, metric, tokenizer)


# --- their scripts as modules --------------------------------------------------------------------

_READ_AT_ONCE = ("type_haystack", "dataset")  # arguments that a script obeys when it is run
_REQUIRED = {"save_dir": ".", "save_name": "none", "tokenizer_path": "none", "template": ""}
_REQUIRED |= {"max_seq_length": "4096", "tokens_to_generate": "1", "num_samples": "1"}
_PAIRS: dict[Path, list[str]] = {}  # six million pairs of words, made when `niah` is run first


def _command_line(given: Mapping[str, Any]) -> list[str]:
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


@lru_cache(maxsize=8)
def _script(root: Path, kind: str, data: tuple[tuple[str, str], ...]) -> Any:
    """One of their scripts, run as far as it goes without being the main program."""
    stubs = {name: ModuleType(name) for name in _IMPORTED}
    for name, found in _IMPORTED.items():
        vars(stubs[name]).update(found)
    if kind == "niah" and root in _PAIRS:
        no_words = Namespace(_get_words_from_text_file=lambda name: [])
        stubs["wonderwords"] = ModuleType("wonderwords")
        vars(stubs["wonderwords"]).update(random_word=no_words)
    stubs["constants"] = _run(root / "data/synthetic/constants.py")
    path = root / "data/synthetic" / f"{kind}.py"
    with _put_in_place(stubs, [str(path), *_command_line({**_REQUIRED, **dict(data)})]), _draws(0):
        module = _run(path, *data)
    if kind == "niah":
        module.words = _PAIRS.setdefault(root, module.words)
    return module


@lru_cache(maxsize=16)
def _run(path: Path, *data: object) -> Any:
    """A file of theirs as a module.

    Args:
        data: what else it depends on.

    Raises:
        OSError: there is no such file.
    """
    spec = spec_from_file_location(f"ruler_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _NoTokens:
    """In the place of their tokenizer: texts are counted here."""

    def text_to_tokens(self, text: str) -> tuple[()]:
        """None."""
        return ()


def _sentences(text: str) -> list[str]:
    """Sentences, which end before a space; joined by spaces they are the text."""
    return re.split(r"(?<=[.!?]) ", text)


def _nothing(*_: object, **__: object) -> _NoTokens:
    return _NoTokens()


# What their scripts import of their package and of nltk.
_IMPORTED: dict[str, dict[str, Any]] = {
    "tokenizer": {"select_tokenizer": _nothing},
    "long_context_eval.data.tokenizer": {"select_tokenizer": _nothing},
    "long_context_eval.pred.nemo_utils": {"write_manifest": _nothing},
    "nltk.tokenize": {"sent_tokenize": _sentences},
}


@contextmanager
def _put_in_place(modules: Mapping[str, ModuleType], command_line: list[str]) -> Iterator[None]:
    """Modules that are imported by name, and the command line; all is put back afterwards."""
    kept = {name: sys.modules.get(name) for name in modules}
    kept_line, kept_path = sys.argv, list(sys.path)
    sys.modules.update(modules)
    sys.argv = command_line
    try:
        yield
    finally:
        sys.argv, sys.path[:] = kept_line, kept_path
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextmanager
def _draws(seed: int) -> Iterator[None]:
    """The global random numbers begin at a seed, and go on as before afterwards."""
    import numpy

    kept, kept_too = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(kept)
        numpy.random.set_state(kept_too)
