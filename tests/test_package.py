"""The package as a whole: what it needs, which way its imports point, what every file holds."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cometlm
from cometlm.checkpoints.backbones import _GGUF_READERS
from cometlm.tasks.ruler import NEEDED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCE = ROOT / "src" / "cometlm"
FILES = sorted(SOURCE.rglob("*.py"))


@functools.cache
def source(path):
    return path.read_text(encoding="utf-8")


@functools.cache
def tree(path):
    return ast.parse(source(path))


# --- a bare install -----------------------------------------------------------------------------

# Run first in a fresh process: modules that a bare install would not have cannot be found.
HIDE = """
import sys
import tomllib
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {hidden!r}
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def requirements(name, extra=""):
    """Distributions that `name` requires here, without extras but the one named."""
    for line in metadata.requires(name) or ():
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
            yield canonicalize_name(wanted.name), wanted.extras


def closure(name):
    """All distributions that installing `name` brings."""
    found, waiting = {name}, [(name, "")]
    while waiting:
        for needed, extras in requirements(*waiting.pop()):
            try:
                metadata.version(needed)
            except metadata.PackageNotFoundError:
                continue  # for other platforms, or a CPU build that needs less
            new = [(needed, extra) for extra in extras if metadata.requires(needed)]
            if needed not in found:
                found.add(needed)
                new.append((needed, ""))
            waiting += new
    return found


@functools.cache
def hidden_modules():
    """Installed top-level modules that a bare install would not have."""
    allowed = closure("cometlm")
    owners = metadata.packages_distributions()
    return {
        module
        for module, names in owners.items()
        if not {canonicalize_name(name) for name in names} & allowed
        and module not in sys.stdlib_module_names
    }


def run_bare(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden_modules()) + program, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


# All in one process, which takes seconds to begin. A step that fails ends it.
BARE = """
import importlib, socket, sys, torch
def refuse(*_, **__): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
import cometlm
assert cometlm.attach and cometlm.load and cometlm.Session
accelerator = torch.accelerator.current_accelerator()
assert accelerator is None or not torch.get_device_module(accelerator).is_initialized()

torch.accelerator.current_accelerator = lambda check_available=False: None
import cometlm.cli.main
for arguments in (["--help"], ["train", sys.argv[1]]):
    sys.argv = ["cometlm", *arguments]
    try:
        cometlm.cli.main.run()
    except SystemExit as end:
        print("\\ncode", end.code or 0)
for name in MODULES:
    importlib.import_module(name)
print("every module")
"""

