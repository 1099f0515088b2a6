"""Fresh processes that look like another platform: other variables, or a program that pretends."""

import os
import subprocess
import sys
from pathlib import Path

# A C locale in which Python is kept from taking everything for UTF-8.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


# What other packages do on Windows is theirs: they are imported as they are here, and then what
# Python lacks there is hidden, and the platform's name changed.
WINDOWS = """
import ast, importlib.abc, importlib.util, pathlib, sys

ABSENT = {"fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}

class Windows(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

home = pathlib.Path(importlib.util.find_spec("cometlm").origin).parent
for file in sorted(home.rglob("*.py")):
    for line in ast.parse(file.read_text(encoding="utf-8")).body:
        names = [a.name for a in getattr(line, "names", [])] if isinstance(line, ast.Import) else []
        names += [line.module] if isinstance(line, ast.ImportFrom) else []
        root = names[0].partition(".")[0] if names else "cometlm"
        if root != "cometlm" and root not in sys.stdlib_module_names:
            try:
                exec(ast.unparse(line))
            except ImportError:
                pass  # of an extra
import typer.rich_utils

for name in ABSENT:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Windows())
sys.platform = "win32"
"""

# The tiny model in the place of `load`.
TINY = """
from cometlm.cli import console
from tests import real
console.load = lambda *_, **__: (real.tiny_comet(), real.tokenizer("smollm2"))
"""

# `python -c ... ARGUMENTS` is then `cometlm ARGUMENTS`.
COMMAND = """
import sys
sys.argv[0] = "cometlm"
from cometlm.cli.main import run
run()
"""


def run(program, *arguments, stdin="", **environment):
    """What a fresh process does; its output as bytes."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        input=stdin.encode(),
        capture_output=True,
        timeout=600,
        check=False,
    )
