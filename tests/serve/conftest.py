"""One server for tests that leave it as it was."""

import pytest

from tests.serve.running import running


@pytest.fixture(scope="module")
def server():
    with running() as made:
        yield made
