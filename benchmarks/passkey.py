"""Passkeys at every depth of texts of several lengths, with the whole memory and with half of it.

    python benchmarks/passkey.py [--model smollm2-passkey] [--lengths 8000 128000] [--texts 4]

For each length some texts are read. A number is hidden in each of them ten times, once per decile
of depth. What stands before a number is read only once, and the session is forked there. Each
number is also asked for with one half of the memory taken away right before the question, which
shows which half carries the answer. `cometlm eval --task passkey` compares methods instead.

Numbers, texts and templates are none of the training. Every trial is written to out/NAME.json as
soon as it is done, and the same command goes on where it stopped. The picture is out/NAME.png.

Several processes share the work by `--deciles` or `--only`, each with a `--name` of its own;
`--join` then takes over what they found:

    python benchmarks/passkey.py --lengths 1000000 --only 1 --deciles 0 --name bible
    python benchmarks/passkey.py --lengths 1000000 --only 2 --deciles 0 --name python
    python benchmarks/passkey.py --lengths --join bible python

What is reported has seed 0. Choose between memories by other seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cometlm
from cometlm.checkpoints.atomic_write import write_whole
from cometlm.checkpoints.fingerprint import fingerprint
from cometlm.device import peak_memory, readable_bytes
from cometlm.eval.metrics import interval
from cometlm.eval.runner import answer_to
from cometlm.methods.comet import CometReader
from cometlm.session.session import Session
from cometlm.tasks import Question, Sample
from cometlm.tasks.passkey import Passkey
from cometlm.tasks.story import DECILES
from common import OUT, argument_parser, machine

VARIANTS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "without_global": ("global",),
    "without_temporary": ("temporary",),
}
JITTER = 256  # most tokens by which a text is shorter, so that questions stand anywhere in a chunk


@dataclass(frozen=True)
class Trial:
    """One number, asked for.

    Attributes:
        length: most tokens of the text.
        text: which of the texts of that length.
        haystack: where it is from.
        decile: of the depth, 0 … 9.
        depth: of the number, 0 (start) … 1.
        key: the number.
        answers: what each of `VARIANTS` said.
    """

    length: int
    text: int
    haystack: str
    decile: int
    depth: float
    key: str
    answers: dict[str, str]

    @property
    def cell(self) -> tuple[int, int, int]:
        """What identifies the trial in a measurement."""
        return self.length, self.text, self.decile

    def hit(self, variant: str = "whole") -> bool:
        """Whether the whole number was said, and nothing else."""
        return self.answers[variant] == self.key

    def digits(self, variant: str = "whole") -> float:
        """Share of the number's digits that are right, place by place."""
        pairs = zip(self.key, self.answers[variant], strict=False)
        return sum(a == b for a, b in pairs) / len(self.key)


def trials_of(
    model: Any,
    task: Passkey,
    length: int,
    text: int,
    deciles: Collection[int],
    jitter: int = JITTER,
) -> Iterator[Trial]:
    """The trials of one text, in the order in which their numbers stand in it.

    Args:
        task: with ten samples per text.
        jitter: see `JITTER`.
    """
    made = [(decile, sample_of(task, length, text, decile, jitter)) for decile in deciles]
    made.sort(key=lambda one: _needle(one[1]).start)
    base, read = Session(model, task.tokenizer), 0
    for decile, sample in made:
        # Up to the first number, all samples of a text are the same.
        base.read(sample.context[read : _needle(sample).start])
        read = _needle(sample).start
        fork = base.fork()
        fork.read(sample.context[read:])
        (question,) = sample.questions
        answers = {name: said(fork, question, gone) for name, gone in VARIANTS.items()}
        meta = sample.meta
        yield Trial(
            length, text, meta["haystack"], decile, meta["depth"], question.answers[0], answers
        )


