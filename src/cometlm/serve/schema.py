"""Bodies: what of requests is understood, a refusal by name of everything else, and errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from transformers import PreTrainedTokenizerBase

from cometlm.serve.errors import UNKNOWN, ApiError, unknown_field, unsupported
from cometlm.serve.service import Service, Writing
from cometlm.session.writer import Sampling

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
# What makes a prompt of messages is the server's to say: above all, no template may come from
# outside, since it is a program. Documents are for the template.
_NO_VARIABLES = signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
    "documents"
} | {"messages"}
_LOGPROBS = "message.output_text.logprobs"  # what a response may include
_DEEPEST = 64  # levels of a body; what handles it calls itself
TOO_DEEP = f"the body must be at most {_DEEPEST} levels deep"
_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _UnsupportedError(ValueError):
    """A field of a model is not supported, or its value; pydantic knows where the model stands."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(why)
        self.field = field


class _WantedError(ValueError):
    """A value is none of what it must be."""


def _wanted(what: str) -> WrapValidator:
    """Of several types: what is said of a value of none, where pydantic names the first."""

    def validate(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            raise _WantedError(f"must be {what}") from error

    return WrapValidator(validate)


class Body(BaseModel):
    """A body whose fields are of the right type, and all known.

    A field that is not supported may have the value that asks for nothing (`NEUTRAL`), or null.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        _check_values(given)
        kept = {}
        for name, value in given.items():
            if name in cls.model_fields:
                kept[name] = value
            elif value is None or any(_same(value, one) for one in cls.NEUTRAL.get(name, ())):
                continue
            elif name in cls.NEUTRAL:
                raise _UnsupportedError(
                    name, f"this value is not supported, leave the field out: {value!r:.80}"
                )
            else:
                raise _UnsupportedError(name, UNKNOWN)
        return kept


def _check_values(given: dict[str, Any]) -> None:
    """Refuse halves of characters, which JSON can hold and no text can, and what is too deep."""
    waiting: list[tuple[Any, int]] = [(given, 1)]
    while waiting:
        one, depth = waiting.pop()
        if depth > _DEEPEST:
            raise ApiError(TOO_DEEP)
        if isinstance(one, dict):
            waiting += [(value, depth + 1) for value in (*one, *one.values())]
        elif isinstance(one, list):
            waiting += [(value, depth + 1) for value in one]
        elif isinstance(one, str):
            check_text(one)


def check_text(text: str) -> None:
    """Refuse a text that has halves of characters.

    Raises:
        ApiError: it has.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(f"the body is not Unicode text: {error.reason}") from error


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


class ErrorDetail(BaseModel):
    """What is wrong; see `ApiError`."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error, as the server's OpenAPI document has it."""

    error: ErrorDetail


class StreamOptions(Body):
    """How a stream is written."""

    NEUTRAL = {"include_obfuscation": (False,)}

    include_usage: bool | None = None


class Sampled(Body):
    """What chats and completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Annotated[
        _Stop | Annotated[list[_Stop], Field(max_length=4)] | None,
        _wanted("a string or a list of at most 4 strings, each of 1 to 256 characters"),
    ] = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    session: str | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is for streams only", param="stream_options")
        return self

    @property
    def likely(self) -> int | None:
        """How many of the likeliest tokens are told at each place; None: nothing is."""
        return None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what it used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def writing(self, service: Service, asked: int | None, usual: int, param: str) -> Writing:
        """How answers are written.

        Raises:
            ApiError: more than is allowed.
        """
        count = 1 if self.n is None else self.n
        if count > service.limits.most_answers:
            raise ApiError(
                f"n must be at most {service.limits.most_answers}, got {count}", param="n"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Writing(
            sampling_of(self.temperature, self.top_p, self.seed, self.likely),
            service.most_tokens(asked, usual, param),
            stop,
            count,
            keeps=self.store is not False,
        )


def sampling_of(
    temperature: float | None, top_p: float | None, seed: int | None, likely: int | None = None
) -> Sampling:
    """OpenAI's sampling, 1 where nothing is said."""
    return Sampling(
        1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, seed, likely
    )


class Function(Body):
    """A function that a model may call."""

    NEUTRAL = {"strict": (False,)}  # nothing here makes a model write what a schema wants

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A tool, as chats have it."""

    type: Literal["function"]
    function: Function

    def to_chat(self) -> dict[str, Any]:
        """In the form of OpenAI's chats."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class FlatTool(Function):
    """A tool, as responses have it."""

    type: Literal["function"]

    def to_chat(self) -> dict[str, Any]:
        """In the form of OpenAI's chats."""
        named = self.model_dump(exclude_none=True, exclude={"type"})
        return {"type": "function", "function": named}


class WithTools(Body):
    """What chats and responses say of tools."""

    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_tools(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        tools = given.get("tools")
        for i, tool in enumerate(tools if isinstance(tools, list) else ()):
            kind = tool.get("type") if isinstance(tool, dict) else None
            if isinstance(kind, str) and kind != "function":
                raise unsupported("tools", f"[{i}] is a {kind!r:.40}; only functions are supported")
        if given.get("tool_choice") not in (None, "none", "auto"):
            raise unsupported(
                "tool_choice",
                "must be none or auto: nothing here can make the model call a tool",
            )
        return given

    @property
    def tools_given(self) -> list[dict[str, Any]] | None:
        """Tools that may be called, in the form of OpenAI's chats."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.to_chat() for tool in self.tools]

    @property
    def only_one_call(self) -> bool:
        """Whether an answer may have one call at most."""
        return self.parallel_tool_calls is False


class ChatBody(Sampled, WithTools):
    """Of `POST /v1/chat/completions`."""

    NEUTRAL = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "functions": ([],),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "metadata": ({},),
    }

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[Tool] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError(
                "max_tokens and max_completion_tokens are the same; give one of them",
                param="max_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs is for logprobs: true only", param="top_logprobs")
        _check_variables(self.chat_template_kwargs or {}, "chat_template_kwargs")
        check_messages(self.messages, "messages")
        return self

    @property
    def likely(self) -> int | None:
        """See `Sampled`."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _check_variables(variables: dict[str, Any], where: str) -> None:
    for name in _NO_VARIABLES & variables.keys():
        raise unsupported(f"{where}.{name}", "no variable of a template")
    documents = variables.get("documents")
    are_documents = isinstance(documents, list) and all(isinstance(d, dict) for d in documents)
    if documents is not None and not are_documents:
        said = f"{where}.documents must be a list of objects with title and text"
        raise ApiError(said, param=f"{where}.documents")


class CompletionBody(Sampled):
    """Of `POST /v1/completions`."""

    NEUTRAL = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
    }

    prompt: Annotated[str | list[int], _wanted("a string or a list of token ids")]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, given: Any) -> Any:
        """The only one of a list of prompts, which some clients send in any case."""
        if not isinstance(given, list) or not given or not isinstance(given[0], str | list):
            return given
        if len(given) > 1:
            raise unsupported("prompt", f"one prompt is answered at a time, got {len(given)}")
        return given[0]

    @property
    def likely(self) -> int | None:
        """See `Sampled`."""
        return self.logprobs


