"""`cometlm generate MODEL [PROMPT]`: text of any length from a prompt of any length."""

from __future__ import annotations

from typing import Annotated

import typer

from cometlm.cli import options
from cometlm.cli.console import load_quietly, pack_weights, print_stream
from cometlm.cli.terminal import prompt_text
from cometlm.session.session import Session


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="What to go on from, or - for standard input.")],
    loading: options.LoadOptions,
    generation: options.GenerationOptions,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the chat template.")
    ] = False,
    special: options.Special = False,
) -> None:
    """Write on from a prompt, in constant memory."""
    text = prompt_text(prompt)
    writing = generation.start()
    loaded, tokenizer = load_quietly(model, **loading.given())
    pack_weights(loaded)
    writer = Session(loaded, tokenizer)
    print_stream(writer.ask(text, stream=True, template=chat, special=special, **writing))
