"""Environments with a client each, beside the one that runs the tests.

Clients want other versions than `dev` of what both need, so each is installed into a folder of its
own, `.clients/NAME`, which stays until its list of packages changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from tests.matrix import ROOT, UV

HERE = Path(__file__).parent
HOME = ROOT / ".clients"


def python_of(client: str) -> Path:
    """The Python of a client's environment, which is made if it is not whole.

    Args:
        client: the name of its list of packages beside this file.

    Raises:
        subprocess.CalledProcessError: it cannot be installed.
    """
    folder, packages = HOME / client, HERE / f"{client}.txt"
    python, done = folder / "bin" / "python", folder / ".done"
    wanted = f"{sys.version}\n{packages.read_text(encoding='utf-8')}"
    HOME.mkdir(exist_ok=True)
    with FileLock(HOME / f"{client}.lock"):
        if done.exists() and done.read_text(encoding="utf-8") == wanted:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        _uv("venv", "--python", sys.executable, folder)
        _uv("pip", "install", "--no-deps", "--python", python, "-r", packages)
        done.write_text(wanted, encoding="utf-8")
    return python


def run(client: str, url: str) -> None:
    """Let the client's script talk to the server at a URL.

    Raises:
        AssertionError: the script failed.
        subprocess.CalledProcessError: the client cannot be installed.
    """
    quiet = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "true",
        "LANGSMITH_TRACING": "false",
        "PYTHONWARNINGS": "ignore",
    }
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OPENAI"))}
    done = subprocess.run(
        [python_of(client), HERE / f"use_{client}.py", url],
        env={**ours, **quiet, "NO_PROXY": "127.0.0.1"},
        cwd=HOME,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def _uv(*arguments: object) -> None:
    command = [*UV, *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
