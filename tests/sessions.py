"""Sessions over tiny models, for tests of what they keep."""

import copy
import functools
import random

import torch

import cometlm
from cometlm import Session
from tests import real
from tests.tiny import scramble, tiny_backbone

TEXT = "".join(
    f"On day {i} the keeper of the lamp wrote: <|im_start|> wind {i * 37 % 100}, naïve ☂️ sea.\n"
    for i in range(12)
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5, "rank": 2}
GREEDY = {"do_sample": False, "eos_token_id": None}


@functools.cache
def model_of(kind):
    if kind == "like gemma":
        backbone = tiny_backbone("qwen3", vocab_size=len(real.tokenizer(kind)))
        sizes = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5, "rank": 2}
        model = cometlm.attach(backbone, **sizes)
        scramble(model.model.comet, 0.5)
        return model
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.bfloat16}
    switches = {"no global": "global_memory", "no temporary": "temporary_memory", "no gate": "gate"}
    family = "qwen3" if kind == "qwen3" else "llama"
    sizes = {switches[kind]: False} if kind in switches else {}
    sizes |= {"overlap": 3} if kind == "overlap" else {}
    sizes |= {"chunk_size": 180} if kind == "long chunks" else {}
    model = real.tiny_comet(family, **sizes).to(dtypes.get(kind, torch.float64))
    if kind == "mixed":
        model.model.comet.float()
    return model


@functools.cache
def tokenizer_of(kind):
    tokenizer = copy.deepcopy(real.tokenizer("like gemma" if kind == "like gemma" else "smollm2"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def session_of(kind="llama"):
    return Session(model_of(kind), tokenizer_of(kind))


def read_at_random(session, seed):
    """A few reads of text and ids."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 6)):
        if rng.random() < 0.7:
            begin = rng.randrange(len(TEXT))
            session.read(TEXT[begin : begin + rng.randrange(300)])
        else:
            session.read([rng.randrange(50) for _ in range(rng.randrange(1, 30))])


def going_on(session, count=4):
    """The next tokens, and the exact logits that they were chosen by: what the session holds."""
    logits = []
    hook = session.model.lm_head.register_forward_hook(
        lambda module, given_input, out: logits.append(out[0, -1].clone())
    )
    try:
        return session.continuation(count), torch.stack(logits)
    finally:
        hook.remove()


def assert_same(ours, theirs):
    assert ours.stats() == theirs.stats()
    assert ours.characters == theirs.characters
    if theirs.stats().tokens == 0:
        return
    (ids, logits), (want_ids, want_logits) = going_on(ours), going_on(theirs)
    assert ids == want_ids
    assert torch.equal(logits, want_logits)


def reloaded(session, path):
    session.save(path)
    return Session.load(path, session.model, session.tokenizer)
