"""`cometlm eval MODEL --lm-eval TASKS --method NAME`: lm-evaluation-harness, by any method."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from cometlm.cli.console import UNTRAINED, err, is_untrained, out
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.extras import EVAL, lacks
from cometlm.methods import METHODS, Budget, Loader, TooLongError

_NO_SAMPLES = -1  # the score of a length that no sample has, in the harness's own RULER


def eval_with_harness(
    tasks: str,
    loader: Loader,
    methods: Sequence[str],
    budget: Budget | None,
    tokens: Sequence[int],
    samples: int | None,
    output: Path | None,
) -> bool:
    """Measure methods on tasks of lm-evaluation-harness, and print its scores.

    Args:
        tasks: names, with commas between them.
        tokens: `max_seq_lengths` of tasks that make texts as long as they are asked to; each is a
            run of its own, since `samples` counts from a task's first sample.
        samples: of each task at most; None is all.
        output: a file that gets a line of JSON for each method and length: settings, results and
            answers.

    Returns:
        Whether anything was measured.

    Raises:
        ValueError: a task that the harness does not know.
        OSError: the folder of `output` is missing.
        ImportError: the harness is not installed.
    """
    if output is not None and not output.parent.is_dir():  # say it now, not after an hour
        raise FileNotFoundError(f"{output}: its folder is missing")
    if message := lacks("--lm-eval", ["lm_eval", "accelerate"], EVAL):
        raise ImportError(message, name="lm_eval")
    for name in methods:
        METHODS.find(name)
    names = [name for name in (part.strip() for part in tasks.split(",")) if name]
    _check_tasks(names)
    rows: list[tuple[str, ...]] = []
    refused: dict[str, str] = {}
    for name in methods:
        err.print(f"loading {loader.source.name} for {name} …", highlight=False, soft_wrap=True)
        try:
            for length, results in _measured(names, loader, name, budget, tokens, samples):
                shown = "–" if length is None else f"{length:,}"
                rows += [(name, shown, *row) for row in scores_of(results["results"])]
                if output is not None:
                    settings = _settings(loader, name, budget, length, samples)
                    _append(output, {"settings": settings, **results})
        except (TooLongError, ValueError, ImportError, torch.OutOfMemoryError) as error:
            refused[name] = str(error)  # the others may be measured all the same
            err.print(f"{name}: {error}", style="yellow", highlight=False, soft_wrap=True)
    _print(rows, refused)
    return bool(rows)


def scores_of(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """Task, metric, value and standard error of what the harness measured.

    Args:
        results: figures of each task; a metric's name is followed by a comma and a filter's.
    """
    for task, figures in results.items():
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if metric.isdecimal() and value == _NO_SAMPLES:
                continue
            spread = figures.get(f"{metric}_stderr,{kind}")
            shown = f"{spread:.4f}" if isinstance(spread, int | float) else "–"
            name = metric if kind == "none" else f"{metric} ({kind})"
            yield task, name, f"{value:.4f}", shown


def _check_tasks(names: Sequence[str]) -> None:
    """Refuse what the harness does not know before a model is loaded."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not names:
        raise ValueError("--lm-eval must name tasks of lm-evaluation-harness, got none")
    known = TaskManager()
    for name in names:
        if not known.match_tasks([name]):
            close = difflib.get_close_matches(name, known.all_tasks, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"--lm-eval {name}: lm-evaluation-harness has no such task; `lm_eval ls tasks` "
                f"lists them{hint}"
            )


def _measured(
    tasks: list[str],
    loader: Loader,
    method: str,
    budget: Budget | None,
    tokens: Sequence[int],
    samples: int | None,
) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Each length, and what the harness gives for it."""
    from lm_eval import simple_evaluate

    from cometlm.eval.lm_eval import CometLM

    lm = CometLM(loader, method=method, budget=budget)
    if isinstance(loader.model, CometForCausalLM) and is_untrained(loader.model):
        err.print(UNTRAINED, style="yellow")
    with tempfile.TemporaryDirectory() as folder:
        # Tasks that make their texts load a tokenizer by name, to measure them.
        loader.tokenizer.save_pretrained(folder)
        for length in dict.fromkeys(tokens) or [None]:
            sizes = {} if length is None else {"max_seq_lengths": [length]}
            with contextlib.redirect_stdout(sys.stderr):  # some tasks say how far they are
                results = simple_evaluate(
                    model=lm, tasks=tasks, limit=samples, metadata={"tokenizer": folder, **sizes}
                )
            assert results is not None  # which it is on ranks other than the first
            yield length, dict(results)


def _settings(
    loader: Loader, method: str, budget: Budget | None, length: int | None, samples: int | None
) -> dict[str, Any]:
    """All that the scores of one length depend on, once the model is loaded."""
    return {
        "model": loader.source.name,
        "weights": loader.weights,
        "sizes": loader.sizes,
        "dtype": str(loader.dtype),
        "quantization": loader.quantization,
        "method": method,
        "budget": None if budget is None else budget.plain,
        "tokens": length,
        "samples": samples,
    }


def _append(path: Path, row: dict[str, Any]) -> None:
    kept = {name: row[name] for name in ("settings", "results", "groups", "samples") if name in row}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(kept, ensure_ascii=False, default=str) + "\n")


def _print(rows: Sequence[tuple[str, ...]], refused: Mapping[str, str]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("method", "tokens", "task", "metric", "value", "stderr"):
        justify: Any = "right" if column in ("tokens", "value", "stderr") else "left"
        table.add_column(column, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    for name, error in refused.items():
        out.print(f"{name}: {error}", highlight=False, soft_wrap=True)
