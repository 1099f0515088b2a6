"""People's own training data as records in a table.

A record is a conversation (`messages`), a `prompt` with its `completion`, both as words or both as
messages, or plain `text`. Beside messages there may be `tools`, and `chat_template_kwargs` (such as
`enable_thinking`). CoMeT's published data is read too: JSON lines of `uniq_id` and
`messages`, these as a string of JSON.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cometlm.extras import TRAIN, lacks
from cometlm.session.chat_template import content_as_text
from cometlm.text_file import read_blocks

if TYPE_CHECKING:
    from datasets import Dataset

Record = dict[str, Any]
Placed = tuple[str, Record]  # a record and where it stands
FORMS = (("messages",), ("prompt", "completion"), ("text",))
_BESIDE = ("tools", "chat_template_kwargs")  # of the chat template
_ENDINGS = (".jsonl", ".json")
_OF_DATASETS = ("dataset_info.json", "dataset_dict.json")  # files that only describe a dataset
_SHOWN = 5


def read_records(source: str | Path) -> Dataset:
    """Read training data.

    Args:
        source: a file of JSON lines (or one JSON list), a directory of such files, or the name of
            a dataset on the hub or of its directory, maybe with a split: "name:train[:1000]".

    Returns:
        A dataset with the columns of one of `FORMS`. Messages are JSON, each by itself, as is what
        stands beside them: the fields of a table have one type, and all of its rows have all.

    Raises:
        ValueError: a line that is not JSON, records of no known form or of several, empty ones,
            conversations in which the assistant says nothing; each with where it stands.
        OSError: a file or a dataset cannot be read.
        ImportError: `datasets` is not installed.
    """
    if message := lacks("training data", ["datasets"], TRAIN):
        raise ImportError(message, name="datasets")
    from datasets import Dataset

    records = [(where, _plain(where, record)) for where, record in _placed(source)]
    if not records:
        raise ValueError(f"{source} holds no records")
    form = _form(records[0][1])
    _refuse(records, lambda record: _form(record) != form, f"are not {form} like the first")
    _refuse(records, _is_empty, "are empty")
    _refuse(records, _has_no_answer, "have no assistant turn with words in it")
    beside = {name for _, record in records for name in _BESIDE if name in record}
    missing = dict.fromkeys(sorted(beside))
    return Dataset.from_list([{**missing, **_as_row(where, record)} for where, record in records])


# --- where records come from --------------------------------------------------------------------


def _placed(source: str | Path) -> Iterator[tuple[str, Any]]:
    path = Path(source)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS)
        if any(file.name in _OF_DATASETS for file in files):
            raise ValueError(
                f"{source} was written by datasets' save_to_disk; write JSON lines instead, with "
                "to_json"
            )
        if not files:
            return _read_dataset(str(source))
    elif not path.exists():
        if path.suffix in _ENDINGS:
            raise FileNotFoundError(f"there is no file {source}")
        return _read_dataset(str(source))
    return (pair for file in files for pair in read_json_file(file))


def read_json_file(
    path: Path, parse_float: Callable[[str], float] | None = None
) -> Iterator[tuple[str, Any]]:
    """What a file of JSON lines, or of one JSON list, holds: where each row stands, and the row.

    Args:
        parse_float: makes a number that is no whole one of its text.

    Raises:
        ValueError: text that is not JSON or not UTF-8; says where.
        OSError: the file cannot be read.
    """
    yield from json_rows(path.read_bytes(), str(path), parse_float)


def json_rows(
    raw: bytes, path: str, parse_float: Callable[[str], float] | None = None
) -> Iterator[tuple[str, Any]]:
    """The same of what a file holds.

    Raises:
        ValueError: as `read_json_file`.
    """
    text = "".join(read_blocks(io.BytesIO(raw), path))
    if text.lstrip().startswith("["):
        for i, record in enumerate(_parsed(text, path, 0, parse_float)):
            yield f"{path} record {i + 1}", record
        return
    # Not splitlines: what it takes for the end of a line may stand in a JSON string.
    for i, line in enumerate(text.split("\n")):
        if line.strip():
            yield f"{path} line {i + 1}", _parsed(line, path, i, parse_float)


def _parsed(text: str, path: str, before: int, parse_float: Callable[[str], float] | None) -> Any:
    """JSON from the middle of a file, with `before` lines in front of it."""
    try:
        return json.loads(text, parse_float=parse_float)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} line {before + error.lineno} is not JSON: {error.msg} (column {error.colno})"
        ) from error


def _read_dataset(source: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except OSError as error:
        raise OSError(
            f"{name!r} is no file or directory of {' or '.join(_ENDINGS)} files and cannot be "
            f"loaded as a dataset: {error}"
        ) from error
    for i, row in enumerate(rows):
        yield f"{source} row {i + 1}", _without_nulls(dict(row))  # that a table filled rows with


# --- what a record must be ----------------------------------------------------------------------


def _plain(where: str, record: Any) -> Record:
    """A record with the columns of its form only, its messages as a list."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object, got {type(record).__name__}")
    names = next((names for names in FORMS if set(names) <= record.keys()), None)
    if names is None:
        known = "; ".join(" and ".join(names) for names in FORMS)
        raise ValueError(f"{where} has {', '.join(record) or 'no fields'}; records need {known}")
    plain = {name: record[name] for name in names}
    if isinstance(plain.get("messages"), str):
        try:
            plain["messages"] = json.loads(plain["messages"])
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: messages is not JSON: {error}") from error
    for name, value in plain.items():
        _check_value(where, name, value)
    if len({type(value) for value in plain.values()}) > 1:
        raise ValueError(f"{where}: {' and '.join(names)} must both be words or both messages")
    if any(isinstance(value, list) for value in plain.values()):
        plain = {name: [_as_text(one) for one in value] for name, value in plain.items()}
        plain |= {name: _parsed_beside(where, name, record) for name in _BESIDE if record.get(name)}
    return plain


