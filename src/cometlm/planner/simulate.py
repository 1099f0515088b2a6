"""A training step across devices, simulated cell by cell: what the pipeline would take.

Three ways to share one sample of N chunks between P devices are laid out as tasks, each on a device
and in that device's order, with what it waits for:

    wave    each device has a block of chunks and walks it layer by layer; a layer's memory is sent
            as soon as it is there (SPEC §6)
    naive   the same blocks, chunk by chunk; memory is sent when the whole block is done
    layers  each device has a block of layers, and chunks are its micro-batches

Legend: P devices, N chunks, L layers; seconds and bytes throughout.

Pitfalls:
    - Every cell takes the same time. Chunk 0, which reads no memory, is a little faster in truth.
    - A link carries one message after the other; links do not disturb each other.
    - Optimiser steps and the exchange of weights (sharding, replicas) are not simulated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cometlm.parallel.blocks import balanced

Key = tuple[str, int, int]  # "forward", "head" or "backward"; chunk; layer


@dataclass(frozen=True)
class Costs:
    """What one cell costs.

    Args:
        forward: seconds of one layer on one full chunk.
        backward: seconds of its backward pass, without running it again.
        head: seconds of embedding, head and loss of one chunk, forward and backward.
        memory_bytes: one layer's state and temporary memory: what the wave sends.
        hidden_bytes: one chunk's hidden states: what passes from layer to layer.
        kept_bytes: what autograd keeps of one cell that is not run again.
        weight_bytes: weights, gradients and optimiser's state of one layer on one device.

    Raises:
        ValueError: a cost below 0, or a forward pass that takes no time.
    """

    forward: float
    backward: float
    head: float = 0.0
    memory_bytes: float = 0.0
    hidden_bytes: float = 0.0
    kept_bytes: float = 0.0
    weight_bytes: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.forward == 0:
            raise ValueError("forward must be more than 0 seconds")


@dataclass(frozen=True)
class Link:
    """What a message costs.

    Args:
        bandwidth: bytes a second between two devices.
        latency: seconds before a message begins to arrive.
    """

    bandwidth: float = float("inf")
    latency: float = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth <= 0:
            raise ValueError(f"bandwidth must be more than 0 bytes/s, got {self.bandwidth}")
        if self.latency < 0:
            raise ValueError(f"latency must be at least 0 seconds, got {self.latency}")


@dataclass(frozen=True)
class Job:
    """One sample to train on.

    Args:
        chunks: N.
        layers: L.
        devices: P.
        recompute: run each cell again in its backward pass, and keep only what went in.

    Raises:
        ValueError: a number below 1.
    """

    chunks: int
    layers: int
    devices: int
    recompute: bool = True

    def __post_init__(self) -> None:
        for name in ("chunks", "layers", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Task:
    """A piece of work on one device.

    Attributes:
        needs: tasks that must be done before, and the bytes that come from them if they are done on
            another device.
    """

    key: Key
    device: int
    seconds: float
    needs: tuple[tuple[Key, float], ...] = ()


@dataclass(frozen=True)
class Span:
    """A task in time."""

    key: Key
    device: int
    start: float
    end: float


@dataclass(frozen=True)
class Outcome:
    """What a way of sharing takes.

    Attributes:
        seconds: of the step.
        bubble: share of the devices' time in which they wait.
        sent: bytes over all links.
        peak: bytes on the fullest device.
        spans: every task in time.
    """

    name: str
    seconds: float
    bubble: float
    sent: float
    peak: float
    spans: tuple[Span, ...] = field(repr=False)


def simulate(name: str, job: Job, costs: Costs, link: Link = Link()) -> Outcome:
    """One step of `job`, shared in the way that `name` says: one of `WAYS`.

    Raises:
        ValueError: another name.
    """
    if name not in WAYS:
        raise ValueError(f"a way of sharing must be one of {', '.join(WAYS)}, got {name!r}")
    spans, sent = play(WAYS[name](job, costs), link)
    seconds = max(span.end for span in spans)
    busy = sum(span.end - span.start for span in spans)
    return Outcome(
        name=name,
        seconds=seconds,
        bubble=1 - busy / (seconds * job.devices),
        sent=sent,
        peak=_peak(name, job, costs),
        spans=tuple(spans),
    )


def _blocks(count: int, devices: int) -> list[range]:
    """Blocks of chunks or layers that cost the same, as the pipeline makes them."""
    return balanced([1.0] * count, devices)


# --- ways of sharing ----------------------------------------------------------------------------


def _wave(job: Job, costs: Costs) -> Iterator[Task]:
    """Layer by layer over each block; a layer's memory travels at once."""
    places = _blocks(job.chunks, job.devices)
    memory = costs.memory_bytes
    for p, block in enumerate(places):
        for i in range(job.layers):
            for t in block:
                needs = [(("forward", t, i - 1), 0.0)] if i else []
                needs += [(("forward", t - 1, i), memory)] if t else []
                yield Task(("forward", t, i), p, costs.forward, tuple(needs))
        yield from _heads(block, job, costs, p)
        for i in reversed(range(job.layers)):
            for t in reversed(block):
                before = ("backward", t, i + 1) if i + 1 < job.layers else ("head", t, 0)
                needs = [(before, 0.0)]
                needs += [(("backward", t + 1, i), memory)] if t + 1 < job.chunks else []
                yield Task(("backward", t, i), p, _backward(job, costs), tuple(needs))


