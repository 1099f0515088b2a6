"""Real tokenizers and models out of the packages that `make test` and `make test-slow` install."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import cometlm
from cometlm.checkpoints.backbones import BUILT_IN, converted
from tests.tiny import SMALL as TINY
from tests.tiny import scramble, tiny_backbone

SMALL = {"chunk_size": 64, "readout_tokens": 8, "stride": 8, "capacity": 16}


@functools.cache
def tokenizer(name: str) -> Any:
    """A built-in model's tokenizer, without loading the weights; or one made here like Gemma's."""
    if name == "like gemma":
        return _like_gemma()
    return AutoTokenizer.from_pretrained(str(converted(name, BUILT_IN[name])))


def model(name: str, **sizes: Any) -> cometlm.CometForCausalLM:
    """A built-in model in float32 on the CPU, with small sizes unless told otherwise."""
    loaded, _ = cometlm.load(name, device="cpu", dtype=torch.float32, **{**SMALL, **sizes})
    return loaded


def save_backbone(folder: Path, name: str = "smollm2") -> Path:
    """A tiny backbone and a tokenizer, as a plain transformers directory."""
    own = tokenizer(name)
    tiny_backbone("llama", vocab_size=len(own)).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def _like_gemma() -> Any:
    """Byte-pair merges over the text as a whole, not word by word; trained on our own sources."""
    corpus = [path.read_text() for path in sorted(Path(cometlm.__file__).parent.glob("*.py"))]
    inner = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special: list[str | AddedToken] = ["<unk>", "<bos>", "<|im_start|>", "<|im_end|>"]
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    inner.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=3000, special_tokens=special, show_progress=False)
    )
    inner.pre_tokenizer = None
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>")


def tiny_comet(family: str = "llama", **sizes: Any) -> cometlm.CometForCausalLM:
    """A tiny random model with a memory that takes SmolLM2's tokens."""
    backbone = tiny_backbone(family, vocab_size=len(tokenizer("smollm2")))
    model = cometlm.attach(backbone, **{**TINY, **sizes})
    scramble(model.model.comet, 0.5)
    return model
