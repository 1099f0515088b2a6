"""Prefill at steady state: the fast path against memory slots as full rows, in one run.

    python benchmarks/prefill.py [--dtype bfloat16] [--rounds 7]

Layers shaped like Qwen3-0.6B's with random weights, at the paper's row sizes (chunk 2,048, m 512,
stride 8, capacity 2,048) and with the memory full. The naive path is what the published code does:
every memory slot is a full row of every layer, under the kernel's own causal flag. The third path
is the fast one with its element-wise rest (norms, gated MLP) under torch.compile. Prints the
measured ratio beside the counted one and the share of the machine's matrix peak; writes
out/prefill.json and out/prefill.png.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import cometlm
from cometlm.config import CometConfig
from cometlm.core.cache import CometCache
from cometlm.core.cell import Cell
from cometlm.core.layout import ChunkLayout, take
from cometlm.core.plan import plan_full_chunks
from cometlm.core.state import LayerState
from cometlm.core.walk import Grid
from cometlm.device import default_device, default_dtype
from cometlm.planner.flops import chunk_cost
from common import OUT, argument_parser, machine, ratio, timed_in_turn, write

SHAPES = {
    "Qwen3-0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "Qwen3-4B": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


def main() -> None:
    """Measure, print and draw."""
    parser = argument_parser(__doc__)
    parser.add_argument("--dtype", help="default: what the machine is fast at")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = default_device()
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    with torch.no_grad():
        write("prefill", measure(device, dtype, args.layers, args.rounds))


def measure(device: torch.device, dtype: torch.dtype, layers: int, rounds: int) -> dict[str, Any]:
    """All three paths over one chunk, in turn."""
    config = Qwen3Config(**SHAPES["Qwen3-0.6B"], num_hidden_layers=layers, vocab_size=1024)
    torch.manual_seed(0)
    model = cometlm.attach(Qwen3ForCausalLM(config).to(device, dtype).eval())
    inner, sizes = model.model, model.config.comet_config
    cache = filled(model, device)
    (step,) = plan_full_chunks(cache.rows, (sizes.chunk_size,), sizes.chunk_size, close_last=True)
    grid = inner.grid(cache.max_positions)
    items = torch.randn(1, sizes.chunk_items, config.hidden_size, device=device).to(dtype)

    def layout() -> ChunkLayout:  # new each time, since its indices are part of the work
        return ChunkLayout(sizes, cache.rows, step, cache.max_positions, device)

    def walk(cell_path: Callable[..., tuple[Tensor, LayerState]]) -> Tensor:
        hidden, where = items, layout()
        for i, state in enumerate(cache.layers):
            hidden, _ = cell_path(grid, i, hidden, state, where)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return hidden

    difference = (walk(fast) - walk(naive)).float().norm() / walk(naive).float().norm()
    seconds = timed_in_turn({"naive": lambda: walk(naive), "fast": lambda: walk(fast)}, rounds)
    compiled = with_compiled_rest(inner, lambda: walk(fast), lambda: walk(naive), rounds)
    cost = chunk_cost(config, sizes)
    peak = matrix_peak(device, dtype)
    rate = 2 * cost.fast * layers / statistics.median(seconds["fast"])
    result = {
        "machine": machine(),
        "dtype": str(dtype),
        "sizes": sizes.to_dict(),
        "layers": layers,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "relative_difference": float(difference),
        "measured_ratio": ratio(seconds["naive"], seconds["fast"]),
        "counted_ratio": {name: counted(name) for name in SHAPES},
        "matrix_peak_gflops": peak / 1e9,
        "fast_share_of_peak": rate / peak,
        "compiled_rest": compiled,
    }
    picture(result)
    return result


def counted(shape: str) -> dict[str, float]:
    """The gain of the fast path by counting multiplications at the paper's sizes."""
    cost = chunk_cost(Qwen3Config(**SHAPES[shape]), CometConfig())
    rest = cost.naive / (cost.fast - cost.projections)
    return {"all": round(cost.gain, 2), "without_projecting_memory": round(rest, 2)}


