"""A judge: another model that says whether an answer agrees with the right one.

It is asked over OpenAI's interface, which vLLM, llama.cpp, Ollama and most providers have too.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request

URL = "http://localhost:8000/v1"
_SECONDS = 120
_WAITS = (1.0, 4.0)  # seconds before another try: a server is busy, not wrong
_TOO_MANY = 429
_VERDICT = r"(?:\b(?:NOT|ISN['’]T)\s+(?:(?:ENTIRELY|FULLY|QUITE)\s+)?[*_]*|\bIN-?|\b)CORRECT\b"
_ASKED = """A question was asked about some documents. Is the answer that was given right? It is
right if it says the same as the official answer; how it is worded does not matter.

Question: {question}
Official answer: {answer}
Answer to be judged: {said}

Reply with one word: CORRECT or INCORRECT."""


class Judge:
    """A model behind a server.

    The key is what the environment has as `OPENAI_API_KEY`, if it has one.

    Args:
        model: its name there.
        url: of the interface, up to `/v1`.
    """

    def __init__(self, model: str, url: str = URL) -> None:
        self.model = model
        self.url = url.rstrip("/")

    def verdict(self, question: str, answer: str, said: str) -> float | None:
        """Whether an answer is right: 1 or 0; None if the judge says neither.

        A server that is too busy, fails or does not answer in time is asked three times.

        Raises:
            OSError: the server cannot be reached, refuses, or breaks off.
        """
        content = _ASKED.format(question=question, answer=answer, said=said)
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        reply = self._said({**body, "temperature": 0})
        words = re.findall(_VERDICT, reply.upper())
        return float(words[-1] == "CORRECT") if words else None  # a judge may reason first

    def _said(self, body: dict[str, object]) -> str:
        """What the model replies, of several tries."""
        for seconds in _WAITS:
            try:
                return self._posted(body)
            except OSError as error:
                if not _may_pass(error.__cause__):
                    raise
            time.sleep(seconds)
        return self._posted(body)

    def _posted(self, body: dict[str, object]) -> str:
        """What it replies to one request; what failed is the cause of an error."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.url}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                content = json.load(response)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise OSError(f"the judge {self.model} at {url} refuses: {error}: {said}") from error
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"the judge {self.model} cannot be asked at {url}: {error}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise OSError(f"{url} must answer as OpenAI's interface does, got {error!r}") from error
        return content or ""


def _may_pass(error: BaseException | None) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code == _TOO_MANY or error.code >= 500
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return isinstance(reason, TimeoutError)
