"""lm-evaluation-harness over any reader: a memory, or another method to read a long text.

`CometLM` answers what the harness asks as its own `hf` model does, token for token, but nothing is
cut off: texts are read piece by piece, and logits are had of a few tokens at a time. Requests that
begin alike (few-shot examples, the choices of a question, questions about one document) share a
reading: what they have in common is read once, and goes on in forks.

`HFLM` given a model with a memory cuts nothing either, since the model's config says that no text
is too long; but it has the logits of a whole batch of texts in memory, and reads each from its
beginning.

Pitfalls:
    - Texts are read one by one in one process: `batch_size` changes nothing.
    - A method that cannot read a text ends the run with an error.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from tqdm import tqdm
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from cometlm.checkpoints.source import Source
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.device import as_dtype
from cometlm.methods import METHODS, Budget, Loader, Reader
from cometlm.methods.comet import CometReader
from cometlm.sequences import num_shared
from cometlm.session.session import Session

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_WORTH_A_FORK = 32  # tokens; a shorter common beginning is read again
_log = logging.getLogger(__name__)


@register_model("cometlm")
class CometLM(HFLM):
    """A model for lm-evaluation-harness that reads with a memory, or by another of `METHODS`.

    Args:
        pretrained: a name that `cometlm.load` takes, a `Source`, a `Loader`, or a model with a
            memory and its `tokenizer`.
        method: how texts are read, one of `METHODS`.
        budget: what the method may hold: "512" tokens, "3MB". See `methods.base`.
        tokenizer: or its name; default: the model's own.
        device, dtype, quantization: see `cometlm.load`.
        batch_size, max_batch_size: accepted; texts are read one by one.
        max_length, truncation: accepted as None and False: nothing is cut off.
        add_bos_token, prefix_token_id, enable_thinking, chat_template_args: see `HFLM`.
        think_end_token: see `HFLM`; as text.
        sizes: of the memory, see `cometlm.load`.

    Raises:
        ValueError: an option that is not supported, a name, size or budget that cannot be.
        OSError: the model cannot be read.
    """

    def __init__(
        self,
        pretrained: str | Source | Loader | CometForCausalLM,
        *,
        method: str = "comet",
        budget: str | int | Budget | None = None,
        tokenizer: Any = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantization: Any = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        truncation: bool | None = False,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **sizes: Any,
    ) -> None:
        _check_uncut(max_length, truncation, think_end_token)
        if str(batch_size) not in ("1", "auto", "None"):
            _log.warning("batch_size=%s changes nothing: texts are read one by one", batch_size)
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        model: Any
        if isinstance(pretrained, CometForCausalLM):
            given: dict[str, Any] = {
                "method": method != "comet",
                "budget": budget,
                "device": device,
            }
            given |= {"dtype": dtype, "quantization": quantization, **sizes}
            if wrong := [name for name, value in given.items() if value]:
                raise ValueError(f"{', '.join(wrong)}: a model that is loaded already takes none")
            if tokenizer is None:
                raise ValueError("tokenizer must be given with a model that is loaded already")
            model, self._empty = pretrained, CometReader(Session(pretrained, tokenizer))
        else:
            if isinstance(pretrained, Loader):
                loader = pretrained
            else:
                kind = dtype if isinstance(dtype, torch.dtype) else as_dtype(_not_auto(dtype))
                loader = Loader(pretrained, _not_auto(device), kind, quantization, sizes)
            if tokenizer is not None:
                loader.tokenizer = tokenizer
            allowed = Budget.parse(str(budget)) if isinstance(budget, str | int) else budget
            self._empty = METHODS.find(method).open(loader, allowed)
            model, tokenizer = loader.model, loader.tokenizer
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            think_end_token=think_end_token,
            enable_thinking=enable_thinking,
            chat_template_args=chat_template_args,
        )

    _empty: Reader  # has read nothing, and stays so

    @property
    def max_length(self) -> int:
        """No text is too long; what a method cannot read it refuses by itself."""
        return sys.maxsize

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is written behind each context, up to a stop text.

        Raises:
            ValueError: an option that `generate` does not have; `max_length`.
            TooLongError: the method cannot read a context, or has no room for an answer.
        """
        asked = [self._generation(options) for _, options in (one.args for one in requests)]
        contexts = [one.args[0] for one in requests]
        found = [""] * len(requests)
        prompts = [self._prompt(context) for context in contexts]
        for number, reader in self._readers(prompts, "generate_until", disable_tqdm):
            until, options = asked[number]
            criteria = StoppingCriteriaList([_Until(self.tokenizer, until)])
            said = reader.answer(stopping_criteria=criteria, **options)
            found[number] = postprocess_generated_text(said, until, self.think_end_token)
            self.cache_hook.add_partial("generate_until", requests[number].args, found[number])
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding writes."""
        found = [(0.0, True)] * len(requests)
        contexts = [context for _, context, _ in requests]
        for number, reader in self._readers(contexts, "loglikelihood", disable_tqdm):
            asked, _, continuation = requests[number]
            tokens = reader.foresee(continuation)
            likely = sum(token.loglikelihood for token in tokens)
            found[number] = likely, all(token.is_likeliest for token in tokens)
            self.cache_hook.add_partial("loglikelihood", asked, found[number])
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each text, every token after all that stand before it."""
        found: list[float] = []
        for (text,) in tqdm([one.args for one in requests], disable=disable_tqdm):
            reader = self._empty.fork()
            reader.read([self.prefix_token_id])
            tokens = reader.read_foreseen(self.tok_encode(text))
            found.append(float(sum(token.loglikelihood for token in tokens)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    # --- inside -----------------------------------------------------------------------------

    def _prompt(self, context: str) -> list[int]:
        """Ids of a context, as `HFLM` makes them."""
        ids, _ = self.tok_batch_encode([context])
        return ids[0].long().tolist() or [self.prefix_token_id]

    def _generation(self, given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Stop texts, and options of `generate`."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        if "max_length" in options:
            raise ValueError(
                f"max_length={options['max_length']} counts the prompt, which has no bound here; "
                "give max_gen_toks"
            )
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(options.pop("until"), eos=end)
        options["max_new_tokens"] = options.pop("max_gen_toks")
        if not options["do_sample"]:
            options.pop("temperature", None)
        return until, options

    def _readers(
        self, prompts: Sequence[list[int]], purpose: str, quiet: bool
    ) -> Iterator[tuple[int, Reader]]:
        """Each prompt's number, and a reader that has read it, in an order that reads least.

        In alphabetical order, prompts that begin alike stand together. Where some part later, a
        reader stays behind as long as one that comes goes on from there.
        """
        order = sorted(range(len(prompts)), key=prompts.__getitem__)
        pairs = itertools.pairwise(prompts[number] for number in order)
        shared = [*(num_shared(*pair) for pair in pairs), 0]  # with the next one
        behind: list[tuple[int, Reader]] = [(0, self._empty)]
        for place, number in enumerate(tqdm(order, desc=f"Running {purpose}", disable=quiet)):
            ids = prompts[number]
            read, reader = behind[-1]
            for length in _partings(shared[place:], read):
                if length - read >= _WORTH_A_FORK or length == len(ids):
                    reader, read = _read_on(reader, ids[read:length]), length
                    behind.append((read, reader))
            yield number, _read_on(reader, ids[read:])
            while behind[-1][0] > shared[place]:
                behind.pop()


def _partings(shared: Sequence[int], read: int) -> list[int]:
    """Lengths behind `read`, in order, at which a prompt parts from some of those that follow it.

    Args:
        shared: items that it shares with the next one, that with the one behind it, and so on.
    """
    lengths: list[int] = []
    for length in itertools.takewhile(lambda length: length > read, shared):
        if not lengths or length < lengths[0]:
            lengths.insert(0, length)
    return lengths


class _Until(StoppingCriteria):
    """The harness's own criteria; a reader knows how long a prompt is, which they want to know."""

    def __init__(self, tokenizer: Any, until: list[str]) -> None:
        self._tokenizer = tokenizer
        self._until = until
        self._criteria: StoppingCriteriaList | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> Any:
        """Whether one of the texts was written."""
        if self._criteria is None:  # one token was written
            prompt = input_ids.shape[1] - 1
            self._criteria = stop_sequences_criteria(self._tokenizer, self._until, prompt, 1)
        return self._criteria(input_ids, scores)


def _read_on(reader: Reader, ids: list[int]) -> Reader:
    """A fork that has read on; the reader itself if there is nothing to read."""
    if not ids:
        return reader
    fork = reader.fork()
    fork.read(ids)
    return fork


def _check_uncut(max_length: int | None, truncation: bool | None, thinking: object) -> None:
    if max_length is not None:
        raise ValueError(
            f"max_length must be None, got {max_length}: nothing is cut off; "
            "method=truncate with a budget reads the end of a text"
        )
    if truncation:
        raise ValueError("truncation must be False: nothing is cut off")
    if isinstance(thinking, int):
        raise ValueError(f"think_end_token must be text, got {thinking}")


def _not_auto(value: Any) -> Any:
    """None, the default here, where the harness says "auto"."""
    return None if value == "auto" else value
