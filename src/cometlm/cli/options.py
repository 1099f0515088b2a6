"""Arguments and options that several verbs take."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

Model = Annotated[
    str, typer.Argument(help="A built-in name (smollm2, gemma3-270m), a directory or a hub id.")
]
ChunkSize = Annotated[int | None, typer.Option(help="Text tokens per chunk.")]
ReadoutTokens = Annotated[int | None, typer.Option(help="Slots of global memory.")]
Stride = Annotated[int | None, typer.Option(help="Text tokens per compression token.")]
Capacity = Annotated[int | None, typer.Option(help="Slots of temporary memory.")]
Overlap = Annotated[int | None, typer.Option(help="Text tokens that the next chunk reads again.")]
Device = Annotated[str | None, typer.Option(help="Default: the accelerator, else the CPU.")]
Dtype = Annotated[str | None, typer.Option(help="Default: what the device is fast at.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Write at most this many tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy; above it, sampling.")]
TopP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Sample from the likeliest that make up this."),
]
Seed = Annotated[int | None, typer.Option(help="Sample the same again.")]


def generation(
    max_new_tokens: int, temperature: float, top_p: float | None, seed: int | None
) -> dict[str, Any]:
    """Options of `generate` from those of the command line."""
    if seed is not None:
        torch.manual_seed(seed)
    if temperature == 0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False}
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p or 1.0}
    return {"max_new_tokens": max_new_tokens, **sampling}
