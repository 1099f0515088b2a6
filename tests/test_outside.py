"""A task, a corpus, a method and a chunk plan of another package: found and run, nothing edited.

The package is what an installed one looks like: modules, and a `dist-info` with entry points.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.sessions import tokenizer_of
from tests.tiny import tiny_backbone

SOURCE = Path(__file__).parents[1] / "src"
# Several command lines in one process, each as if alone: exit code, standard output and error.
COMMANDS = """
import contextlib, io, json, sys
from cometlm.cli.main import run

for number, arguments in enumerate(json.loads(sys.argv[1])):
    sys.argv[1:] = arguments
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run()
        except SystemExit as stop:
            code = stop.code or 0
    with open(f"{number}.json", "w", encoding="utf-8") as file:
        json.dump([code, out.getvalue(), err.getvalue()], file)
"""
FILES = {
    "toy_task.py": '''
"""Which word does the text begin with?"""

from cometlm.data.corpora import corpus_files
from cometlm.tasks import Question, Sample, Task


class FirstWord(Task):
    def __init__(self, tokenizer, *, split="test", seed=0, corpus="toy-letters"):
        super().__init__(tokenizer, split=split, seed=seed)
        self.corpus = corpus

    def sample(self, index, tokens):
        (path,) = corpus_files(self.corpus)
        words = path.read_text().split()
        text = " ".join(words[index % len(words) :] + words)
        question = Question("Which word comes first?", (text.split()[0],))
        return Sample(self.encode(text)[:tokens], (question,), {"corpus": self.corpus})
''',
    "toy_corpus.py": '''
"""Letters, one of them held out."""

from pathlib import Path

from cometlm.data.corpora import Corpus


class Letters(Corpus):
    about = "two letters"
    held_out = ("letter2.txt",)

    def files(self):
        return sorted(Path(__file__).parent.glob("letter*.txt"))


LETTERS = Letters()
''',
    "toy_method.py": '''
"""Reads the beginning and nothing else."""

from cometlm.methods import Foreseen, Method, Reader


class Beginning(Method):
    @classmethod
    def open(cls, loader, budget=None):
        return BeginningReader(loader.tokenizer, 8)


class BeginningReader(Reader):
    def __init__(self, tokenizer, budget, ids=()):
        self.tokenizer, self.budget, self.ids = tokenizer, budget, list(ids)

    def read(self, ids):
        self.ids = [*self.ids, *ids][: self.budget]

    def fork(self):
        return BeginningReader(self.tokenizer, self.budget, self.ids)

    def answer(self, ids=(), **generation):
        return self.tokenizer.decode(self.ids, skip_special_tokens=True).split()[0]

    def foresee(self, ids):
        return [Foreseen(0.0, True)] * len(ids)

    @property
    def nbytes(self):
        return 8 * len(self.ids)
''',
    "toy_plan.py": '''
"""Chunks of two lengths in turn."""

from cometlm.train.chunk_plans import ChunkPlan


class Alternating(ChunkPlan):
    def cut(self, ids, size, rng):
        lengths = []
        while (left := len(ids) - sum(lengths)) > 0:
            lengths.append(min(left, size if len(lengths) % 2 else max(1, size // 2)))
        return lengths
''',
    "letter1.txt": "Dear Ada, the ship left the harbour in the rain and carried salt. " * 3,
    "letter2.txt": "Dear Basil, nobody saw it again, though the keeper of the lamp waited. " * 3,
    "toy-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 0.1\n",
    "toy-0.1.dist-info/entry_points.txt": """
[cometlm.tasks]
first-word = toy_task:FirstWord
broken = toy_missing:Nothing

[cometlm.corpora]
toy-letters = toy_corpus:LETTERS

[cometlm.methods]
beginning = toy_method:Beginning

[cometlm.plans]
alternating = toy_plan:Alternating
""",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of the other package."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny backbone with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("model")
    words = tokenizer_of("like gemma")
    tiny_backbone("llama", vocab_size=len(words)).float().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def evaluation(model, task, *options):
    sizes = ["--chunk-size", "24", "--readout-tokens", "3", "--stride", "4", "--capacity", "5"]
    common = ["--tokens", "40", "--samples", "2", "--device", "cpu", "--max-new-tokens", "3"]
    return ["eval", str(model), "--task", task, *common, *sizes, *options]


def training(model, folder, plan):
    """A run with a chunk plan; its configuration is written to a file."""
    settings = {
        "model": str(model),
        "output": plan,
        "mode": "memory",
        "comet": {"chunk_size": 24, "readout_tokens": 3, "stride": 4, "capacity": 5},
        "mixture": {
            "tasks": {"first-word": 1},
            "options": {"first-word": {"corpus": "toy-letters"}},
            "steps": 2,
            "tokens": [60, 60],
            "batch_tokens": 120,
        },
        "chunks": {"plans": {plan: 1}},
        "trainer": {"logging_steps": 1},
    }
    (folder / f"{plan}.yaml").write_text(yaml.safe_dump(settings))
    return ["train", f"{plan}.yaml", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(toy, model, tmp_path_factory):
    """Where a process that can import the other package has run all commands, one by one."""
    folder = tmp_path_factory.mktemp("commands")
    both = ["--method", "beginning", "--method", "comet", "--out", "rows.jsonl", "--by", "corpus"]
    both += ["--option", "corpus=toy-letters-test"]
    commands = [
        evaluation(model, "first-word", *both),
        evaluation(model, "first-word", *both),
        evaluation(model, "broken", "--method", "comet"),
        training(model, folder, "alternating"),
        training(model, folder, "alternatin"),
    ]
    paths = os.pathsep.join([str(toy), str(SOURCE)])
    more = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        check=False,
        cwd=folder,
        env={**os.environ, **more},
    )
    assert done.returncode == 0, done.stderr
    return folder


def said(folder, number):
    """Exit code, standard output and standard error of a command."""
    return json.loads((folder / f"{number}.json").read_text(encoding="utf-8"))


def test_a_task_a_corpus_and_a_method(folder):
    code, out, err = said(folder, 0)
    assert code == 0, err
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row["settings"]["method"] for row in rows] == ["beginning"] * 2 + ["comet"] * 2
    first, second, *_ = (row["answer"] for row in rows)
    assert (first["said"], second["said"]) == ("Dear", "Basil,")
    assert first["scores"] == {"exact": 1.0}
    assert first["meta"] == {"corpus": "toy-letters-test"}
    assert "1.00 0.34–1.00" in out
    code, _, err = said(folder, 1)
    assert code == 0, err
    assert "2 answers are known already" in err  # and so no row more than four
    assert len(rows) == 4


def test_a_package_that_cannot_be_imported_is_one_line(folder):
    code, _, err = said(folder, 2)
    assert code == 1
    assert "'broken'" in err
    assert "toy_missing:Nothing" in err
    assert "Traceback" not in err


def test_a_chunk_plan_a_task_and_a_corpus_train(folder):
    code, _, err = said(folder, 3)
    assert code == 0, err
    state = json.loads((folder / "alternating" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "loss" in row] == [1, 2]
    code, _, err = said(folder, 4)
    assert code == 1
    assert "'alternatin'" in err
    assert "alternating" in err.replace("'alternatin'", "")
