"""Keeping a backbone what it is: the model goes on as the backbone alone would.

In a slice of every batch the model's next-token distribution is held to the backbone's: the
divergence KL(backbone ‖ model), in nats a token. The slice is prose of corpora, and prompts with
the answers that the backbone gives to them, made once. Prompts are read with an empty memory.
Prose may stand behind chunks that only the memory knows, while the backbone sees all of it. The
backbone is the same object with its adapters switched off: no second copy of the weights.

Batch i depends on the settings, the seed and i alone, as those of a mixture do.

Legend: B rows, N tokens of the longest row, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cometlm.checkpoints.adapters import has_adapter
from cometlm.checkpoints.atomic_write import write_whole
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.data.corpora import corpus_files
from cometlm.data.prompts import prompts_of
from cometlm.session.chat_template import render_turn
from cometlm.session.plain_text import prefix_ids
from cometlm.tasks.haystack import Haystack
from cometlm.train.config import TASK_QUESTIONS, Keep, Log

KEEP = "keep_loss"
ANSWERS_FILE = "keep.json"  # in a run's folder: the backbone's answers
_AT_ONCE = 64  # prompts that are answered together


@dataclass(frozen=True)
class Answered:
    """A prompt in the chat template, and what the backbone says to it.

    Attributes:
        asked: ids up to the head of the answer.
        answer: ids of the answer, with what ends it if it came so far.
    """

    asked: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Rows:
    """Texts that a model and its backbone go on with.

    Attributes:
        ids: [B, N]; filling follows where a row has less, which no earlier token sees.
        counted: [B, N], whether the distribution of the token that follows is held.
        chunks: tokens of each row's chunks, as the model reads them; the backbone reads all at
            once. Default: one.
    """

    ids: Tensor
    counted: Tensor
    chunks: tuple[int, ...] = ()


class KeepBatches:
    """Rows to hold a model to its backbone with, a batch for each number.

    Args:
        settings: how many tokens, and of what.
        tokenizer: the model's.
        answered: prompts with the backbone's answers; may be empty where all is prose.
        longest: tokens of a chunk at most: the model's chunk size.
        seed: of everything that is drawn.
        positions: of the backbone; None: any number.

    Raises:
        ValueError: no prompts where some are wanted, one that fills a row by itself; more in front
            than the backbone has positions for.
        OSError: a corpus that cannot be fetched.
    """

    def __init__(
        self,
        settings: Keep,
        tokenizer: Any,
        answered: Sequence[Answered],
        longest: int,
        seed: int,
        positions: int | None = None,
    ) -> None:
        self._prose = round(settings.tokens * settings.prose_share)
        self._said = settings.tokens - self._prose
        if self._said and not answered:
            raise ValueError(
                f"keep.prose_share must be 1 without prompts, got {settings.prose_share}"
            )
        self._first = prefix_ids(tokenizer) if self._prose else []  # in front of a text
        held = min(self._prose + len(self._first), longest)
        if positions is not None and settings.behind > positions - held:
            raise ValueError(
                f"keep.behind must be at most {positions - held}, got {settings.behind}: the "
                f"backbone sees {held} tokens behind it, too, and has {positions} positions"
            )
        self._behind = settings.behind
        self._answered = list(answered)
        self._haystacks = [
            Haystack(tokenizer, corpus_files(name))
            for name in (settings.corpora if self._prose else ())
        ]
        self._longest = longest
        self._seed = seed

    def __getitem__(self, number: int) -> list[Rows]:
        """Batch `number`; what has nothing in front is read together, in one chunk a row."""
        rng = random.Random(f"keep/{self._seed}/{number}")
        prose, said = list(self._of_prose(rng)), list(self._of_prompts(rng))
        if not self._behind:
            return [_filled(prose + said)]
        behind = [_filled([row], chunks=self._chunks(row[1])) for row in prose]
        return behind + ([_filled(said)] if said else [])

    def _chunks(self, held: range) -> tuple[int, ...]:
        """Of a row: as few as hold what is in front, and one of what is held."""
        starts = [*range(0, held.start, self._longest), held.start, held.stop]
        return tuple(stop - start for start, stop in pairwise(starts))

    def _of_prose(self, rng: random.Random) -> Iterator[tuple[list[int], range]]:
        """Rows of running text, all of it held but what is in front."""
        left = self._prose
        while left > 0:
            length = min(left, max(1, self._longest - len(self._first)))
            front = rng.randint(1, self._behind) if self._behind else 0
            drawn = rng.choice(self._haystacks).draw(rng, front + length)
            ids, begin = [*self._first, *drawn], len(self._first) + front
            yield ids, range(begin, begin + length)
            left -= length

    def _of_prompts(self, rng: random.Random) -> Iterator[tuple[list[int], range]]:
        """Prompts with answers, of which the answers are held."""
        left = self._said
        while left > 0:
            one = rng.choice(self._answered)
            answer = one.answer[:left]
            first = len(one.asked) - 1  # whose next token is the answer's first
            yield one.asked + answer, range(first, first + len(answer))
            left -= len(answer)


def _filled(rows: Sequence[tuple[list[int], range]], chunks: tuple[int, ...] = ()) -> Rows:
    """Rows of ids and of places that are held, at one length."""
    width = max(len(ids) for ids, _ in rows)
    places = torch.arange(width)
    counted = [(places >= held.start) & (places < held.stop) for _, held in rows]
    ids = [row + [0] * (width - len(row)) for row, _ in rows]
    return Rows(torch.tensor(ids), torch.stack(counted), chunks)


def keep_loss(model: CometForCausalLM, batch: Sequence[Rows]) -> Tensor:
    """KL(backbone ‖ model) of the tokens that are counted: the mean, in nats (a scalar).

    Args:
        model: its weights get gradients where they are trained; the backbone's pass has none.
        batch: on any device.
    """
    return torch.cat([_divergence(model, rows) for rows in batch]).mean()


def _divergence(model: CometForCausalLM, rows: Rows) -> Tensor:
    """Of each token that is counted [n]."""
    with torch.no_grad(), as_backbone(model):
        theirs = _counted(model, backbone_hidden(model, rows.ids.to(model.device)), rows.counted)
    count, width = rows.ids.shape
    chunks = list(rows.chunks or [width])
    out = model.model(rows.ids, use_cache=False, chunk_lengths=[chunks] * count)
    assert out.last_hidden_state is not None
    ours = _counted(model, out.last_hidden_state, rows.counted)
    return divergence(theirs, ours)


def divergence(theirs: Tensor, ours: Tensor) -> Tensor:
    """KL(theirs ‖ ours) of each token in nats [n], from logits [n, V]."""
    wide = torch.promote_types(ours.dtype, torch.float32)
    ours, theirs = (F.log_softmax(x.to(wide), dim=-1) for x in (ours, theirs))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


@contextmanager
def as_backbone(model: CometForCausalLM) -> Iterator[None]:
    """While it is open, the backbone inside a model computes as it did before it was trained."""
    training, adapted = model.training, has_adapter(model)
    learns = [(weight, weight.requires_grad) for weight in model.parameters()]
    model.eval()
    if adapted:
        model.disable_adapters()
    try:
        yield
    finally:
        if adapted:
            model.enable_adapters()
        for weight, learned in learns:  # peft has every adapter that it enables learn
            weight.requires_grad_(learned)
        model.train(training)


def backbone_hidden(model: CometForCausalLM, ids: Tensor) -> Tensor:
    """Last hidden states [B, N, D] of the plain backbone."""
    hidden: Tensor = model._backbone.get_decoder()(ids, use_cache=False).last_hidden_state
    return hidden


def _counted(model: CometForCausalLM, hidden: Tensor, counted: Tensor) -> Tensor:
    """Logits [n, V] of the tokens that are counted."""
    return model.logits(hidden[counted.to(hidden.device)])


# --- the backbone's own answers -----------------------------------------------------------------


def answers_for(
    model: CometForCausalLM,
    tokenizer: Any,
    settings: Keep,
    questions: Callable[[], list[str]],
    folder: Path,
    log: Log = print,
) -> list[Answered]:
    """Every prompt with the backbone's answer; made once, and kept in a run's folder.

    Args:
        questions: gives those of the run's tasks, for the prompts that are called "tasks".
        folder: of the run; what was made for other prompts or another model is made anew.

    Raises:
        ValueError: a prompt with which its answer does not fit into a chunk; prompts that are not
            there; no chat template.
        OSError: the answers cannot be written.
    """
    if settings.prose_share == 1:
        return []
    prompts = _prompts(settings, questions)
    made_for = {
        "backbone": model.config.backbone,
        "answer_tokens": settings.answer_tokens,
        "ends": answer_ends(tokenizer),
        "prompts": prompts,
    }
    path = folder / ANSWERS_FILE
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["made_for"] == made_for:
            return [Answered(**one) for one in kept["answers"]]
    log(f"the backbone answers {len(prompts)} prompts, which are kept in {path}")
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    _check_room(prompts, asked, settings, model.config.comet_config.chunk_size)
    with as_backbone(model):
        said = own_answers(model._backbone, tokenizer, asked, settings.answer_tokens)
    answered = [Answered(ids, answer) for ids, answer in zip(asked, said, strict=True) if answer]
    made = {"made_for": made_for, "answers": [dataclasses.asdict(one) for one in answered]}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(made).encode())
    return answered


def _prompts(settings: Keep, questions: Callable[[], list[str]]) -> list[str]:
    """All prompts that settings name, each once."""
    named = (
        questions() if name == TASK_QUESTIONS else prompts_of(name, "train")
        for name in settings.prompts
    )
    prompts = list(dict.fromkeys(prompt for some in named for prompt in some))
    if not prompts:
        raise ValueError(f"keep.prompts must give some, got none from {list(settings.prompts)}")
    return prompts


def _check_room(
    prompts: Sequence[str], asked: Sequence[list[int]], settings: Keep, chunk_size: int
) -> None:
    """Refuse answers that may not fit into a chunk together with their prompts."""
    ids, longest = max(zip(asked, prompts, strict=True), key=lambda pair: len(pair[0]))
    room = chunk_size - len(ids)
    if room < settings.answer_tokens:
        raise ValueError(
            f"keep.answer_tokens must be at most {room}, which the prompt {longest!r} leaves of a "
            f"chunk of {chunk_size} tokens, got {settings.answer_tokens}"
        )


@torch.no_grad()
def own_answers(
    backbone: Any, tokenizer: Any, asked: Sequence[list[int]], longest: int
) -> list[list[int]]:
    """What a model without memory says, greedily, to each of some prompts.

    Args:
        asked: ids of each.
        longest: tokens of an answer at most.

    Returns:
        Ids up to and with the token that ends the answer, in the order of the prompts.
    """
    ends = answer_ends(tokenizer)
    filling = ends[0] if ends else 0
    said: list[list[int]] = []
    for start in range(0, len(asked), _AT_ONCE):
        some = asked[start : start + _AT_ONCE]
        width = max(map(len, some))
        ids = torch.tensor([[filling] * (width - len(row)) + row for row in some])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some])
        out = backbone.generate(
            ids.to(backbone.device),
            attention_mask=mask.to(backbone.device),
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=filling,
        )
        for row in out[:, width:].tolist():
            first = next((place for place, token in enumerate(row) if token in ends), len(row))
            said.append(row[: first + 1])
    return said


def answer_ends(tokenizer: Any) -> list[int]:
    """Tokens that end an answer: its turn in the chat template (Gemma, Phi-3), or the text."""
    turn = render_turn(tokenizer, "", first=True, began=True)
    return sorted({*turn.closing_ids[:1], tokenizer.eos_token_id} - {None})


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a prompt in the chat template, in front of its answer and behind nothing."""
    return render_turn(tokenizer, prompt, first=True, began=False).opening_ids
