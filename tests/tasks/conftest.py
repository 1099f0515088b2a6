"""A real tokenizer, and a corpus to hide things in."""

import pytest

from tests.real import tokenizer
from tests.tasks.shared import PROSE


@pytest.fixture(scope="session")
def words():
    return tokenizer("smollm2")


@pytest.fixture(scope="session")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(PROSE * 100)
    return str(path)
