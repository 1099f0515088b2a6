"""`benchmarks/gpu.py` at tiny sizes on the CPU: what it measures, and what can go wrong."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

import gpu
from gpu_parts import decode, laws, prefill, train
from gpu_parts.lab import Lab, limit
from gpu_parts.report import Report, TimeBox, failure
from gpu_parts.scale import FULL, TINY, label

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def given(path, *more):
    """Arguments; the time is enough for the busiest machine."""
    return ["--tiny", "--device", "cpu", "--minutes", "600", "--out", str(path), *more]


def read(path):
    def no_constant(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=no_constant)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The file of a run of everything; backbones have one layer, and `torch.compile` does nothing.

    Compilers take longer than all the rest: `test_compilers_run_too` has them.
    """
    path = tmp_path_factory.mktemp("gpu") / "deeper" / "gpu.json"
    shapes = {name: fields | {"num_hidden_layers": 1} for name, fields in TINY.shapes.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "TINY", replace(TINY, shapes=shapes))
        patch.setattr(torch, "compile", lambda work, **options: work)
        gpu.main(given(path))
    return read(path)


@pytest.fixture
def bench(tmp_path):
    """A report on the CPU, and its laboratory."""
    lab = Lab(CPU, TINY)
    return Report(tmp_path / "gpu.json", lab, lambda x: laws.conclusions(x, TINY, ["4B"])), lab


@pytest.fixture
def uncompiled(monkeypatch):
    """Compilers take the most time by far."""
    monkeypatch.setattr(prefill.Prefill, "_compiled", lambda reading, box: None)


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for x in value for number in numbers(x)]
    return [value] if isinstance(value, (int, float)) else []


# --- a run of everything ------------------------------------------------------------------------


def expected_names():
    names = {"peak/matrix", "peak/copy", "train/0.6B/record", "kernels/4B/reading"}
    lengths = ("128", "256", "512", "1k")
    names |= {f"prefill/4B/backbone/{x}" for x in lengths}
    ours = ("128", "256", "1k", "4k", "steady", "steady compiled", "steady recorded")
    names |= {f"prefill/4B/ours/{x}" for x in ours}
    for after in ("32", "512", "4k"):
        for batch in (1, 2):
            ways = ("recorded", "fixed", "eager", *(["backbone"] if after != "4k" else []))
            names |= {f"decode/4B/{after}/batch {batch}/{way}" for way in ways}
    names |= {f"decode/4B/{after}/batch 1/compiled" for after in ("32", "512")}
    names |= {f"decode/4B/4k/batch 1/{x} really read" for x in ("recorded", "fixed")}
    names.add("decode/4B/4k/batch 1/backbone")
    ways = ("every 1", "every k", "every 1, offload", "every k, offload", "every 1, everything")
    return names | {f"train/0.6B/{n}/{way}" for n in ("512", "1k", "2k") for way in ways}


def test_what_a_chunk_is_made_of(done):
    """Of operations here, since a CPU has no kernels."""
    entry = done["measurements"]["kernels/4B/reading"]
    longest = entry["longest"]
    assert any("attention" in one["name"] for one in longest)
    spent = [one["seconds_per_chunk"] for one in longest]
    assert spent == sorted(spent, reverse=True)
    assert sum(spent) <= entry["busy_per_chunk"] * 1.001
    assert entry["launching_per_chunk"] <= entry["seconds_per_chunk"]
    assert sum(one["per_chunk"] for one in longest) <= entry["kernels_per_chunk"]


def test_everything_is_measured(done):
    entries = done["measurements"]
    assert set(entries) == expected_names()
    assert (done["finished"], done["running"]) == (True, None)
    assert done["machine"]["torch"] == torch.__version__
    for name, entry in entries.items():
        recorded = "recorded" in name  # no graphs on a CPU
        skipped = recorded or name == "decode/4B/4k/batch 1/backbone"
        assert entry["status"] == ("skipped" if skipped else "ok"), entry
        assert all(map(math.isfinite, numbers(entry)))
        if recorded:
            assert entry["reason"] == "recorded: not available on cpu"
        elif not skipped and not name.startswith(("peak", "kernels")):
            assert min(entry["tokens_per_second"], entry["peak_bytes"], entry["took_seconds"]) > 0


