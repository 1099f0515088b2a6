"""Settings for every test (one thread, reproducible properties), and what several files share."""

import shutil
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

from cometlm import text_file
from cometlm.device import default_device
from cometlm.session import token_stream as text
from tests import real
from tests.tiny import tiny_backbone, tiny_comet

settings.register_profile(
    "default",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# Four times as many of everything: `pytest --hypothesis-profile thorough`.
settings.register_profile("thorough", settings.get_profile("default"), max_examples=400)
settings.load_profile("default")
torch.set_num_threads(1)
# A shell that runs this behind itself, and nohup, have these ignored, as programs then rightly do.
for _name, _handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    _number = getattr(signal, _name, None)
    if _number is not None and signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Files whose tests are marked core: where another version of torch or transformers would show.
CORE = {
    "test_attention", "test_caches", "test_compat", "test_compiling", "test_families",
    "test_fixed_cache", "test_generation", "test_golden", "test_gpu", "test_lora", "test_main",
    "test_model", "test_pretrained", "test_quantised", "test_session_file", "test_train_trl",
}  # fmt: skip


# Files that take longest, longest first: one of them begun last would be waited for.
FIRST = [
    "test_train_together", "test_train_sharded", "test_train_resume", "test_train",
    "test_reading_together",
]  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(FIRST)))
    for item in items:
        if item.path.stem in CORE:
            item.add_marker(pytest.mark.core)


def pytest_report_header():
    device = default_device()
    if device.type == "cpu":
        return "gpu: no accelerator here; tests marked gpu rehearse on the CPU, or are skipped"
    return f"gpu: tests marked gpu run on {device}"


@pytest.fixture(scope="module")
def small_windows():
    """Text comes out of the tokenizer in many steps, as it does in a long text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_WINDOW", 160)
        patch.setattr(text, "_MARGIN", 96)
        patch.setattr(text, "_CONTEXT", 128)
        patch.setattr(text_file, "_BLOCK", 100)
        yield


@pytest.fixture(scope="module")
def small():
    """A tiny model of 96 ids, for what needs no text."""
    return tiny_comet("llama")


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A tiny backbone as a plain transformers directory, with a tokenizer."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny"
    tokenizer = real.tokenizer("like gemma")
    tiny_backbone("llama", vocab_size=len(tokenizer)).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chromium():
    """Chromium of this machine, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="there is no playwright")
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        pytest.skip("there is no Chromium here; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
