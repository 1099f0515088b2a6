"""`/v1/responses`: answers that are kept under an id and gone on from."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from cometlm.serve.access_log import note_used
from cometlm.serve.answer import Answer, Piece
from cometlm.serve.errors import as_api_error, unsupported
from cometlm.serve.folder import Kept
from cometlm.serve.http import Owner, Serving, data, event_stream, unless_gone
from cometlm.serve.items import call_item, items_of, messages_of, with_own_ids
from cometlm.serve.logprobs import event_logprobs, response_logprobs
from cometlm.serve.pages import PageQuery, page_of
from cometlm.serve.prompt import Prompt
from cometlm.serve.run import Run
from cometlm.serve.schema import ResponseBody, sampling_of
from cometlm.serve.service import Service, Writing
from cometlm.serve.start import find_start
from cometlm.serve.thread import Thread, change, turn
from cometlm.session.file import NotesError, noted
from cometlm.session.writer import Likely

router = APIRouter()

_KIND, _PREFIX = "response", "resp_"


@router.post("/v1/responses")
async def create(body: ResponseBody, request: Request, service: Serving, owner: Owner) -> Any:
    """Answer, and keep the answer."""
    service.check_model(body.model)
    with contextlib.ExitStack() as stack:
        if body.conversation_id is not None:
            stack.enter_context(turn(body.conversation_id, owner))
        reply, run = await _begun(body, request, service, owner)
        if body.stream:
            return event_stream(reply.events(run, stack.pop_all()))
        (answer,) = await unless_gone(request, run.answers())
        return await reply.keep(answer)


async def _begun(
    body: ResponseBody, request: Request, service: Service, owner: str
) -> tuple[_Reply, Run]:
    items = items_of(body.input)
    if body.store is not False:
        _check_can_be_kept(items)
    most = service.most_tokens(
        body.max_output_tokens, service.limits.usual_tokens, "max_output_tokens"
    )
    found = await find_start(
        service,
        owner,
        request,
        previous_response_id=body.previous_response_id,
        conversation=body.conversation_id,
        session=body.session,
    )
    if found.thread is not None:
        with_own_ids(items, (), "input")  # refuse now what the conversation would not take then
    waiting = () if found.thread is None else found.thread.waiting
    messages = messages_of([*waiting, *items])
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    prompt = await service.chat(
        messages,
        owner,
        start=found.start,
        tools=body.tools_given,
        only_one_call=body.only_one_call,
        param="input",
    )
    sampling = sampling_of(body.temperature, body.top_p, None, body.likely)
    writing = Writing(sampling, most, keeps=body.store is not False)
    reply = _Reply(service, body, owner, prompt, items, most, found.thread, request)
    return reply, service.run(prompt, writing, owner)


def _check_can_be_kept(items: Sequence[Mapping[str, Any]]) -> None:
    """Refuse, before any of it is read, what could not be kept with the answer.

    Raises:
        ApiError: it is too long.
    """
    try:
        noted({"input": list(items)})
    except NotesError as error:
        raise as_api_error(error, "input") from error


class ResponseQuery(BaseModel):
    """What OpenAI's clients may ask for beside a response that is kept; only nothing is given."""

    model_config = ConfigDict(extra="forbid")
    stream: bool = False
    starting_after: int | None = None
    include_obfuscation: bool = False
    include: tuple[str, ...] = ()
    bracketed: tuple[str, ...] = Field((), alias="include[]")  # as openai's client writes a list

    def check(self) -> None:
        """Refuse what is not told again.

        Raises:
            ApiError: names it.
        """
        for name in ("stream", "starting_after", "include_obfuscation"):
            if getattr(self, name) not in (False, None):
                raise unsupported(name, "a response that is finished is not streamed again")
        if self.include or self.bracketed:
            raise unsupported("include", "nothing more is kept; log probabilities are told once")


@router.get("/v1/responses/{name}")
async def retrieve(
    name: str, service: Serving, owner: Owner, query: Annotated[ResponseQuery, Query()]
) -> Any:
    """A response that is kept."""
    query.check()
    return (await _document(service, name, owner))["response"]


