"""`make test-matrix`: its rows, its table and its exit code; no environment is made here."""

import subprocess
import sys
import tomllib

import pytest
from packaging.version import Version

from cometlm.compat import TESTED
from tests import matrix


def test_the_rows_reach_from_the_oldest_to_the_newest_version():
    for name, (oldest, newest) in TESTED.items():
        versions = [Version(getattr(row, name)) for row in matrix.ROWS.values()]
        assert versions == sorted(versions)
        assert versions[0].release[:2] == Version(oldest).release
        assert versions[-1].release[:2] == Version(newest).release


def test_pythons_are_those_that_the_project_names():
    project = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text())["project"]
    named = [
        line.rpartition(" ")[2] for line in project["classifiers"] if ":: Python :: 3." in line
    ]
    assert sorted(named) == sorted(matrix.PYTHONS)


@pytest.mark.parametrize(("failing", "code"), [(None, 0), ("middle", 1)])
def test_one_red_row_makes_it_fail(monkeypatch, capsys, failing, code):
    def run(name, given):
        assert given.core
        said = "3 passed in 1.0s"
        return matrix.Outcome(name, f"versions of {name}", said, 61.4, passed=name != failing)

    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr(sys, "argv", ["matrix", "--core"])
    assert matrix.main() == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(matrix.ROWS)
    for name, line in zip(matrix.ROWS, lines[1:], strict=True):
        assert line.split()[0] == name
        assert ("RED" in line) == (name == failing)
        assert "61 s" in line


def test_a_row_without_an_environment_is_red(monkeypatch, capsys):
    def fails(*command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(matrix, "environment", fails)
    monkeypatch.setattr(sys, "argv", ["matrix", "oldest"])
    assert matrix.main() == 1
    assert "no environment" in capsys.readouterr().out


def test_an_unknown_row_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["matrix", "ancient"])
    with pytest.raises(SystemExit):
        matrix.main()
    assert "got ancient" in capsys.readouterr().err


def test_what_pytest_says_last_is_kept(capfd):
    said, code = matrix.streamed(
        [sys.executable, "-c", "print('a\\n=== 3 passed ===\\n'); exit(4)"]
    )
    assert (said, code) == ("3 passed", 4)
    assert capfd.readouterr().out.startswith("a\n")