def test_what_is_compared_first_is_measured_first(done):
    """A run of few minutes has no time for all of decoding's quick half."""
    found = [name for name in done["measurements"] if name.startswith("decode/")]
    first = ["32/batch 1/recorded", "4k/batch 1/recorded", "32/batch 1/backbone"]
    assert found[:3] == [f"decode/4B/{name}" for name in first]


@pytest.mark.slow
def test_compilers_run_too(bench):
    report, lab = bench
    prefill.Prefill(lab, report, "4B")._compiled(TimeBox(600))
    decode.Decode(lab, report, "4B")._compiled(32, TimeBox(600))
    assert [entry["status"] for entry in report.entries.values()] == ["ok", "ok"]


def test_what_entries_say(done):
    entries = done["measurements"]
    million = entries["prefill/4B/ours/4k"]
    assert (million["basis"], million["read_tokens"]) == ("really read", TINY.million)
    assert entries["decode/4B/4k/batch 1/fixed"]["state"].startswith("flat")
    assert entries["decode/4B/4k/batch 1/fixed really read"]["state"] == "really read"
    assert entries["decode/4B/4k/batch 1/fixed really read"]["read_tokens"] == 4096 + 32
    short = entries["decode/4B/32/batch 1/eager"]
    assert short["ms_per_token_whole_chunk"] == pytest.approx(
        short["ms_per_token"] + short["border_ms"] / 64
    )
    record = entries["train/0.6B/record"]
    assert (record["tokens"], record["chunks"], record["every"]) == (4000, 63, 7)
    assert record["gradient_norm"] > 0
    assert entries["train/0.6B/512/every k, offload"]["settings"]["offload"]


def test_the_same_loss_every_way(bench):
    """Every way of training is exact."""
    _, lab = bench
    found = []
    for way in (train.Way(), train.Way(sparse=True), train.Way(True, True)):
        model = lab.model("0.6B")
        torch.manual_seed(1)
        train.prepare(model, way, way.every(6))
        found.append(train.step(lab, model, 6 * 64))
        train.restore(model)
    for one in found[1:]:
        assert one["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
        assert one["gradient_norm"] == pytest.approx(found[0]["gradient_norm"], rel=1e-4)


def test_tiny_figures_fulfil_no_promise(done):
    assert len(done["promises"]) == 5
    assert {promise["met"] for promise in done["promises"].values()} == {None}
    assert all(promise["value"] is not None for promise in done["promises"].values())
    assert set(done["laws"]) == {"4B"}


def test_the_weights_are_made_on_the_device(monkeypatch):
    """As far as that can be seen without one: nothing but the device named is asked for weights."""
    lab = Lab(CPU, TINY)
    lab.device = torch.device("meta")
    backbone = lab._loaded("4B")
    tensors = [*backbone.parameters(), *backbone.buffers()]
    assert {x.device.type for x in tensors} == {"meta"}
    monkeypatch.setattr(lab, "device", CPU)
    lab.drop()
    assert {p.dtype for p in lab.model("4B").parameters()} == {torch.float32}
    assert Lab(torch.device("meta"), TINY).dtype == torch.bfloat16


def test_only_some_parts(tmp_path):
    path = tmp_path / "gpu.json"
    gpu.main(given(path, "--parts", "record", "--shapes", "0.6B,4B"))
    kinds = {name.split("/")[0] for name in read(path)["measurements"]}
    assert kinds == {"peak", "train"}
    assert "train/0.6B/record" in read(path)["measurements"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "prefill,decoding"], "--parts are prefill, decode, train, record, got decod"),
        (["--shapes", "7B"], "--shapes are 4B, 0.6B, got 7B"),
        (["--minutes", "-1"], "--minutes must be at least 0, got -1.0"),
    ],
)
def test_arguments_that_make_no_sense(arguments, said, capsys):
    with pytest.raises(SystemExit):
        gpu.parsed(arguments)
    assert said in capsys.readouterr().err


