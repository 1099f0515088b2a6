"""Test suites of other projects, run against a tiny model with memory.

A suite comes out of the source distribution of the installed version, at test time; none of it is
kept here. A driver, a file beside this one, is put into it as `conftest.py` and chooses what runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Outcome:
    """How a suite ended: names of its tests.

    Attributes:
        inherent: failed, as the list of what is inherent says.
        failed: failed otherwise.
        stale: entries of that list that no failed test matches.
    """

    passed: list[str]
    skipped: list[str]
    inherent: list[str]
    failed: list[str]
    stale: list[str]

    def __str__(self) -> str:
        counts = {name: len(found) for name, found in vars(self).items()}
        return ", ".join(f"{name} {count}" for name, count in counts.items())


def fetched(package: str, folder: Path) -> Path:
    """The `tests` folder of the installed version's source distribution, as a package.

    Raises:
        subprocess.CalledProcessError: the index does not give it.
    """
    wanted = f"{package}=={metadata.version(package)}"
    options = ["--no-binary", ":all:", "--no-deps", "--disable-pip-version-check", "-q"]
    pip = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), wanted]
    subprocess.run(pip, check=True, timeout=600)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (tests,) = folder.glob("*/tests")
    (tests / "__init__.py").touch()
    return tests


def run(tests: Path, driver: str, target: str, inherent: Mapping[str, str]) -> Outcome:
    """Run a suite in a process of its own.

    Args:
        tests: its folder.
        driver: a file beside this one, which becomes the suite's `conftest.py`.
        target: the file of the suite that runs.
        inherent: patterns for names of tests that must fail, and why.
    """
    (tests / "conftest.py").write_text((HERE / driver).read_text(encoding="utf-8"))
    report = tests / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", "-o", "addopts="]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", f"tests/{target}"],
        cwd=tests.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr[-2000:]
    print(done.stdout[-20000:])
    return sorted_out(report, inherent)


def sorted_out(report: Path, inherent: Mapping[str, str]) -> Outcome:
    """What a JUnit report says of each test."""
    ended: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = str(case.get("name"))
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "passed"
        kind = "skipped" if kinds == {"skipped"} else kind
        if ended.get(name) != "failed":  # one of several parts of a test
            ended[name] = kind
    by_kind = {
        kind: sorted(name for name, end in ended.items() if end == kind)
        for kind in ("passed", "skipped", "failed")
    }
    failed = by_kind.pop("failed")
    meant = [name for name in failed if any(re.search(pattern, name) for pattern in inherent)]
    stale = [pattern for pattern in inherent if not any(re.search(pattern, n) for n in failed)]
    return Outcome(**by_kind, inherent=meant, failed=sorted(set(failed) - set(meant)), stale=stale)
