"""Clients that people use, against a server: the lines of docs/serving.md, and `use_*.py`."""

import os
import re
import shutil
import subprocess

import pytest

from cometlm.serve.kept import SessionStore
from cometlm.serve.service import Limits, Service
from cometlm.session.writer import Writer
from tests.clients import environments
from tests.clients.lines import DOCS, DOCUMENTED
from tests.serve.running import running
from tests.serve.test_tools import tokenizer_with
from tests.sessions import model_of

pytestmark = pytest.mark.slow

CALLS = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Lyon"}}\n</tool_call>'
KNOWS = "It rains."


class Diligent(Service):
    """Its model calls the tool that it is told of, then says what it learned.

    Without tools it says what a tiny model does. One request comes after another.
    """

    says = None

    async def chat(self, messages, owner, **options):
        self.says = None
        if options["tools"]:
            text = KNOWS if messages[-1]["role"] == "tool" else CALLS
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self.says = [*ids, self.tokenizer.convert_tokens_to_ids("<|im_end|>")]
        return await super().chat(messages, owner, **options)


@pytest.fixture(scope="module")
def server():
    limits = Limits(usual_tokens=40)
    tokenizer = tokenizer_with()
    service = Diligent(model_of("llama"), tokenizer, "smollm2", SessionStore(), limits)
    chosen = Writer._chosen
    with pytest.MonkeyPatch.context() as patch, running(service) as made:
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        patch.setattr("cometlm.serve.service.stop_ids", lambda *_: {end})
        patch.setattr(
            Writer,
            "_chosen",
            lambda writer, logits: (
                chosen(writer, logits) if service.says is None else service.says[len(writer.ids)]
            ),
        )
        yield made


@pytest.mark.parametrize("client", ["langchain", "llama_index", "litellm"])
def test_client(server, client):
    try:
        environments.python_of(client)
    except subprocess.CalledProcessError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{client} cannot be installed: {error.stderr.strip()[-300:]}")
    environments.run(client, server.url)


def test_the_documentation_names_the_versions():
    (section,) = re.findall(r"^## Clients\n(.*?)^##", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    named = re.findall(r"(langchain-openai|llama-index-llms-[a-z-]+|litellm) (\d[\d.]*\d)", section)
    listed = "\n".join(path.read_text() for path in environments.HERE.glob("*.txt")).splitlines()
    assert len(named) == 4
    assert {f"{name}=={version}" for name, version in named} <= set(listed)


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_curl(server):
    (section,) = re.findall(r"^### curl\n(.*?)^##", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    (line,) = re.findall(r"^\$ (curl .*?)^```", section, re.M | re.S)
    command = line.replace(DOCUMENTED, server.url)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert '"object":"chat.completion"' in done.stdout.replace(" ", "")
