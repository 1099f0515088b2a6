"""`cometlm generate MODEL [PROMPT]`: text of any length from a prompt of any length."""

from __future__ import annotations

from typing import Annotated

import typer

from cometlm.cli import options
from cometlm.cli.console import load_quietly, print_stream
from cometlm.cli.terminal import prompt_text
from cometlm.session.session import Session


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="What to go on from, or - for standard input.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the chat template.")
    ] = False,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    chunk_size: options.ChunkSize = None,
    readout_tokens: options.ReadoutTokens = None,
    stride: options.Stride = None,
    capacity: options.Capacity = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Write on from a prompt, in constant memory."""
    text = prompt_text(prompt)
    generation = options.generation(max_new_tokens, temperature, top_p, seed)
    loaded, tokenizer = load_quietly(
        model,
        device,
        dtype,
        chunk_size=chunk_size,
        readout_tokens=readout_tokens,
        stride=stride,
        capacity=capacity,
    )
    writer = Session(loaded, tokenizer)
    print_stream(writer.ask(text, stream=True, template=chat, **generation))