# --- failures -----------------------------------------------------------------------------------


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, uncompiled):
    def no_memory(model, ids, piece=None):
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    def broken(lab, model, tokens):
        raise RuntimeError("an illegal instruction\nwas met")

    monkeypatch.setattr(prefill, "full_attention", no_memory)
    monkeypatch.setattr(train, "step", broken)
    path = tmp_path / "gpu.json"
    gpu.main(given(path, "--parts", "prefill,train"))
    result = read(path)
    entries = result["measurements"]
    backbone = entries["prefill/4B/backbone/256"]
    assert (backbone["status"], backbone["out_of_memory"]) == ("failed", True)
    assert backbone["message"] == "tried to allocate 20.00 GiB"
    trained = entries["train/0.6B/512/every 1"]
    assert (trained["status"], trained["error"]) == ("failed", "RuntimeError")
    assert trained["message"] == "an illegal instruction was met"
    assert any(x.startswith("test_gpu_benchmark.py:") for x in trained["where"])
    assert entries["train/0.6B/record"]["reason"] == "no shorter step went well"
    assert entries["prefill/4B/ours/4k"]["status"] == "ok"
    assert result["finished"]
    assert "full_attention" not in result["laws"]["4B"]


def test_full_attention_in_pieces_where_a_text_does_not_fit_whole(bench, monkeypatch):
    report, lab = bench
    original = prefill.full_attention

    def small(model, ids, piece=None):
        if ids.shape[1] > 100 and piece is None:
            raise torch.OutOfMemoryError("tried to allocate")
        original(model, ids, piece)

    monkeypatch.setattr(prefill, "full_attention", small)
    monkeypatch.setattr(prefill, "_PIECE", 48)
    prefill.Prefill(lab, report, "4B")._backbone(128, TimeBox(60), rounds=2)
    entry = report.entries["prefill/4B/backbone/128"]
    assert (entry["status"], entry["whole"]) == ("ok", False)
    assert laws.full_attention_law(report.entries, "4B") is None


def test_steps_that_cannot_be_recorded_are_no_figures(bench, monkeypatch):
    """The library then warns and goes on unrecorded, which must not pass for the recorded way."""
    from cometlm.core import fixed_cache

    def refuse(work, buffers):
        raise RuntimeError("not permitted while recording")

    monkeypatch.setattr(fixed_cache, "_recorded", refuse)
    monkeypatch.setattr(decode, "new_graph", lambda device: object())
    report, lab = bench
    decode.Decode(lab, report, "4B")._ours(32, 1, "recorded", TimeBox(60))
    entry = report.entries["decode/4B/32/batch 1/recorded"]
    assert entry["status"] == "failed"
    assert "not permitted while recording" in entry["message"]


def test_a_new_process_goes_on_when_the_device_is_lost(tmp_path, monkeypatch, uncompiled):
    class Replaced(Exception):
        pass

    def execute(program, arguments):
        raise Replaced(arguments)

    def broken(lab):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr(Lab, "bandwidth", broken)
    monkeypatch.setattr(Lab, "alive", lambda lab: False)
    path = tmp_path / "gpu.json"
    arguments = given(path, "--parts", "prefill")
    with pytest.raises(Replaced) as caught:
        gpu.main(arguments)
    (command,) = caught.value.args
    assert command[:2] == [sys.executable, gpu.__file__]
    assert read(path)["measurements"]["peak/copy"]["status"] == "failed"
    monkeypatch.setattr(Lab, "matrix_peak", broken)  # was measured: not again
    monkeypatch.setattr(Lab, "alive", lambda lab: True)
    gpu.main(command[2:])
    result = read(path)
    assert result["measurements"]["peak/matrix"]["status"] == "ok"
    assert result["measurements"]["peak/copy"]["status"] == "failed"
    assert result["measurements"]["prefill/4B/ours/4k"]["status"] == "ok"
    assert (result["minutes"], result["finished"]) == (600.0, True)


# `gpu.py ARGUMENTS`, killed in its fourth measurement.
KILLED = """
import os, signal
import gpu
from gpu_parts.report import Report

measure = Report.measure

def measured(report, name, work, *more, **options):
    if len(report.entries) == 3:
        work = lambda: os.kill(os.getpid(), signal.SIGKILL)
    return measure(report, name, work, *more, **options)

Report.measure = measured
gpu.main()
"""


