"""A comparison on a tiny model: whole, interrupted, killed, limited, and with something missing."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from cometlm.eval import comparison as module
from cometlm.eval import forecast
from cometlm.eval.comparison import Comparison, Watch
from cometlm.eval.config import config_of
from cometlm.eval.page import write_page
from cometlm.eval.results import as_plain
from cometlm.eval.rows import Forecast, Rows
from cometlm.tasks import TASKS, Question, Sample, Task
from tests import real
from tests.cli.said import TEXT
from tests.sessions import SIZES, tokenizer_of
from tests.tiny import refused

MEASURED = {"read_seconds", "answer_seconds", "peak_bytes", "foreseen", "machine"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    real.save_backbone(folder / "tiny-model")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture
def values(folder):
    return {
        "model": str(folder / "tiny-model"),
        "sizes": {name: size for name, size in SIZES.items() if name != "rank"},
        "device": "cpu",
        "dtype": "float32",
        "methods": ["comet", "truncate"],
        "tasks": {
            "passkey": {"options": {"corpora": str(folder / "text.txt")}},
            "traces": {"lengths": [200]},
            "continue": {"options": {"corpora": str(folder / "text.txt")}, "samples": 1},
        },
        "lengths": [60, 150],
        "samples": 2,
        "max_new_tokens": 2,
    }


def measured_apart(value):
    """Results without what depends on when they were measured."""
    if isinstance(value, dict):
        return {name: measured_apart(one) for name, one in value.items() if name not in MEASURED}
    return [measured_apart(one) for one in value] if isinstance(value, list) else value


def plain(comparison):
    return measured_apart(json.loads(json.dumps(as_plain(comparison.results))))


def run(values, rows=None, watch=None):
    made = Comparison(config_of(values), rows or Rows(), watch)
    made.run()
    return made


def test_every_method_meets_every_task(values):
    made = run(values)
    cells = [(c.method, c.task, c.tokens, c.samples) for c in made.cells]
    per_method = [
        ("passkey", 60, 2), ("continue", 60, 1), ("passkey", 150, 2), ("continue", 150, 1),
        ("traces", 200, 2),
    ]  # fmt: skip
    assert cells == [(m, *one) for m in ("comet", "truncate") for one in per_method]
    found = plain(made)
    assert {cell["texts"] for cell in found["cells"]} == {1, 2}
    opened = {cell["method"]: [] for cell in found["cells"]}
    for cell in found["cells"]:
        opened[cell["method"]].append(cell["open_bytes"])
        assert cell["bytes"] > cell["open_bytes"]
    assert all(opened["comet"])
    assert not any(opened["truncate"])
    (difference,) = [
        one for one in found["differences"]
        if one["task"] == "passkey" and one["tokens"] == 150
    ]  # fmt: skip
    assert (difference["method"], difference["from"], difference["n"]) == ("truncate", "comet", 2)
    assert made.is_whole
    foreseen = [c["foreseen"] for c in as_plain(made.results)["cells"] if c["tokens"] == 150]
    assert all(one["seconds"]["measured"] > 0 < one["seconds"]["foreseen"] for one in foreseen)


class Stop(Watch):
    """Ctrl-C after some answers."""

    def __init__(self, count):
        self.count = count

    def answered(self, cell, answer):
        self.count -= 1
        if self.count < 0:
            raise KeyboardInterrupt


def test_wherever_it_is_interrupted_it_finds_the_same(values, tmp_path):
    values = {**values, "limits": {"hours": 1, "memory": "900GB"}, "lengths": [60]}
    del values["tasks"]["traces"]
    want = plain(run(values))
    path = tmp_path / "rows.jsonl"
    for count in (0, 2):
        rows = Rows(path)
        with pytest.raises(KeyboardInterrupt):
            run(values, rows, Stop(count))
        rows.close()
    rows = Rows(path)
    assert plain(run(values, rows)) == want
    rows.close()
    known = path.read_text()
    rows = Rows(path)
    assert plain(run(values, rows)) == want
    rows.close()
    assert path.read_text() == known  # nothing was asked again


@pytest.mark.slow
def test_wherever_it_is_killed_it_finds_the_same(values, tmp_path):
    """SIGKILL at a random row, twice; then to the end."""
    config = tmp_path / "compare.yaml"
    want = plain(run(values))
    config.write_text(yaml.safe_dump({**values, "output": str(tmp_path / "out")}, sort_keys=False))
    rows = tmp_path / "out" / "rows.jsonl"
    command = [sys.executable, "-c", "from cometlm.cli.main import run; run()", "eval", str(config)]
    # As many threads as here: another number of them adds up in another order.
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    rng = random.Random()
    for _ in range(2):
        before = len(rows.read_bytes().splitlines()) if rows.exists() else 0
        wanted = before + rng.randint(1, 4)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=env, **quiet)
        while process.poll() is None:
            if rows.exists() and len(rows.read_bytes().splitlines()) >= wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.wait()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert measured_apart(found)["cells"] == want["cells"]
    assert measured_apart(found)["differences"] == want["differences"]
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_what_would_take_too_long_is_skipped_and_said(values):
    made = run({**values, "limits": {"hours": 1e-9}, "methods": ["comet"]})
    assert set(made.skipped) == set(made.cells)
    assert all("would take" in why and "more than 1e-09 h" in why for why in made.skipped.values())
    cell, *_ = plain(made)["cells"]
    assert cell["texts"] == 0
    assert made.is_whole
    made = run({**values, "limits": {"memory": "1MB"}, "methods": ["comet"]})
    assert all("of memory, more than 976.6 KiB" in why for why in made.skipped.values())


def test_skipped_cells_are_run_when_they_may(values, tmp_path):
    values = {**values, "methods": ["comet"]}
    rows = Rows(tmp_path / "rows.jsonl")
    assert run({**values, "limits": {"hours": 1e-9}}, rows).skipped
    made = run(values, rows)
    assert not made.skipped
    assert plain(made) == {**plain(run(values)), "settings": plain(made)["settings"]}
    rows.close()


def test_a_cell_that_was_skipped_once_is_finished_later(values, tmp_path):
    values = {**values, "methods": ["comet"], "tasks": ["traces"], "lengths": [200], "samples": 3}
    rows = Rows(tmp_path / "rows.jsonl")
    assert run({**values, "limits": {"hours": 1e-9}}, rows).skipped
    with pytest.raises(KeyboardInterrupt):
        run(values, rows, Stop(0))
    made = run({**values, "limits": {"hours": 1e-9}}, rows)  # what was begun is finished
    assert not made.skipped
    assert [cell["texts"] for cell in plain(made)["cells"]] == [3]
    rows.close()
    rows = Rows(tmp_path / "rows.jsonl")
    assert not run(values, rows).skipped
    rows.close()


def test_time_that_is_left_does_not_count_what_will_be_skipped(values, monkeypatch):
    class Left(Watch):
        def begins(self, cell, forecast, left):
            found.append(left)

    def foresee(readings, task, tokens, *more, **named):
        return Forecast(tokens, 10.0 if tokens == 200 else 7200.0)

    monkeypatch.setattr(module, "foresee", foresee)
    found = []
    values = {**values, "methods": ["comet"], "tasks": ["traces"], "lengths": [200, 220]}
    made = run({**values, "samples": 1, "limits": {"hours": 1}}, watch=Left())
    assert [cell.tokens for cell in made.skipped] == [220]
    assert found == [10.0]


def test_two_tasks_with_the_same_settings_are_asked_once(values, tmp_path):
    values = {**values, "methods": ["comet"], "lengths": [200], "samples": 2,
              "tasks": {"traces": {}, "again": {"task": "traces"}}}  # fmt: skip
    rows = Rows(tmp_path / "rows.jsonl")
    want = plain(run(values, rows))
    first, second = want["cells"]
    assert (first["texts"], first["n"]) == (second["texts"], second["n"])
    assert first["texts"] == 2
    rows.close()
    path = tmp_path / "rows.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum("answer" in row for row in kept) == first["n"]
    rows = Rows(path)
    assert plain(run(values, rows)) == want
    rows.close()


def test_texts_of_uneven_lengths_are_foreseen_by_their_mean(values, tmp_path, monkeypatch):
    path = tmp_path / "mine.jsonl"
    texts = ["A lamp. ", "A lamp. " * 3, "A lamp. " * 40]
    rows = [{"context": text, "question": "What?", "answer": "a lamp"} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)))
    calibrated, usual = [], []

    def calibrate(*arguments):
        calibrated.append(arguments[-1])
        return forecast.calibrate(*arguments)

    def foresee(readings, task, tokens, questions, mean, bounds):
        usual.append((tokens, mean, max(one.tokens for one in readings)))
        return forecast.foresee(readings, task, tokens, questions, mean, bounds)

    monkeypatch.setattr(module, "calibrate", calibrate)
    monkeypatch.setattr(module, "foresee", foresee)
    values = {**values, "methods": ["truncate"], "tasks": {"mine": {"data": str(path)}},
              "samples": 3, "lengths": [], "limits": {"hours": 1}}  # fmt: skip
    made = run(values)
    lengths = [one.read for one in made.results.answers["truncate", "mine"]]
    assert len(set(lengths)) == 3
    for tokens, mean, measured in usual:
        assert tokens == max(lengths)
        assert mean == pytest.approx(sum(lengths) / 3)
        assert measured <= lengths[0]  # of the beginnings of the first text
    assert set(calibrated) == {values["max_new_tokens"]}


def test_a_text_that_has_changed_is_asked_anew(values, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    task = {"options": {"corpora": str(path)}}
    values = {**values, "methods": ["truncate"], "tasks": {"passkey": task}, "lengths": [60]}
    rows = Rows(tmp_path / "rows.jsonl")
    before = run(values, rows).results
    path.write_text(TEXT.swapcase())
    made = run(values, rows).results
    ours, theirs = (
        {one.place: one.digest for one in own.answers["truncate", "passkey"]}
        for own in (made, before)
    )
    assert ours.keys() == theirs.keys()
    assert not set(ours.values()) & set(theirs.values())
    assert run(values, rows, Stop(0)).results.answers == made.answers  # nothing is asked again
    rows.close()


class Judged(Task):
    """Its judge answers, or not."""

    answers = True

    def sample(self, index, tokens):
        return Sample([1] * tokens, (Question("Why?", ("x",)),))

    def score(self, question, said):
        if not self.answers:
            raise OSError("the judge cannot be asked")
        return {"judged": 1.0}


def test_what_a_judge_did_not_say_is_asked_again(values, monkeypatch):
    monkeypatch.setitem(TASKS._known, "judged", Judged)
    values = {**values, "methods": ["truncate"], "tasks": ["judged"], "lengths": [20]}
    monkeypatch.setattr(Judged, "answers", False)
    rows = Rows()
    limited = run({**values, "limits": {"hours": 1}}, rows)  # calibration needs no judge
    (line,) = limited.results.lines.values()
    assert (line.count, line.num_errors) == (0, 2)
    assert limited.is_whole
    monkeypatch.setattr(Judged, "answers", True)
    (line,) = run(values, rows).results.lines.values()
    assert (line.count, line.num_errors) == (2, 0)


def test_positions_that_run_out_are_rows(values):
    made = run({**values, "methods": ["full"], "tasks": ["traces"], "lengths": [200, 2000],
                "limits": {"hours": 1e-9}})  # fmt: skip
    long = made.cells[1]
    assert long not in made.skipped
    (first, *_) = made.results.of(long)
    assert "must be at most 256" in first.error


class Gone(Task):
    """Its data are not there, from the start or from a length on."""

    def __init__(self, tokenizer, *, split="test", seed=0, most=10**9):
        super().__init__(tokenizer, split=split, seed=seed)
        self.most = most
        if most == 0:
            raise OSError("data of gone are not there; run: pip install gone")

    def sample(self, index, tokens):
        if tokens > self.most:
            raise OSError("data of gone are not there; run: pip install gone")
        return Sample([1] * tokens, meta={})


@pytest.mark.parametrize("most", [0, 10, 100])
def test_data_that_are_missing_leave_the_others(values, monkeypatch, most):
    monkeypatch.setitem(TASKS._known, "gone", Gone)
    made = run({**values, "tasks": {"gone": {"options": {"most": most}}, **values["tasks"]}})
    assert not made.is_whole
    assert "pip install gone" in made.results.lacking["gone"]
    assert len(made.answers["comet", "passkey"]) == 4
    assert len(made.answers.get(("comet", "gone"), [])) == (2 if most == 100 else 0)
    with pytest.raises(OSError, match="pip install gone"):
        run({**values, "tasks": {"gone": {"options": {"most": 0}}}})


class Partly(Judged):
    """One of its data is not there."""

    lacking = {"gone": OSError("gone is not there; run: pip install gone")}  # noqa: RUF012


def test_data_that_a_task_goes_on_without_are_said(values, monkeypatch):
    monkeypatch.setitem(TASKS._known, "partly", Partly)
    made = run({**values, "tasks": ["partly"]})
    assert not made.is_whole
    assert made.results.lacking == {"gone of partly": "gone is not there; run: pip install gone"}
    assert len(made.answers["comet", "partly"]) == 4


def test_a_model_that_is_missing_leaves_the_others(values):
    rival = {"method": "comet", "model": "no/such-folder/at-all"}
    made = run({**values, "methods": {"rival": rival, "truncate": {}}})
    assert not made.is_whole
    assert "rival" in made.results.lacking
    assert made.answers["truncate", "passkey"]


def test_a_text_that_is_too_short_is_known_at_once(values):
    with refused("tasks.passkey: tokens must be at least"):
        Comparison(config_of({**values, "lengths": [3, 5]}), Rows())


def test_a_text_that_is_too_short_leaves_longer_ones(values, tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    values = {**values, "lengths": [3, 60]}
    made = run(values, rows)
    assert {(cell.task, cell.tokens) for cell in made.skipped} == {("passkey", 3)}
    assert all(why.startswith("tokens must be at least") for why in made.skipped.values())
    assert made.is_whole
    assert {(cell.task, cell.tokens) for cell in made.results.lines} == {
        ("passkey", 60), ("continue", 3), ("continue", 60), ("traces", 200)
    }  # fmt: skip
    first, *_ = as_plain(made.results)["cells"]
    assert first["skipped"].startswith("tokens must be at least")
    assert first["foreseen"] is None
    write_page(tmp_path / "report.html", made.results)
    assert "tokens must be at least" in (tmp_path / "report.html").read_text()
    assert plain(run({**values, "limits": {"hours": 1}}, rows))["cells"] == plain(made)["cells"]
    rows.close()


def test_options_that_a_method_does_not_have(values):
    """Before anything is loaded, and whatever the others are."""
    mine = {"method": "truncate", "options": {"colour": 1}}
    with refused("methods.mine: options of the method truncate are none, got colour"):
        config_of({**values, "methods": {"comet": {}, "mine": mine}})


def test_methods_may_have_models_and_sizes_of_their_own(values, monkeypatch):
    loaded = []
    own = module.Loader

    def loader(name, device, dtype, bits, sizes):
        loaded.append(dict(sizes))
        return own(name, device, dtype, bits, sizes)

    monkeypatch.setattr(module, "Loader", loader)
    small = {"method": "comet", "sizes": {**values["sizes"], "capacity": 2}}
    made = run({**values, "methods": {"comet": {}, "small": small}, "tasks": ["traces"],
                "lengths": [200]})  # fmt: skip
    held = {cell.method: made.results.lines[cell].nbytes for cell in made.cells}
    assert held["small"] < held["comet"]
    assert {sizes["capacity"] for sizes in loaded} == {5, 2}


def test_two_models_that_count_tokens_otherwise_are_compared_on_texts_of_their_own_length(
    values, tmp_path
):
    real.save_backbone(tmp_path / "other", "like gemma")
    tokenizer_of("like gemma").save_pretrained(tmp_path / "other")  # with a chat template
    path = tmp_path / "mine.jsonl"
    rows = [
        {"context": "A lamp and a keeper. " * n, "question": "What?", "answer": "a lamp"}
        for n in (1, 2)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    methods = {
        "ours": {"method": "truncate"},
        "other": {"method": "truncate", "model": str(tmp_path / "other")},
    }
    made = run(
        {**values, "methods": methods, "tasks": {"mine": {"data": str(path)}}, "lengths": []}
    )
    read = [{a.read for a in made.results.answers[method, "mine"]} for method in methods]
    assert read[0] != read[1]
    assert len({cell.tokens for cell in made.cells}) == 1
    assert [one["n"] for one in as_plain(made.results)["differences"]] == [2]