class TextFormat(Body):
    """Of `text`: plain text only."""

    NEUTRAL = {"format": ({"type": "text"},), "verbosity": ("medium",)}


class ConversationName(Body):
    """A conversation by its id."""

    id: str


def _as_name(given: Any) -> Any:
    """An id, as an object with one."""
    if isinstance(given, str):
        return {"id": given}
    if not isinstance(given, dict | None):
        raise _WantedError("must be an id, or an object with one as id")
    return given


class ResponseBody(WithTools):
    """Of `POST /v1/responses`."""

    NEUTRAL = {
        "background": (False,),
        "prompt": (),
        "reasoning": ({},),
        "service_tier": ("auto", "default"),
        "stream_options": ({}, {"include_obfuscation": False}),
        "truncation": ("disabled",),
    }

    model: str
    input: Annotated[
        str | Annotated[list[dict[str, Any]], Field(min_length=1)],
        _wanted("a string or a list of at least one item, each an object"),
    ]
    tools: list[FlatTool] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Annotated[
        ConversationName | None,
        BeforeValidator(_as_name, json_schema_input_type=str | ConversationName | None),
    ] = None
    session: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    text: TextFormat | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check_include(self) -> Self:
        for name in self.include or ():
            if name != _LOGPROBS:
                raise unsupported("include", f"{name!r:.80} is not supported, only {_LOGPROBS}")
        if self.top_logprobs and not self.include:
            raise ApiError(
                f"top_logprobs is for include: [{_LOGPROBS!r}] only", param="top_logprobs"
            )
        return self

    @property
    def likely(self) -> int | None:
        """See `Sampled`."""
        return (self.top_logprobs or 0) if self.include else None

    @property
    def conversation_id(self) -> str | None:
        """The conversation that is gone on with."""
        return None if self.conversation is None else self.conversation.id