@router.get("/v1/responses/{name}/input_items")
async def input_items(
    name: str, service: Serving, owner: Owner, query: Annotated[PageQuery, Query()]
) -> dict[str, Any]:
    """What was said to a response, in pages."""
    return page_of((await _document(service, name, owner))["input"], query)


@router.delete("/v1/responses/{name}")
async def delete(name: str, service: Serving, owner: Owner) -> Any:
    """Keep a response no longer; those that went on from it stay."""
    await _document(service, name, owner)
    await asyncio.to_thread(service.store.delete, name, owner)
    return {"id": name, "object": "response", "deleted": True}


async def _document(service: Service, name: str, owner: str) -> dict[str, Any]:
    return await service.document(name, owner, _KIND, "response_id")


class _Reply:
    """What is said to one request."""

    def __init__(
        self,
        service: Service,
        body: ResponseBody,
        owner: str,
        prompt: Prompt,
        items: Sequence[Mapping[str, Any]],
        most: int,
        talk: Thread | None,
        request: Request,
    ) -> None:
        self._service, self._body, self._owner = service, body, owner
        self._prompt, self._items, self._most = prompt, items, most
        self._thread, self._request = talk, request
        self.id = service.store.ids.new(_PREFIX, owner)
        self.message_id = "msg_" + self.id.removeprefix(_PREFIX)
        self._created = int(time.time())
        self._sequence = 0

    async def keep(self, answer: Answer) -> dict[str, Any]:
        """The finished response, kept unless the request does not want that."""
        response = self._response(answer)
        total = response["usage"]["total_tokens"]
        note_used(self._request, tokens=total, cached=self._prompt.cached)
        if self._body.store is not False:
            document = {"response": _as_kept(response), "input": list(self._items)}
            kept = Kept(self.id, self._owner, _KIND, self._created, document=document)
            await self._service.keep(kept, self._prompt, answer)
        if self._thread is not None:
            await self._go_on(self._thread, _as_kept(response), answer)
        return response

    async def _go_on(self, talk: Thread, response: Mapping[str, Any], answer: Answer) -> None:
        """Let the conversation come to what this answer left."""
        trail = await asyncio.to_thread(self._prompt.trail_after, answer)
        said = (*with_own_ids(self._items, talk.items), *response["output"])
        last = None if self._body.store is False else self.id
        await change(
            self._service,
            talk.id,
            self._owner,
            lambda now: talk.after(said, last, trail, self._prompt.tools, now),
            answer.session,
        )

    async def events(
        self, run: Run, until: contextlib.AbstractContextManager[Any]
    ) -> AsyncIterator[str]:
        """The response as a stream of typed events; `until` is left at its end."""
        with until:
            async for event in self._events(run):
                yield event

    async def _events(self, run: Run) -> AsyncIterator[str]:
        yield self.event("response.created", response=self._response())
        yield self.event("response.in_progress", response=self._response())
        message, answer = _MessageEvents(self), None
        try:
            async for event in run.pieces():
                if isinstance(event, Answer):
                    answer = event
                    continue
                for line in message.more(event):
                    yield line
            assert answer is not None
            response = await self.keep(answer)
        except Exception as error:
            told = as_api_error(error)
            failed = {**self._response(), "status": "failed"}
            failed["error"] = {"code": told.code or "server_error", "message": str(told)}
            yield self.event("response.failed", response=failed)
            if told is not error:
                raise
            return
        for place, item in enumerate(response["output"]):
            is_message = item["type"] == "message"
            for line in message.end(item) if is_message else self._call_events(place, item):
                yield line
        yield self.event(f"response.{response['status']}", response=response)

    def _call_events(self, place: int, item: Mapping[str, Any]) -> Iterator[str]:
        about = {"output_index": place}
        part = {**about, "item_id": item["id"]}
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self.event("response.output_item.added", **about, item=begun)
        arguments = item["arguments"]
        yield self.event("response.function_call_arguments.delta", **part, delta=arguments)
        done = {"arguments": arguments, "name": item["name"]}
        yield self.event("response.function_call_arguments.done", **part, **done)
        yield self.event("response.output_item.done", **about, item=item)

    def logprobs(self, likely: Sequence[Likely]) -> list[dict[str, Any]]:
        """How likely tokens were; nothing where the request does not want to know."""
        return response_logprobs(self._service.tokenizer, likely)

    def event(self, kind: str, **values: Any) -> str:
        """One event of the stream."""
        number, self._sequence = self._sequence, self._sequence + 1
        return data({"type": kind, "sequence_number": number, **values}, event=kind)

    def _response(self, answer: Answer | None = None) -> dict[str, Any]:
        body, status, incomplete = self._body, "in_progress", None
        output, usage = [], None
        if answer is not None:
            status = "completed"
            if answer.finish == "length":
                status, incomplete = "incomplete", {"reason": "max_output_tokens"}
            output, usage = self._output(answer, status), _usage(self._prompt, answer)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "conversation": None if self._thread is None else {"id": self._thread.id},
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": self._most,
            "metadata": body.metadata or {},
            "model": self._service.name,
            "output": output,
            "parallel_tool_calls": not body.only_one_call,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": body.user,
        }

    def _output(self, answer: Answer, status: str) -> list[dict[str, Any]]:
        """What was said, and the calls; these get their ids once."""
        logprobs = self.logprobs(answer.likely)
        said = [_message_item(self.message_id, answer.text, status, logprobs)]
        if not answer.calls:
            return said
        return [*(said if answer.text else ()), *map(call_item, answer.calls)]


