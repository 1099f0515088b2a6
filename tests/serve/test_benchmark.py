"""`benchmarks/serving.py` over a tiny model: what it measures, and what it would notice."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from serving_parts import load
from serving_parts.load import Asked
from tests import real

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return real.save_backbone(tmp_path_factory.mktemp("serve") / "tiny-model")


def measured(folder, where, what, *options):
    command = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), what]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "--model", str(folder), *options], cwd=where, env=environment, check=True
    )
    return json.loads((where / "out" / f"serving-{what}.json").read_text())


def test_a_chat_costs_the_same_bytes(folder, tmp_path):
    found = measured(folder, tmp_path, "turns", "--turns", "24")
    assert found["history sent"]["tokens of the last prompt"] > 24 * 20
    sizes = found["bytes of a session's file"]
    assert 0 < sizes["least"] <= sizes["most"]


@pytest.mark.parametrize(
    ("what", "options"),
    [("turns", ["--turns", "15"]), ("beside", ["--turns", "1"]), ("load", ["--clients", "0"])],
)
def test_too_little_to_compare(folder, tmp_path, what, options):
    with pytest.raises(subprocess.CalledProcessError):
        measured(folder, tmp_path, what, *options)
    assert not (tmp_path / "out").exists()


def test_eight_answers_beside_one(folder, tmp_path):
    found = measured(folder, tmp_path, "together")
    assert len(found["ratios"]) == 5
    assert found["tokens a second, 8 answers"] > 0


def test_transformers_serve_beside_it(folder, tmp_path):
    found = measured(folder, tmp_path, "beside", "--turns", "2")
    both = [found[f"{name} serve"] for name in ("cometlm", "transformers")]
    assert all(one["tokens of the last prompt"] > 40 for one in both)
    assert (tmp_path / "out" / "serving-beside.png").stat().st_size > 1000


def test_no_answer_is_anothers(folder, tmp_path):
    found = measured(folder, tmp_path, "load", "--clients", "4", "--minutes", "0.1")
    assert found["went wrong"] == []
    assert found["answers asked again"] > 4
    assert found["of them different"] == 0


def test_an_answer_that_is_anothers_is_noticed(monkeypatch):
    monkeypatch.setattr(load, "ask", lambda server, parent, text: load.Streamed(text="yes"))
    right = Asked(None, "Is it?", "yes", "one")
    found = load.again(None, [right, replace(right, answer="no")])
    assert found["of them different"] == 1
    assert found["different"][0]["under load"] == "no"
