"""The table of fields in docs/serving.md says what the server does with each of OpenAI's."""

import json
from pathlib import Path

import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as OfChats
from openai.types.completion_create_params import CompletionCreateParamsStreaming as OfCompletions
from openai.types.responses.response_create_params import (
    ResponseCreateParamsStreaming as OfResponses,
)

from cometlm.serve.errors import ApiError
from cometlm.serve.schema import ChatBody, CompletionBody, ResponseBody, checked

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "serving.md"
ENDPOINTS = {
    "chat": (ChatBody, set(OfChats.__annotations__)),
    "completions": (CompletionBody, set(OfCompletions.__annotations__)),
    "responses": (ResponseBody, set(OfResponses.__annotations__)),
}
LEAST = {
    "chat": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
    "completions": {"model": "tiny", "prompt": "Hi"},
    "responses": {"model": "tiny", "input": "Hi"},
}


def told(endpoint, field):
    """What the table has to say of a field."""
    body, theirs = ENDPOINTS[endpoint]
    if field in body.model_fields:
        return "yes" if field in theirs else "ours"
    if values := body.NEUTRAL.get(field):
        return "only " + ", ".join(f"`{json.dumps(value)}`" for value in values)
    return "no" if field in theirs or field in body.NEUTRAL else ""


FIELDS = sorted({f for body, theirs in ENDPOINTS.values() for f in theirs | {*body.model_fields}})
ROWS = [(f"`{field}`", *(told(endpoint, field) for endpoint in ENDPOINTS)) for field in FIELDS]


@pytest.mark.skipif(
    f"openai=={openai.__version__}\n" not in (ROOT / "constraints.txt").read_text(),
    reason="another version of openai has other fields",
)
def test_the_table_is_the_server_s():
    """A row that is missing or wrong is shown as it should be; the last column is free."""
    _, _, table = DOCS.read_text(encoding="utf-8").partition("| field | chat | completions |")
    rows, _, _ = table.partition("\n\n")
    found = [tuple(cell.strip() for cell in row.split("|")[1:5]) for row in rows.split("\n")[2:]]
    assert found == ROWS


REFUSED = [(e, f) for e in ENDPOINTS for f in FIELDS if told(e, f) in ("no", "")]
NEUTRAL = [
    (endpoint, field, value)
    for endpoint, (body, _) in ENDPOINTS.items()
    for field, values in body.NEUTRAL.items()
    for value in values
]


@pytest.mark.parametrize(("endpoint", "field"), REFUSED)
def test_what_the_table_refuses(endpoint, field):
    body = ENDPOINTS[endpoint][0]
    with pytest.raises(ApiError) as caught:
        checked(body, {**LEAST[endpoint], field: "x"}, "")
    assert (caught.value.status, caught.value.code) == (400, "unsupported")
    assert caught.value.param == field
    if told(endpoint, field) == "":  # unknown at this endpoint; null is as good as nothing
        assert body.model_validate({**LEAST[endpoint], field: None})


@pytest.mark.parametrize(("endpoint", "field", "value"), NEUTRAL)
def test_what_the_table_takes(endpoint, field, value):
    body = ENDPOINTS[endpoint][0]
    assert body.model_validate({**LEAST[endpoint], field: value})
    with pytest.raises(ApiError) as caught:
        checked(body, {**LEAST[endpoint], field: "something else"}, "")
    assert caught.value.param == field
