"""`cometlm eval`: rows, the table, and going on."""

import json
from pathlib import Path

import pytest
import yaml

from cometlm.eval import comparison
from cometlm.eval.config import read_config
from cometlm.eval.runner import evaluate
from cometlm.tasks import TASKS
from cometlm.tasks.continuation import Continuation
from tests.cli.said import INTERRUPTED, one_line
from tests.sessions import SIZES

OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items() if name != "rank"]
OPTIONS += ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "3"]
TASK = ["--task", "passkey", "--option", "corpora=text.txt", "--samples", "2"]


OWN = [
    {"context": "Ada paid for the lamp. " * 9, "question": "Who paid?", "answer": "Ada"},
    {"context": "Ada paid for the lamp. " * 9, "question": "For what?", "answer": ["lamp", "it"]},
    {"context_file": "text.txt", "question": "Who wrote?", "answer": "the keeper"},
]


@pytest.fixture
def run(command, on_disk, text_file):
    def run(*arguments, methods=("comet", "full")):
        wanted = [part for name in methods for part in ("--method", name)]
        return command("eval", on_disk, *TASK, *wanted, *OPTIONS, *arguments)

    return run


def rows():
    found = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    return [row for row in found if "answer" in row]


def test_methods_side_by_side(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # else units go to a line of their own where all is slow
    code, out, err = run("--tokens", "90", "--tokens", "300", "--out", "rows.jsonl")
    assert code == 0, err
    assert "untrained" in err
    first, second = out.split("\n\n")
    for method in ("comet", "full"):
        lines = [line for line in first.splitlines() if line.startswith(f"{method} ")]
        assert len(lines) == 2
        assert all("KiB" in line or "–" in line for line in lines)
    assert "full, 2 ×: tokens of text, question and answer must be at most 256" in out
    assert "differences from comet on the same questions" in second
    assert len([line for line in second.splitlines() if line.startswith("full − comet")]) == 1
    assert len(rows()) == 8
    answer = rows()[0]["answer"]
    assert {"depth", "decile", "distance", "haystack"} == set(answer["meta"])
    assert set(answer["scores"]) == {"exact", "found", "digits"}


def test_the_same_command_goes_on(run, monkeypatch):
    def interrupted(*arguments, **more):
        for count, answer in enumerate(evaluate(*arguments, **more)):
            if count:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "evaluate", interrupted)
        code, out, err = run("--tokens", "90", "--out", "rows.jsonl")
    assert code == INTERRUPTED
    assert "the same command goes on" in err
    assert "\ncomet " in out
    kept = rows()
    code, _, err = run("--tokens", "90", "--out", "rows.jsonl")
    assert code == 0, err
    assert "comet: 1 answers are known already" in err
    assert rows()[:1] == kept
    assert len(rows()) == 4
    code, _, err = run("--tokens", "90", "--out", "rows.jsonl", "--seed", "1", methods=["comet"])
    assert code == 0, err
    assert len(rows()) == 6  # another seed has rows of its own


def test_a_text_without_questions(run):
    code, out, err = run("--task", "continue", "--tokens", "90", methods=["full"])
    assert code == 0, err
    assert "nats" in out
    mean = float(next(line for line in out.splitlines() if line.startswith("full ")).split()[3])
    assert mean > 1  # an untrained model foresees little; the figure is not cut off at 1
    assert "nats" in err


class Few(Continuation):
    """It has not more than 40 tokens of text."""

    def sample(self, index, tokens):
        return super().sample(index, min(tokens, 40))


def test_texts_that_are_shorter_than_was_asked_are_said(run, monkeypatch):
    monkeypatch.setitem(TASKS._known, "few", Few)
    code, out, err = run("--task", "few", "--tokens", "40", "--tokens", "90", methods=["full"])
    assert code == 0, err
    assert "full on few, 90 tokens: shorter: 40 tokens" in out
    assert "full  40 of 90 tokens  sample 0" in err
    assert out.count("shorter") == err.count(" of 90 tokens") - 1 == 1


