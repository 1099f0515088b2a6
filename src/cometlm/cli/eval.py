"""`cometlm eval MODEL --task NAME --method NAME`: measure methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from rich.table import Table
from rich.text import Text

from cometlm.cli import options
from cometlm.cli.console import UNTRAINED, err, is_untrained, out, resolve_quietly
from cometlm.device import as_dtype, readable_bytes
from cometlm.eval.report import Line, summarize
from cometlm.eval.runner import Answer, ResultsFile, evaluate
from cometlm.methods import METHODS, Budget, Loader
from cometlm.methods.comet import CometReader
from cometlm.tasks import TASKS, make_task


def eval_(
    model: options.Model,
    loading: options.LoadOptions,
    task: Annotated[str, typer.Option(help="What is asked: passkey, or another package's task.")],
    method: Annotated[
        list[str], typer.Option(help="How it is read: comet, full, retrieve, …; repeatable.")
    ],
    tokens: Annotated[list[int], typer.Option(min=1, help="Length of a text; repeatable.")],
    samples: Annotated[int, typer.Option(min=1, help="Texts of each length.")] = 20,
    option: Annotated[
        list[str] | None, typer.Option(help="Of the task: key=value; repeatable.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="What a method may hold: tokens (512), or bytes (3MB) for comet too."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Keep every answer here; the same command goes on in it."),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="A line for each value of this, such as decile.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: what the right answer takes, and 16 more.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what the task draws.")] = 0,
) -> None:
    """Ask a model about long texts, read in one way or another, and count what it gets right."""
    allowed = None if budget is None else Budget.parse(budget)
    chosen = dict(_key_and_value(text) for text in option or [])
    for registry, names in ((TASKS, [task]), (METHODS, method)):
        for name in names:
            registry.find(name)  # before anything is loaded
    sizes = loading.sizes()
    bits: Any = loading.quantization
    loader = Loader(resolve_quietly(model), loading.device, as_dtype(loading.dtype), bits, sizes)
    made = make_task(task, loader.tokenizer, split="test", seed=seed, **chosen)
    settings: dict[str, Any] = {
        "model": model,
        "sizes": sizes,
        "dtype": str(loader.dtype),
        "quantization": bits,
        "task": task,
        "options": chosen,
        "seed": seed,
        "budget": _plain_budget(allowed),
        "max_new_tokens": max_new_tokens,
    }
    results = ResultsFile(output)
    found: dict[str, list[Answer]] = {}
    try:
        for name in dict.fromkeys(method):
            err.print(f"loading {model} for {name} …", highlight=False, soft_wrap=True)
            reader = METHODS[name].open(loader, allowed)
            if isinstance(reader, CometReader) and is_untrained(reader.session.model):
                err.print(UNTRAINED, style="yellow")
            own = {**settings, "method": name, "weights": loader.weights}
            wanted = [one for one in results.answers(own) if _is_wanted(one, tokens, samples)]
            found[name] = wanted
            done = {one.place for one in wanted}
            if done:
                err.print(f"{name}: {len(done)} answers are known already", highlight=False)
            for answer in evaluate(
                reader, made, tokens, samples, done=done, max_new_tokens=max_new_tokens
            ):
                results.append(own, answer)
                summarize([answer], by)  # refuse a field that is not there before hours have passed
                wanted.append(answer)
                err.print(_said(name, answer), highlight=False, soft_wrap=True)
            del reader  # two models need not fit into memory
    except KeyboardInterrupt:
        kept = "the same command goes on" if output else "--out keeps answers, to go on from"
        err.print(f"\ninterrupted; {kept}")
        out.print(_table(found, by))
        raise typer.Exit(130) from None
    finally:
        results.close()
    out.print(_table(found, by))


def _key_and_value(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found or not key:
        raise ValueError(f"option must be key=value, got {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"option {key} must be a YAML value, got {value!r}") from error


def _plain_budget(budget: Budget | None) -> int | str | None:
    """A budget as rows keep it."""
    if budget is None:
        return None
    return budget.amount if budget.unit == "tokens" else f"{budget.amount} bytes"


def _is_wanted(answer: Answer, tokens: list[int], samples: int) -> bool:
    return answer.tokens in tokens and answer.index < samples


def _said(method: str, answer: Answer) -> str:
    said = answer.error or f"{answer.said!r} of {answer.answers[0]!r}"
    scores = "  ".join(f"{name} {score:.2f}" for name, score in answer.scores.items())
    return f"{method}  {answer.tokens:,} tokens  sample {answer.index}  {scores}  {said}"


def _table(found: dict[str, list[Answer]], by: str | None) -> Table:
    lines = [(name, line) for name, answers in found.items() for line in summarize(answers, by)]
    names = list(dict.fromkeys(score for _, line in lines for score in line.scores))
    title = "means and 95% intervals"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("method", "tokens", *([by] if by else []), "n", *names, "held", "seconds"):
        justify: Literal["left", "right"] = "left" if column == "method" else "right"
        least = len(_score_text(1, 1, 1).split()[-1]) if column in names else None
        table.add_column(column, justify=justify, no_wrap=column not in names, min_width=least)
    for name, line in lines:
        group = [str(line.group)] if by else []
        scores = [_score(line, score) for score in names]
        rest = [readable_bytes(line.nbytes), f"{line.seconds:,.1f}"] if line.count else ["–", "–"]
        table.add_row(name, f"{line.tokens:,}", *group, str(line.count), *scores, *rest)
    errors = [f"{name}, {line.num_errors} ×: {line.error}" for name, line in lines if line.error]
    if errors:
        table.caption = Text("\n".join(errors))
        table.caption_justify = "left"
    return table


def _score(line: Line, name: str) -> str:
    if name not in line.scores:
        return "–"
    return _score_text(*line.scores[name])


def _score_text(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f} {low:.2f}–{high:.2f}"
