"""peft's adapters: before and after attaching, in a `PeftModel`, in checkpoints and Trainers."""

import copy
import json
import warnings

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import cometlm
from cometlm import CometForCausalLM
from cometlm.checkpoints.weights import saved_names
from cometlm.train.trainable import set_trainable
from tests import real
from tests.checkpoints import IDS, SIZES, attached, logits
from tests.tiny import error, random_ids, refused, tiny_backbone

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, beside transformers 5.24

Q = ["q_proj", "v_proj"]
KINDS = {
    "plain": {"target_modules": Q},
    "dora": {"target_modules": Q, "use_dora": True},
    "bias": {"target_modules": ["o_proj"], "bias": "all"},
    "biased": {"target_modules": ["o_proj"], "lora_bias": True},
    "one layer": {"target_modules": Q, "layers_to_transform": [1]},
    "ranks": {"target_modules": Q, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "pattern": {"target_modules": r".*q_proj"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "whole head": {"target_modules": Q, "modules_to_save": ["lm_head"]},
    "whole norms": {"target_modules": Q, "modules_to_save": ["norm"]},  # the memory has some, too
    "with the memory": {"target_modules": Q, "modules_to_save": ["comet"]},
    "tokens": {"target_modules": Q, "trainable_token_indices": [3, 4]},
}

OWN_PARTS = ("lora_", "ia3_l", "modules_to_save", "trainable_tokens_delta")  # of a weight's name


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A tiny backbone that a checkpoint can name; it needs no tokenizer."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny"
    tiny_backbone("llama").float().save_pretrained(folder)
    return folder


def config_of(kind):
    if kind == "ia3":
        targets = ["k_proj", "v_proj", "down_proj"]
        return peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
    return peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **KINDS[kind])


def shaken(model):
    """With every weight of an adapter off its beginning."""
    torch.manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in OWN_PARTS):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def after_attach(named, config):
    model = attached(named)
    model.add_adapter(config)
    return model


def before_attach(named, config):
    backbone = AutoModelForCausalLM.from_pretrained(named).eval()
    peft.inject_adapter_in_model(config, backbone)
    return cometlm.attach(backbone, **SIZES)


def peft_before_attach(named, config):
    return cometlm.attach(
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(named), config), **SIZES
    )


def inside_a_peft_model(named, config):
    return peft.get_peft_model(attached(named), config).get_base_model()


WAYS = (before_attach, peft_before_attach, inside_a_peft_model)
CASES = [(kind, after_attach, True) for kind in (*KINDS, "ia3")]
CASES += [("plain", after_attach, False), ("whole head", after_attach, False)]
CASES += [(kind, way, False) for way in WAYS for kind in ("one layer", "ranks", "ia3", "tokens")]
CASES += [(kind, way, True) for way in WAYS for kind in ("plain", "whole norms", "with the memory")]


@pytest.mark.parametrize(("kind", "way", "whole"), CASES)
def test_an_adapter_is_saved_and_loaded(named, tmp_path, kind, way, whole):
    model = shaken(way(named, config_of(kind)))
    want = logits(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "weights of the backbone")  # none of it is lost
        model.save_pretrained(tmp_path, backbone=whole)
    assert (tmp_path / "lora" / "adapter_config.json").exists()
    assert torch.equal(logits(CometForCausalLM.from_pretrained(tmp_path)), want)
    merged = CometForCausalLM.from_pretrained(tmp_path, merge=True)
    assert error(logits(merged), want) < 1e-4


@pytest.mark.parametrize("kind", ["plain", "dora", "whole head", "tokens", "ia3"])
def test_a_models_own_adapter_is_trained_and_saved(named, tmp_path, kind):
    """All of it, whatever its kind; and of gathered weights, those of `saved_names` are enough."""
    shaken(after_attach(named, config_of(kind))).save_pretrained(tmp_path / "begun")
    model = CometForCausalLM.from_pretrained(tmp_path / "begun").train()
    set_trainable(model, "lora")
    model(IDS, labels=IDS).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {
        name
        for name, _ in model.named_parameters()
        if ".comet." in name or any(part in name for part in OWN_PARTS)
    }
    torch.optim.SGD(model.parameters(), 0.1).step()
    saved = saved_names(model)
    weights = {name: w for name, w in model.state_dict().items() if name in saved}
    assert "model.embed_tokens.weight" not in weights
    model.eval().save_pretrained(tmp_path / "on", state_dict=weights)
    assert torch.equal(logits(CometForCausalLM.from_pretrained(tmp_path / "on")), logits(model))


