"""Read a text of any length in flat memory, and ask about its beginning.

    python examples/read_and_ask.py                    # Python's own argparse, some 20,000 tokens
    python examples/read_and_ask.py --file book.txt

The memory `smollm2-passkey` keeps one number that it was told to keep, so expect "48213", however
long the text is. The bytes of memory stop growing after a few chunks.
"""

import argparse

import cometlm

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2-passkey")
parser.add_argument("--file", default=argparse.__file__)
options = parser.parse_args()

model, tokenizer = cometlm.load(options.model)
session = model.session(tokenizer)
session.read("The pass key is 48213. Remember it. 48213 is the pass key.\n")
with open(options.file, encoding="utf-8") as text:
    for stats in session.reading(text):  # session.read(text) does the same without a word
        if stats.chunks % 10 == 1:
            print(f"{stats.tokens:7,} tokens read, {stats.memory_bytes / 1e6:.2f} MB held")
print(session.ask("What is the pass key?", max_new_tokens=16, do_sample=False))
