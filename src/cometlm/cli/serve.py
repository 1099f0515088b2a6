"""`cometlm serve MODEL`: a server for OpenAI clients; `cometlm key NAME`: who may use it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cometlm.cli import options
from cometlm.cli.console import describe, err, load_quietly, out, pack_weights, tell_what_it_learned
from cometlm.extras import lacks

NEEDS = (
    "fastapi",
    "fsspec",
    "prometheus_client",
    "pydantic",
    "python_multipart",
    "uvicorn",
)
SERVE = 'pip install "cometlm[serve]"'
_WHO, _KEPT, _LIMITS = "Who may", "What is kept", "Limits"


def serve(
    model: options.Model,
    loading: options.LoadOptions,
    host: Annotated[
        str, typer.Option(help="Where to listen; by default on this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: as it is called here.")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="A file of API keys (`cometlm key`).", rich_help_panel=_WHO),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="A page to chat with, at /.")
    ] = True,
    allow_anyone: Annotated[
        bool,
        typer.Option(
            "--allow-anyone",
            help="Listen beyond this machine without keys: whoever reaches it may use it.",
            rich_help_panel=_WHO,
        ),
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(
            help="A folder for sessions, which then outlive the server, or a URL that fsspec "
            "knows: s3://BUCKET/PREFIX. Several servers may share it.",
            rich_help_panel=_KEPT,
        ),
    ] = None,
    store_gib: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="GiB that the store may take, for all servers together.",
            rich_help_panel=_KEPT,
        ),
    ] = 16.0,
    index: Annotated[
        Path | None,
        typer.Option(
            help="A file of this server's own that knows the store, so that not every session is "
            "looked at when it starts again.",
            rich_help_panel=_KEPT,
        ),
    ] = None,
    refresh_seconds: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Seconds after which it looks again at what others put into the store.",
            rich_help_panel=_KEPT,
        ),
    ] = 30.0,
    memory_gib: Annotated[
        float,
        typer.Option(min=0.0, help="GiB of sessions held in memory.", rich_help_panel=_KEPT),
    ] = 1.0,
    keep_days: Annotated[
        float,
        typer.Option(
            min=0.0, help="Days that a session is kept; 0: always.", rich_help_panel=_KEPT
        ),
    ] = 30.0,
    max_running: Annotated[
        int, typer.Option(min=1, help="Requests worked on at once.", rich_help_panel=_LIMITS)
    ] = 16,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=1,
            help="Requests that may wait; where as many do, other keys still have a share.",
            rich_help_panel=_LIMITS,
        ),
    ] = 256,
    max_requests_per_minute: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests (POST) of each key; without keys, of everybody together. Default: any.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_tokens_per_minute: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that the model reads or writes for each key. Default: any.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_body_mib: Annotated[
        int, typer.Option(min=1, help="MiB of a request.", rich_help_panel=_LIMITS)
    ] = 64,
    max_file_mib: Annotated[
        int, typer.Option(min=1, help="MiB of an upload.", rich_help_panel=_LIMITS)
    ] = 4096,
    log_json: Annotated[
        bool,
        typer.Option(
            "--log-json",
            help="A line of JSON for each request to standard error, and nothing of its text.",
        ),
    ] = False,
    grace: Annotated[
        int,
        typer.Option(
            min=0, help="Seconds that running requests get at the end.", rich_help_panel=_LIMITS
        ),
    ] = 30,
) -> None:
    """Serve a model to OpenAI clients; conversations cost the same at any length."""
    if message := lacks("serving", NEEDS, SERVE):
        raise ValueError(message)
    import uvicorn

    from cometlm.serve.app import LOOPBACK, create_app
    from cometlm.serve.folder import Folder
    from cometlm.serve.kept import SessionStore
    from cometlm.serve.keys import Keys
    from cometlm.serve.rates import Rates
    from cometlm.serve.service import Service

    is_local = host in LOOPBACK
    if not (is_local or keys or allow_anyone):
        raise ValueError(
            f"--host {host} lets others in, and there are no keys: give --keys FILE, or "
            "--allow-anyone"
        )
    known = None if keys is None else Keys.read(keys)
    loaded, tokenizer = load_quietly(model, **loading.given())
    err.print(describe(loaded), highlight=False, soft_wrap=True)
    tell_what_it_learned(loaded)
    pack_weights(loaded)
    sessions = SessionStore(
        memory_bytes=int(memory_gib * 2**30),
        folder=None if store is None else Folder(store, loaded, tokenizer),
        folder_bytes=int(store_gib * 2**30),
        lifetime=keep_days * 24 * 3600 or None,
        index=index,
        refresh=refresh_seconds,
    )
    called = name or Path(model).name or model
    service = Service(
        loaded,
        tokenizer,
        called,
        sessions,
        rates=Rates(max_requests_per_minute, max_tokens_per_minute),
        most_running=max_running,
        most_waiting=max_waiting,
    )
    app = create_app(
        service,
        keys=known,
        hosts=LOOPBACK if is_local and known is None else None,
        most_bytes=max_body_mib << 20,
        most_file_bytes=max_file_mib << 20,
        with_page=page,
        log=(lambda line: print(line, file=sys.stderr, flush=True)) if log_json else None,
    )
    where = ", with a page to chat at /" if page else ""
    err.print(f"serving {called}{where}; stop with Ctrl-C", highlight=False, soft_wrap=True)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="info",
        access_log=not log_json,
        timeout_graceful_shutdown=grace,
    )


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    keys: Annotated[Path, typer.Option(help="The file that its hash is added to.")],
) -> None:
    """Make an API key for `cometlm serve`. It is shown once; the file holds its hash."""
    from cometlm.serve.keys import new_key

    made = new_key(keys, name)
    err.print(f"the key of {name}, which is shown this once:", highlight=False, soft_wrap=True)
    out.print(made, highlight=False, soft_wrap=True)