def test_a_copy_that_cannot_be_trained_in_float32_is_refused(named):
    model = after_attach(named, config_of("whole head")).bfloat16()
    with refused("the adapter's copy of lm_head cannot be beside a backbone in torch.bfloat16"):
        set_trainable(model, "lora")


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
        peft.LoHaConfig(target_modules=Q),
        peft.VeraConfig(target_modules=Q),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_that_no_checkpoint_can_hold_are_refused_at_once(named, config):
    with refused(config.peft_type.value):
        attached(named).add_adapter(copy.deepcopy(config))
    backbone = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(named), config)
    with refused(config.peft_type.value):
        cometlm.attach(backbone, **SIZES)


def test_an_adapter_that_counts_tokens_is_refused(named):
    config = peft.LoraConfig(target_modules=Q, alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    with refused("alora_invocation_tokens must be None"):
        attached(named).add_adapter(config)
    model = peft.get_peft_model(attached(named), config)
    with refused("alora_invocation_tokens must be None"):
        model(input_ids=random_ids(20)[None])


def test_an_adapter_inside_a_peft_model_that_no_checkpoint_can_hold(named, tmp_path):
    model = peft.get_peft_model(attached(named), peft.LoHaConfig(target_modules=Q))
    with refused("peft_type must be LORA or IA3"):
        model.get_base_model().save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    model.merge_and_unload().save_pretrained(tmp_path / "merged", backbone=True)
    assert not (tmp_path / "merged" / "lora").exists()


def test_several_active_adapters_are_refused_before_anything_is_written(named, tmp_path):
    model = attached(named)
    for name in ("one", "two"):
        model.add_adapter(config_of("plain"), name)
    model.set_adapter(["one", "two"])
    with refused("only one adapter can be saved, active are ['one', 'two']"):
        model.save_pretrained(tmp_path / "checkpoint", backbone=True)
    assert not (tmp_path / "checkpoint").exists()


def test_layers_with_several_adapters_are_refused_too(named, tmp_path):
    """peft's `delete_adapter` leaves each layer with what it has."""
    wrapped = peft.get_peft_model(attached(named), config_of("plain"), "first")
    wrapped.add_adapter("second", peft.LoraConfig(target_modules=["k_proj"]))
    wrapped.add_weighted_adapter(["first", "second"], [0.5, 0.5], "both", combination_type="cat")
    wrapped.set_adapter("both")
    wrapped.delete_adapter("both")
    with refused("only one adapter can be saved, active are"):
        wrapped.get_base_model().save_pretrained(tmp_path)


def test_an_adapter_is_not_added_twice(named, tmp_path):
    """Merged in place, it is in the weights and beside them."""
    wrapped = peft.get_peft_model(attached(named), config_of("plain"))
    model = shaken(wrapped).get_base_model()
    want = logits(model)
    wrapped.merge_adapter()
    with refused("the backbone's weights hold the adapter (merge_adapter())"):
        model.save_pretrained(tmp_path / "whole", backbone=True)
    with refused("the backbone's weights hold the adapter (merge_adapter())"):
        model.save_backbone(tmp_path / "backbone")
    with pytest.warns(UserWarning, match="weights of the backbone were changed"):
        model.save_pretrained(tmp_path / "named")
    assert error(logits(CometForCausalLM.from_pretrained(tmp_path / "named")), want) < 1e-4
    wrapped.unmerge_adapter()
    model.save_pretrained(tmp_path / "whole", backbone=True)
    assert error(logits(CometForCausalLM.from_pretrained(tmp_path / "whole")), want) < 1e-4


@pytest.mark.parametrize("beginning", ["pissa", "olora"])
@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_that_changes_weights_changes_them_once(named, tmp_path, beginning, whole):
    config = peft.LoraConfig(r=2, target_modules=Q, init_lora_weights=beginning)
    model = shaken(before_attach(named, config))
    want = logits(model)
    model.save_pretrained(tmp_path, backbone=whole)
    assert error(logits(CometForCausalLM.from_pretrained(tmp_path)), want) < 1e-4
    merged = CometForCausalLM.from_pretrained(tmp_path, merge=True)
    assert error(logits(merged), want) < 1e-4


def test_a_new_adapter_has_the_models_mode(named):
    model = attached(named)
    model.add_adapter(peft.LoraConfig(target_modules=Q, lora_dropout=0.5, init_lora_weights=False))
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(model))


def test_adapters_are_named_in_errors(named):
    model = attached(named)
    with refused("adapter_config must be a config of peft's, got dict"):
        model.add_adapter({"r": 2})
    model.add_adapter(config_of("plain"))
    with refused("adapter_name must be one of default, got 'other'"):
        model.get_adapter_state_dict("other")


def test_detach_gives_a_peft_model_back(named):
    given = peft.get_peft_model(tiny_backbone("llama").float(), config_of("plain"))
    ids = random_ids(20)[None]
    want = shaken(given)(ids).logits
    model = cometlm.attach(given, **SIZES)
    back = cometlm.detach(model)
    assert back is given
    assert torch.equal(back(ids).logits, want)


