"""What callers of transformers do with any model: taken, or refused in one line."""

import copy

import accelerate
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from trl.trainer.utils import create_model_from_path, get_config_model_id

import cometlm
from cometlm import CometForCausalLM
from tests.checkpoints import SIZES
from tests.tiny import error, random_ids, refused, tiny_backbone, tiny_comet

IDS = random_ids(40)[None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with its backbone."""
    folder = tmp_path_factory.mktemp("checkpoint")
    cometlm.attach(tiny_backbone("llama").float(), **SIZES).save_pretrained(folder, backbone=True)
    return folder


# --- from_pretrained and save_pretrained --------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": "auto"},
        {"torch_dtype": torch.float32, "low_cpu_mem_usage": True, "subfolder": ""},
        {"use_safetensors": True, "ignore_mismatched_sizes": True, "weights_only": True},
        {"offload_folder": "unused", "max_memory": {"cpu": "1GB"}, "offload_buffers": False},
        {"attn_implementation": "eager"},
        {"load_in_8bit": False, "variant": None, "tp_plan": None, "trust_remote_code": True},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [CometForCausalLM, AutoModelForCausalLM])
def test_options_that_say_nothing_else_are_taken(saved, kind, options):
    model = kind.from_pretrained(saved, **options)
    assert torch.equal(model(IDS).logits, CometForCausalLM.from_pretrained(saved)(IDS).logits)
    assert model.config.use_cache is options.get("use_cache", True)
    assert (model(IDS).past_key_values is None) == (not model.config.use_cache)


def test_a_config_may_be_given_by_its_place(saved):
    model = CometForCausalLM.from_pretrained(saved, config=str(saved))
    assert torch.equal(model(IDS).logits, CometForCausalLM.from_pretrained(saved)(IDS).logits)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": {"comet": {}}}, "config must be a CometModelConfig, or where one is, got dict"),
        ({"generation_config": {}}, "generation_config must be a GenerationConfig, got dict"),
        ({"backbone_config": {}}, "from_pretrained() does not take backbone_config"),
        ({"model_type": "llama"}, "from_pretrained() does not take model_type"),
        ({"comet": {"chunk_size": 8}}, "from_pretrained() does not take comet"),
    ],
    ids=str,
)
def test_options_of_another_kind_are_refused(saved, options, said):
    with refused(said):
        CometForCausalLM.from_pretrained(saved, **options)


@pytest.mark.parametrize("change", [lambda name: f"module.{name}", None], ids=["renamed", "none"])
def test_a_checkpoint_without_its_memory_is_not_written(saved, tmp_path, change):
    model = CometForCausalLM.from_pretrained(saved)
    given = {change(name): w for name, w in model.state_dict().items()} if change else {}
    with refused("the memory cannot be saved: its weight model.comet.readout is not given"):
        model.save_pretrained(tmp_path / "new", state_dict=given)
    assert not (tmp_path / "new").exists()


def test_torch_dtype_is_dtype(saved):
    model = CometForCausalLM.from_pretrained(saved, torch_dtype=torch.float64)
    assert model.dtype == torch.float64


def test_the_attention_asked_for_is_the_backbones_after_detach(saved):
    model = CometForCausalLM.from_pretrained(saved, attn_implementation="eager")
    assert cometlm.detach(model).config._attn_implementation == "eager"


def test_loading_info_is_that_all_fits(saved):
    model, info = CometForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert isinstance(model, CometForCausalLM)
    assert not any(info.values())
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()


def test_a_checkpoint_in_a_subfolder(tmp_path):
    model = cometlm.attach(tiny_backbone("llama").float(), **SIZES)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "deep" / "er", backbone=True)
    for kind in (CometForCausalLM, AutoModelForCausalLM):
        loaded = kind.from_pretrained(tmp_path, subfolder="deep/er")
        assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "lora").exists()
    again = CometForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "options", [{"backbones": True}, {"max_shards": 3}, {"variant": "fp16"}], ids=str
)
def test_save_pretrained_refuses_what_it_does_not_know(saved, tmp_path, options):
    model = CometForCausalLM.from_pretrained(saved)
    with refused(f"save_pretrained() does not take {next(iter(options))}"):
        model.save_pretrained(tmp_path / "new", **options)
    with refused("safe_serialization must be True"):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_save_pretrained_takes_what_says_nothing_new(saved, tmp_path):
    model = CometForCausalLM.from_pretrained(saved)
    others = {"safe_serialization": True, "save_function": torch.save, "variant": None}
    model.save_pretrained(tmp_path, save_peft_format=True, **others)
    assert torch.equal(CometForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_the_backbone_is_written_in_shards(saved, tmp_path):
    model = CometForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path, backbone=True, max_shard_size="20KB")
    assert len(list((tmp_path / "backbone").glob("model-*.safetensors"))) > 2
    assert torch.equal(CometForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_fields_of_the_config_survive(saved, tmp_path):
    model = CometForCausalLM.from_pretrained(saved)
    model.config.pad_token_id, model.config.use_cache = 7, False
    model.save_pretrained(tmp_path)
    loaded = CometForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.pad_token_id, loaded.config.use_cache) == (7, False)


# --- forward ------------------------------------------------------------------------------------


@torch.no_grad()
def test_return_dict_false_gives_a_tuple(small):
    out = small(IDS, labels=IDS, logits_to_keep=0)
    loss, logits, *_ = small(IDS, labels=IDS, logits_to_keep=0, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    (hidden, *_) = small.model(IDS, return_dict=False)
    assert torch.equal(hidden, small.model(IDS).last_hidden_state)


@pytest.mark.parametrize(
    ("flag", "value"),  # transformers itself refuses output_attentions
    [("output_hidden_states", True), ("return_dict", False)],
)
def test_flags_of_the_config_are_not_ignored(flag, value):
    model = tiny_comet("llama")
    setattr(model.config, flag, value)
    with refused(f"config.{flag} must be {not value}"):
        model(IDS)
    with refused(f"config.{flag} must be {not value}"):
        model.generate(IDS, max_new_tokens=2)


def test_a_loss_without_the_balance_of_experts_is_refused_in_training():
    model = tiny_comet("qwen3_moe")
    model.config.backbone_config.output_router_logits = True
    model(IDS, labels=IDS)
    with refused("backbone_config.output_router_logits must be False"):
        model.train()(IDS, labels=IDS)


def test_embeddings_are_no_text(small):
    table = small.get_input_embeddings()(IDS)
    for call in (small, small.model):
        with refused("input_ids must be given"):
            call(inputs_embeds=table)
        with refused("forward() does not take inputs_embeds"):
            call(IDS, inputs_embeds=table)
    with refused("generate() does not take inputs_embeds"):
        small.generate(inputs_embeds=table, max_new_tokens=2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.PromptTuningConfig, "nor prompt tuning"),
        (peft.PrefixTuningConfig, "must be a CometCache"),
    ],
)
def test_prompt_learning_is_refused_in_one_line(config, said):
    sizes = {"num_layers": 3, "token_dim": 32, "num_attention_heads": 4}  # else peft asks for them
    config = config(num_virtual_tokens=4, task_type="CAUSAL_LM", **sizes)
    model = peft.get_peft_model(tiny_comet("llama").float(), config).eval()
    with refused(said):
        model(input_ids=IDS, labels=IDS)


# --- switches -----------------------------------------------------------------------------------


def test_attention_to_a_memory_has_one_implementation():
    model = tiny_comet("llama")
    want = model(IDS).logits
    for other in ("sdpa", "eager", {"backbone_config": "sdpa"}):
        with refused("attn_implementation must be 'cometlm'"):
            model.set_attn_implementation(other)
    model.set_attn_implementation("cometlm")
    assert torch.equal(model(IDS).logits, want)
    model._backbone.set_attn_implementation("sdpa")
    with refused("the attention of a backbone with memory must be 'cometlm', got 'sdpa'"):
        model(IDS)
    model._backbone.set_attn_implementation("cometlm")
    assert torch.equal(model(IDS).logits, want)


def gradients(model):
    model.train()(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_on_the_backbone_is_recomputation(when, options):
    want = gradients(cometlm.attach(tiny_backbone("llama"), **SIZES))
    backbone = tiny_backbone("llama")
    if when == "before":
        backbone.gradient_checkpointing_enable(options)
    model = cometlm.attach(backbone, **SIZES)
    if when == "after":
        backbone.gradient_checkpointing_enable(options)
    got = gradients(model)
    assert model.is_activation_checkpointing
    for name, grad in want.items():
        assert error(got[name], grad) < 1e-9, name
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    layers = cometlm.detach(model).model.layers
    assert {layer.gradient_checkpointing for layer in layers} == {when == "before"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_prepared_for_training_beside_quantised_weights(when):
    backbone = tiny_backbone("llama").bfloat16()
    if when == "before":
        backbone = peft.prepare_model_for_kbit_training(backbone)
    model = cometlm.attach(backbone, **SIZES)
    if when == "after":
        model = peft.prepare_model_for_kbit_training(model)
    model.enable_input_require_grads()
    model.add_adapter(cometlm.lora_config(r=2))
    model.train()(IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_B" in name for name in trained)
    assert any(".comet." in name for name in trained)
    assert all("lora_" in name or ".comet." in name for name in trained)


def test_continuous_batching_is_refused(small):
    with refused("continuous batching keeps pages of keys and values, and a memory has none"):
        small.generate_batch([[5, 6, 7]])
    with refused("continuous batching"), small.continuous_batching_context_manager():
        pass


# --- models without weights, elsewhere, or in a graph -------------------------------------------


def test_a_model_is_made_of_a_config(saved, tmp_path):
    config = AutoConfig.from_pretrained(saved)
    for model in (AutoModelForCausalLM.from_config(config), CometForCausalLM(config)):
        assert model.config.comet_config == cometlm.CometConfig(**SIZES)
        assert model(IDS).logits.isfinite().all()
    model.eval().save_pretrained(tmp_path, backbone=True)
    loaded = CometForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    back = cometlm.detach(model)
    assert back.config._attn_implementation == "sdpa"


def test_a_model_on_the_meta_device_gets_its_weights_later():
    whole = tiny_comet("llama")
    with accelerate.init_empty_weights():
        empty = cometlm.attach(tiny_backbone("llama"), **SIZES)
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(empty.eval()(IDS).logits, whole(IDS).logits)


def test_a_memory_that_was_offloaded_is_named(tmp_path):
    model = accelerate.cpu_offload(tiny_comet("llama"), torch.device("cpu"))
    with refused("the memory's weights cannot be offloaded, but comet.readout has no data here"):
        model(IDS)


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_is_not_exported(small, strict):
    said = "checked by value"
    with pytest.raises(Exception, match=said):  # torch wraps it when it traces bytecode
        torch.export.export(small, (IDS,), strict=strict)


def test_one_graph_for_a_whole_call_is_refused(small):
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ids are checked by value"):
        torch.compile(small, backend="eager", fullgraph=True)(IDS)
    torch._dynamo.reset()


# --- trainers ------------------------------------------------------------------------------------


def test_a_trainer_evaluates_to_a_loss(tmp_path):
    model = tiny_comet("llama").float()
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 3
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    called = []
    trainer = Trainer(
        model, arguments, eval_dataset=rows, compute_metrics=lambda _: called.append(1) or {}
    )
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(float(model(IDS, labels=IDS).loss), rel=1e-4)
    assert called == [1]


def test_a_trainers_metrics_have_logits_if_asked(tmp_path):
    model = tiny_comet("llama").float()
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 3
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    model.config.logits_with_labels = True
    found = Trainer(model, arguments).predict(rows)
    with torch.no_grad():
        want = model(IDS).logits
        model.train()
        assert model(IDS, labels=IDS).logits is None
    assert error(torch.from_numpy(found.predictions[:1]), want) < 1e-4
    assert found.metrics["test_loss"] == pytest.approx(float(model(IDS, labels=IDS).loss), rel=1e-4)


def test_a_trainer_that_smooths_labels_shifts_them(tmp_path):
    """It shifts those of models that it knows to be causal by their names."""
    model = tiny_comet("llama").float().train()
    arguments = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, label_smoothing_factor=1e-9
    )
    batch = {"input_ids": IDS, "labels": IDS}
    smoothed = Trainer(model, arguments).compute_loss(model, dict(batch))
    assert float(smoothed) == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_trl_loads_a_model_by_its_path(saved):
    model = CometForCausalLM.from_pretrained(saved)
    for path in (saved, get_config_model_id(model.config)):
        found = create_model_from_path(str(path), dtype="float32", device_map=None)
        assert torch.equal(found(IDS).logits, model(IDS).logits)


def test_a_model_without_its_head_has_no_checkpoint(small, tmp_path):
    for call in (small.model.save_pretrained, type(small.model).from_pretrained):
        with refused("a CometModel has no checkpoint of its own"):
            call(tmp_path)


def test_a_copy_is_a_model_of_its_own():
    """As trainers make reference models."""
    model = tiny_comet("llama")
    want = model(IDS).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
        other.model.comet.readout.zero_()
    assert torch.equal(model(IDS).logits, want)
    assert cometlm.detach(other).lm_head is other.lm_head
