"""A corpus of mutated session files: each is refused, in memory of at most twice the file.

So it is where a library loads them and where a server is sent them.

It is loaded in a process of its own, whose data the system limits: what cannot be allocated there
ends in another error than `ValueError`, or in no answer.
"""

import json
import random
import struct
import subprocess
import sys

import pytest

from cometlm import Session
from tests.test_session_damage import joined, parts
from tests.tiny import random_ids, tiny_comet

SLACK = 4 << 20  # bytes: pages of the allocators, modules that are loaded on the way
SIZE = 8 << 20  # of files that would grow: much more than the slack

LOADING = """
import pathlib, resource, sys
from cometlm import Session
from cometlm.session.identity import identity
from tests.tiny import tiny_comet

def used():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))

def upload(path):
    with path.open("rb") as file:
        load_upload(file, model, None, made_by)

model, load = tiny_comet("llama"), lambda path: Session.load(path, model)
if sys.argv[3] == "upload":
    from cometlm.serve.upload import load_upload
    made_by, load = identity(model), upload
files = sorted(pathlib.Path(sys.argv[1]).iterdir())
for path in [*files[:3], *files]:  # the first ones also load what is loaded once
    most = used() + 2 * path.stat().st_size + int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    try:
        load(path)
        said = "was loaded"
    except ValueError as error:
        named = "the file" if sys.argv[3] == "upload" else str(path)
        said = "" if named in str(error) else f"is not named: {error}"
    except BaseException as error:
        said = f"raised {type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    if said:
        print(path.name, said, flush=True)
print("done", len(files))
"""


def with_header(data, **texts):
    """The file with other texts beside its tensors."""
    header, body = parts(data)
    header["__metadata__"].update(texts)
    return joined(header, body)


def with_raw_text(data, key, raw):
    """The same with bytes as they stand in the header."""
    header, body = parts(data)
    header["__metadata__"][key] = "HERE"
    return joined(json.dumps(header).encode().replace(b"HERE", raw), body)


def with_tensor(data, name, entry, content):
    """The file with a tensor instead of what it has of that name, at its end."""
    header, body = parts(data)
    entry["data_offsets"] = [len(body), len(body) + len(content)]
    return joined({**header, name: entry}, body + content)


def grown(good):
    """Files that are large once they are parsed; each is about `SIZE`."""
    many = {
        f"t{i}": {"dtype": "I8", "shape": [], "data_offsets": [0, 0]} for i in range(SIZE // 60)
    }
    document = json.loads(parts(good)[0]["__metadata__"]["cometlm"])
    ones = b"[" + b"1," * (SIZE // 2) + b"1]"
    yield "tensors", joined(many, b"")
    yield (
        "shape",
        joined(b'{"open":{"dtype":"I8","data_offsets":[0,0],"shape":' + ones + b"}}", b""),
    )
    yield "text", with_raw_text(good, "cometlm", b"x" * SIZE)
    yield "wide text", with_raw_text(good, "cometlm", b"x" * SIZE + "😀".encode())
    yield "escapes", with_raw_text(good, "cometlm", b'\\"' * (SIZE // 2))
    yield "wide escapes", with_raw_text(good, "cometlm", b"\\ud83d\\ude00" * (SIZE // 12))
    yield "many texts", with_header(good, **{f"k{i}": "v" for i in range(SIZE // 16)})
    yield "objects", with_header(good, cometlm="[" + "{}," * (SIZE // 3) + "{}]")
    yield "numbers", with_header(good, cometlm=ones.decode())
    yield "deep", with_header(good, cometlm="[" * SIZE)
    yield "deep objects", with_header(good, cometlm='{"a":' * (SIZE // 5))
    yield "long number", with_header(good, cometlm="9" * SIZE)
    sizes = {**document["model"], "sizes": "[" + "{}," * (SIZE // 3) + "{}]"}
    yield "sizes", with_header(good, cometlm=json.dumps({**document, "model": sizes}))
    ids = struct.pack("<q", 90) * (SIZE // 8)
    yield "ids", with_tensor(good, "open", {"dtype": "I64", "shape": [SIZE // 8]}, ids)
    for dtype, size in (("U8", 1), ("F16", 2), ("F32", 4), ("F8_E4M3", 1), ("C64", 8)):
        unknown = {"dtype": dtype, "shape": [SIZE // size]}
        yield f"unknown {dtype}", with_tensor(good, "code", unknown, bytes(SIZE))
    yield "zeros", bytes(SIZE)
    yield "ones", b"\xff" * SIZE
    yield "spaces", struct.pack("<Q", SIZE) + b" " * SIZE


def small_changes(good, rng):
    """Files of about the same size."""
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for i in range(60):
        flipped = bytearray(good)
        flipped[rng.randrange(header if i % 2 else len(good))] ^= 1 << rng.randrange(8)
        yield f"flip {i}", bytes(flipped)
    for i in range(30):
        yield f"cut {i}", good[: rng.randrange(len(good))]
    for length in (0, 1, header, len(good), 10**8, 2**31, 2**40, 2**63, 2**64 - 1):
        yield f"length {length}", struct.pack("<Q", length) + good[8:]
    names = [name for name in parts(good)[0] if name != "__metadata__"]
    for i, name in enumerate(names):
        for dtype in ("F64", "I8", "U64", "C64", "F8_E4M3", "X"):
            changed, body = parts(good)
            changed[name]["dtype"] = "I32" if dtype == changed[name]["dtype"] else dtype
            yield f"dtype {i} {dtype}", joined(changed, body)
        for shape in ([2**40], [2**63], [2**64], [2**31, 2**31], [0], [], [1] * 1000, [-1]):
            changed, body = parts(good)
            changed[name]["shape"] = shape
            yield f"shape {i} {len(shape)} {shape[:1]}", joined(changed, body)


def is_the_same(data, good):
    """Whether a flip changed nothing that is read: blanks, a key's letter that nobody reads."""
    try:
        ours, theirs = parts(data), parts(good)
    except ValueError:
        return False
    return (
        len(ours[0].get("__metadata__", {})) <= 2
        and ours[1] == theirs[1]
        and all(
            ours[0].get("__metadata__", {}).get(key) == text
            for key, text in theirs[0]["__metadata__"].items()
        )
        and {k: v for k, v in ours[0].items() if k != "__metadata__"}
        == {k: v for k, v in theirs[0].items() if k != "__metadata__"}
    )


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its limits")
@pytest.mark.parametrize("way", ["load", "upload"])
def test_a_corpus_of_mutated_files_is_refused(tmp_path, way):
    session = Session(tiny_comet("llama"))
    session.read(random_ids(40))
    session.save(tmp_path / "good", notes={"owner": "ann"})
    good, corpus = (tmp_path / "good").read_bytes(), tmp_path / "corpus"
    corpus.mkdir()
    count = 0
    for name, data in [*small_changes(good, random.Random(0)), *grown(good)]:
        if not is_the_same(data, good):
            (corpus / name.replace(" ", "-")).write_bytes(data)
            count += 1
    assert count > 150
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(corpus), str(SLACK), way],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout == f"done {count}\n", done.stdout + done.stderr[-2000:]