@pytest.mark.parametrize("way", [after_attach, before_attach])
def test_an_adapter_stays_beside_the_backbone_that_is_given_back(named, tmp_path, way):
    """Trained here, it is the model's that the backbone is in next, and saved with that."""
    model = way(named, config_of("ranks"))
    learns = {name: weight.requires_grad for name, weight in model._backbone.named_parameters()}
    model = shaken(model)
    memory = copy.deepcopy(model.model.comet.state_dict())
    want = logits(model)
    back = cometlm.detach(model)
    if way is after_attach:
        assert not learns["model.layers.0.self_attn.q_proj.base_layer.weight"]
        assert back.get_submodule("model.layers.0.self_attn.q_proj.base_layer").weight.requires_grad
    second = cometlm.attach(back, **SIZES)
    second.model.comet.load_state_dict(memory)
    assert second.active_adapters() == ["default"]
    assert torch.equal(logits(second), want)
    second.save_pretrained(tmp_path)
    assert torch.equal(logits(CometForCausalLM.from_pretrained(tmp_path)), want)


def test_what_adapters_put_round_the_head_is_the_backbones_after_detach(named):
    model = shaken(after_attach(named, config_of("head")))
    head = model.lm_head
    assert cometlm.detach(model).lm_head is head


def test_a_whole_head_that_was_trained_is_saved_after_merging(named, tmp_path):
    model = shaken(peft.get_peft_model(attached(named), config_of("whole head")))
    want = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path, backbone=True)
    assert error(logits(CometForCausalLM.from_pretrained(tmp_path)), want) < 1e-5


# --- the model that an adapter names -----------------------------------------------------------


def test_an_adapter_names_its_model_and_finds_it(named, tmp_path):
    attached(named).save_pretrained(tmp_path / "model")
    real.tokenizer("smollm2").save_pretrained(tmp_path / "model")
    for loaded in (
        CometForCausalLM.from_pretrained(tmp_path / "model"),
        cometlm.load(str(tmp_path / "model"), device="cpu", dtype=torch.float32)[0],
    ):
        assert loaded.name_or_path == loaded.config.name_or_path == str(tmp_path / "model")
        model = shaken(peft.get_peft_model(loaded, cometlm.lora_config(r=2)))
        model.save_pretrained(tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "model")
        again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model))


# --- Trainers ------------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = random_ids(30, seed=index)
        return {"input_ids": ids, "labels": ids}


def trainer_of(model, folder, **options):
    common = {"max_steps": 3, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    common |= {"learning_rate": 1e-2, "disable_tqdm": True, "save_steps": 1}
    arguments = TrainingArguments(str(folder), **{**common, **options})
    return Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts())


def adapted(named, form):
    if form == "wrapped":
        return peft.get_peft_model(attached(named), cometlm.lora_config(r=2))
    return after_attach(named, cometlm.lora_config(r=2))


@pytest.mark.parametrize("form", ["beside", "wrapped"])
def test_a_trainer_ends_with_the_best_memory_and_the_best_adapter(named, tmp_path, form):
    """Evaluation says that the first step was."""
    torch.manual_seed(3)
    model = adapted(named, form)
    told = iter([3.0, 1.0, 2.0])
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    best |= {"metric_for_best_model": "told", "greater_is_better": True}
    trainer = trainer_of(model, tmp_path, **best)
    trainer.compute_metrics = lambda _: {"told": next(told)}
    seen = []

    def look(*_, **__):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        seen.append({name: p.detach().clone() for name, p in trained.items()})

    trainer.add_callback(type("Look", (TrainerCallback,), {"on_save": look}))
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    first, _, last = seen
    assert any("lora_B" in name for name in first)
    assert any(".comet." in name for name in first)
    parameters = dict(model.named_parameters())
    for name, weight in first.items():
        assert torch.equal(parameters[name], weight), name
    assert any(not torch.equal(last[name], weight) for name, weight in first.items())


def test_a_trainer_resumes_memory_and_adapter(named, tmp_path):
    def run(folder, resume=None):
        torch.manual_seed(3)
        model = adapted(named, "beside")
        trainer_of(model, folder, max_steps=2).train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = run(tmp_path / "run")
    again = run(tmp_path / "again", str(tmp_path / "run" / "checkpoint-1"))
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


def test_what_a_trainer_saved_of_an_adapter_is_loaded(named, tmp_path):
    model = adapted(named, "beside")
    trainer_of(model, tmp_path, max_steps=1).train()
    loaded = CometForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert torch.equal(logits(loaded), logits(model.eval()))
