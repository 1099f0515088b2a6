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
COMMAND = "from cometlm.cli.main import run; run()"
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

from cometlm.methods import Method, Reader


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
        return self.tokenizer.decode(self.ids).split()[0]

    def loglikelihood(self, ids):
        return [0.0] * len(ids)

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


@pytest.fixture
def command(toy, tmp_path):
    """Run `cometlm ARGUMENTS` in a process of its own that can import the other package."""

    def run(*arguments):
        paths = [str(toy), str(SOURCE)]
        more = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-c", COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
            check=False,
            cwd=tmp_path,
            env={**os.environ, **more},
        )

    return run


def test_a_task_a_corpus_and_a_method(command, model, tmp_path):
    sizes = ["--chunk-size", "24", "--readout-tokens", "3", "--stride", "4", "--capacity", "5"]
    arguments = ["eval", model, "--task", "first-word", "--method", "beginning", "--method"]
    arguments += ["comet", "--tokens", "40", "--samples", "2", "--out", "rows.jsonl", *sizes]
    arguments += ["--device", "cpu", "--by", "corpus", "--max-new-tokens", "3"]
    done = command(*arguments, "--option", "corpus=toy-letters-test")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["settings"]["method"] for row in rows] == ["beginning"] * 2 + ["comet"] * 2
    first, second, *_ = (row["answer"] for row in rows)
    assert (first["said"], second["said"]) == ("Dear", "Basil,")
    assert first["scores"] == {"exact": 1.0}
    assert first["meta"] == {"corpus": "toy-letters-test"}
    assert "1.00 0.34–1.00" in done.stdout
    again = command(*arguments, "--option", "corpus=toy-letters-test")
    assert again.returncode == 0, again.stderr
    assert "2 answers are known already" in again.stderr
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4


def test_a_package_that_cannot_be_imported_is_one_line(command, model):
    done = command("eval", model, "--task", "broken", "--method", "comet", "--tokens", "40")
    assert done.returncode == 1
    assert "task 'broken' cannot be imported from toy_missing:Nothing" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_chunk_plan_a_task_and_a_corpus_train(command, model, tmp_path):
    settings = {
        "model": str(model),
        "output": "out",
        "mode": "memory",
        "comet": {"chunk_size": 24, "readout_tokens": 3, "stride": 4, "capacity": 5},
        "mixture": {
            "tasks": {"first-word": 1},
            "options": {"first-word": {"corpus": "toy-letters"}},
            "steps": 2,
            "tokens": [60, 60],
            "batch_tokens": 120,
        },
        "chunks": {"plans": {"alternating": 1}},
        "trainer": {"logging_steps": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done = command("train", "run.yaml", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "loss" in row] == [1, 2]
    settings["chunks"] = {"plans": {"alternatin": 1}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done = command("train", "run.yaml", "--device", "cpu")
    assert "unknown chunk plan 'alternatin'" in done.stderr
    assert "alternating" in done.stderr
