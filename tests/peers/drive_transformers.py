"""transformers' tests of any model, on a tiny one with memory; becomes `conftest.py` of its suite.

Its sdist lacks the folders below `tests`: two mixins of them are left out.
"""

import sys
import types
import unittest
from pathlib import Path

import torch
from transformers import LlamaConfig

from cometlm import CometForCausalLM, CometModelConfig

for name, mixin in (
    ("exporters.test_export", "ExportTesterMixin"),
    ("generation.test_utils", "GenerationTesterMixin"),
):
    for part in (f"tests.{name.partition('.')[0]}", f"tests.{name}"):
        sys.modules[part] = types.ModuleType(part)
    setattr(sys.modules[f"tests.{name}"], mixin, type(mixin, (), {}))

from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402


class ModelTester:
    """What the mixin asks for."""

    batch_size, seq_length, is_training = 2, 40, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        text = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            intermediate_size=37,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        sizes = {"chunk_size": 16, "readout_tokens": 4, "stride": 4, "capacity": 8, "rank": 2}
        return CometModelConfig(backbone_config=text, comet=sizes)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        mask = torch.ones(shape, dtype=torch.long)
        ids = ids_tensor(shape, self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class CometModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CometForCausalLM,)

    def setUp(self):
        self.model_tester = ModelTester(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:  # which the mixin gives to transformers' own models only
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs


(Path(__file__).parent / "test_comet.py").write_text("from .conftest import CometModelTest\n")
