"""`cometlm eval MODEL --task NAME | --data FILE --method NAME`: measure methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
import yaml
from rich.table import Table
from rich.text import Text

from cometlm.cli import options
from cometlm.cli.console import UNTRAINED, err, is_untrained, out, resolve_quietly
from cometlm.cli.lm_eval import eval_with_harness
from cometlm.device import as_dtype, readable_bytes
from cometlm.eval.page import write_page
from cometlm.eval.report import differences, summarize
from cometlm.eval.runner import OUT_OF_MEMORY, Answer, ResultsFile, evaluate
from cometlm.methods import METHODS, Budget, Loader
from cometlm.methods.comet import CometReader
from cometlm.tasks import TASKS, Own, Task, make_task


def eval_(
    model: options.Model,
    loading: options.LoadOptions,
    task: Annotated[
        str | None, typer.Option(help=f"What is asked: {', '.join(TASKS)}.", show_default=False)
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"How it is read: {', '.join(METHODS)}; repeatable. Default: comet.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Or JSON lines of your own: context or context_file, question, answer.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Length of a task's text; repeatable.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Texts of each length. Default: 20, or all of --data.")
    ] = None,
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
    report: Annotated[
        Path | None, typer.Option(help="Write one HTML file with tables, pictures and answers.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="A line for each value of this, such as decile.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: what the right answer takes, and 16 more.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what the task draws.")] = 0,
    lm_eval: Annotated[
        str | None, typer.Option(help="Or tasks of lm-evaluation-harness, with commas.")
    ] = None,
) -> None:
    """Ask a model about long texts, read in one way or another, and count what it gets right."""
    allowed = None if budget is None else Budget.parse(budget)
    if lm_eval is not None:
        more = {"report": report, "by": by, "max_new_tokens": max_new_tokens, "seed": seed}
        _check_harness_alone(task=task, data=data, option=option, **more)
        loader, methods = _loader(model, loading), method or ["comet"]
        if not eval_with_harness(lm_eval, loader, methods, allowed, tokens or [], samples, output):
            raise typer.Exit(1)
        return
    _check_what(task, data, tokens, option)
    chosen = dict(_key_and_value(text) for text in option or [])
    methods = list(dict.fromkeys(method or ["comet"]))
    for registry, names in ((TASKS, [task] if task else []), (METHODS, methods)):
        for name in names:
            registry.find(name)  # before anything is loaded
    sizes, bits = loading.sizes(), loading.quantization
    loader = _loader(model, loading)
    made: Task
    if data is not None:
        own_data = made = Own(loader.tokenizer, path=data, seed=seed)
        chosen = {"digest": own_data.digest}
    else:
        made = make_task(str(task), loader.tokenizer, split="test", seed=seed, **chosen)
    lengths = tokens or ([] if made.longest is None else [made.longest])
    if not lengths:
        raise ValueError(f"--tokens must be given with --task {task}: how long a text is")
    count = samples or made.num_samples or 20
    count = min(count, made.num_samples or count)
    settings: dict[str, Any] = {
        "model": model,
        "sizes": sizes,
        "dtype": str(loader.dtype),
        "quantization": bits,
        "task": task or "own",
        "options": chosen,
        "seed": seed,
        "budget": _plain_budget(allowed),
        "max_new_tokens": max_new_tokens,
    }
    _check_folder(report)
    results = ResultsFile(output)
    found: dict[str, list[Answer]] = {}
    refused: dict[str, Exception] = {}
    try:
        for name in methods:
            err.print(f"loading {model} for {name} …", highlight=False, soft_wrap=True)
            try:
                reader = METHODS[name].open(loader, allowed)
            except (ValueError, ImportError, torch.OutOfMemoryError) as error:
                refused[name] = error  # the others may be measured all the same
                err.print(f"{name}: {error}", style="yellow", highlight=False, soft_wrap=True)
                continue
            if isinstance(reader, CometReader) and is_untrained(reader.session.model):
                err.print(UNTRAINED, style="yellow")
            own = {**settings, "method": name, "weights": loader.weights}
            wanted = [one for one in results.answers(own) if _is_wanted(one, lengths, count)]
            found[name] = wanted
            done = {one.place for one in wanted}
            if done:
                err.print(f"{name}: {len(done)} answers are known already", highlight=False)
            limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "device": loader.device}
            for answer in evaluate(reader, made, lengths, count, done=done, **limits):
                results.append(own, answer)
                summarize([answer], by)  # refuse a field that is not there before hours have passed
                wanted.append(answer)
                err.print(_said(name, answer), highlight=False, soft_wrap=True)
            del reader  # two models need not fit into memory
    except KeyboardInterrupt:
        kept = "the same command goes on" if output else "--out keeps answers, to go on from"
        err.print(f"\ninterrupted; {kept}")
        _print_tables(found, refused, by)
        raise typer.Exit(130) from None
    finally:
        results.close()
        if report is not None and any(found.values()):
            write_page(report, settings, found)
            err.print(f"written {report}", highlight=False, soft_wrap=True)
    if refused and not found:
        raise next(iter(refused.values()))
    _print_tables(found, refused, by)
    if not any(not answer.error for answers in found.values() for answer in answers):
        raise typer.Exit(1)


def _loader(model: str, loading: options.LoadOptions) -> Loader:
    bits: Any = loading.quantization
    dtype = as_dtype(loading.dtype)
    return Loader(resolve_quietly(model), loading.device, dtype, bits, loading.sizes())


def _check_folder(report: Path | None) -> None:
    """Say now, not after an hour, that a report cannot be written."""
    if report is not None and not report.parent.is_dir():
        raise ValueError(f"--report {report}: its folder is missing")


def _check_harness_alone(**given: Any) -> None:
    """Refuse what says nothing to lm-evaluation-harness."""
    for name, value in given.items():
        if value:
            raise ValueError(
                f"--{name.replace('_', '-')} does not go with --lm-eval, got {value!r}"
            )


def _check_what(
    task: str | None, data: Path | None, tokens: list[int] | None, option: list[str] | None
) -> None:
    """Refuse options that do not go together."""
    if (task is None) == (data is None):
        given = "neither" if task is None else "both"
        raise ValueError(f"what is asked must be a --task or --data, got {given}")
    if data is not None and tokens:
        raise ValueError(f"--tokens goes with --task: the texts of {data} have their own lengths")
    if data is not None and option:
        raise ValueError(f"--option goes with --task, got {option[0]!r} for {data}")


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
    return (
        answer.tokens in tokens
        and answer.index < samples
        and not answer.error.startswith(OUT_OF_MEMORY)  # another machine may have enough
    )


def _said(method: str, answer: Answer) -> str:
    said = answer.error or (f"{answer.said!r} of {answer.answers[0]!r}" if answer.answers else "")
    scores = "  ".join(f"{name} {score:.2f}" for name, score in answer.scores.items())
    return f"{method}  {answer.tokens:,} tokens  sample {answer.index}  {scores}  {said}"


def _print_tables(
    found: dict[str, list[Answer]], refused: dict[str, Exception], by: str | None
) -> None:
    """Each method's figures, what went wrong, and how methods differ from the first one."""
    lines = [(name, line) for name, answers in found.items() for line in summarize(answers, by)]
    names = list(dict.fromkeys(score for _, line in lines for score in line.scores))
    table = _new_table("means and 95% intervals", names, by, ["held", "peak", "seconds"])
    for name, line in lines:
        group = [str(line.group)] if by else []
        scores = [_interval(line.scores.get(score)) for score in names]
        rest = ["–", "–", "–"]
        if line.count:
            held = [readable_bytes(count) for count in (line.nbytes, line.peak_bytes)]
            rest = [*held, f"{line.seconds:,.1f}"]
        table.add_row(name, f"{line.tokens:,}", *group, str(line.count), *scores, *rest)
    for name in refused:
        table.add_row(name, "–", *(["–"] if by else []), "0", *["–"] * (len(names) + 3))
    errors = [f"{name}, {line.num_errors} ×: {line.error}" for name, line in lines if line.error]
    errors += [f"{name}: {error}" for name, error in refused.items()]
    out.print(table)
    for error in errors:
        out.print(Text(error), highlight=False, soft_wrap=True)
    first, *others = found
    rows = [(name, one) for name in others for one in differences(found[name], found[first], by)]
    if not rows:
        return
    title = f"differences from {first} on the same questions, 95% intervals"
    table = _new_table(title, names, by, [])
    for name, one in rows:
        group = [str(one.group)] if by else []
        scores = [_interval(one.scores.get(score), "+") for score in names]
        table.add_row(f"{name} − {first}", f"{one.tokens:,}", *group, str(one.count), *scores)
    out.print()
    out.print(table)


def _new_table(title: str, scores: list[str], by: str | None, more: list[str]) -> Table:
    """A table with a column for each score."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("method", "tokens", *([by] if by else []), "n", *scores, *more):
        justify: Literal["left", "right"] = "left" if column == "method" else "right"
        least = len("0.00–1.00") if column in scores else None
        table.add_column(column, justify=justify, no_wrap=column not in scores, min_width=least)
    return table


def _interval(figures: tuple[float, float, float] | None, sign: Literal["", "+"] = "") -> str:
    """A mean and its interval; "+" gives figures their sign."""
    if figures is None:
        return "–"
    mean, low, high = (f"{0.0 if abs(figure) < 0.005 else figure:{sign}.2f}" for figure in figures)
    return f"{mean} {low}{'…' if sign else '–'}{high}"