def test_a_killed_run_leaves_whole_json_and_goes_on(tmp_path, uncompiled):
    path = tmp_path / "gpu.json"
    arguments = given(path, "--parts", "prefill")
    paths = os.pathsep.join(str(ROOT / name) for name in ("src", "benchmarks"))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    result = read(path)
    assert not result["finished"]
    assert len(result["measurements"]) == 3
    assert list(tmp_path.iterdir()) == [path]
    gpu.main([*arguments, "--go-on"])
    again = read(path)
    assert again["finished"]
    for name, entry in result["measurements"].items():
        assert again["measurements"][name] == entry
    assert again["measurements"][result["running"]]["status"] == "cut"
    assert again["measurements"]["prefill/4B/ours/4k"]["status"] == "ok"


def test_numbers_that_json_has_not_and_conclusions_that_fail(bench):
    report, _ = bench
    report._conclude = lambda entries: 1 / 0
    report.measure("it", lambda: {"tokens_per_second": math.nan, "x": [math.inf, 2]}, TimeBox(9))
    result = read(report.path)
    assert result["measurements"]["it"]["tokens_per_second"] is None
    assert result["measurements"]["it"]["x"] == [None, 2]
    assert result["conclusions"]["error"] == "ZeroDivisionError"


def test_an_error_keeps_no_tensors_alive():
    try:
        raise RuntimeError("too\n  large")
    except RuntimeError as error:
        found = failure(error)
    assert found["message"] == "too large"
    json.dumps(found)


# --- time ---------------------------------------------------------------------------------------


def ticking(seconds):
    """A clock that moves on with every look at it."""
    ticks = count()
    return lambda: next(ticks) * seconds


def test_what_does_not_fit_the_time_is_skipped_with_a_reason(tmp_path):
    """Each look at the clock takes a second of a minute."""
    args = gpu.parsed(given(tmp_path / "gpu.json"))
    lab, clock = Lab(CPU, TINY), ticking(1.0)
    report = gpu.new_report(args, lab, clock)
    gpu.run(args, report, TimeBox(60, clock))
    entries = read(report.path)["measurements"]
    assert set(entries) >= expected_names() - {
        f"decode/4B/4k/batch 1/{x} really read" for x in ("recorded", "fixed")
    }
    statuses = [entry["status"] for entry in entries.values()]
    assert statuses.count("ok") >= 2
    assert statuses.count("skipped") > 30
    assert "are left" in entries["train/0.6B/2k/every k"]["reason"]
    assert read(report.path)["finished"]


def test_no_time_at_all(tmp_path):
    gpu.main(given(tmp_path / "gpu.json", "--minutes", "0"))
    entries = read(tmp_path / "gpu.json")["measurements"]
    assert {entry["status"] for entry in entries.values()} == {"skipped"}


def test_a_box_and_its_shares():
    now = [100.0]
    box = TimeBox(60, lambda: now[0])
    half = box.share(0.5)
    now[0] += 20
    assert (box.left(), half.left()) == (40, 10)
    now[0] += 50
    assert box.left() < 0
    assert box.share(0.5).left() < 0


def test_a_measurement_that_needs_more_than_is_left(bench):
    report, _ = bench
    box = TimeBox(10, lambda: 0.0)
    assert report.measure("long", lambda: {}, box, needs=12.0, tokens=5) is None
    assert report.entries["long"] == {
        "status": "skipped",
        "reason": "needs about 12 s, and 10 s are left for it",
        "settings": {"tokens": 5},
    }
    assert report.measure("short", lambda: {"x": 1}, box, needs=8.0)["x"] == 1


