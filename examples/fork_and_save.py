"""Fork a session, let the fork go its own way, and go on from a file in another process.

    python examples/fork_and_save.py

A fork costs nothing, and what it reads the first session never sees. A loaded session is the saved
one to the last bit: expect "90557", "48213", "True" and 2.6 MB.
"""

import argparse
import tempfile
from pathlib import Path

import cometlm

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2-passkey")
options = parser.parse_args()
greedy = {"max_new_tokens": 16, "do_sample": False}

model, tokenizer = cometlm.load(options.model)
session = model.session(tokenizer)
session.read("The pass key is 48213. Remember it. 48213 is the pass key.\n")
session.read(Path(argparse.__file__).read_text(encoding="utf-8")[:20_000])

fork = session.fork()
fork.read("\nThe pass key was changed. The new pass key is 90557. Remember it.\n")
print("fork:   ", fork.ask("What is the pass key?", **greedy))
answer = session.ask("What is the pass key?", **greedy)
print("session:", answer)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "argparse.comet"
    session.save(path)
    restored = cometlm.Session.load(path, model, tokenizer)
    print("loaded: ", restored.ask("What is the pass key?", **greedy) == answer)
    print(f"file:    {path.stat().st_size / 1e6:.1f} MB")