class Content(BaseModel):
    """A part of a message that is text."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["text", "input_text", "output_text"]
    text: str


class CalledFunction(Body):
    """The function of a call."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class CalledTool(Body):
    """A call of a tool in an earlier answer."""

    NEUTRAL = {"index": tuple(range(128))}  # of whoever sends back what a stream said

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class CalledItem(CalledFunction):
    """A call of a tool, as an item of responses."""

    call_id: Annotated[str, Field(min_length=1, max_length=256)]


class OutputItem(Body):
    """What a call gave, as an item of responses."""

    call_id: Annotated[str, Field(min_length=1, max_length=256)]
    output: Annotated[
        str | list[dict[str, Any]], _wanted("a string or a list of parts, each an object")
    ]


_Model = TypeVar("_Model", bound=BaseModel)


def checked(model: type[_Model], given: Any, where: str) -> _Model:
    """A part of a body that only its kind tells how to read.

    Raises:
        ApiError: says which field is wrong.
    """
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise first_error(error.errors(), where) from error


def first_error(errors: Sequence[Mapping[str, Any]], where: str = "") -> ApiError:
    """What a client is told of the first field that is wrong.

    Args:
        errors: pydantic's.
        where: what their places are in.
    """
    first = errors[0]
    path, ours = first["loc"], first.get("ctx", {}).get("error")
    if isinstance(ours, _UnsupportedError):
        path = (*path, ours.field)
    steps = (f"[{one}]" if isinstance(one, int) else f".{one}" for one in path)
    param = (where + "".join(steps)).removeprefix(".")
    if first["type"] == "extra_forbidden":
        return unknown_field(param)
    if isinstance(ours, _UnsupportedError):
        return unsupported(param, str(ours))
    said = f" {ours}" if isinstance(ours, _WantedError) else f": {first['msg']}"
    return ApiError((param or "the body") + said, param=param or None)


_ROLES = ("system", "developer", "user", "assistant", "tool")
_MORE = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}  # beside role, name and content


def check_messages(messages: list[dict[str, Any]], param: str) -> None:
    """Refuse messages that hold more than a role, text, and calls of tools or what these gave.

    Raises:
        ApiError: says which field.
    """
    for i, message in enumerate(messages):
        check_message(message, f"{param}[{i}]")


def check_message(message: dict[str, Any], where: str) -> None:
    """The same of one message, which errors call `where`."""
    role = message.get("role")
    if role not in _ROLES:
        raise ApiError(
            f"{where}.role must be one of {', '.join(_ROLES)}, got {role!r:.80}", param=where
        )
    known = ("role", "name", "content", *_MORE.get(role, ()))
    for name, value in message.items():
        if name not in known and value not in (None, [], {}, ""):
            raise unsupported(f"{where}.{name}", "this field is not supported; leave it out")
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise ApiError(f"{where}.tool_call_id must be the id of a call", param=where)
    if not isinstance(message.get("name"), str | None):
        raise ApiError(f"{where}.name must be text", param=where)
    calls = message.get("tool_calls")
    if calls:
        _check_calls(calls, f"{where}.tool_calls")
    content = message.get("content")
    if isinstance(content, list):
        for k, part in enumerate(content):
            _check_part(part, f"{where}.content[{k}]")
    elif not isinstance(content, str) and not (content is None and calls):
        raise ApiError(f"{where}.content must be text, got {type(content).__name__}", param=where)


def _check_calls(calls: Any, where: str) -> None:
    if not isinstance(calls, list):
        raise ApiError(f"{where} must be a list, got {type(calls).__name__}", param=where)
    for k, call in enumerate(calls):
        checked(CalledTool, call, f"{where}[{k}]")


def _check_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    try:
        Content.model_validate(part)
    except ValidationError as error:
        if kind in get_args(Content.model_fields["type"].annotation):
            raise first_error(error.errors(), where) from error
        raise unsupported(
            where, f"a part of type {kind!r:.40} is not supported, only text"
        ) from error
