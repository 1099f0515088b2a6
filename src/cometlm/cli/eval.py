"""`cometlm eval`: measure methods side by side, on one task or as a configuration says."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.text import Text

from cometlm.cli import options
from cometlm.cli.console import (
    UNTRAINED,
    err,
    is_untrained,
    out,
    resolve_quietly,
    silence_libraries,
)
from cometlm.cli.lm_eval import eval_with_harness
from cometlm.device import as_dtype
from cometlm.eval.comparison import Comparison, Watch
from cometlm.eval.config import EvalConfig, MethodConfig, TaskConfig, read_config
from cometlm.eval.page import write_page
from cometlm.eval.report import is_shorter, summarize
from cometlm.eval.results import (
    Cell,
    changed_settings,
    name_of,
    readable_seconds,
    write_results,
)
from cometlm.eval.rows import Forecast, Rows
from cometlm.eval.runner import Answer
from cometlm.eval.tables import tables
from cometlm.methods import METHODS, Budget, Loader, Reader
from cometlm.methods.comet import CometReader
from cometlm.tasks import TASKS

_ONE = "One task"  # the panel of options that a configuration has as fields
_YAML = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class OneTask:
    """What is measured, where no configuration says it."""

    task: Annotated[
        str | None,
        typer.Option(
            help=f"What is asked: {', '.join(TASKS)}.", show_default=False, rich_help_panel=_ONE
        ),
    ] = None
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"How it is read: {', '.join(METHODS)}; repeatable. Default: comet.",
            show_default=False,
            rich_help_panel=_ONE,
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            help="Or JSON lines of your own: context or context_file, question, answer.",
            show_default=False,
            rich_help_panel=_ONE,
        ),
    ] = None
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Length of a task's text; repeatable.", rich_help_panel=_ONE),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Texts of each length. Default: 20, or all of --data.",
            rich_help_panel=_ONE,
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of the task: key=value; repeatable.", rich_help_panel=_ONE),
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            help="What a method may hold: tokens (512), or bytes (3MB) for comet too.",
            rich_help_panel=_ONE,
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Default: what the right answer takes, and 16 more.",
            rich_help_panel=_ONE,
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of what the task draws.", rich_help_panel=_ONE)] = 0
    lm_eval: Annotated[
        str | None,
        typer.Option(help="Or tasks of lm-evaluation-harness, with commas.", rich_help_panel=_ONE),
    ] = None

    def config(self, model: str, loading: options.LoadOptions) -> EvalConfig:
        """A comparison on one task.

        Raises:
            ValueError: options that do not go together, or an impossible one.
        """
        if (self.task is None) == (self.data is None):
            given = "neither" if self.task is None else "both"
            raise ValueError(f"what is asked must be a --task or --data, got {given}")
        if self.data is not None and self.tokens:
            raise ValueError(
                f"--tokens goes with --task: the texts of {self.data} have their own lengths"
            )
        if self.data is not None and self.option:
            raise ValueError(f"--option goes with --task, got {self.option[0]!r} for {self.data}")
        asked = TaskConfig(
            task=self.task or "",
            data=None if self.data is None else str(self.data),
            options=dict(_key_and_value(text) for text in self.option or []),
        )
        bits: Any = loading.quantization
        return EvalConfig(
            model=model,
            tasks={self.task or "own": asked},
            methods={name: MethodConfig() for name in self.method or ["comet"]},
            sizes=loading.sizes(),
            device=loading.device,
            dtype=loading.dtype,
            quantization=bits,
            budget=self.budget,
            lengths=tuple(self.tokens or []),
            samples=self.samples,
            seed=self.seed,
            max_new_tokens=self.max_new_tokens,
        )


def eval_(
    model: Annotated[
        str,
        typer.Argument(
            help="A built-in name, a directory or a hub id; or a YAML file that says all."
        ),
    ],
    loading: options.LoadOptions,
    asked: OneTask,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field of the YAML file: key=value, key.inner=value."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Keep every answer here, to go on from; with a YAML file, a folder."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write one HTML file with tables, pictures and answers.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="A line for each value of this, such as decile.")
    ] = None,
) -> None:
    """Ask a model about long texts, read in one way or another, and count what it gets right."""
    silence_libraries()
    if is_config(model):
        _refuse_beside(loading, asked)
        config = read_config(model, set_ or [])
        folder = output or (Path(config.output) if config.output else None)
        if folder is None:
            raise ValueError(f"output of {model} must be a folder; or give one with --out")
        folder.mkdir(parents=True, exist_ok=True)
        rows, page, summary = folder / "rows.jsonl", folder / "report.html", folder / "results.json"
        _run(config, rows, report or page, summary, by)
    elif set_:
        raise ValueError(f"--set goes with a YAML file, got {set_[0]!r} for {model}")
    elif asked.lm_eval is not None:
        _run_harness(model, loading, asked, output, {"report": report, "by": by})
    else:
        _run(asked.config(model, loading), output, report, None, by)


def is_config(name: str) -> bool:
    """Whether a name is that of a configuration and not of a model."""
    return name.casefold().endswith(_YAML)


def _refuse_beside(loading: options.LoadOptions, asked: OneTask) -> None:
    """Options that a configuration has as fields do not stand beside one."""
    values = {**dataclasses.asdict(loading), **dataclasses.asdict(asked)}
    given = [name for name, value in values.items() if value not in (None, 0, [])]
    if given:
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option} does not go with a YAML file; change a field with --set")


def _run_harness(
    model: str,
    loading: options.LoadOptions,
    asked: OneTask,
    output: Path | None,
    more: Mapping[str, Any],
) -> None:
    """Run tasks of lm-evaluation-harness.

    Raises:
        ValueError: options that say nothing to it.
        typer.Exit: nothing could be measured.
    """
    names = ("task", "data", "option", "max_new_tokens", "seed")
    for name, value in {**{name: getattr(asked, name) for name in names}, **more}.items():
        if value:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} does not go with --lm-eval, got {value!r}")
    bits: Any = loading.quantization
    loader = Loader(
        resolve_quietly(model), loading.device, as_dtype(loading.dtype), bits, loading.sizes()
    )
    is_measured = eval_with_harness(
        str(asked.lm_eval),
        loader,
        asked.method or ["comet"],
        None if asked.budget is None else Budget.parse(asked.budget),
        asked.tokens or [],
        asked.samples,
        output,
    )
    if not is_measured:
        raise typer.Exit(1)


def _run(
    config: EvalConfig, rows: Path | None, page: Path | None, summary: Path | None, by: str | None
) -> None:
    """Run a comparison, and write and print what it found, also when it is interrupted.

    Raises:
        typer.Exit: it was interrupted, or not all that was asked for could be had.
    """
    if page is not None and not page.parent.is_dir():  # say it now, not after an hour
        raise ValueError(f"--report {page}: its folder is missing")
    if page is not None and page.is_dir():
        raise ValueError(f"--report {page} is a directory; name a file")
    kept = Rows(rows)
    try:
        comparison = Comparison(config, kept, _Teller(by, len(config.tasks) > 1))
        is_interrupted = False
        _tell_of_others(summary, page, comparison)
        try:
            comparison.run()
        except KeyboardInterrupt:
            is_interrupted = True
            again = "the same command goes on" if rows else "--out keeps answers, to go on from"
            err.print(f"\ninterrupted; {again}")
        finally:
            _write(comparison, page, summary)
        others = kept.num_others(list(comparison.settings.values()))
    finally:
        kept.close()
    results = comparison.results
    for table in tables(results, by):
        out.print(table, highlight=False, soft_wrap=isinstance(table, Text))
    if is_interrupted:
        raise typer.Exit(130)
    if others:
        _tell(f"{rows} also holds {others} answers of other settings; they are not counted here")
    is_answered = any(line.count for line in results.lines.values())
    if not comparison.is_whole or not (is_answered or comparison.skipped):
        raise typer.Exit(1)


def _tell_of_others(summary: Path | None, page: Path | None, comparison: Comparison) -> None:
    """Say before anything is measured that results of other settings will be replaced."""
    if summary is None:
        return
    changed = changed_settings(summary, comparison.results.settings)
    if changed:
        files = summary if page is None else f"{summary} and {page}"
        _tell(
            f"{files} are of other settings ({', '.join(changed)}) and will be replaced; "
            "rows are kept, so that those settings make them again, or give another --out",
            "yellow",
        )


def _write(comparison: Comparison, page: Path | None, summary: Path | None) -> None:
    """Write what was found so far, if anything was."""
    results = comparison.results
    if not any(results.answers.values()) and not comparison.skipped:
        return
    if summary is not None:
        write_results(summary, results)
        _tell(f"written {summary}")
    if page is not None:
        write_page(page, results)
        _tell(f"written {page}")


class _Teller(Watch):
    """Says what happens, on standard error.

    Args:
        by: a field of `meta` that all answers must have.
        of_several: whether there are several tasks.
    """

    def __init__(self, by: str | None, of_several: bool) -> None:
        self._by = by
        self._of_several = of_several

    def opening(self, method: str, model: str) -> None:
        _tell(f"loading {model} for {method} …")

    def opened(self, method: str, reader: Reader) -> None:
        if isinstance(reader, CometReader) and is_untrained(reader.session.model):
            err.print(UNTRAINED, style="yellow")

    def lacks(self, what: str, error: Exception) -> None:
        _tell(f"{what}: {error}", "yellow")

    def known(self, method: str, count: int) -> None:
        _tell(f"{method}: {count} answers are known already")

    def begins(self, cell: Cell, forecast: Forecast, left: float | None) -> None:
        if forecast.seconds is None and not self._of_several:
            return
        texts = f"{cell.samples} text{'s' * (cell.samples > 1)}"
        if forecast.seconds is not None:
            texts += f", about {readable_seconds(forecast.seconds * cell.samples)}"
        rest = "" if left is None else f"; {cell.method} has about {readable_seconds(left)} left"
        _tell(f"{name_of(cell)}: {texts}{rest}", "bold")

    def skipped(self, cell: Cell, why: str) -> None:
        _tell(f"{name_of(cell)}: skipped, {why}", "yellow")

    def answered(self, cell: Cell, answer: Answer) -> None:
        """Say it, and refuse a field that is not there before hours have passed."""
        summarize([answer], self._by)
        answers = answer.answers
        said = answer.error or (f"{answer.said!r} of {answers[0]!r}" if answers else "")
        scores = "  ".join(f"{name} {score:.2f}" for name, score in answer.scores.items())
        what = f"{cell.method}  {cell.task}" if self._of_several else cell.method
        short = f"{answer.read:,} of " if is_shorter(answer.read, answer.tokens) else ""
        _tell(f"{what}  {short}{answer.tokens:,} tokens  sample {answer.index}  {scores}  {said}")


def _tell(line: str, style: str | None = None) -> None:
    err.print(line, style=style, highlight=False, soft_wrap=True)


def _key_and_value(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ValueError(f"option must be key=value, got {text!r}")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"option {key} must be a YAML value, got {value!r}") from error
    return key, value if isinstance(found, datetime.date) else found  # 2024-01-01 is a name here