def _naive(job: Job, costs: Costs) -> Iterator[Task]:
    """Chunk by chunk; all layers' memory travels when a block is done."""
    places = _blocks(job.chunks, job.devices)
    last = job.layers - 1
    memory = costs.memory_bytes * job.layers
    for p, block in enumerate(places):
        for t in block:
            for i in range(job.layers):
                needs = [(("forward", t, i - 1), 0.0)] if i else []
                if t and (t > block[0] or not i):
                    done = ("forward", t - 1, last if t == block[0] else i)
                    needs.append((done, memory))
                yield Task(("forward", t, i), p, costs.forward, tuple(needs))
        yield from _heads(block, job, costs, p)
        for t in reversed(block):
            for i in reversed(range(job.layers)):
                before = ("backward", t, i + 1) if i < last else ("head", t, 0)
                needs = [(before, 0.0)]
                if t + 1 < job.chunks and (t < block[-1] or i == last):
                    done = ("backward", t + 1, 0 if t == block[-1] else i)
                    needs.append((done, memory))
                yield Task(("backward", t, i), p, _backward(job, costs), tuple(needs))


def _layers(job: Job, costs: Costs) -> Iterator[Task]:
    """Chunk after chunk through blocks of layers; hidden states travel."""
    places = _blocks(job.layers, job.devices)
    last = max(p for p, own in enumerate(places) if own)
    for p, own in enumerate(places):
        for t in range(job.chunks):
            for i in own:
                needs = [(("forward", t, i - 1), costs.hidden_bytes)] if i else []
                needs += [(("forward", t - 1, i), 0.0)] if t else []
                yield Task(("forward", t, i), p, costs.forward, tuple(needs))
        if p == last:
            yield from _heads(range(job.chunks), job, costs, p)
        for t in reversed(range(job.chunks)):
            for i in reversed(own):
                if i + 1 < job.layers:
                    needs = [(("backward", t, i + 1), costs.hidden_bytes)]
                else:
                    needs = [(("head", t, 0), 0.0)]
                needs += [(("backward", t + 1, i), 0.0)] if t + 1 < job.chunks else []
                yield Task(("backward", t, i), p, _backward(job, costs), tuple(needs))


def _heads(block: Sequence[int], job: Job, costs: Costs, device: int) -> Iterator[Task]:
    for t in block:
        yield Task(("head", t, 0), device, costs.head, ((("forward", t, job.layers - 1), 0.0),))


def _backward(job: Job, costs: Costs) -> float:
    return costs.backward + (costs.forward if job.recompute else 0.0)


WAYS: dict[str, Callable[[Job, Costs], Iterator[Task]]] = {
    "wave": _wave,
    "naive": _naive,
    "layers": _layers,
}


def _peak(name: str, job: Job, costs: Costs) -> float:
    """Bytes on the fullest device when its forward pass is done."""
    by_layers = name == "layers"
    layers = max(map(len, _blocks(job.layers, job.devices))) if by_layers else job.layers
    chunks = job.chunks if by_layers else max(map(len, _blocks(job.chunks, job.devices)))
    border = costs.hidden_bytes + costs.memory_bytes
    cell = border if job.recompute else costs.kept_bytes
    again = costs.kept_bytes if job.recompute else 0.0
    return layers * (costs.weight_bytes + chunks * cell) + again


# --- time ---------------------------------------------------------------------------------------


def play(tasks: Iterator[Task], link: Link) -> tuple[list[Span], float]:
    """When each task runs: in its device's order, as soon as what it needs is there.

    Returns:
        All tasks in time, and the bytes that were sent.

    Raises:
        ValueError: tasks that wait for each other for ever.
    """
    queues: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        queues[task.device].append(task)
    places = dict.fromkeys(queues, 0)
    free = dict.fromkeys(queues, 0.0)
    done: dict[Key, Span] = {}
    network = _Network(link)
    progress = True
    while progress:
        progress = False
        for device, queue in queues.items():
            while places[device] < len(queue):
                task = queue[places[device]]
                if any(key not in done for key, _ in task.needs):
                    break
                ready = [network.arrival(done[key], device, size) for key, size in task.needs]
                start = max([free[device], *ready])
                free[device] = start + task.seconds
                done[task.key] = Span(task.key, device, start, free[device])
                places[device] += 1
                progress = True
    if any(places[device] < len(queue) for device, queue in queues.items()):
        raise ValueError("tasks wait for each other for ever")
    return list(done.values()), network.sent


class _Network:
    """Links between pairs of devices; each carries one message after the other."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free: dict[tuple[int, int], float] = defaultdict(float)
        self.sent = 0.0

    def arrival(self, done: Span, device: int, size: float) -> float:
        """When what a task leaves is on a device."""
        if done.device == device:
            return done.end
        route = (done.device, device)
        begin = max(done.end, self._free[route])
        self._free[route] = begin + size / self._link.bandwidth
        self.sent += size
        return self._free[route] + self._link.latency
