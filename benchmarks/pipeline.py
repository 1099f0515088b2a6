"""Ranks that share a sample: the wave against a naive split, the bound, and the simulation.

    python benchmarks/pipeline.py [--ranks 2] [--chunks 16] [--rounds 5]   # measured
    python benchmarks/pipeline.py --paper                                 # simulated

SmolLM2 with LoRA and memory, one training step with recomputation, the same number of chunks on
each rank and the same work either way; the naive split hands all layers' memory on when its block
is done. Steps alternate, so a drift of the machine meets both. A cell is measured on all ranks at
once, as it runs later. `--paper` sets the simulation beside the paper's 2.7 times (SPEC section 7).
Writes out/pipeline.json or out/pipeline-paper.json.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import cometlm
from cometlm.config import CometConfig
from cometlm.core.state import LayerState
from cometlm.parallel.p2p import Neighbour, receive, send
from cometlm.parallel.pipeline import TIMEOUT, Pipeline, Wave, sum_gradients
from cometlm.planner.calibrate import Weights, counted, measured
from cometlm.planner.simulate import Costs, Job, Link, simulate
from cometlm.train.trainable import set_trainable
from common import argument_parser, machine, ratio, write

SIZES = {"chunk_size": 256, "readout_tokens": 16, "stride": 8, "capacity": 64}
LABELLED = 16  # tokens of each chunk: an answer's worth, so that the head is little and even
TARGETS = {"wave / naive": 0.62, "error of the simulation": 0.10}


class AllAtOnce(Wave):
    """Memory as a naive split hands it on: of all layers, when a block is done."""

    def incoming(self) -> Iterator[LayerState]:
        """See `Wave.incoming`."""
        assert self.left is not None
        layers = range(len(self.model.cells))
        specs = [self.specs(i) for i in layers]
        flat = [like for layer in specs for like in layer]
        got = list(receive(self.left, flat, "the memory of all layers"))
        self.ties.extend(got)
        for layer in specs:
            yield self.state_of([got.pop(0) for _ in layer])

    def outgoing(self, right: Neighbour | None) -> Callable[[LayerState], LayerState]:
        """See `Wave.outgoing`."""
        assert right is not None
        waiting: list[list[Tensor]] = []

        def leave(after: LayerState) -> LayerState:
            waiting.append(self.tensors_of(after))
            if len(waiting) == len(self.model.cells):
                flat = [tensor for layer in waiting for tensor in layer]
                token = send(right, flat, "the memory of all layers")
                if token is not None:
                    self.ties.append(token)
            return after

        return leave


class Naive(Pipeline):
    """A block begins when the one before it is done."""

    passing = AllAtOnce


# --- measured -----------------------------------------------------------------------------------


def rank_of(rank: int, ranks: int, folder: str, chunks: int, rounds: int) -> None:
    """One rank's part; rank 0 keeps what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=ranks)
    model = cometlm.load("smollm2", device="cpu", seed=0, **SIZES)[0]
    set_trainable(model, "lora")
    model.train()
    dist.barrier()
    costs = mean_costs(measured(model, repeats=3, labelled=LABELLED))
    link = measured_link(costs.memory_bytes)
    model.activation_checkpointing_enable()
    group = dist.group.WORLD
    assert group is not None
    kinds = {"wave": Pipeline(group, TIMEOUT), "naive": Naive(group, TIMEOUT)}
    ids = torch.randint(100, 40_000, (1, chunks * SIZES["chunk_size"]))
    dist.broadcast(ids, 0)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        for name, pipeline in kinds.items():
            spent = step(model, pipeline, ids)
            if turn:  # the first builds kernels
                seconds[name].append(spent)
                if rank == 0:
                    print(f"{name:<6} {spent:6.2f} s", flush=True)
    if rank == 0:
        torch.save({"seconds": seconds, "costs": costs, "link": link}, f"{folder}/result.pt")
    dist.destroy_process_group()


def step(model: Any, pipeline: Pipeline, ids: Tensor) -> float:
    """Seconds of one step on the slowest rank."""
    model.training_plan = replace(model.training_plan, pipeline=pipeline)
    labels = ids.clone()
    labels[:, (torch.arange(ids.shape[1]) % SIZES["chunk_size"]) >= LABELLED] = -100
    dist.barrier()
    start = time.perf_counter()
    model(ids, labels=labels, use_cache=False).loss.backward()
    pipeline.flush()
    spent = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    sum_gradients([p for p in model.parameters() if p.requires_grad], pipeline.group)
    model.zero_grad()
    return float(spent)