class _MessageEvents:
    """The events of what is said in a response, which begin with its first text."""

    def __init__(self, reply: _Reply) -> None:
        self._reply, self._event = reply, reply.event
        self._id, self._text = reply.message_id, ""
        self._has_begun = False
        self._held: list[Likely] = []  # of tokens that no event told yet
        self._place = {"output_index": 0}
        self._part = {"item_id": self._id, **self._place, "content_index": 0}

    def more(self, piece: Piece) -> Iterator[str]:
        """Of a piece of it."""
        self._held += piece.likely
        if piece.text or self._has_begun:  # calls of tools have no text, and no message
            yield from self._begin()
            yield self._delta(piece.text)

    def end(self, item: Mapping[str, Any]) -> Iterator[str]:
        """Of its end, as the item that it has become."""
        yield from self._begin()
        if self._held:
            yield self._delta("")
        text, (part,) = self._text, item["content"]
        logprobs = event_logprobs(part["logprobs"])
        yield self._event("response.output_text.done", **self._part, text=text, logprobs=logprobs)
        yield self._event("response.content_part.done", **self._part, part=part)
        yield self._event("response.output_item.done", **self._place, item=item)

    def _delta(self, text: str) -> str:
        self._text += text
        logprobs = event_logprobs(self._reply.logprobs(self._held))
        self._held = []
        return self._event(
            "response.output_text.delta", **self._part, delta=text, logprobs=logprobs
        )

    def _begin(self) -> Iterator[str]:
        if not self._has_begun:
            self._has_begun = True
            item = _message_item(self._id, "", None)
            yield self._event("response.output_item.added", **self._place, item=item)
            part = _text_part("")
            yield self._event("response.content_part.added", **self._part, part=part)


def _message_item(
    name: str, text: str, status: str | None, logprobs: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """What the model says, as an item; it is empty before there is a status."""
    return {
        "id": name,
        "type": "message",
        "status": status or "in_progress",
        "role": "assistant",
        "content": [_text_part(text, logprobs)] if status else [],
    }


def _as_kept(response: Mapping[str, Any]) -> dict[str, Any]:
    """A response without log probabilities, which may take a thousand times as much as its text."""
    output = [
        {**item, "content": [{**part, "logprobs": []} for part in item["content"]]}
        if item["type"] == "message"
        else item
        for item in response["output"]
    ]
    return {**response, "output": output}


def _text_part(text: str, logprobs: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _usage(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": prompt.tokens,
        "input_tokens_details": {"cached_tokens": prompt.cached},
        "output_tokens": answer.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt.tokens + answer.tokens,
    }
