"""What other packages offer by name."""

import pytest

from cometlm.registry import Registry


@pytest.mark.parametrize("said", ["raise RuntimeError('no driver')", "def ("])
def test_a_package_that_breaks_is_named(tmp_path, monkeypatch, said):
    """However it breaks, and others are found all the same."""
    (tmp_path / "broken_package.py").write_text(said)
    info = tmp_path / "broken_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[toys.here]\nbroken = broken_package:Toy\n")
    monkeypatch.syspath_prepend(tmp_path)
    toys = Registry("toy", "toys.here", {"ball": 1})
    assert list(toys) == ["ball", "broken"]
    assert toys.find("ball") == 1
    with pytest.raises(ValueError, match="toy 'broken' cannot be imported from broken_package:Toy"):
        toys.find("broken")
