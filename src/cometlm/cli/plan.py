"""`cometlm plan MODEL`: what training one long sample on many devices would take."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cometlm.cli import options
from cometlm.cli.console import err, load_quietly, out, resolve_quietly
from cometlm.config import CometConfig
from cometlm.device import as_dtype, readable_bytes
from cometlm.planner.calibrate import Weights, counted, measured
from cometlm.planner.simulate import WAYS, Costs, Job, Link, Outcome, simulate
from cometlm.planner.timeline import NAMES, check_can_draw, draw

_MANY = 300_000  # cells that take a while


def plan(
    model: options.Model,
    loading: options.LoadOptions,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the sample.")] = 131_072,
    devices: Annotated[int, typer.Option(min=1, help="How many share it.")] = 16,
    speed: Annotated[
        float | None,
        typer.Option(
            help="TFLOP/s that a device really reaches. Default: measure a cell on this machine."
        ),
    ] = None,
    memory: Annotated[float | None, typer.Option(help="GiB of each device.")] = None,
    bandwidth: Annotated[float, typer.Option(help="GB/s between two devices.")] = 25.0,
    latency: Annotated[float, typer.Option(help="Microseconds of a message.")] = 20.0,
    recompute: Annotated[
        bool, typer.Option(help="Run cells again in the backward pass, to keep only what went in.")
    ] = True,
    trained: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of the weights trained; below 1 the backbone is frozen.",
        ),
    ] = 1.0,
    shards: Annotated[int, typer.Option(min=1, help="Devices that share one copy of it all.")] = 1,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the timelines into this file (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Simulate one training step: the wave, a naive split of chunks, and a split of layers."""
    if picture is not None:
        check_can_draw()
    given = {"speed": speed, "memory": memory, "bandwidth": bandwidth}
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be more than 0, got {value:g}")
    if not 0 <= latency < math.inf:
        raise ValueError(f"--latency must be at least 0, got {latency:g}")
    if loading.quantization is not None and speed is not None:
        raise ValueError(
            f"--quantization {loading.quantization} is for costs that are measured: leave out "
            f"--speed {speed:g}, which counts them"
        )
    if loading.quantization is not None and trained == 1:
        raise ValueError(
            f"--quantization {loading.quantization} keeps the backbone frozen: --trained must be "
            f"below 1, got {trained:g}"
        )
    weights = Weights(trained=trained, shards=shards)
    if speed is None:
        loaded, _ = load_quietly(model, merge=False, **loading.given())
        err.print("measuring a cell of each layer on this machine …", highlight=False)
        config, sizes = loaded.config.backbone_config, loaded.config.comet_config
        if trained < 1:  # the memory's gradients alone, and those of what comes in
            loaded.requires_grad_(False)
            loaded.model.comet.requires_grad_(True)
        costs = measured(loaded.train(), weights)
        how = f"measured: {loaded.dtype} on {loaded.device}"
    else:
        source = resolve_quietly(model)
        config, sizes = source.backbone_config, source.comet_config(**loading.sizes())
        if (dtype := as_dtype(loading.dtype)) is not None:
            weights = replace(weights, dtype_bytes=dtype.itemsize)
        costs = counted(config, sizes, speed * 1e12, weights)
        how = f"counted, at {speed:g} TFLOP/s"
    chunks = -(-tokens // sizes.chunk_size)
    job = Job(chunks, config.num_hidden_layers, devices, recompute)
    link = Link(bandwidth * 1e9, latency * 1e-6)
    if job.chunks * job.layers > _MANY:
        err.print(f"simulating {job.chunks * job.layers:,} cells, three times …", highlight=False)
    outcomes = [simulate(name, job, costs, link) for name in WAYS]
    alone = simulate("wave", Job(chunks, job.layers, 1, recompute), costs).seconds
    out.print(_heading(job, costs, tokens, sizes, how), highlight=False, soft_wrap=True)
    out.print(_table(outcomes, alone, memory))
    out.print(
        "Left out: the optimiser's step, the exchange of sharded weights, embedding and head "
        "weights, and what is slower with several devices in one machine.",
        style="dim",
        highlight=False,
    )
    if picture is not None:
        draw(outcomes, job.layers, picture)
        out.print(f"drawn into {picture}", highlight=False, soft_wrap=True)


def _heading(job: Job, costs: Costs, tokens: int, sizes: CometConfig, how: str) -> str:
    cell = f"{costs.forward * 1e3:,.3g} ms forward, {costs.backward * 1e3:,.3g} ms backward"
    return (
        f"{tokens:,} tokens in {job.chunks:,} chunks of {sizes.chunk_size:,}, {job.layers} layers, "
        f"{job.devices} devices, {'with' if job.recompute else 'without'} recomputation\n"
        f"a cell: {cell} ({how}); its memory {readable_bytes(costs.memory_bytes)}, "
        f"hidden states {readable_bytes(costs.hidden_bytes)}"
    )


def _table(outcomes: list[Outcome], alone: float, memory: float | None) -> Table:
    table = Table(title="one training step, simulated", title_justify="left")
    for column in ("", "time", "waiting", "against one", "sent", "peak"):
        table.add_column(column, justify="left" if not column else "right")
    for outcome in outcomes:
        peak: str | Text = readable_bytes(outcome.peak)
        if memory is not None and outcome.peak > memory * 2**30:
            peak = Text(f"{peak} > {memory:g}", style="red")
        table.add_row(
            NAMES[outcome.name],
            _readable_time(outcome.seconds),
            f"{outcome.bubble:.1%}",
            f"{alone / outcome.seconds:.2f} ×",
            readable_bytes(outcome.sent),
            peak,
        )
    return table


def _readable_time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:,.1f} ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{seconds:,.2f} s" if not minutes else f"{minutes:,} min {rest:02d} s"
