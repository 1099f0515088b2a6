"""`cometlm serve` and `cometlm key`: what they refuse, and a server that is a process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from cometlm.cli.main import app
from cometlm.cli.serve import NEEDS, serve
from cometlm.serve.keys import Keys
from tests import real
from tests.tiny import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return real.save_backbone(tmp_path_factory.mktemp("serve") / "tiny-model")


def cometlm(*arguments, **options):
    program = "from cometlm.cli.main import run; run()"
    return [sys.executable, "-c", program, *map(str, arguments)], options


def test_it_does_not_let_others_in_by_accident():
    with refused("--host 0.0.0.0 lets others in"):
        serve("no-such-model", None, host="0.0.0.0")
    with refused("--host :: lets others in"):
        serve("no-such-model", None, host="::")


def test_an_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "uvicorn")
    monkeypatch.setattr("cometlm.extras.find_spec", lambda name: None)
    with refused('pip install "cometlm[serve]"'):
        serve("no-such-model", None)
    assert "uvicorn" in NEEDS


def test_a_key_is_shown_and_not_kept(tmp_path, capsys):
    path = tmp_path / "keys"
    app(["key", "ann", "--keys", str(path)], standalone_mode=False)
    made = capsys.readouterr().out.strip()
    assert re.fullmatch(r"sk-comet-[\w-]{43}", made)
    assert made not in path.read_text()
    assert Keys.read(path).owner_of(made)


@pytest.mark.slow
def test_a_server_that_is_a_process(folder, tmp_path):
    """It answers, and ends by itself when it is told to, after what runs."""
    command, _ = cometlm(
        "serve", folder, "--port", 0, "--chunk-size", 12, "--stride", 4, "--capacity", 5,
        "--readout-tokens", 3, "--store", tmp_path / "store", "--dtype", "float32", "--grace", 1,
    )  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        for line in process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                break
        assert found
        with urllib.request.urlopen(found[1] + "/", timeout=60) as page:
            assert page.headers.get_content_type() == "text/html"
        body = {"model": "tiny-model", "prompt": "Once", "max_tokens": 3}
        request = urllib.request.Request(
            found[1] + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] <= 3
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert time.monotonic() - began < 30
        assert len(list((tmp_path / "store").glob("*.safetensors"))) == 1
    finally:
        process.kill()
        process.wait()
