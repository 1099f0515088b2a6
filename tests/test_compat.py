"""Other versions of torch and transformers: their names, and what runs without private entries."""

import inspect
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch

import cometlm
from cometlm import compat
from cometlm.core import attention, recompute
from tests.tiny import error, random_ids, tiny_comet

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "src").rglob("*.py"))


@pytest.mark.parametrize(
    ("torch_version", "transformers_version", "bounds"),
    [
        ("2.8.0", "5.24.0", ["torch 2.8.0", "transformers 5.24.0", "torch>=2.9"]),
        ("2.15.0+cpu", "5.9.1", ["torch 2.15.0+cpu", "transformers 5.9.1", "transformers>=5.10"]),
        ("1.13.1", "4.57.0", ["torch 1.13.1", "transformers 4.57.0"]),
    ],
)
def test_versions_that_are_too_old_are_refused(torch_version, transformers_version, bounds):
    with pytest.raises(ImportError) as caught:
        compat.check_versions(torch_version, transformers_version)
    said = str(caught.value)
    assert "\n" not in said
    for bound in bounds:
        assert bound in said


@pytest.mark.parametrize(
    ("torch_version", "transformers_version"), [("2.16.0", "5.24.0"), ("3.0", "6.0.0.dev0")]
)
def test_newer_versions_than_any_tested_are_named_once(torch_version, transformers_version):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compat.check_versions(torch_version, transformers_version)
    (one,) = caught
    for part in (torch_version, transformers_version, *(new for _, new in compat.TESTED.values())):
        assert part in str(one.message)


def test_a_build_of_ones_own_is_taken_with_a_word():
    with pytest.warns(UserWarning, match=r"torch main-3f2a\+x/y and transformers 5\.24\.0"):
        compat.check_versions("main-3f2a+x/y", "5.24.0")


@pytest.mark.parametrize(
    ("torch_version", "transformers_version"),
    [("2.9.0", "5.10.1"), ("2.13.0+cpu", "5.23.0"), ("2.15.3", "5.24.9"), ("2.11.0a0", "5.17")],
)
def test_tested_versions_are_taken_in_silence(torch_version, transformers_version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.check_versions(torch_version, transformers_version)


@pytest.mark.parametrize(
    ("versions", "kind", "code"),
    [
        ({"torch": "2.8.0", "transformers": "4.57.1"}, "ImportError", 1),
        ({"torch": "2.99.0"}, "UserWarning", 0),
    ],
)
def test_importing_the_package_says_so_in_one_line(versions, kind, code):
    given = "; ".join(f"{name}.__version__ = {version!r}" for name, version in versions.items())
    program = f"import torch, transformers; {given}; import cometlm"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code
    (line,) = [line for line in done.stderr.splitlines() if f"{kind}: " in line]
    for name, version in versions.items():
        assert f"{name} {version}" in line


def test_this_project_asks_for_the_oldest_versions_that_it_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = {f"{name}>={old}" for name, (old, _) in compat.TESTED.items()}
    assert oldest <= set(project["dependencies"])


# --- the cache's two names ---


@pytest.mark.parametrize("whole", [True, False])
def test_a_cache_has_both_names_on_every_version(whole):
    model = tiny_comet("llama")
    model = model if whole else model.model
    ids = random_ids(30)[None]
    out = model(ids[:, :20], use_cache=True)
    assert out.cache is out.past_key_values
    assert isinstance(out.cache, cometlm.CometCache)
    assert out[compat.CACHE] is out.cache
    first = model(ids[:, 20:], past_key_values=out.cache, use_cache=True)
    second = model(ids[:, 20:], cache=out.cache, use_cache=True)
    assert torch.equal(first[0], second[0])
    with pytest.raises(ValueError, match="cache and past_key_values"):
        model(ids[:, 20:], cache=out.cache, past_key_values=out.cache)


def test_generate_takes_both_names(small):
    ids = random_ids(30)[None]
    past = small(ids[:, :20], use_cache=True).cache
    options = {"max_new_tokens": 9, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        wanted = small.generate(ids, **options)[:, 30:]
        for name in ("cache", "past_key_values"):
            assert torch.equal(
                small.generate(ids[:, 20:], **{name: past}, **options)[:, 10:], wanted
            )


def test_transformers_sees_what_forward_takes():
    """The Trainer keeps the columns that forward's signature names."""
    names = inspect.signature(cometlm.CometForCausalLM.forward).parameters
    assert {"input_ids", "attention_mask", "labels", "past_key_values"} <= set(names)


# --- activation checkpointing under both names ---


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
def test_both_names_of_the_switches_lead_to_our_recomputation(name):
    model = tiny_comet("llama")
    kwargs = {f"{name}_kwargs": {"every": 3, "use_reentrant": False}}
    # As the Trainer of transformers 5.17 says it.
    getattr(model, f"{name}_enable")(**kwargs, every_n_layers=1, offload=False)
    assert model.training_plan.recomputation == recompute.Recomputation(every=3)
    assert getattr(model, f"is_{name}") is True
    getattr(model, f"{name}_disable")()
    assert model.training_plan.recomputation is None
    assert getattr(model, f"is_{name}") is False
    with pytest.raises(ValueError, match="does not take depth"):
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"depth": 3}})


