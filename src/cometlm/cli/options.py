"""Arguments and options that several verbs take, and groups of them.

A group is a frozen dataclass whose fields are options. A verb takes one parameter of that class;
`with_options` shows the command line an option for each of its fields instead.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

import torch
import typer
import yaml
from typer.core import TyperCommand

from cometlm.checkpoints.backbones import Bits
from cometlm.cli.console import print_error
from cometlm.device import as_dtype

_SIZES, _PLACE, _WRITING = "Sizes of the memory", "Where and how it is computed", "Writing"
_BITS = get_args(Bits)


def _check_bits(value: str | None) -> str | None:
    if value not in (None, *_BITS):
        raise typer.BadParameter(f"must be one of {', '.join(_BITS)}, got {value!r}")
    return value


def _check_dtype(value: str | None) -> str | None:
    try:
        as_dtype(value)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("dtype ")) from error
    return value


Model = Annotated[
    str,
    typer.Argument(
        help="A built-in name (smollm2, gemma3-270m, smollm2-passkey), a directory or a hub id."
    ),
]

# Sizes: the default of each is the trained memory's own, the built-in model's, or the paper's.
ChunkSize = Annotated[
    int | None, typer.Option(min=1, help="Text tokens per chunk.", rich_help_panel=_SIZES)
]
ReadoutTokens = Annotated[
    int | None, typer.Option(min=1, help="Slots of global memory.", rich_help_panel=_SIZES)
]
Stride = Annotated[
    int | None,
    typer.Option(min=1, help="Text tokens per compression token.", rich_help_panel=_SIZES),
]
Capacity = Annotated[
    int | None, typer.Option(min=1, help="Slots of temporary memory.", rich_help_panel=_SIZES)
]
Overlap = Annotated[
    int | None,
    typer.Option(min=0, help="Text tokens that the next chunk rereads.", rich_help_panel=_SIZES),
]

Device = Annotated[
    str | None,
    typer.Option(
        help="A device of torch, or auto: all of them. Default: the accelerator, else the CPU.",
        rich_help_panel=_PLACE,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        callback=_check_dtype,
        help="bfloat16, float32, … Default: what the device is fast at.",
        rich_help_panel=_PLACE,
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        callback=_check_bits,
        metavar="|".join(_BITS),
        help="Keep the backbone in so many bits, with bitsandbytes. Default: as it is.",
        rich_help_panel=_PLACE,
    ),
]

Encoding = Annotated[
    str, typer.Option(help="Of the text: utf-8, utf-16, latin-1, … as Python calls them.")
]
Special = Annotated[
    bool,
    typer.Option(
        "--special",
        help="Obey control tokens in the text, such as <|im_end|>: for conversations that a chat "
        "template rendered already. Else they are text.",
    ),
]
System = Annotated[
    str | None, typer.Option(help="A system message in front.", rich_help_panel="Chat template")
]
Variables = Annotated[
    list[str] | None,
    typer.Option(
        "--variable",
        metavar="NAME=VALUE",
        help="Set a variable of the chat template, for example enable_thinking=false.",
        rich_help_panel="Chat template",
    ),
]

MaxNewTokens = Annotated[
    int, typer.Option(min=1, help="Write at most this many tokens.", rich_help_panel=_WRITING)
]
Temperature = Annotated[
    float,
    typer.Option(min=0.0, help="0 is greedy; above it, sampling.", rich_help_panel=_WRITING),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Sample from the likeliest that make up this.",
        rich_help_panel=_WRITING,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End an answer behind this text; may be repeated.", rich_help_panel=_WRITING),
]
Seed = Annotated[int | None, typer.Option(help="Sample the same again.", rich_help_panel=_WRITING)]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded: the options of `cometlm.load` that the command line has."""

    chunk_size: ChunkSize = None
    readout_tokens: ReadoutTokens = None
    stride: Stride = None
    capacity: Capacity = None
    overlap: Overlap = None
    device: Device = None
    dtype: Dtype = None
    quantization: Quantization = None

    def given(self) -> dict[str, Any]:
        """What the user gave, for `load_quietly`."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None}

    def sizes(self) -> dict[str, int]:
        """The sizes that the user gave."""
        place = ("device", "dtype", "quantization")
        return {name: value for name, value in self.given().items() if name not in place}


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How text is written: the options of `generate` that the command line has."""

    max_new_tokens: MaxNewTokens = 256
    temperature: Temperature = 0.0
    top_p: TopP = None
    stop: Stop = None
    seed: Seed = None

    def start(self) -> dict[str, Any]:
        """Seed torch, where a seed was given, and return the options of `generate`."""
        if self.seed is not None:
            torch.manual_seed(self.seed)
        common: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.stop:
            common["stop_strings"] = list(self.stop)
        if self.temperature == 0:
            return {**common, "do_sample": False}
        top_p = 1.0 if self.top_p is None else self.top_p
        return {**common, "do_sample": True, "temperature": self.temperature, "top_p": top_p}


@dataclass(frozen=True, kw_only=True)
class ChatTemplateOptions:
    """What the chat template is given beside a message."""

    system: System = None
    variable: Variables = None

    def variables(self) -> dict[str, Any]:
        """Variables of the template; values are YAML's, so false is no text.

        Raises:
            ValueError: one that is no NAME=VALUE.
        """
        found = {}
        for given in self.variable or ():
            name, equals, value = given.partition("=")
            if not equals or not name.strip().isidentifier():
                raise ValueError(f"--variable must be NAME=VALUE, got {given!r}")
            try:
                found[name.strip()] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"--variable {name}: the value is not YAML: {error}") from error
        return found


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb as the command line takes it: with an option for each field of its groups.

    Args:
        verb: a function; parameters whose type is a dataclass are groups. A group that is a
            default gives its options their defaults.
    """
    hints = get_type_hints(verb, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type[Any], list[str]]] = {}

    def add(name: str, default: Any, annotation: Any) -> None:
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))

    for parameter in inspect.signature(verb).parameters.values():
        group = hints[parameter.name]
        if not (isinstance(group, type) and dataclasses.is_dataclass(group)):
            add(parameter.name, parameter.default, group)
            continue
        fields = get_type_hints(group, include_extras=True)
        is_required = parameter.default is parameter.empty
        for field in dataclasses.fields(group):
            default = field.default if is_required else getattr(parameter.default, field.name)
            add(field.name, default, fields[field.name])
        groups[parameter.name] = (group, list(fields))

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        made = {
            name: group(**{field: given.pop(field) for field in fields})
            for name, (group, fields) in groups.items()
        }
        verb(**given, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


class VerbCommand(TyperCommand):
    """A verb for which the wrong value of an option is one line, and not a page on usage."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the command line apart.

        Raises:
            typer.Exit: a value that an option does not take; a line names option, value and bound.
        """
        line = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if type(error) is not typer.BadParameter or error.param is None:
                if not error.message and getattr(error.param, "name", None) == "model":
                    error.message = f"Try: {ctx.command_path} smollm2 {shlex.join(line)}"
                raise  # a missing argument: there the usage helps
            given, _, _ = self.make_parser(ctx).parse_args(line)
            said = error.message[:1].lower() + error.message[1:].rstrip(".")
            if "got " not in said:
                said = f"{said}, got {given.get(error.param.name or '')!r}"
            option = error.param.opts[-1] if error.param.opts else error.param.name
            print_error(ValueError(f"{option}: {said}"))
            raise typer.Exit(error.exit_code) from error
