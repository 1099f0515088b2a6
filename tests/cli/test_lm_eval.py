"""`cometlm eval --lm-eval`: what is refused, what is printed, and a real run."""

import json
from pathlib import Path

import lm_eval.tasks
import pytest

import cometlm.cli.lm_eval as verb
from tests.cli.said import one_line

RESULTS = {
    "niah": {"alias": "niah", "1024,none": 0.5, "1024_stderr,none": "N/A", "4096,none": -1.0},
    "choices": {"acc,none": 0.25, "acc_stderr,none": 0.125, "exact,first": 1.0, "name": "x"},
}


class Known:
    """Knows two tasks, without the thirty seconds that the harness looks through its own."""

    all_tasks = ("choices", "niah")

    def match_tasks(self, names):
        return [name for name in names if name in ("niah", "choices")]


@pytest.fixture
def run(command, on_disk, monkeypatch):
    """With a harness that measures nothing, and gives what it was asked for."""
    calls = []

    def measured(tasks, loader, method, budget, tokens, samples):
        if method == "window":
            raise ValueError("budget of a window must be more than 4, got 4")
        calls.append((tasks, method, budget, tokens, samples))
        loader.weights = "f1"  # as loading does
        for length in tokens or [None]:
            yield length, {"results": RESULTS, "samples": {"niah": [1]}, "config": object()}

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Known)
    monkeypatch.setattr(verb, "_measured", measured)

    def run(*arguments):
        return *command("eval", on_disk, "--device", "cpu", *arguments), calls

    return run


def test_scores_are_rows_of_a_table(run):
    code, out, err, calls = run(
        *("--lm-eval", "niah, choices", "--method", "full", "--method", "window", "--samples", "2"),
        *("--tokens", "1024", "--tokens", "2048", "--out", "rows.jsonl"),
    )
    assert code == 0, err
    assert calls == [(["niah", "choices"], "full", None, [1024, 2048], 2)]
    cells = [line.split() for line in out.splitlines()]
    assert ["full", "1,024", "niah", "1024", "0.5000", "–"] in cells
    assert ["full", "2,048", "choices", "acc", "0.2500", "0.1250"] in cells
    assert ["full", "2,048", "choices", "exact", "(first)", "1.0000", "–"] in cells
    assert not any("4096" in cell for row in cells for cell in row)  # no sample of that length
    assert "window: budget of a window must be more than 4, got 4" in out
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["settings"]["tokens"] for row in rows] == [1024, 2048]
    assert rows[0]["results"] == RESULTS
    assert rows[0]["samples"] == {"niah": [1]}


def test_rows_say_what_scores_depend_on(run):
    code, _, err, _ = run(
        *("--lm-eval", "niah", "--method", "full", "--tokens", "1024", "--samples", "2"),
        *("--dtype", "float32", "--capacity", "32", "--budget", "3MB", "--out", "rows.jsonl"),
    )
    assert code == 0, err
    (row,) = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    settings = row["settings"]
    assert Path(settings.pop("model")).exists()
    assert settings == {
        "weights": "f1",
        "sizes": {"capacity": 32},
        "dtype": "torch.float32",
        "quantization": None,
        "method": "full",
        "budget": "3000000 bytes",
        "tokens": 1024,
        "samples": 2,
    }


def test_a_missing_folder_is_named_before_anything_is_measured(run):
    code, _, err, calls = run("--lm-eval", "niah", "--out", "missing/rows.jsonl")
    assert code == 1
    assert "missing/rows.jsonl: its folder is missing" in one_line(err)
    assert not calls


def test_nothing_measured_is_an_error(run):
    code, out, _, _ = run("--lm-eval", "niah", "--method", "window")
    assert code == 1
    assert "budget of a window" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lm-eval", "riddles"], "--lm-eval riddles: lm-evaluation-harness has no such task"),
        (["--lm-eval", "niah,choises"], "lists them; did you mean choices?"),
        (["--lm-eval", ","], "--lm-eval must name tasks"),
        (["--lm-eval", "niah", "--method", "telepathy"], "unknown method 'telepathy'"),
        (["--lm-eval", "niah", "--task", "passkey"], "--task does not go with --lm-eval"),
        (["--lm-eval", "niah", "--max-new-tokens", "3"], "--max-new-tokens does not go with"),
        (["--lm-eval", "niah", "--seed", "3"], "--seed does not go with --lm-eval, got 3"),
    ],
    ids=str,
)
def test_what_does_not_go_together(run, arguments, said):
    code, _, err, calls = run(*arguments)
    assert code == 1
    assert said in one_line(err)
    assert not calls


@pytest.mark.slow
def test_the_real_harness(command, on_disk):
    sizes = ["--chunk-size", "128", "--stride", "16", "--capacity", "32", "--readout-tokens", "8"]
    code, out, err = command(
        *("eval", on_disk, "--device", "cpu", "--lm-eval", "niah_single_1", "--tokens", "1024"),
        *("--samples", "1", "--method", "comet", "--method", "full", *sizes),
    )
    assert code == 0, err
    cells = [line.split()[:4] for line in out.splitlines()]
    assert ["comet", "1,024", "niah_single_1", "1024"] in cells
    assert "full: tokens of text, question and answer must be at most 256" in out


@pytest.mark.slow
def test_the_real_harness_knows_the_nearest_name(command, on_disk):
    code, _, err = command("eval", on_disk, "--device", "cpu", "--lm-eval", "niah_singel_1")
    assert code == 1
    assert "did you mean niah_single_1?" in one_line(err)


@pytest.mark.slow
def test_the_harness_other_tasks_of_long_texts(command, on_disk):
    tasks = ["niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"]
    code, out, err = command(
        *("eval", on_disk, "--device", "cpu", "--lm-eval", ",".join(tasks), "--tokens", "1024"),
        *("--samples", "1", "--method", "truncate"),
    )
    assert code == 0, err
    cells = [line.split()[:4] for line in out.splitlines()]
    assert [row for row in cells if row[0] == "truncate"] == [
        ["truncate", "1,024", task, "1024"] for task in tasks
    ]
