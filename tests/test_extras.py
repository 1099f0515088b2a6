"""What is missing is named at once, with the command that brings it."""

import re
import sys

import pytest
from packaging.requirements import Requirement

import cometlm
from cometlm import extras
from cometlm.cli.train import _NEEDS
from cometlm.data.records import read_records
from cometlm.methods.retrieve import Retrieve
from cometlm.planner.timeline import draw
from tests.test_package import PROJECT


@pytest.fixture
def hide(monkeypatch):
    """Make modules look as if they were not installed."""

    def hidden(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hidden


@pytest.mark.parametrize(("names", "text"), [("a", "a"), ("ab", "a and b"), ("abc", "a, b and c")])
def test_listed(names, text):
    assert extras.listed(list(names)) == text


def test_nothing_is_said_where_nothing_is_missing():
    assert extras.lacks("this", ["json", "torch"]) is None


def test_what_is_missing_is_named_with_the_command(hide):
    hide("peft")
    said = extras.lacks("this", ["peft", "json", "no_such_module"])
    assert said == "this needs peft and no_such_module; run: pip install peft no_such_module"
    assert extras.lacks("this", ["peft"], "make it").endswith("needs peft; run: make it")


@pytest.mark.parametrize("command", [extras.EVAL, extras.PLOT, extras.TRAIN])
def test_commands_name_extras_that_are_declared(command):
    extra = re.fullmatch(r'pip install "cometlm\[(\w+)\]"', command)[1]
    assert extra in PROJECT["optional-dependencies"]


def test_training_looks_for_all_of_its_extra():
    declared = PROJECT["optional-dependencies"]["train"]
    assert set(_NEEDS) == {Requirement(line).name for line in declared}


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("peft", "train", lambda path: cometlm.lora_config()),
        ("datasets", "train", read_records),
        ("bm25s", "eval", lambda path: Retrieve.open(None)),
        ("matplotlib", "plot", lambda path: draw([], 1, path)),
    ],
)
def test_who_needs_an_extra_says_which(hide, tmp_path, module, extra, use):
    hide(module)
    with pytest.raises((ImportError, ValueError), match=rf'needs {module}; .*cometlm\[{extra}\]"$'):
        use(tmp_path / "file")
