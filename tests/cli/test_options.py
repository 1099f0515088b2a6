"""Options that verbs share: declared once, shown by each verb, and checked in one line."""

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from cometlm.cli import options
from cometlm.cli.options import GenerationOptions, LoadOptions, VerbCommand, with_options
from tests.cli.said import TEXT, new_session, one_line

SIZES = ("chunk-size", "readout-tokens", "stride", "capacity", "overlap")
PLACE = ("device", "dtype", "quantization")
VERBS = {
    "read": (*SIZES, *PLACE),
    "chat": (*SIZES, *PLACE, "temperature", "max-new-tokens"),
    "generate": (*SIZES, *PLACE, "temperature", "max-new-tokens"),
    "info": (*SIZES, *PLACE),
    "plan": (*SIZES, *PLACE),
    "demo": (*SIZES, *PLACE),
    "ask": ("device", "quantization", "temperature", "max-new-tokens"),
    "train": ("device",),
}


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_what_a_verb_takes(command, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = command(verb, "--help")
    assert code == 0
    assert [name for name in VERBS[verb] if f"--{name} " not in out] == []
    assert ("Sizes of the memory" in out) == ("chunk-size" in VERBS[verb])


def test_all_options_reach_load(command, loads, text_file):
    sizes = {name: number for number, name in enumerate(SIZES, 3)}
    place = {"device": "cpu", "dtype": "float32", "quantization": "8bit"}
    given = [f"--{name}={value}" for name, value in {**sizes, **place}.items()]
    code, _, err = command("read", "tiny", text_file, *given)
    assert code == 0, err
    ((name, got),) = loads
    assert name == "tiny"
    assert str(got.pop("dtype")) == "torch.float32"
    assert got == {
        "device": "cpu",
        "quantization": "8bit",
        **{name.replace("-", "_"): value for name, value in sizes.items()},
    }


def test_what_is_not_given_is_left_to_load(command, loads, text_file):
    assert command("read", "tiny", text_file)[0] == 0
    assert loads == [("tiny", {"device": None, "dtype": None})]


WRONG = [
    ("--chunk-size", "0", "1"),
    ("--readout-tokens", "-2", "1"),
    ("--overlap", "-1", "0"),
    ("--stride", "many", "integer"),
    ("--dtype", "int8", "floating-point"),
    ("--quantization", "2bit", "4bit, 8bit"),
]


@pytest.mark.parametrize(("option", "value", "bound"), WRONG)
@pytest.mark.parametrize("verb", ["read", "demo"])
def test_a_wrong_value_is_one_line(command, loads, text_file, verb, option, value, bound):
    arguments = ["tiny", text_file] if verb == "read" else []
    code, out, err = command(verb, *arguments, option, value)
    assert (code, out, loads) == (2, "", [])
    assert err.startswith("error: ")
    message = one_line(err)
    assert option in message
    assert repr(value) in message
    assert bound in message


def test_a_session_is_asked_with_the_quantization_given(command, loads, model):
    new_session(model, TEXT[:300]).save("s")
    answer = ["--max-new-tokens", "2"]
    assert command("ask", "s", "Why?", *answer)[0] == 0
    assert command("ask", "s", "Why?", "--quantization", "8bit", *answer)[0] == 0
    assert [given.get("quantization") for _, given in loads] == [None, "8bit"]


@pytest.mark.parametrize("option", ["--speed", "--memory", "--bandwidth"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_what_a_plan_counts_with_is_more_than_nothing(command, option, value):
    code, _, err = command("plan", "tiny", option, value)
    assert code == 1
    assert f"{option} must be more than 0, got {value}" in err


def test_plan_refuses_a_quantised_backbone_that_is_trained_or_counted(command, loads):
    code, _, err = command("plan", "tiny", "--quantization", "4bit")
    assert code == 1
    assert "--trained must be below 1, got 1" in one_line(err)
    code, _, err = command("plan", "tiny", "--quantization", "4bit", "--speed", "3")
    assert code == 1
    assert "--speed 3" in one_line(err)
    assert not loads


# --- the mechanism ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fruit:
    apples: Annotated[int, typer.Option(min=1, help="How many.")] = 2
    pears: Annotated[int | None, typer.Option()] = None


MANY = Fruit(apples=7)


def app_of(verb):
    app = typer.Typer()
    app.command(cls=VerbCommand)(with_options(verb))
    return app


@pytest.mark.parametrize(
    ("line", "want"),
    [
        (["x"], ("x", Fruit(), Fruit(apples=7).apples)),
        (["x", "--apples", "3", "--pears", "4"], ("x", Fruit(apples=3, pears=4), 7)),
    ],
)
def test_a_group_becomes_options_and_comes_back_whole(line, want):
    seen = []

    def verb(name: str, fruit: Fruit, number: int = 7) -> None:
        """Eat."""
        seen.append((name, fruit, number))

    assert CliRunner().invoke(app_of(verb), line).exit_code == 0
    assert seen == [want]


def test_a_group_as_a_default_gives_defaults():
    seen = []

    def verb(fruit: Fruit = MANY) -> None:
        seen.append(fruit)

    assert CliRunner().invoke(app_of(verb), ["--pears", "1"]).exit_code == 0
    assert seen == [Fruit(apples=7, pears=1)]


def test_no_option_is_declared_by_two_groups():
    names = [name for group in (LoadOptions, GenerationOptions) for name in vars(group())]
    assert len(set(names)) == len(names)
    assert "chunk_size" in inspect.signature(with_options(_verb)).parameters


def _verb(model: options.Model, loading: LoadOptions, generation: GenerationOptions) -> None: ...


@pytest.mark.parametrize("line", [[], ["--apples", "3"]])
def test_a_command_without_its_model_says_what_to_type(line):
    def verb(model: options.Model, fruit: Fruit) -> None: ...

    result = CliRunner().invoke(app_of(verb), line)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert "Missing argument 'model'" in said.replace("MODEL", "model")
    assert f"Try: verb smollm2 {' '.join(line)}".strip() in said