@pytest.fixture
def run_own(command, on_disk, text_file):
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, OWN)))

    def run(*arguments):
        return command("eval", on_disk, *OPTIONS, "--method", "truncate", *arguments)

    return run


def test_data_of_ones_own(run_own):
    code, out, err = run_own("--data", "mine.jsonl", "--out", "rows.jsonl")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("truncate ")]
    assert line.split()[2] == "3"
    assert [row["answer"]["index"] for row in rows()] == [0, 0, 1]
    assert set(rows()[0]["answer"]["scores"]) == {"exact", "found", "f1"}
    Path("mine.jsonl").rename("other.jsonl")
    code, _, err = run_own("--data", "other.jsonl", "--out", "rows.jsonl")
    assert "truncate: 3 answers are known already" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "what is asked must be a --task or --data, got neither"),
        (["--data", "mine.jsonl", "--task", "passkey"], "--task or --data, got both"),
        (["--data", "mine.jsonl", "--tokens", "9"], "--tokens goes with --task"),
        (["--data", "mine.jsonl", "--option", "a=1"], "--option goes with --task, got 'a=1'"),
        (["--task", "passkey"], "--tokens or lengths must be given for passkey"),
        (["--data", "gone.jsonl"], "there is no file gone.jsonl"),
    ],
    ids=str,
)
def test_what_is_asked_must_be_clear(run_own, arguments, said):
    code, _, err = run_own(*arguments)
    assert code == 1
    assert said in one_line(err)


def test_a_method_that_cannot_be_opened_leaves_the_others(run):
    code, out, err = run("--tokens", "90", "--budget", "4", methods=("window", "comet"))
    assert code == 0, err
    assert "window: budget of a window must be more than 4, got 4" in out
    assert any(line.split()[:3] == ["window", "–", "0"] for line in out.splitlines())


