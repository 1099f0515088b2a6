"""Lists in pages, as OpenAI has them: so many, behind an id, in one order or the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cometlm.serve.errors import ApiError

_MOST = 100


class PageQuery(BaseModel):
    """Which part of a list is wanted."""

    model_config = ConfigDict(extra="forbid")
    limit: Annotated[int, Field(ge=1, le=_MOST)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: Annotated[str, Field(max_length=256)] | None = None


def page_of(items: Sequence[Mapping[str, Any]], query: PageQuery) -> dict[str, Any]:
    """A page of items, each with an id.

    Args:
        items: all of them, the oldest first.
        query: which are wanted.

    Raises:
        ApiError: `after` is none of them.
    """
    wanted = items if query.order == "asc" else items[::-1]
    if query.after is not None:
        places = [i for i, item in enumerate(wanted) if item["id"] == query.after]
        if not places:
            raise ApiError(f"after: there is no item {query.after!r:.80}", param="after")
        wanted = wanted[places[0] + 1 :]
    page = list(wanted[: query.limit])
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(wanted) > len(page),
    }
