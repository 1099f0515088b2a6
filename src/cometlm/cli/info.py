"""`cometlm info MODEL`: what attaching a memory costs."""

from __future__ import annotations

from rich.table import Table

from cometlm.cli import options
from cometlm.cli.console import describe, load_quietly, out
from cometlm.core.footprint import bytes_of_memory
from cometlm.device import readable_bytes
from cometlm.planner.flops import chunk_cost


def info(model: options.Model, loading: options.LoadOptions) -> None:
    """Say what attaching a memory to a model costs: parameters, memory, rows and the gain."""
    loaded, _ = load_quietly(model, **loading.given())
    sizes = loaded.config.comet_config
    added = sum(p.numel() for p in loaded.model.comet.parameters())
    total = loaded._backbone.num_parameters()
    state, entry = bytes_of_memory(loaded)
    held = state + sizes.temporary_slots * entry
    cost = chunk_cost(loaded.config.backbone_config, sizes)
    table = Table(show_header=False, title=describe(loaded), title_justify="left")
    table.add_row("backbone parameters", f"{total:,}")
    table.add_row("new parameters", f"{added:,} ({added / total:.3%})")
    table.add_row("memory held, whatever was read", readable_bytes(held))
    table.add_row(
        "rows per chunk, memory full",
        f"{sizes.memory_rows:,} memory + {sizes.chunk_items:,} computed = {sizes.row_length:,}",
    )
    table.add_row("gain over memory as full rows, counted", f"{cost.gain:.2f} ×")
    out.print(table)