def test_nothing_measured_is_an_error(run):
    code, out, _ = run("--tokens", "300", methods=["full"])
    assert code == 1
    assert "full, 2 ×: tokens of text, question and answer must be at most 256" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "telepathy"], "unknown method 'telepathy'; there are comet, full"),
        (["--option", "digits"], "option must be key=value, got 'digits'"),
        (["--option", "digits=0"], "digits must be one or two numbers in 1 … 100"),
        (["--option", "colour=red"], "got colour"),
        (["--option", "corpora=2024-01-01"], "2024-01-01"),
        (["--option", "digits=true"], "digits"),
        (["--option", "digits=["], "option digits must be a YAML value, got '['"),
        (["--by", "colour"], "by must be one of depth, decile, haystack, distance, got 'colour'"),
        (["--budget", "many"], "budget must be tokens like 512, or bytes like 3MB"),
        (["--budget", "4"], "budget of a window must be more than 4, got 4"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(run, arguments, said):
    code, _, err = run("--tokens", "90", *arguments, methods=["window"])
    assert code == 1
    assert said in one_line(err)


def test_texts_that_are_too_short(run):
    code, _, err = run("--tokens", "3", methods=["truncate"])
    assert code == 1
    assert "tokens must be at least" in one_line(err)
    code, out, err = run("--tokens", "3", "--tokens", "90", methods=["truncate"])
    assert code == 0, err
    assert "truncate on passkey, 3 tokens: skipped, tokens must be at least" in out


# --- a configuration ----------------------------------------------------------------------------


@pytest.fixture
def compare(command, on_disk, text_file):
    sizes = {name: size for name, size in SIZES.items() if name != "rank"}
    values = {
        "model": str(on_disk),
        "sizes": sizes,
        "device": "cpu",
        "dtype": "float32",
        "methods": ["comet", "truncate"],
        "tasks": {"passkey": {"options": {"corpora": "text.txt"}}, "traces": {"lengths": [200]}},
        "lengths": [60],
        "samples": 1,
        "max_new_tokens": 2,
        "output": "out",
    }

    def run(*arguments, **changes):
        Path("compare.yaml").write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
        return command("eval", "compare.yaml", *arguments)

    return run


def test_a_file_says_what_is_compared(compare):
    code, out, err = compare()
    assert code == 0, err
    assert {path.name for path in Path("out").iterdir()} >= {
        "rows.jsonl", "results.json", "report.html"
    }  # fmt: skip
    assert "comet on passkey, 60 tokens: 1 text" in err
    assert "\npasskey\n" in out
    assert "\ntraces\n" in out
    cells = json.loads(Path("out/results.json").read_text())["cells"]
    assert [(c["method"], c["task"], c["texts"]) for c in cells] == [
        (method, task, 1) for method in ("comet", "truncate") for task in ("passkey", "traces")
    ]
    code, _, err = compare()
    assert (code, "other settings" in err) == (0, False)
    code, _, err = compare("--set", "seed=1", "--set", "methods=[truncate]")
    assert code == 0, err
    warned, _, _ = err.partition("loading")
    assert (
        "out/results.json and out/report.html are of other settings (methods, seed) and will be "
        "replaced; rows are kept"
    ) in " ".join(warned.split())
    assert "out/rows.jsonl also holds" in err
    assert "answers of other settings; they are not counted here" in err


def test_a_file_that_is_no_results_is_not_replaced_silently(compare):
    Path("out").mkdir()
    Path("out/results.json").write_text("[1, 2]")
    code, _, err = compare(methods=["truncate"], tasks={"traces": {"lengths": [200]}})
    assert code == 0, err
    assert "are of other settings (model, tasks, methods" in " ".join(err.split())


def test_what_is_missing_is_said_at_the_end_and_by_the_exit_code(compare):
    gone = {"task": "questions", "options": {"folder": "gone"}}
    code, out, err = compare(tasks={"gone": gone, "traces": {"lengths": [200]}})
    assert code == 1
    assert "gone: " in out
    assert "comet on traces, 200 tokens: 1 text" in err
    assert json.loads(Path("out/results.json").read_text())["lacking"].keys() == {"gone"}


def test_cells_beyond_the_limits_are_said(compare):
    code, out, err = compare("--set", "limits.hours=1e-9", methods=["truncate"])
    assert code == 0, err
    assert "truncate on passkey, 60 tokens: skipped, would take" in out
    assert "skipped" in Path("out/report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        (["--task", "passkey"], {}, "--task does not go with a YAML file"),
        (["--max-new-tokens", "3"], {}, "--max-new-tokens does not go with a YAML file"),
        (["--device", "cpu"], {}, "--device does not go with a YAML file"),
        ([], {"output": None}, "output of compare.yaml must be a folder; or give one with --out"),
        ([], {"tasks": ["paskey"]}, "did you mean passkey?"),
        ([], {"methods": {"comet": {}, "window": {"options": {"colour": "red"}}}}, "got colour"),
        (["--set", "seed"], {}, "a change must look like key=value, got 'seed'"),
    ],
    ids=str,
)
def test_what_a_configuration_cannot_be(compare, arguments, changes, said):
    code, _, err = compare(*arguments, **changes)
    assert code == 1
    assert said in one_line(err)


def test_changes_go_with_a_file(run):
    code, _, err = run("--set", "seed=1")
    assert code == 1
    assert "--set goes with a YAML file, got 'seed=1'" in one_line(err)


@pytest.mark.parametrize("name", ["comparison", "short"])
def test_the_published_configurations_say_what_they_mean(name, monkeypatch):
    """Tasks and methods of other packages may be missing here; fields may not be wrong."""
    monkeypatch.setattr(TASKS, "find", str)
    config = read_config(Path(__file__).parents[2] / "benchmarks" / f"{name}.yaml")
    for method in config.methods:
        config.budget_of(method)
        for task in config.tasks:
            for tokens in config.lengths_of(task):
                assert config.samples_of(method, task, tokens)