# --- without torch's newer and private entries ---


@pytest.mark.parametrize(
    ("text", "native"), [("flags : avx2 avx512_bf16", True), ("flags : avx2", False), (None, False)]
)
def test_cpu_abilities_before_torch_2_11(monkeypatch, tmp_path, text, native):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(compat, "_CPU_INFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert compat.cpu_abilities() == {"bf16": native}
    wanted = torch.bfloat16 if native else torch.float32
    assert cometlm.device.default_dtype(torch.device("cpu")) == wanted


def results(model, ids):
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return [out.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_attention_without_the_private_kernel(monkeypatch, family):
    model = tiny_comet(family).train()
    ids = random_ids(40)[None]
    wanted = results(model, ids)
    pieces = (ids[:, :17], ids[:, 17:18], ids[:, 18:])  # one token in an open chunk among them
    logits = model.eval()(ids).logits
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    assert compat.cpu_flash_attention() is None
    monkeypatch.setattr(attention, "_FLASH", None)
    for got, want in zip(results(model.train(), ids), wanted, strict=True):
        assert error(got, want) < 1e-9
    past, parts = None, []
    for piece in pieces:
        out = model.eval()(piece, past_key_values=past, use_cache=True)
        past = out.past_key_values
        parts.append(out.logits)
    assert error(torch.cat(parts, 1), logits) < 1e-9


class _Stop(Exception):
    pass


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("every", [1, 2])
def test_recomputation_without_the_private_pass_number(monkeypatch, private, every):
    """Also after a pass that broke off in a chunk, and after one that wanted no parameter."""
    if not private:
        monkeypatch.setattr(recompute, "backward_pass", lambda: None)
    model = tiny_comet("llama").train()
    ids = random_ids(60)[None]
    wanted = results(model, ids)
    model.activation_checkpointing_enable({"every": every})
    for got, want in zip(results(model, ids), wanted, strict=True):
        assert error(got, want) < 1e-9
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    for stop_after in (2, 4):
        with _breaking(model, stop_after), pytest.raises(_Stop):
            loss.backward(retain_graph=True)
        model.zero_grad()
    loss.backward(retain_graph=True)
    for got, want in zip(_grads(model), wanted[1:], strict=True):
        assert error(got, want) < 1e-9


def _grads(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


class _breaking:
    """Let the backward pass fail in the chunk that runs again as number `after`."""

    def __init__(self, model, after):
        self.cell = model.model.cells[0]
        self.left = after

    def __enter__(self):
        def count(*_):
            self.left -= 1
            if self.left < 0:
                raise _Stop

        self.hook = self.cell.register_forward_pre_hook(count)

    def __exit__(self, *exc):
        self.hook.remove()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_private_entries_of_torch_are_looked_up_in_one_file(path):
    text = path.read_text(encoding="utf-8")
    assert path.name == "compat.py" or not re.search(r"torch\._C|ops\.aten\._", text)
