"""Arguments and options that several verbs take."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="A built-in name (smollm2, gemma3-270m), a directory or a hub id.")
]
ChunkSize = Annotated[int | None, typer.Option(help="Text tokens per chunk.")]
ReadoutTokens = Annotated[int | None, typer.Option(help="Slots of global memory.")]
Stride = Annotated[int | None, typer.Option(help="Text tokens per compression token.")]
Capacity = Annotated[int | None, typer.Option(help="Slots of temporary memory.")]
Device = Annotated[str | None, typer.Option(help="Default: the accelerator, else the CPU.")]
Dtype = Annotated[str | None, typer.Option(help="Default: what the device is fast at.")]
