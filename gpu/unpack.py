"""Take a bundle's pieces, say which are missing, install what they hold beside the machine's own.

    python gpu/unpack.py put FOLDER HOME
    python gpu/unpack.py check HOME
    python gpu/unpack.py install HOME

HOME is a folder outside the repository. It holds `pieces` and, once they are installed, `site-…`, a
folder for PYTHONPATH. `install` prints that folder, or nothing where no bundle was put. What cannot
be done is one line on standard error and exit code 2. It needs the standard library and pip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bundle import TEXTS_FILE, version
from pieces import (
    MANIFEST,
    Manifest,
    fault,
    is_piece,
    join,
    read_manifest,
    sha256_of,
    whole_file,
    write_manifest,
)


def put(folder: Path, home: Path) -> None:
    """Copy the pieces that `folder` holds into `home`; others may follow.

    Pieces of another bundle go, unless the new one has the same.

    Raises:
        ValueError: there is no manifest, or a piece in `folder` is damaged (the others are taken).
        OSError: the disk is full or the like.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    kept = home / "pieces"
    kept.mkdir(parents=True, exist_ok=True)
    manifest = _manifest_for(folder, kept)
    damaged = []
    for piece in manifest.pieces:
        if not (folder / piece.name).exists():
            continue
        if fault(piece, folder):  # it must not replace one that is right
            damaged.append(piece.name)
            continue
        with (folder / piece.name).open("rb") as source, whole_file(kept / piece.name) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        _say(f"{piece.name} taken")
    for name in sorted(_strangers(folder, manifest)):
        _say(f"{name} is no piece of this bundle, left out")
    if damaged:
        raise ValueError(f"{', '.join(damaged)} of {folder} damaged, not taken")


def check(home: Path) -> None:
    """Say of each piece whether it is there.

    Raises:
        ValueError: pieces are missing or damaged, or there is no bundle.
    """
    manifest = _manifest_of(home)
    if manifest is None:
        raise ValueError(f"there is no bundle in {home}: gpu/run.sh put FOLDER")
    _say(str(manifest.origin))
    faults = []
    for piece in manifest.pieces:
        found = fault(piece, home / "pieces")
        _say(found or f"{piece.name} is there")
        faults += [found] if found else []
    if faults:
        raise ValueError(f"the bundle in {home} is not whole: {', '.join(faults)}")


def install(home: Path, own_version: str) -> Path | None:
    """The folder with the bundle's packages, installed if they are not; None without a bundle.

    Args:
        own_version: of the cometlm that asks; a bundle of another is refused.

    Raises:
        ValueError: pieces are missing or damaged, another version's, or pip refuses them.
        OSError: the disk is full or the like.
    """
    manifest = _manifest_of(home)
    if manifest is None:
        return None
    if manifest.origin.version != own_version:
        raise ValueError(
            f"the bundle in {home} is of cometlm {manifest.origin.version}, but this is "
            f"{own_version}: make it again"
        )
    site = home / f"site-{manifest.sha256[:12]}"
    with tempfile.TemporaryDirectory(dir=home, prefix=".install-") as work:
        archive = Path(work) / "bundle.zip"
        try:  # whatever was installed earlier: what is said must not depend on it
            join(manifest, home / "pieces", archive)
        except ValueError as error:
            raise ValueError(f"the bundle in {home} is not whole: {error}") from None
        if not site.is_dir():
            _install_wheels(archive, Path(work))
            (Path(work) / "site").rename(site)
    return site


def _install_wheels(archive: Path, work: Path) -> None:
    """Unpack the wheels and install them into `work/site`, texts of corpora into its `texts`."""
    wheels = work / "wheels"
    with zipfile.ZipFile(archive) as file:
        file.extractall(wheels)
    texts = wheels / TEXTS_FILE
    if texts.exists():
        with zipfile.ZipFile(texts) as file:
            file.extractall(work / "site" / "texts")
        texts.unlink()
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--no-index", "--no-deps", "--no-cache-dir", "--target", str(work / "site")),
        *map(str, sorted(wheels.iterdir())),
    ]
    # A configuration of pip's may name constraints or another target; nothing of it is wanted.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ValueError(f"pip cannot install the bundle: {said[-1]}")


def _manifest_for(folder: Path, kept: Path) -> Manifest:
    """The manifest that came with the pieces, else the one that came earlier."""
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder / MANIFEST)
        _drop_others(manifest, kept)
        write_manifest(manifest, kept)
        return manifest
    if (kept / MANIFEST).exists():
        return read_manifest(kept / MANIFEST)
    raise ValueError(f"{folder} holds no {MANIFEST}, and none was put earlier")


def _drop_others(manifest: Manifest, kept: Path) -> None:
    """Remove pieces of another bundle, unless the new one has the same."""
    digests = {piece.name: piece.sha256 for piece in manifest.pieces}
    for path in kept.iterdir():
        if is_piece(path.name) and digests.get(path.name) != sha256_of(path):
            path.unlink()
            _say(f"{path.name} of another bundle removed")


def _manifest_of(home: Path) -> Manifest | None:
    path = home / "pieces" / MANIFEST
    return read_manifest(path) if path.exists() else None


def _strangers(folder: Path, manifest: Manifest) -> set[str]:
    """Names of files that look like pieces, but are not of this bundle."""
    names = {path.name for path in folder.iterdir() if is_piece(path.name)}
    return names - {piece.name for piece in manifest.pieces}


def _say(line: str) -> None:
    print(line, flush=True)


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    try:
        match arguments:
            case ["put", folder, home]:
                put(Path(folder), Path(home))
            case ["check", home]:
                check(Path(home))
            case ["install", home]:
                site = install(Path(home), version())
                _say("" if site is None else str(site))
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
