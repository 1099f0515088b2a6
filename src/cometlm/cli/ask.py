"""`cometlm ask SESSION PROMPT`: a question to what was read; the session file stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cometlm.cli import options
from cometlm.cli.console import load_for_session, pack_weights, print_stream, tell_what_it_learned
from cometlm.cli.terminal import prompt_text
from cometlm.session.session import Session


def ask(
    session: Annotated[Path, typer.Argument(help="A session that `cometlm read --save` kept.")],
    prompt: Annotated[str, typer.Argument(help="The question, or - for standard input.")],
    generation: options.GenerationOptions,
    chat: options.ChatTemplateOptions,
    model: Annotated[str | None, typer.Option(help="Its model, if it is not where it was.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on from the prompt as it is, without chat template.")
    ] = False,
    special: options.Special = False,
    device: options.Device = None,
    quantization: options.Quantization = None,
) -> None:
    """Ask a saved session. Asking changes nothing: ask again, or ask something else."""
    question = prompt_text(prompt)
    writing = generation.start()
    variables = chat.variables()
    if raw and (chat.system is not None or variables):
        raise ValueError("--system and --variable are for the chat template: not with --raw")
    loaded, tokenizer = load_for_session(session, model, device, quantization)
    tell_what_it_learned(loaded)
    pack_weights(loaded)
    reader = Session.load(session, loaded, tokenizer)
    print_stream(
        reader.ask(
            question,
            stream=True,
            template=False if raw else None,
            special=special,
            system=chat.system,
            chat_template_kwargs=variables,
            **writing,
        )
    )