# Modules that stand on an extra; the command line says which when they cannot be imported.
NEED_EXTRAS = {
    "cometlm.eval.lm_eval",
    "cometlm.serve.access_log",
    "cometlm.serve.admission",
    "cometlm.serve.app",
    "cometlm.serve.chat",
    "cometlm.serve.conversations",
    "cometlm.serve.files",
    "cometlm.serve.http",
    "cometlm.serve.items",
    "cometlm.serve.metrics",
    "cometlm.serve.page",
    "cometlm.serve.pages",
    "cometlm.serve.responses",
    "cometlm.serve.run",
    "cometlm.serve.schema",
    "cometlm.serve.service",
    "cometlm.serve.sessions",
    "cometlm.serve.start",
    "cometlm.serve.thread",
    "cometlm.train.arguments",
    "cometlm.train.samples",
    "cometlm.train.trainer",
    "cometlm.train.run",
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """What a bare install does: import the package, show help, be asked to train, and the rest."""
    config = tmp_path_factory.mktemp("bare") / "run.yaml"
    config.write_text("{model: smollm2, output: out, records: data.jsonl}")
    modules = sorted(set(map(module_name, FILES)) - NEED_EXTRAS)
    return run_bare(BARE.replace("MODULES", repr(modules)), str(config))


def test_extras_are_hidden_and_requirements_are_not():
    """Else the tests below say nothing."""
    hidden = hidden_modules()
    assert {"bm25s", "gguf", "hypothesis", "pytest", "matplotlib", "accelerate"} <= hidden
    assert not {"torch", "transformers", "safetensors", "typer", "rich", "tokenizers"} & hidden
    done = run_bare("import gguf")
    assert "No module named 'gguf'" in done.stderr


def test_a_bare_install_imports_and_shows_help(bare):
    """Without extras, an accelerator or the network; importing does not touch the device."""
    shown, code, _ = bare.stdout.partition("code 0")
    assert code, bare.stderr
    assert re.search(r"\bread\b", shown)


def test_training_without_its_extra_says_what_to_install(bare):
    assert "code 1" in bare.stdout, bare.stderr
    (line,) = bare.stderr.splitlines()  # and nothing else was said, by help neither
    for word in ("trl", "peft", "accelerate", "datasets", 'pip install "cometlm[train]"'):
        assert word in line


def test_every_module_imports_in_a_bare_install(bare):
    assert bare.stdout.endswith("every module\n"), bare.stderr
    assert bare.returncode == 0


# --- what is declared ---------------------------------------------------------------------------


def names_in(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements}


BASE = names_in(PROJECT["dependencies"])
EXTRAS = {
    extra: names_in(lines)
    for extra, lines in PROJECT["optional-dependencies"].items()
    if extra not in ("dev", "docs")  # tools
}


OWNERS = metadata.packages_distributions()


def third_party(path):
    """(distributions that have the module, module, whether at the top) of a file's imports."""
    for name, at_top in imported(path):
        module = name.partition(".")[0]
        if module != "cometlm" and module not in sys.stdlib_module_names:
            assert module in OWNERS, f"{module} is not installed here: what brings it?"
            yield {canonicalize_name(owner) for owner in OWNERS[module]}, module, at_top


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_every_import_is_declared(path):
    """In `dependencies`, or in an extra; those of extras wait until they are needed."""
    for owners, module, at_top in third_party(path):
        if not owners & BASE:
            assert owners & set.union(*EXTRAS.values()), f"{module} is in no extra"
            assert not at_top or module_name(path) in NEED_EXTRAS, (
                f"{module} is not in every install"
            )


def test_every_declared_package_is_imported():
    """What nobody imports must not be installed.

    transformers imports those that read GGUF, fastapi what parses forms, fsspec what speaks to S3,
    and RULER's scripts what they need.
    """
    used = set().union(*(owners for path in FILES for owners, _, _ in third_party(path)))
    theirs = {*_GGUF_READERS, *NEEDED, "python-multipart", "s3fs"}
    assert set.union(BASE, *EXTRAS.values()) - used - theirs == set()
    assert set(NEEDED) <= EXTRAS["ruler"]
    assert set(_GGUF_READERS) <= EXTRAS["demo"]


# --- the arrows ---------------------------------------------------------------------------------

# From the bottom up. A package imports only itself and what stands in an earlier line. Modules at
# the top of the source tree count as packages.
PACKAGES: list[list[str]] = [
    ["__version__"],
    ["sequences", "text_file"],
    ["compat", "config", "extras", "fields", "registry"],
    ["device"],
    ["backbones"],
    ["checkpoints"],
    ["core"],
    ["model_loader"],
    ["session"],
    ["inspection"],
    ["data"],
    ["tasks"],
    ["methods"],
    ["eval"],
    ["parallel"],
    ["train"],
    ["planner"],
    ["serve"],
    [""],  # the public names
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(PACKAGES) for name in names}


def module_name(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in FILES} | {"cometlm.__version__"}


def package(module):
    """The part of the package that a module belongs to: "core" of "cometlm.core.cell"."""
    return f"{module}.".split(".")[1]


def for_types_only(path):
    """Nodes under `if TYPE_CHECKING`, which are never run."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from (below for one in node.body for below in ast.walk(one))


@functools.cache
def imported(path):
    """(module, whether at the top of the file) of all imports that are run.

    `from package import module` counts as the module.
    """
    top, unused, found = set(tree(path).body), set(for_types_only(path)), []
    for node in ast.walk(tree(path)):
        if node in unused:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((full if full in NAMES else node.module, node in top))
    return found


def own_imports(path):
    """Modules of the package that a file imports, wherever in it."""
    return {name for name, _ in imported(path) if name.partition(".")[0] == "cometlm"}


def test_every_package_has_its_place():
    assert {package(name) for name in NAMES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path):
    mine = package(module_name(path))
    others = {package(name) for name in own_imports(path)} - {mine}
    assert {name for name in others if RANK[name] >= RANK[mine]} == set()


def test_no_modules_import_each_other():
    """Not even in a circle of several, and not inside functions either."""
    left = {module_name(path): own_imports(path) - {module_name(path)} for path in FILES}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_torch_distributed_stays_in_its_rooms(path):
    if {"parallel", "train"} & set(path.relative_to(SOURCE).parts):
        return
    assert not [name for name, _ in imported(path) if name.startswith("torch.distributed")]
    nodes = ast.walk(tree(path))
    attributes = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    assert "torch.distributed" not in attributes


def test_the_command_line_is_imported_by_nobody():
    for path in FILES:
        if "cli" in path.relative_to(SOURCE).parts or path.stem == "__main__":
            continue
        names = [name for name, _ in imported(path)]
        assert not [name for name in names if name.startswith("cometlm.cli")], path


# --- every file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_file_begins_with_what_it_is_for(path):
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_file_names_one_makers_devices(path):
    """`torch.accelerator` serves them all."""
    assert "cuda" not in source(path).lower()


def test_the_version_is_in_the_changelog():
    headings = re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cometlm.__version__ in headings
    assert metadata.version("cometlm") == cometlm.__version__


def test_public_names_exist_and_are_documented():
    for name in cometlm.__all__:
        assert getattr(cometlm, name).__doc__, name