def _as_text(message: Record) -> Record:
    """A message whose content is text, and not a list of parts of it."""
    message = _without_nulls(message, but="arguments")
    return {**message, "content": content_as_text("", message.get("content") or "")}


def _without_nulls(value: Any, but: str | None = None) -> Any:
    """JSON without fields that are null, which chat templates take for some that are there.

    Args:
        but: the name of fields that stay as they are, such as what a tool is called with.
    """
    if isinstance(value, dict):
        return {
            name: one if name == but else _without_nulls(one, but)
            for name, one in value.items()
            if one is not None
        }
    return [_without_nulls(one, but) for one in value] if isinstance(value, list) else value


def _as_row(where: str, record: Record) -> Record:
    """A record as a table can hold it: words, and JSON."""
    row: Record = {}
    for name, value in record.items():
        if name in _BESIDE:
            row[name] = _as_json(where, name, value)
        elif isinstance(value, list):
            row[name] = [_as_json(where, name, message) for message in value]
        else:
            row[name] = value
    return row


def _as_json(where: str, name: str, value: Any) -> str:
    written = json.dumps(value, ensure_ascii=False, default=str)  # of a dataset's dates, say
    _check_words(where, name, written)
    return written


def _parsed_beside(where: str, name: str, record: Record) -> Any:
    """What stands beside messages; it may be written as JSON."""
    value, kind = record[name], list if name == "tools" else dict
    try:
        given = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {name} is not JSON: {error}") from error
    if not isinstance(given, kind):
        raise ValueError(f"{where}: {name} must be a {kind.__name__}, got {type(given).__name__}")
    return given


def _check_value(where: str, name: str, value: Any) -> None:
    if isinstance(value, list) and name != "text":
        for message in value:
            calls = isinstance(message, dict) and message.get("tool_calls")
            needed = {"role"} if calls else {"role", "content"}
            if not isinstance(message, dict) or not needed <= message.keys():
                raise ValueError(
                    f"{where}: each of {name} must have role and content, got {message!r}"
                )
            _check_words(where, f"{name}.role", message["role"])
            if message.get("content") is not None or not calls:
                content = message["content"]
                if isinstance(content, list):
                    content = content_as_text(f"{where}: {name}", content)
                _check_words(where, f"{name}.content", content)
    elif name == "messages":
        raise ValueError(f"{where}: messages must be a list, got {type(value).__name__}")
    else:
        _check_words(where, name, value)


def _check_words(where: str, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write
        raise ValueError(f"{where}: {name} is not Unicode text: {error.reason}") from error


def _form(record: Record) -> str:
    """The names of a record's columns, and whether they hold words or messages."""
    kind = " as messages" if any(isinstance(value, list) for value in record.values()) else ""
    return " and ".join(name for name in record if name not in _BESIDE) + kind


def _learned(record: Record) -> Any:
    """What of a record is learned: its words, or the messages that hold them."""
    names = [name for name in record if name not in _BESIDE]
    return record[names[-1]]  # a prompt may be empty


def _is_empty(record: Record) -> bool:
    learned = _learned(record)
    return not (learned.strip() if isinstance(learned, str) else learned)


def _has_no_answer(record: Record) -> bool:
    turns = _learned(record)
    return isinstance(turns, list) and not any(
        turn["role"] == "assistant" and (turn["content"].strip() or turn.get("tool_calls"))
        for turn in turns
    )


def _refuse(records: list[Placed], bad: Callable[[Record], bool], what: str) -> None:
    found = [where for where, record in records if bad(record)]
    if found:
        shown = ", ".join(found[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
        raise ValueError(f"{len(found)} of {len(records)} records {what}: {shown}")