def mean_costs(own: Costs) -> Costs:
    """The mean over ranks, so that all agree."""
    values = torch.tensor(list(vars(own).values()), dtype=torch.float64)
    dist.all_reduce(values)
    mean = values / dist.get_world_size()
    return Costs(**dict(zip(vars(own), mean.tolist(), strict=True)))


def measured_link(size: float, repeats: int = 50) -> Link:
    """What it takes to send a layer's memory from rank 0 to rank 1 and back."""
    rank, message = dist.get_rank(), torch.zeros(int(size), dtype=torch.uint8)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        if rank == 0:
            dist.send(message, 1)
            dist.recv(message, 1)
        elif rank == 1:
            dist.recv(message, 0)
            dist.send(message, 0)
    each = torch.tensor((time.perf_counter() - start) / (2 * repeats))
    dist.broadcast(each, 0)
    return Link(bandwidth=size / float(each))


def run(ranks: int, chunks: int, rounds: int) -> dict[str, Any]:
    """Measure on ranks of this machine and compare."""
    if chunks % ranks:
        raise ValueError(f"--chunks must be a multiple of the {ranks} ranks, got {chunks}")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of, (ranks, folder, chunks, rounds), nprocs=ranks)
        found = torch.load(Path(folder, "result.pt"), weights_only=False)
    layers, costs, link = 30, found["costs"], found["link"]
    job = Job(chunks, layers, ranks)
    predicted = {name: simulate(name, job, costs, link).seconds for name in ("wave", "naive")}
    pairs = ratio(found["seconds"]["wave"], found["seconds"]["naive"])
    said = predicted["wave"] / predicted["naive"]
    medians = {name: sorted(s)[len(s) // 2] for name, s in found["seconds"].items()}
    errors = {name: predicted[name] / medians[name] - 1 for name in predicted}
    return {
        "machine": machine(),
        "job": {"ranks": ranks, "chunks": chunks, "layers": layers, **SIZES},
        "cell": vars(costs),
        "link_bytes_per_second": link.bandwidth,
        "seconds": found["seconds"],
        "wave / naive": pairs,
        "bound": (layers + ranks - 1) / (layers * ranks),
        "simulated": {**predicted, "wave / naive": said},
        "error of the simulation": {**errors, "wave / naive": said / pairs["median"] - 1},
        "holds": {
            f"wave / naive <= {TARGETS['wave / naive']}": pairs["median"]
            <= TARGETS["wave / naive"],
            "error of the simulation <= 10%": abs(said / pairs["median"] - 1)
            <= TARGETS["error of the simulation"],
        },
    }


# --- the paper's job ----------------------------------------------------------------------------

PAPER_SIZES = CometConfig(chunk_size=2048, readout_tokens=512, stride=8, capacity=2048)
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}
ASSUMED = {
    "tokens": 131_072,
    "TFLOP/s that a device reaches": 400.0,
    "GB/s between devices": 50.0,
    "microseconds of latency": 20.0,
    "recomputation": True,
    "labels": "on every token",
    "weights": "sharded over 16 devices; their exchange and the optimiser's step are left out",
}


def paper() -> dict[str, Any]:
    """16 ranks, 128k tokens, the paper's sizes: groups of several sizes share a sample."""
    from transformers import Qwen3Config

    config = Qwen3Config(**QWEN3_4B)
    costs = counted(config, PAPER_SIZES, 400e12, Weights(shards=16))
    link = Link(50e9, 20e-6)
    groups = {}
    for ranks in (2, 3, 4, 8, 16):
        job = Job(131_072 // 2048, 36, ranks)
        ways = {name: simulate(name, job, costs, link) for name in ("wave", "naive", "layers")}
        wave = ways["wave"].seconds
        groups[ranks] = {
            **{f"{name}_seconds": way.seconds for name, way in ways.items()},
            "naive / wave": ways["naive"].seconds / wave,
            "layers / wave": ways["layers"].seconds / wave,
            "wave_bubble": ways["wave"].bubble,
            "wave_peak_bytes": ways["wave"].peak,
        }
    return {"assumed": ASSUMED, "sizes": QWEN3_4B, "ranks": groups, "paper": 2.7}


def main() -> None:
    """Measure or simulate, print and keep."""
    parser = argument_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--paper", action="store_true")
    args = parser.parse_args()
    if args.paper:
        write("pipeline-paper", paper())
    else:
        write("pipeline", run(args.ranks, args.chunks, args.rounds))


if __name__ == "__main__":
    main()
