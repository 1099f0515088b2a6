"""The configuration of a comparison: what it says, and what is refused."""

import math

import pytest

from cometlm.eval.config import Limits, config_of, read_config
from cometlm.methods import Budget
from tests.tiny import refused

SMALL = {"model": "m", "tasks": ["passkey"], "lengths": [200, 100]}


def test_names_stand_for_what_they_name():
    config = config_of({**SMALL, "methods": ["full", "comet"], "samples": 3})
    assert list(config.methods) == ["full", "comet"]
    assert config.lengths_of("passkey") == [100, 200]
    assert config.samples_of("full", "passkey", 100) == 3
    assert list(config_of(SMALL).methods) == ["comet"]
    assert config_of(SMALL).samples_of("comet", "passkey", 100) is None


def test_numbers_of_texts_may_differ():
    values = {
        "model": "m",
        "samples": {100: 20, 200: 6},
        "methods": {"comet": None, "slow": {"method": "summary", "samples": {200: 1}}},
        "tasks": {"passkey": {"options": {"digits": 4}}, "own": {"data": "mine.jsonl"},
                  "short": {"task": "facts", "lengths": [50], "samples": 2}},
    }  # fmt: skip
    config = config_of(values)
    assert config.lengths_of("passkey") == [100, 200]
    assert config.lengths_of("short") == [50]
    found = [config.samples_of(m, "passkey", n) for m in ("comet", "slow") for n in (100, 200)]
    assert found == [20, 6, 20, 1]
    assert config.samples_of("comet", "short", 50) == 2


def test_budgets_are_shared_unless_a_method_has_its_own():
    methods = {"comet": {"budget": None}, "full": {}, "window": {"budget": 512}}
    config = config_of({**SMALL, "budget": "3MB", "methods": methods})
    assert config.budget_of("comet") is None
    assert config.budget_of("full") == Budget(3_000_000, "bytes")
    assert config.budget_of("window") == Budget(512)


def test_a_file_and_changes_to_it(tmp_path):
    path = tmp_path / "compare.yaml"
    path.write_text("model: m\ntasks: {passkey: {}}\nsamples: {4000: 20}\nmethods:\n  comet:\n")
    changes = ["samples.4000=2", "tasks.passkey.options.digits=4", "limits.hours=0.5"]
    config = read_config(path, changes)
    assert config.samples == {4000: 2}
    assert config.tasks["passkey"].options == {"digits": 4}
    assert config.limits == Limits(hours=0.5)


@pytest.mark.parametrize("methods", ["[full, truncate]", "{full: , truncate: }"])
def test_changes_of_what_is_only_named(tmp_path, methods):
    path = tmp_path / "compare.yaml"
    path.write_text(f"model: m\ntasks: [passkey]\nmethods: {methods}\nsizes:\n")
    changes = ["methods.truncate.samples=1", "tasks.passkey.options.digits=4", "sizes.capacity=2"]
    config = read_config(path, changes)
    assert list(config.methods) == ["full", "truncate"]
    assert config.methods["truncate"].samples == 1
    assert config.tasks["passkey"].options == {"digits": 4}
    assert config.sizes == {"capacity": 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modle": "x"}, "unknown field modle; there are model"),
        ({"modle": "x"}, "did you mean model?"),
        ({"tasks": {}}, "tasks must be at least 1, got none"),
        ({"tasks": ["paskey"]}, "tasks.paskey: unknown task 'paskey'"),
        ({"tasks": ["paskey"]}, "did you mean passkey?"),
        ({"tasks": {"passkey": {"optoins": {}}}}, "unknown field tasks.passkey.optoins"),
        ({"tasks": {"x": {"data": "a", "task": "passkey"}}}, "tasks.x.task does not go with data"),
        ({"methods": ["windows"]}, "methods.windows: unknown method 'windows'"),
        ({"methods": {"full": {"budget": "lots"}}}, "methods.full.budget must be tokens like 512"),
        ({"budget": "lots"}, "budget must be tokens like 512"),
        ({"samples": {100: 2}}, "samples of tasks.passkey must say how many texts of 200 tokens"),
        ({"samples": {100: "x"}}, "samples.100 must be int, got 'x'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"lengths": [0]}, "lengths must be at least 1, got 0"),
        ({"limits": {"hours": 0}}, "limits.hours must be more than 0, and a number, got 0"),
        (
            {"limits": {"hours": math.inf}},
            "limits.hours must be more than 0, and a number, got inf",
        ),
        (
            {"limits": {"memory": "20 tons"}},
            "limits.memory must be bytes like 20GiB, got '20 tons'",
        ),
        ({"limits": {"memory": "512"}}, "limits.memory must be bytes like 20GiB, got '512'"),
        ({"dtype": "int8"}, "dtype must be a floating-point dtype"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
    ids=str,
)
def test_what_cannot_be(changes, said):
    with refused(said):
        config_of({**SMALL, **changes})