def test_a_million_that_is_not_read_to_its_end(bench, monkeypatch):
    """The flat law goes on from the last chunks; later, no state passes for a million tokens'."""
    report, lab = bench
    now = [0.0]

    def timed(call):
        call()
        now[0] += 4.0
        return 4.0

    reading = prefill.Prefill(lab, report, "4B")
    reading._ready()
    monkeypatch.setattr(lab, "timed", timed)
    reading._million(TimeBox(20, lambda: now[0]))
    entry = report.entries["prefill/4B/ours/4k"]
    pieces = entry["read_tokens"] / (TINY.piece * 64)
    assert pieces == 3  # 12 of 20 s; two more pieces and what follows would not fit
    assert entry["read_seconds"] == 12
    assert entry["seconds"] == pytest.approx(4.0 * TINY.million / (TINY.piece * 64))
    assert entry["basis"].startswith("flat law")
    assert "million" not in lab.states


def test_the_record_is_as_long_as_the_time_allows(bench):
    report, lab = bench
    report.entries["train/0.6B/512/every k, offload"] = {
        "status": "ok",
        "tokens": 512,
        "tokens_per_second": 1000.0,
        "loss": 1.0,
        "settings": {"way": "every k, offload"},
    }
    train.Train(lab, report).record(TimeBox(1.0, lambda: 0.0))
    entry = report.entries["train/0.6B/record"]
    assert entry["status"] == "ok"
    assert entry["tokens"] == 832  # the whole chunks in 1000 / 1.15
    assert entry["settings"]["wanted"] == 4000
    del report.entries["train/0.6B/record"]
    train.Train(lab, report).record(TimeBox(0.1, lambda: 0.0))
    assert report.entries["train/0.6B/record"]["status"] == "skipped"


def test_the_end_in_the_middle_of_a_measurement(bench, monkeypatch, capsys):
    report, _ = bench
    monkeypatch.setattr(os, "_exit", sys.exit)

    def endless():
        gpu.end_now(report)
        return {}

    with pytest.raises(SystemExit):
        report.measure("endless", endless, TimeBox(9))
    result = read(report.path)
    assert result["measurements"]["endless"]["status"] == "cut"
    assert not result["finished"]
    assert "1 cut" in capsys.readouterr().out


def test_code_that_takes_too_long_is_broken_off():
    with pytest.raises(TimeoutError, match="broken off"), limit(0.01):
        time.sleep(30)
    with limit(60):
        pass


# --- laws ---------------------------------------------------------------------------------------


def test_fitted_laws_find_the_numbers_that_made_them():
    a, b = laws.fit_growth([(n, 3e-5 * n + 7e-10 * n * n) for n in (8192, 32768, 65536, 131072)])
    assert (a, b) == (pytest.approx(3e-5), pytest.approx(7e-10))
    c, d = laws.fit_line([(n, 8e9 + 150_000 * n) for n in (8192, 32768)])
    assert (c, d) == (pytest.approx(8e9), pytest.approx(150_000))
    # By hand: y = c + d·x through (0, 0), (1, 1), (2, 1) is 1/6 + x/2.
    assert laws.fit_line([(0, 0), (1, 1), (2, 1)]) == (pytest.approx(1 / 6), pytest.approx(1 / 2))
    # and t = a·x + b·x² closest to (1, 1), (1, 3), (2, 4) goes through (1, 2), (2, 4).
    assert laws.fit_growth([(1, 1), (1, 3), (2, 4)]) == (pytest.approx(2), pytest.approx(0))


@pytest.mark.parametrize("fit", [laws.fit_growth, laws.fit_line])
def test_laws_need_two_lengths(fit):
    with pytest.raises(ValueError, match="at least 2 lengths, got 1"):
        fit([(8192, 1.0), (8192, 1.1)])


def made_up(seconds_per_chunk, decoded, record):
    """Entries as of a run at the paper's sizes."""
    entries = {
        f"prefill/4B/backbone/{label(n)}": {
            "status": "ok",
            "whole": True,
            "tokens": n,
            "seconds": 2e-5 * n + 7e-10 * n * n,
            "peak_bytes": 9e9 + 200_000 * n,
        }
        for n in (8192, 32768, 131072)
    }
    entries["prefill/4B/backbone/64k"] = {"status": "failed"}
    entries["prefill/4B/ours/steady"] = {
        "status": "ok",
        "seconds_per_chunk": seconds_per_chunk,
        "peak_bytes": 11e9,
        "weights_bytes": 8e9,
        "share_of_peak": 0.55,
    }
    for after, ms in (("1k", 4.0), ("1M", decoded)):
        entry = {"status": "ok", "ms_per_token": ms, "state": "flat"}
        entries[f"decode/4B/{after}/batch 1/fixed"] = entry
    entries["train/0.6B/record"] = {"status": "ok", "tokens": record, "seconds": 400.0}
    return entries


