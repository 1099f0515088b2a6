"""`cometlm demo`: what is hidden in a text and asked for, and what reading it took."""

import re

import pytest

from cometlm import Session
from cometlm.cli.demo import PASSKEY
from tests import real
from tests.cli.said import count_of

TEXT = "The lamp of the lighthouse went out in the night, and nobody saw the ship.\n" * 8


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def table(out):
    """Rows of the demo's table of figures: tokens, and memory held."""
    rows = re.findall(r"^ *([\d,]+)  +[\d,]+  +([\d.]+ \w+)  +[\d.]+ \w+$", out, re.MULTILINE)
    return [(int(tokens.replace(",", "")), held) for tokens, held in rows]


def hidden_at(out):
    """Tokens before the number."""
    (place,) = re.findall(r"^hidden  The pass key .* \(after ([\d,]+) tokens\)$", out, re.MULTILINE)
    return int(place.replace(",", ""))


def test_demo_prints_memory_at_every_tenth(command, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 16, encoding="utf-8")
    code, out, _ = command("demo", "--file", str(path), "--tokens", "1000", "--facts", "5")
    assert code == 0
    assert re.search("tokens +tokens/s +memory held +peak memory", out)
    rows = table(out)
    assert [tokens // 100 for tokens, _ in rows] == list(range(1, 11))
    assert len({held for _, held in rows}) == 1
    asked = re.findall(r"\nhidden  (.+) \(after ([\d,]+) tokens\)\nasked   (.+)\nanswer  .*", out)
    assert len(asked) == 6  # with the number
    places = [int(place.replace(",", "")) for _, place, _ in asked]
    assert places == sorted(places)
    assert "What is the pass key?" in {question for _, _, question in asked}
    assert re.search(
        r"\nfound \d of 6: \d+ s to read, \d+ s to ask, with a peak memory of [\d.]+ \w+", out
    )


@pytest.mark.parametrize(("depth", "place"), [("0", 0), ("0.5", 500), ("1", 1000)])
def test_demo_hides_a_number_where_it_is_told_to(command, monkeypatch, tmp_path, depth, place):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 16, encoding="utf-8")
    monkeypatch.setattr(Session, "ask", lambda self, *args, **options: " 31415\n")
    read = []
    reading = Session.reading
    monkeypatch.setattr(
        Session, "reading", lambda s, texts: reading(s, (read.append(t) or t for t in texts))
    )
    arguments = ("--tokens", "1000", "--passkey", "31415", "--depth", depth)
    code, out, _ = command("demo", "--file", str(path), *arguments)
    assert code == 0
    text = "".join(read)
    assert text.count("The pass key is 31415.") == 1
    assert text[: text.index("\nThe pass key")] == (TEXT * 16)[: text.index("\nThe pass key")]
    assert place <= hidden_at(out) <= place + 700
    assert "answer  31415 (found)\n\nfound 1 of 1" in out


@pytest.mark.parametrize("key", ["123", "1234567", "12a45", "01234", "１２３４５"])
def test_demo_hides_numbers_only(command, text_file, key):
    code, _, err = command("demo", "--file", text_file, "--passkey", key)
    assert code == 1
    assert "--passkey must be a number of 5 digits" in err


def test_demo_stops_after_so_many_tokens(command, text_file):
    code, out, _ = command("demo", "--file", text_file, "--tokens", "30")
    assert code == 0
    needle = 30  # at most
    assert (
        30 <= count_of(out) <= 30 + needle + 2 * 12
    )  # a whole chunk, and what is known of the next


def test_demo_reads_little_more_than_it_is_told_to(command, monkeypatch, tmp_path):
    """A session takes text in windows of 16,384 characters; what was hidden would be far behind."""
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 64, encoding="utf-8")
    asked = []
    monkeypatch.setattr(
        Session, "ask", lambda self, *args, **options: asked.append(self.characters) or "no"
    )
    code, _, _ = command("demo", "--file", str(path), "--tokens", "100", "--facts", "2")
    assert code == 0
    assert len(asked) == 3
    assert all(characters < 2 * 2048 + 500 for characters in asked)


def test_demo_of_a_shorter_text_reads_all_of_it(command, text_file):
    arguments = ("--tokens", "1000", "--passkey", "12345", "--depth", "0.9")
    code, out, _ = command("demo", "--file", text_file, *arguments)
    assert code == 0
    read = f"{TEXT}\n{PASSKEY.format(key=12345)}\n"  # at its end, since its place is beyond
    assert count_of(out) == len(real.tokenizer("smollm2")(read)["input_ids"])
    assert "tokens, at the end)" in out


def test_demo_hides_inside_a_text_that_is_shorter_than_asked_for(command, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 16, encoding="utf-8")
    total = len(real.tokenizer("smollm2")(TEXT * 16)["input_ids"])
    code, out, _ = command("demo", "--file", str(path), "--passkey", "12345", "--depth", "0.5")
    assert code == 0
    assert 0.5 * total <= hidden_at(out) <= 0.5 * total + 700


def test_demo_hides_facts_and_says_which_were_found(command, monkeypatch, tmp_path):
    """What is right stands in the text that was read, and nothing is left out."""
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 16, encoding="utf-8")
    read = []
    reading = Session.reading
    monkeypatch.setattr(
        Session, "reading", lambda s, texts: reading(s, (read.append(t) or t for t in texts))
    )
    asked = []
    monkeypatch.setattr(Session, "ask", lambda self, question, **o: asked.append(question) or "no")
    code, out, _ = command("demo", "--file", str(path), "--tokens", "1000", "--facts", "7")
    assert code == 0
    hidden = re.findall(r"^hidden  (.+) \(after", out, re.MULTILINE)
    assert len(hidden) == len(set(hidden)) == len(asked) == 8
    assert all(f"\n{sentence}\n" in "".join(read) for sentence in hidden)
    assert out.count("answer  no (not found)") == 8
    assert "found 0 of 8" in out
