"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request

from cometlm.serve.access_log import note_used
from cometlm.serve.answer import Answer, Piece
from cometlm.serve.folder import Kept
from cometlm.serve.http import Owner, Serving, data, event_stream, unless_gone
from cometlm.serve.logprobs import chat_logprobs, completion_logprobs
from cometlm.serve.prompt import Prompt
from cometlm.serve.run import Run
from cometlm.serve.schema import ChatBody, CompletionBody, Sampled
from cometlm.serve.service import Service
from cometlm.serve.start import find_start, find_webui_chat, note_webui_chat
from cometlm.session.writer import Likely

router = APIRouter()

_USUAL_COMPLETION = 16  # OpenAI's
_NAMES = {  # what a reply is called, and what its id begins with
    "chat": ("chat.completion", "chatcmpl-"),
    "completion": ("text_completion", "cmpl-"),
}


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request, service: Serving, owner: Owner) -> Any:
    """Answer a chat."""
    service.check_model(body.model)
    asked, param = body.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, param = body.max_tokens, "max_tokens"
    writing = body.writing(service, asked, service.limits.usual_tokens, param)
    messages: Sequence[Mapping[str, Any]] = body.messages
    start = (await find_start(service, owner, request, session=body.session)).start
    if start is None and "documents" not in (body.chat_template_kwargs or {}):
        known = await find_webui_chat(service, owner, request, messages, body.tools_given)
        start, messages = known or (None, messages)
    prompt = await service.chat(
        messages,
        owner,
        start=start,
        variables=body.chat_template_kwargs,
        tools=body.tools_given,
        only_one_call=body.only_one_call,
    )
    reply = _Reply(service, body, owner, prompt, "chat", request)
    return await reply.send(service.run(prompt, writing, owner))


@router.post("/v1/completions")
async def completions(
    body: CompletionBody, request: Request, service: Serving, owner: Owner
) -> Any:
    """Go on with a text."""
    service.check_model(body.model)
    writing = body.writing(service, body.max_tokens, _USUAL_COMPLETION, "max_tokens")
    found = await find_start(service, owner, request, session=body.session)
    prompt = await service.text(body.prompt, owner, found.start)
    reply = _Reply(service, body, owner, prompt, "completion", request)
    return await reply.send(service.run(prompt, writing, owner))


def usage_of(prompt: Prompt, answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens of a request, as OpenAI counts them."""
    written = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt.tokens,
        "completion_tokens": written,
        "total_tokens": prompt.tokens + written,
        "prompt_tokens_details": {"cached_tokens": prompt.cached},
    }


@dataclass
class _Reply:
    """What is said to one request of either kind."""

    service: Service
    body: Sampled
    owner: str
    prompt: Prompt
    kind: Literal["chat", "completion"]
    request: Request

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.object, self._prefix = _NAMES[self.kind]
        self.id = self._new_id()

    async def send(self, run: Run) -> Any:
        if self.body.stream:
            return event_stream(self._stream(run))
        answers = await unless_gone(self.request, run.answers())
        choices = [
            {
                "index": answer.index,
                **self._said(answer),
                "finish_reason": answer.reason,
                "logprobs": self._logprobs(answer.likely),
                "session": await self._keep(answer),
            }
            for answer in answers
        ]
        return self._frame(choices, usage=self._used(answers))

    async def _stream(self, run: Run) -> AsyncIterator[str]:
        answers: list[Answer] = []
        more = {"usage": None} if self.body.wants_usage else {}
        begun: set[int] = set()
        told: dict[int, int] = {}  # characters of each answer
        async for event in run.pieces():
            if event.index not in begun:
                begun.add(event.index)
                if self.kind == "chat":
                    yield self._chunk(event.index, {"role": "assistant", "content": ""}, more)
            if isinstance(event, Piece):
                begin = told.get(event.index, 0)
                told[event.index] = begin + len(event.text)
                likely = {"logprobs": self._logprobs(event.likely, begin)}
                yield self._chunk(event.index, event.text, more, likely)
                continue
            answers.append(event)
            for number, call in enumerate(event.calls):
                yield self._chunk(
                    event.index, {"tool_calls": [{"index": number, **call.to_chat()}]}, more
                )
            ending = {"finish_reason": event.reason, "session": await self._keep(event)}
            yield self._chunk(event.index, "", more, ending)
        usage = self._used(answers)
        if self.body.wants_usage:
            yield data(self._frame([], chunk=True, usage=usage))
        yield data("[DONE]")

    def _chunk(
        self,
        index: int,
        said: str | Mapping[str, Any],
        more: Mapping[str, Any],
        ending: Mapping[str, Any] | None = None,
    ) -> str:
        delta = {"content": said} if isinstance(said, str) and said else said or {}
        content = {"delta": delta} if self.kind == "chat" else {"text": said}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": None}
        return data(self._frame([{**choice, **(ending or {})}], chunk=True, **more))

    def _used(self, answers: Sequence[Answer]) -> dict[str, Any]:
        usage = usage_of(self.prompt, answers)
        note_used(self.request, tokens=usage["total_tokens"], cached=self.prompt.cached)
        return usage

    def _logprobs(self, likely: Sequence[Likely], begin: int = 0) -> dict[str, Any] | None:
        """How likely tokens were; `begin`: where in the text the first stands."""
        if self.body.likely is None or not likely:
            return None
        if self.kind == "chat":
            return chat_logprobs(self.service.tokenizer, likely)
        return completion_logprobs(self.service.tokenizer, likely, begin)

    def _said(self, answer: Answer) -> dict[str, Any]:
        if self.kind == "completion":
            return {"text": answer.text}
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            calls = [call.to_chat() for call in answer.calls]
            message |= {"content": answer.text or None, "tool_calls": calls}
        return {"message": message}

    def _frame(self, choices: list[Any], chunk: bool = False, **more: Any) -> dict[str, Any]:
        kind = f"{self.object}.chunk" if chunk and self.kind == "chat" else self.object
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.service.name,
            "choices": choices,
            **more,
        }

    async def _keep(self, answer: Answer) -> str | None:
        """Keep what an answer left; its id: the reply's own for the first answer."""
        if self.body.store is False:
            return None
        name = self._new_id() if answer.index else self.id
        kept = Kept(name, self.owner, self.kind, self.created)
        await self.service.keep(kept, self.prompt, answer)
        if isinstance(self.body, ChatBody):
            await note_webui_chat(
                self.service, self.owner, self.request, self.body.messages, answer.text, name
            )
        return name

    def _new_id(self) -> str:
        return self.service.store.ids.new(self._prefix, self.owner)
