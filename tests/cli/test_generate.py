"""`cometlm generate`: going on from a prompt."""

import pytest

from tests.cli.said import GREEDY, TEXT, new_session, one_line


def test_generate_goes_on_from_a_prompt(command, model):
    want = new_session(model).ask(TEXT[:300], template=False, max_new_tokens=15, **GREEDY)
    options = ["--max-new-tokens", "15"]
    assert command("generate", "tiny", TEXT[:300], *options)[:2] == (0, want + "\n")
    assert command("generate", "tiny", "-", *options, stdin=TEXT[:300])[:2] == (0, want + "\n")


def test_a_prompt_is_utf8_whatever_the_terminal_says(command):
    options = ["--max-new-tokens", "5"]
    want = command("generate", "tiny", "Grüße 🙂", *options)
    assert want[0] == 0
    assert command("generate", "tiny", "-", *options, stdin="Grüße 🙂", encoding="ascii") == want


def test_generate_in_the_chat_template(command, model):
    want = new_session(model).ask("Who?", template=True, max_new_tokens=5, **GREEDY)
    done = command("generate", "tiny", "Who?", "--chat", "--max-new-tokens", "5")
    assert done[:2] == (0, want + "\n")


def test_generate_from_nothing_is_one_line(command):
    code, out, err = command("generate", "tiny", "")
    assert (code, out) == (1, "")
    assert "prompt is empty" in one_line(err)


def test_generate_from_bytes_that_are_no_text_is_one_line(command):
    code, out, err = command("generate", "tiny", "-", stdin=b"\xff\xfe")
    assert (code, out) == (1, "")
    assert "UTF-8" in one_line(err) or "utf-8" in one_line(err)


@pytest.mark.parametrize(
    "option", [["--max-new-tokens", "0"], ["--temperature", "-1"], ["--top-p", "2"]], ids=str
)
def test_impossible_generation_options_are_usage_errors(command, option):
    code, out, err = command("generate", "tiny", "Who?", *option)
    assert (code, out) == (2, "")
    assert option[0] in err
