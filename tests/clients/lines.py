"""The lines of docs/serving.md for a client, run as they stand there.

For the scripts beside this one, which run in the clients' own environments: `python use_X.py URL`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
DOCUMENTED = "http://127.0.0.1:8000"  # where the documentation has its server


def documented(client: str) -> dict[str, Any]:
    """Run what stands below a client's heading; the names that it leaves.

    Args:
        client: the heading, without its marks.
    """
    text = DOCS.read_text(encoding="utf-8")
    (section,) = re.findall(rf"^### {re.escape(client)}\n(.*?)(?=^##|\Z)", text, re.M | re.S)
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    program = "\n".join(blocks)
    assert DOCUMENTED in program
    names: dict[str, Any] = {"__name__": client}
    exec(compile(program.replace(DOCUMENTED, url()), f"{DOCS}: {client}", "exec"), names)
    return names


def url() -> str:
    """The server's, without a path."""
    return sys.argv[1]
