"""Records as token ids: what trl makes of them, but that text in them is only text.

trl hands contents to the tokenizer with the frame around them, so that `<|im_end|>` in a document
ends a turn. Here only the chat template's own tokens count (`session.plain_text`), unless records
were rendered already. What the assistant says may hold those that it writes itself, such as
`<think>`. trl then builds labels, cuts and packs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from datasets import Dataset
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template

from cometlm.session.chat_template import RAISED
from cometlm.session.plain_text import (
    ENCODING,
    PlainText,
    encoded,
    encoded_with_spans,
    prefix_ids,
    unused_mark,
)
from cometlm.train.templates import generation_template

Sample = dict[str, list[int]]


class Samples:
    """Makes samples of records.

    Args:
        tokenizer: the model's.
        arguments: trl's; `assistant_only_loss` and `completion_only_loss` are turned into masks.
        special: control tokens that are written in records count as such.

    Raises:
        ValueError: conversations for a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: Any, arguments: SFTConfig, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._plain = PlainText.of(tokenizer)
        self._arguments = arguments
        self._special = special
        self._assistant_only = False
        self._template: str | None = None
        self._source = ""

    def of(self, records: Dataset, source: str, assistant_only: bool = True) -> Dataset:
        """Records as samples, whose masks say what is learned of them.

        Args:
            records: as `read_records` gives them.
            source: what errors call them.
            assistant_only: of a conversation, learn what the assistant says.

        Raises:
            ValueError: a record that the chat template refuses, or in which it marks nothing that
                the assistant says; names it.
        """
        self._source = source
        names = records.column_names
        if "completion" in names and self._arguments.completion_only_loss is None:
            self._arguments.completion_only_loss = True
        first = records[0]
        if any(isinstance(first.get(name), list) for name in ("messages", "prompt")):
            self._prepare_template(assistant_only and "messages" in names)
        # The masks are made here, and trl would look for conversations to make them of.
        self._arguments.assistant_only_loss = False
        return records.map(
            self._sample,
            with_indices=True,
            remove_columns=names,
            num_proc=self._arguments.dataset_num_proc,
            desc=f"Tokenising {source}",
        )

    # --- inside -----------------------------------------------------------------------------

    def _prepare_template(self, assistant_only: bool) -> None:
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(
                f"{self._source} holds conversations, and the model's tokenizer has no chat "
                "template: give one to the model, or write records of text"
            )
        self._assistant_only = assistant_only
        if not assistant_only:
            return
        try:
            self._template = generation_template(self._tokenizer)
        except RAISED as error:
            raise ValueError(f"the chat template cannot render {self._source}: {error}") from error
        if self._template is None:
            self._template = self._template_of_trl()

    def _template_of_trl(self) -> str | None:
        """A template of trl's that marks what the assistant says."""
        try:
            return cast("str | None", get_training_chat_template(self._tokenizer))
        except RAISED as error:
            raise ValueError(
                "the chat template does not mark what the assistant says ({% generation %}), and "
                "trl knows no other for this model: set trainer.assistant_only_loss: false to "
                "learn whole conversations, or add the marks"
            ) from error

    def _sample(self, record: Mapping[str, Any], index: int) -> Sample:
        try:
            return self._made(record)
        except RAISED as error:
            raise ValueError(f"record {index + 1} of {self._source}: {error}") from error

    def _made(self, record: Mapping[str, Any]) -> Sample:
        if "messages" in record:
            messages = parsed(record["messages"])
            ids, mask = self._conversation(record, messages, self._assistant_only)
            return {"input_ids": ids, "assistant_masks": mask} if mask else {"input_ids": ids}
        if "text" in record:
            return {"input_ids": self._text(record["text"])}
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list):
            prompt, completion = parsed(prompt), parsed(completion)
            asked, _ = self._conversation(record, prompt, False, head=True)
            ids, _ = self._conversation(record, prompt + completion, False)
        else:
            asked, ids = self._text(prompt, end=False), self._text(prompt + completion)
        pairs = zip(asked, ids, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(asked), len(ids)))
        return {"input_ids": ids, "completion_mask": [0] * same + [1] * (len(ids) - same)}

    def _text(self, text: str, end: bool = True) -> list[int]:
        """Ids of a text, with the tokens that the tokenizer puts in front, and one that ends it."""
        stop = self._tokenizer.eos_token_id
        if self._special:
            ids = list(encoded(self._tokenizer, text, special=True)["input_ids"])
        else:
            ids = self._plain.encode(text)
        ended = not end or stop is None or ids[-1:] == [stop]
        return [*prefix_ids(self._tokenizer), *ids, *([] if ended else [stop])]

    def _conversation(
        self, record: Mapping[str, Any], messages: list[Any], masked: bool, head: bool = False
    ) -> tuple[list[int], list[int]]:
        """Ids of messages, and 1 for each that the assistant says, where that is wanted."""
        tools = record.get("tools")
        variables = record.get("chat_template_kwargs")
        given: Any = [
            messages,
            json.loads(tools) if tools else tools,
            json.loads(variables) if variables else {},
        ]
        mark = unused_mark(given)
        if not self._special:
            given = [self._escaped(given[0], mark), *self._plain.escaped(given[1:], mark)]
        common = {
            "tools": given[1],
            "chat_template": self._template,
            "add_generation_prompt": head,
            **given[2],
        }
        text = self._tokenizer.apply_chat_template(given[0], tokenize=False, **common)
        common |= {"return_dict": True, "return_assistant_tokens_mask": masked}
        with ENCODING:
            out = self._tokenizer.apply_chat_template(given[0], tokenize=True, **common)
        ids, mask = list(out["input_ids"]), list(out["assistant_masks"]) if masked else []
        if mark in text or (self._plain.takes_alike and not self._special):
            spans = encoded_with_spans(self._tokenizer, text, special=True)[1] if masked else []
            ids, places = self._plain.encode_frame_with_spans(text, mark)
            said = bytearray(len(text))
            for (begin, end), learned in zip(spans, mask, strict=True):
                if learned:
                    said[begin:end] = b"\1" * (end - begin)
            mask = [int(any(said[begin:end])) for begin, end in places] if masked else []
        if masked and 1 not in mask:
            raise ValueError("the chat template marks nothing that the assistant says")
        return ids, mask

    def _escaped(self, messages: list[Any], mark: str) -> list[Any]:
        """Messages with the control tokens in them marked; the assistant's own may stay."""
        return [
            self._plain.escaped(one, mark, self._of_turns if one["role"] == "assistant" else None)
            for one in messages
        ]

    @property
    def _of_turns(self) -> list[str]:
        """Control tokens that no assistant writes within an answer."""
        if self._turns is None:
            talk = [{"role": role, "content": "so"} for role in ("user", "assistant", "user")]
            try:
                rendered = self._tokenizer.apply_chat_template(talk, tokenize=False)
            except RAISED:
                rendered = ""
            special = self._plain.special
            self._turns = [one for one in self._plain.control if one in special or one in rendered]
        return self._turns

    _turns: list[str] | None = None


def parsed(messages: Sequence[str]) -> list[Any]:
    """Messages of a record, which a table holds as JSON."""
    return [json.loads(message) for message in messages]
