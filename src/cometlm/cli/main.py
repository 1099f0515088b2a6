"""The `cometlm` command: collects the verbs, and turns errors into one line each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from safetensors import SafetensorError

from cometlm import __version__
from cometlm.cli import ask, chat, demo, generate, import_, info, plan, read, serve, train
from cometlm.cli import eval as eval_
from cometlm.cli import inspect as inspect_
from cometlm.cli.console import err, out, print_error
from cometlm.cli.options import VerbCommand, with_options
from cometlm.cli.terminal import allow_any_character
from cometlm.parallel.mesh import leave_job
from cometlm.parallel.p2p import PipelineError

app = typer.Typer(
    name="cometlm",
    help="Endless context in constant memory for Hugging Face language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_EXPECTED = (ValueError, OSError, ArithmeticError, ImportError, PipelineError, SafetensorError)


def _say_version(asked: bool) -> None:
    if asked:
        out.print(f"cometlm {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Say the version and leave."
        ),
    ] = False,
) -> None: ...


_VERBS: dict[str, Callable[..., None]] = {
    "read": read.read,
    "ask": ask.ask,
    "chat": chat.chat,
    "generate": generate.generate,
    "train": train.train,
    "eval": eval_.eval_,
    "inspect": inspect_.inspect,
    "serve": serve.serve,
    "key": serve.key,
    "info": info.info,
    "plan": plan.plan,
    "import": import_.import_,
    "demo": demo.demo,
}
for _name, _verb in _VERBS.items():
    app.command(_name, cls=VerbCommand)(with_options(_verb))


def run() -> None:
    """Entry point: one clear line instead of a traceback; set COMETLM_DEBUG=1 to see it all."""
    allow_any_character()
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if not end.code:  # after a failure others may wait in the job: torchrun ends them
            leave_job()
        raise
    except KeyboardInterrupt:
        err.print("\ninterrupted")
        sys.exit(130)
    except _EXPECTED as error:
        if os.environ.get("COMETLM_DEBUG"):
            raise
        err.quiet = False  # a rank that says nothing else says this
        print_error(error)
        sys.exit(1)
