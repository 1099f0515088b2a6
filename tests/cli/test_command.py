"""The command says how threads wait before torch is loaded."""

import os
import subprocess
import sys

import pytest

import cometlm_command

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.parametrize(
    "said", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}], ids=str
)
def test_threads_wait_for_a_short_time_unless_the_user_says_how(monkeypatch, said):
    monkeypatch.setattr(os, "environ", {**said})
    found = []
    monkeypatch.setattr("cometlm.cli.main.run", lambda: found.append(dict(os.environ)))
    cometlm_command.run()
    assert found == [said or {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}]


def test_torch_is_not_loaded_before():
    code = "import sys, cometlm_command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