def sample_of(task: Passkey, length: int, text: int, decile: int, jitter: int = JITTER) -> Sample:
    """A sample whose end is cut off by a random number of tokens, though never its number."""
    sample = task.sample(text * DECILES + decile, length)
    rng = random.Random(f"{task.seed}/{length}/{text}/{decile}")
    end = length - rng.randint(0, min(jitter, length // 4))
    return dataclasses.replace(sample, context=sample.context[: max(end, _needle(sample).stop)])


def said(session: Session, question: Question, without: Sequence[str] = ()) -> str:
    """What a session answers without some halves of its memory; it stays as it is."""
    return answer_to(CometReader(session.fork(without=without)), question)


def _needle(sample: Sample) -> range:
    return sample.questions[0].evidence[0]


def begun(path: Path, model: str, sizes: dict[str, Any], seed: int) -> list[Trial]:
    """Trials of an earlier call with the same weights and keys, read in the same way.

    Raises:
        ValueError: the file is of other weights, sizes or keys.
    """
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    if (kept["model"], kept["sizes"], kept.get("seed", 0)) != (model, sizes, seed):
        raise ValueError(
            f"{path} was measured with other weights, sizes or seed; move it away, or use --name"
        )
    return [Trial(**trial) for trial in kept["trials"]]


def joined(
    trials: list[Trial], names: list[str], model: str, sizes: dict[str, Any], seed: int
) -> list[Trial]:
    """These trials and those of other files, in order of length, text and depth.

    Raises:
        ValueError: a file is missing, or of other weights, sizes or keys.
    """
    found = {trial.cell: trial for trial in trials}
    for name in names:
        path = OUT / f"{name}.json"
        if not path.exists():
            raise ValueError(f"there is no {path} to join")
        found |= {trial.cell: trial for trial in begun(path, model, sizes, seed)}
    return [found[cell] for cell in sorted(found)]


def summary(trials: list[Trial]) -> list[dict[str, Any]]:
    """For every length: keys found whole, their interval, and digits right."""
    rows = []
    for length in sorted({trial.length for trial in trials}):
        own = [trial for trial in trials if trial.length == length]
        hits = sum(trial.hit() for trial in own)
        row: dict[str, Any] = {"length": length, "trials": len(own), "found": hits / len(own)}
        row["interval_95"] = [round(x, 3) for x in interval(hits, len(own))]
        row |= {
            f"digits_{name}": round(sum(t.digits(name) for t in own) / len(own), 3)
            for name in VARIANTS
        }
        for name in VARIANTS:
            row[f"found_{name}"] = sum(trial.hit(name) for trial in own) / len(own)
        rows.append(row)
    return rows


def show(trial: Trial) -> None:
    """A line for one trial."""
    answers = "  ".join(f"{name} {said!r}" for name, said in trial.answers.items())
    mark = "found" if trial.hit() else "MISSED"
    print(
        f"{trial.length:>9,} tokens  {trial.haystack:<12} depth {trial.depth:.2f}  "
        f"key {trial.key}  {mark}  {answers}",
        flush=True,
    )


def short(tokens: int) -> str:
    """A length for an axis."""
    return f"{tokens / 1e6:g}M" if tokens >= 1_000_000 else f"{tokens / 1000:,.0f}k"


def picture(trials: list[Trial], path: Path) -> None:
    """Depth × length, one field for each half of the memory that may be missing."""
    import matplotlib.pyplot as plt
    import numpy as np

    lengths = sorted({trial.length for trial in trials})
    titles = {
        "whole": "whole memory",
        "without_global": "global memory silenced",
        "without_temporary": "temporary memory silenced",
    }
    figure, fields = plt.subplots(
        1, len(VARIANTS), figsize=(11, 4.2), sharey=True, layout="constrained"
    )
    for axes, name in zip(fields, VARIANTS, strict=True):
        share = np.full((DECILES, len(lengths)), np.nan)
        for j, length in enumerate(lengths):
            for decile in range(DECILES):
                own = [t.hit(name) for t in trials if (t.length, t.decile) == (length, decile)]
                if own:
                    share[decile, j] = sum(own) / len(own)
        shown = axes.imshow(share, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        for (i, j), value in np.ndenumerate(share):
            if not np.isnan(value):
                colour = "black" if value > 0.6 else "white"
                axes.text(j, i, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(lengths)), [short(n) for n in lengths])
        axes.set(title=titles[name], xlabel="tokens")
    fields[0].set_yticks(range(DECILES), [f"{d * 10}–{d * 10 + 10}%" for d in range(DECILES)])
    fields[0].set_ylabel("depth of the key")
    figure.colorbar(shown, ax=fields, label="keys found whole")
    figure.savefig(path, dpi=150)


def write(path: Path, trials: list[Trial], about: dict[str, Any]) -> None:
    """The file of all trials so far."""
    result = about | {
        "summary": summary(trials),
        "trials": [dataclasses.asdict(one) for one in trials],
    }
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="smollm2-passkey")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4000, 8000, 32000, 128000])
    parser.add_argument("--texts", type=int, default=4, help="of each length")
    parser.add_argument("--only", type=int, nargs="+", help="texts, counted from 0; default: all")
    parser.add_argument("--deciles", type=int, nargs="+", default=list(range(DECILES)))
    parser.add_argument("--join", nargs="+", default=[], help="names of other files in out/")
    parser.add_argument("--chunk-size", type=int, help="default: what the memory came with")
    parser.add_argument("--capacity", type=int, help="default: what the memory came with")
    parser.add_argument("--name", default="passkey", help="of the files in out/")
    parser.add_argument("--seed", type=int, default=0, help="of numbers, places and templates")
    args = parser.parse_args()
    if args.only and not 0 <= min(args.only) <= max(args.only) < args.texts:
        parser.error(f"--only must be of texts 0 … {args.texts - 1}, got {args.only}")
    return args


def main() -> None:
    """Measure what is missing, print and draw."""
    args = arguments()
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{args.name}.json"
    sizes = {"chunk_size": args.chunk_size, "capacity": args.capacity}
    given = {name: size for name, size in sizes.items() if size is not None}
    model, tokenizer = cometlm.load(args.model, **given)
    weights = fingerprint(model.state_dict().items())
    read_with = model.config.comet_config.to_dict()
    files = [path, *(OUT / f"{name}.json" for name in args.join)]
    begun_on = next((json.loads(f.read_text())["machine"] for f in files if f.exists()), machine())
    measured = {"model": weights, "sizes": read_with, "seed": args.seed}
    about = {"name": args.model, **measured, "machine": begun_on}
    trials = begun(path, **measured)
    if args.join:
        trials = joined(trials, args.join, **measured)
        write(path, trials, about)
        picture(trials, path.with_suffix(".png"))
    for length in args.lengths:
        task = Passkey(tokenizer, seed=args.seed, samples_per_text=DECILES)
        for text in args.only or range(args.texts):
            done = {trial.decile for trial in trials if trial.cell[:2] == (length, text)}
            for trial in trials_of(model, task, length, text, set(args.deciles) - done):
                trials.append(trial)
                show(trial)
                write(path, trials, about)
        if trials:
            picture(trials, path.with_suffix(".png"))
    print(json.dumps(summary(trials), indent=1))
    print(f"peak memory {readable_bytes(peak_memory(model.device))}; written to {path}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    except ValueError as error:
        sys.exit(f"error: {error}")
