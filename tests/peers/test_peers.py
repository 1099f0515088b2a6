"""transformers' and peft's own test suites: 0 failures but those that are inherent."""

import pytest

from tests.peers.suites import fetched, run

pytestmark = pytest.mark.slow

NO_STATES = "hidden states and attention weights of all layers are not kept"
ONE_ATTENTION = "attention to a memory has one implementation"
CHUNKS = "what is recomputed are chunks, so no layer is switched to checkpoint itself"
HOLDS_ALL = "weights that are missing are an error"

TRANSFORMERS = {
    r"test_attention_outputs$": NO_STATES,
    r"test_batching_equivalence$": NO_STATES,
    r"test_eager_matches_sdpa_inference_": NO_STATES,
    r"test_hidden_states_output$": NO_STATES,
    r"test_model_outputs_equivalence$": NO_STATES,
    r"test_retain_grad_hidden_states_attentions$": NO_STATES,
    r"test_can_set_attention_dynamically$": ONE_ATTENTION,
    r"test_sdpa_can_dispatch_non_composite_models$": ONE_ATTENTION,
    r"test_gradient_checkpointing_enable_disable$": CHUNKS,
    r"test_peft_gradient_checkpointing_enable_disable$": CHUNKS,
    r"test_training_gradient_checkpointing": CHUNKS,
    r"test_model_weights_reload_no_missing_tied_weights$": HOLDS_ALL,
    r"test_correct_missing_keys$": "a model without its head has no checkpoint of its own",
    r"test_from_pretrained_no_checkpoint$": "a checkpoint has a name",
    # The first passes where memory that nobody wrote to happens to hold what is wanted.
    r"test_(all_tensors_are_parameter_or_buffer|init_weights_can_init_buffers)$": (
        "init_weights() gives no weights: load them"
    ),
    r"test_generation_tester_mixin_inheritance$": "the sdist lacks GenerationTesterMixin",
    r"test_tp_plan_matches_params$": "no tensor parallelism",
}
PEFT = {
    r"LoraConfig-config_kwargs[23]-": "activated LoRA counts tokens from the end of a text",
    r"test_merge_layers\[": "a checkpoint holds a merged backbone if asked; a warning says so",
    r"test_passing_input_embeds_works": "a memory reads token ids",
    r"test_lora_conversion": NO_STATES,
}


@pytest.mark.parametrize(
    ("package", "driver", "target", "inherent"),
    [
        ("transformers", "drive_transformers.py", "test_comet.py", TRANSFORMERS),
        ("peft", "drive_peft.py", "test_decoder_models.py", PEFT),
    ],
)
def test_a_peers_suite(package, driver, target, inherent, tmp_path, capsys):
    outcome = run(fetched(package, tmp_path), driver, target, inherent)
    with capsys.disabled():
        print(f"\n{package}: {outcome}")
    assert outcome.failed == []
    assert outcome.stale == []
    assert len(outcome.passed) > 50