def filled(model: cometlm.CometForCausalLM, device: torch.device) -> CometCache:
    """A cache whose memory is full, at a chunk border."""
    sizes = model.config.comet_config
    chunks = -(-sizes.capacity // sizes.compression_tokens(sizes.chunk_size))
    ids = torch.randint(0, 1024, (1, chunks * sizes.chunk_size), device=device)
    cache: CometCache = model.model(ids, use_cache=True, close_last=True).past_key_values
    assert cache.rows[0].entries == sizes.capacity
    return cache


def fast(
    grid: Grid, i: int, hidden: Tensor, state: LayerState, layout: ChunkLayout
) -> tuple[Tensor, LayerState]:
    """Layer i as the library runs it."""
    out: tuple[Tensor, LayerState] = grid.cells[i](
        hidden, state, layout, grid.rotary[i], grid.weights[i]
    )
    return out


def naive(
    grid: Grid, i: int, hidden: Tensor, state: LayerState, layout: ChunkLayout
) -> tuple[Tensor, LayerState]:
    """Layer i over whole rows [G | T | items]; the memory rows' outputs are thrown away."""
    cell: Cell = grid.cells[i]
    weights: Any = grid.weights[i]
    row = torch.cat([weights.global_memory(state.memory.state), *state.memory.entries, hidden], 1)
    memory = row.shape[1] - hidden.shape[1]
    cos, sin = (table[None, : row.shape[1]] for table in grid.rotary[i])
    # Without the cell's keyword the attention is plain sdpa under its causal flag.
    out = cell.layer(row, attention_mask=None, position_embeddings=(cos, sin))[:, memory:]
    new = weights.global_memory.update(state.memory.state, take(out, layout.readout_index))
    entries = weights.temporary_memory(take(out, layout.compression_index))
    kept = torch.cat([*state.memory.entries, entries], 1)[:, -layout.config.capacity :]
    return out, LayerState(type(state.memory)(new, (kept,)))


def with_compiled_rest(
    inner: Any, fast: Callable[[], Tensor], naive: Callable[[], Tensor], rounds: int
) -> dict[str, Any]:
    """Time the fast path with and without its norms and MLPs compiled, and take that back."""
    modules = []
    for cell in inner.cells:
        layer = cell.layer
        modules += [layer.input_layernorm, layer.post_attention_layernorm, layer.mlp]
    eager = [type(m).forward.__get__(m) for m in modules]
    kernels = [torch.compile(forward, dynamic=False) for forward in eager]

    def using(forwards: list[Any], call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for module, forward in zip(modules, forwards, strict=True):
                module.forward = forward
            return call()

        return run

    try:
        using(kernels, fast)()
    except Exception as error:  # noqa: BLE001 (inductor fails in many ways, none of them ours)
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    calls = {
        "naive": using(eager, naive),
        "fast": using(eager, fast),
        "compiled": using(kernels, fast),
    }
    seconds = timed_in_turn(calls, rounds)
    return {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "over_eager_fast": ratio(seconds["fast"], seconds["compiled"]),
        "over_naive": ratio(seconds["naive"], seconds["compiled"]),
    }


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """Operations per second of a large square product, the best of several."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        a @ b
        if device.type != "cpu":
            torch.accelerator.synchronize()

    return 2 * size**3 / min(timed_in_turn({"product": product}, 5)["product"])


def picture(result: dict[str, Any]) -> None:
    """Seconds per chunk and layer of the three paths."""
    import matplotlib.pyplot as plt

    OUT.mkdir(exist_ok=True)
    compiled = result["compiled_rest"].get("seconds", {}).get("compiled")
    bars = {
        "memory as full rows": result["seconds"]["naive"],
        "fast path": result["seconds"]["fast"],
        **({"fast path, rest compiled": compiled} if compiled else {}),
    }
    figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
    names, values = list(bars), [1000 * s / result["layers"] for s in bars.values()]
    drawn = axes.barh(names, values, color=["0.6", "tab:blue", "tab:cyan"][: len(names)])
    axes.bar_label(drawn, [f"{v:,.0f} ms" for v in values], padding=4)
    axes.set(xlabel=f"ms per chunk of 2,048 tokens and layer ({result['dtype']})")
    axes.set_xlim(0, max(values) * 1.15)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT / "prefill.png", dpi=150)
    print(
        f"measured {result['measured_ratio']['median']:.2f}×, counted "
        f"{result['counted_ratio']['Qwen3-0.6B']['all']:.2f}×",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