def test_promises_by_made_up_figures():
    found = laws.conclusions(made_up(0.07, 4.1, 10_000_000), FULL, ["4B"])
    law = found["laws"]["4B"]
    n = 2**20
    assert law["basis"] == "flat law"
    assert law["seconds"] == pytest.approx(512 * 0.07)
    assert law["full_attention_seconds"] == pytest.approx(2e-5 * n + 7e-10 * n * n)
    # By hand: 36 layers, a key and a value of 8 heads of 128, two bytes each.
    assert law["full_attention_bytes_counted"] == 8e9 + 36 * 2 * 8 * 128 * 2 * n
    assert law["full_attention_bytes_fitted"] == pytest.approx(9e9 + 200_000 * n)
    assert law["memory_ratio"] == pytest.approx(law["full_attention_bytes_counted"] / 11e9)
    assert law["full_attention"]["lengths"] == [8192, 32768, 131072]
    assert {promise["met"] for promise in found["promises"].values()} == {True}

    slow = laws.conclusions(made_up(0.08, 4.3, 2_000_000), FULL, ["4B"])["promises"]
    met = [promise["met"] for promise in slow.values()]
    assert met == [False, True, True, False, False]

    nothing = laws.conclusions({}, FULL, ["4B"])
    assert nothing["laws"] == {}
    assert {promise["met"] for promise in nothing["promises"].values()} == {None}


def test_what_was_really_read_goes_before_the_flat_law():
    entries = made_up(0.07, 4.1, 10_000_000)
    read = {"status": "ok", "seconds": 50.0, "basis": "really read", "peak_bytes": 12e9}
    entries["prefill/4B/ours/1M"] = read | {"weights_bytes": 8e9}
    slow = {"status": "ok", "ms_per_token": 8.0, "state": "really read"}
    entries["decode/4B/1M/batch 1/fixed really read"] = slow
    found = laws.conclusions(entries, FULL, ["4B"])
    assert (found["laws"]["4B"]["seconds"], found["laws"]["4B"]["basis"]) == (50.0, "really read")
    flat = found["promises"]["decoding after a million tokens as fast as after a thousand"]
    assert (flat["value"], flat["met"], flat["state"]) == (2.0, False, "really read")


def test_lengths_for_people_and_borders():
    assert [label(n) for n in (512, 8192, 2**20, 10_000_000)] == ["512", "8k", "1M", "10M"]
    assert train.Way().every(100) == 1
    assert train.Way(sparse=True).every(4883) == 69
    assert FULL.filling == 8
    assert FULL.config("4B").num_key_value_heads == 8
    with pytest.raises(ValueError, match=r"shape must be one of 4B, 0\.6B, got '7B'"):
        FULL.config("7B")


def test_the_papers_sizes_compile_on_accelerators_only(tmp_path):
    """The branches of the full sizes, as far as a CPU has them."""
    lab = Lab(CPU, replace(TINY, paper=True))
    conclude = lambda x: laws.conclusions(x, lab.scale, ["4B"])  # noqa: E731
    report = Report(tmp_path / "gpu.json", lab, conclude)
    prefill.Prefill(lab, report, "4B")._compiled(TimeBox(60))
    decode.Decode(lab, report, "4B")._compiled(32, TimeBox(60))
    reasons = {entry["reason"] for entry in report.entries.values()}
    assert (len(report.entries), reasons) == (2, {"compiled only for an accelerator"})


def test_no_device_is_named():
    """The device is a parameter: no vendor's name in a call."""
    files = [ROOT / "benchmarks" / "gpu.py", *(ROOT / "benchmarks" / "gpu_parts").glob("*.py")]
    assert len(files) > 5
    for path in files:
        assert "cu" + "da" not in path.read_text().lower(), path
