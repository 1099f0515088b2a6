"""Any causal language model of transformers: it attaches and is exact, or an error says why."""

import copy

import accelerate
import peft
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

import cometlm
from cometlm.backbones.plain_attention import plain_attention
from cometlm.backbones.watching import UnsupportedBackboneError
from cometlm.core.recompute import Recomputation
from cometlm.core.reference import reference_logits
from cometlm.core.training_plan import TrainingPlan
from tests.any_backbone import BEGIN, MODEL_TYPES, outcome, tables, tiny, written
from tests.tiny import SMALL, error, random_ids, refused, scramble, tiny_backbone

LIMITS = {
    # Beside the backbone's own logits; the others beside the reference, which shares its float32.
    "without memory": 1e-5,
    "logits": 1e-6,
    "gradients": 1e-5,
    "pieces": 1e-6,
    "ragged": 1e-6,
    "detached": 0.0,
}
AT_LEAST = 55  # of the types that any version lists
# For the default suite: what each adds to a plain decoder stands beside it.
SAMPLE = {
    "gpt2": "learned positions, a fused projection",
    "opt": "learned positions with an offset",
    "gpt_neox": "parallel blocks, partial rotary",
    "stablelm": "attention that is handed no further arguments",
    "nanochat": "a norm of the embedding",
    "gemma2": "softcaps, windows, scaled embeddings",
    "gpt_oss": "sinks, windows, experts",
    "cohere2": "layers without rotary, scaled logits",
    "granite_swa": "several rotary modules, some layers without",
    "olmo3": "a rotary table for each type of layer",
    "deepseek_v3": "latent attention, shared experts",
}
# Of layers with states of their own; what is compared is in float64 from this version on.
HYBRIDS = {
    "lfm2": "convolutions",
    "qwen3_next": "linear attention, gated attention, experts",
    "jamba": "scans that go on by one token only",
    "falcon_h1": "scans beside attention",
}
HYBRIDS_FROM = Version("5.22")
ATTACHED_FROM = Version("5.17")  # before, layers hand their states on otherwise, and are refused


def check(found):
    assert found.attaches, found.why
    assert set(dict(found.figures)) == set(LIMITS)
    assert [one for one in found.figures if not one[1] <= LIMITS[one[0]]] == [], found.model_type


def known(model_type):
    if model_type not in MODEL_TYPES:
        pytest.skip("this transformers has no such type")
    if model_type in HYBRIDS and Version(transformers.__version__) < ATTACHED_FROM:
        pytest.skip("layers hand their states on otherwise")
    return tiny(model_type)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_backbone_without_a_row(model_type):
    known(model_type)
    check(outcome(model_type))


@pytest.mark.skipif(Version(transformers.__version__) < HYBRIDS_FROM, reason="float32 inside")
@pytest.mark.parametrize("model_type", HYBRIDS)
def test_a_backbone_with_states_of_its_own(model_type):
    known(model_type)
    check(outcome(model_type))


@pytest.mark.slow
def test_the_whole_registry():
    found = [outcome(model_type) for model_type in MODEL_TYPES]
    fit = [one for one in found if one.attaches]
    for one in fit:
        check(one)
    assert len(fit) >= AT_LEAST
    if transformers.__version__.startswith("5.24."):
        assert tables(found).strip() == written(BEGIN).strip()


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("mamba", r"(none of its layers calls transformers' attention|layer 0 \(MambaBlock\) )"),
        ("falcon", r"layer 0 \(FalconDecoderLayer\) never calls transformers' attention"),
        ("llama4_text", r"layer 0 \(Llama4TextDecoderLayer\) attends in blocks"),
        ("diffllama", r"layer 0 \(DiffLlamaDecoderLayer\) (never calls|calls 2 times)"),
        ("dory", r"layer 0 \(DoryDecoderLayer\) runs 2 times"),
    ],
)
def test_what_does_not_fit_says_which_layer_and_is_left_as_it_was(model_type, said):
    backbone = known(model_type)
    ids, name = random_ids(20)[None], backbone.config._attn_implementation
    with torch.no_grad():
        before = backbone(ids, use_cache=False).logits
        with pytest.raises(UnsupportedBackboneError, match=f"^{model_type} .*{said}"):
            cometlm.attach(backbone, **SMALL)
        assert torch.equal(backbone(ids, use_cache=False).logits, before)
    assert backbone.config._attn_implementation == name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("training", [True, False])
def test_attaching_changes_no_mode_and_draws_no_random_numbers(training):
    backbone = tiny("gpt2").train(training)
    backbone.transformer.h[0].eval()
    state = torch.get_rng_state()
    model = cometlm.attach(backbone, **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "gpt_oss", *HYBRIDS])
def test_training_recomputed_and_decoding(model_type):
    """What else runs cells: recomputation, buffers of fixed size, a copy, a checkpoint."""
    model = cometlm.attach(known(model_type), **SMALL).train()
    scramble(model.model.comet, 0.5)
    ids = random_ids(43)[None]
    grads = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for how in (None, Recomputation()):
        model.training_plan = TrainingPlan(recomputation=how)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-8 * float(theirs.abs().max()) + 1e-12
    model.eval()
    greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, **greedy)
    assert torch.equal(model.generate(ids, cache_implementation="static", **greedy), plain)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("model_type", ["gpt2", "granite_swa", "lfm2"])
def test_a_checkpoint_with_its_backbone(model_type, tmp_path):
    model = cometlm.attach(known(model_type).float(), **SMALL)
    scramble(model.model.comet, 0.5)
    model.save_pretrained(tmp_path, backbone=True)
    again = cometlm.CometForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(43)[None]
    with torch.no_grad():
        assert error(again(ids).logits, model(ids).logits) < 1e-5


class HalvedLogits(transformers.LlamaForCausalLM):
    """Somebody's own: what it does beside its layers no row knows of."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * torch.arange(1, 97)
        return out


class OwnDecoder(transformers.PreTrainedModel):
    """Somebody's own, with the config of a family that has a row, and modules named otherwise."""

    config_class = transformers.LlamaConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        llama = transformers.models.llama.modeling_llama
        self.words = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = llama.LlamaRotaryEmbedding(config)
        self.blocks = torch.nn.ModuleList(
            llama.LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.last_norm = llama.LlamaRMSNorm(config.hidden_size)
        self.out = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids=None, inputs_embeds=None, use_cache=False, **options):
        hidden = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        table = self.rotary(hidden, torch.arange(hidden.shape[1])[None])
        for block in self.blocks:
            hidden = block(hidden, attention_mask=None, position_embeddings=table)
        logits = self.out(self.last_norm(hidden))
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


def llama_config():
    return tiny_backbone("llama").config


def test_what_a_subclass_does_to_logits_is_not_lost():
    with pytest.raises(UnsupportedBackboneError, match="its head does something else"):
        cometlm.attach(HalvedLogits(llama_config()).double().eval(), **SMALL)


def test_a_class_of_ones_own_with_the_config_of_a_known_family():
    llama = tiny_backbone("llama")
    own = OwnDecoder(copy.deepcopy(llama.config)).double().eval()
    pairs = zip(own.state_dict(), llama.state_dict().values(), strict=True)  # in one order
    own.load_state_dict(dict(pairs))
    known, model = (cometlm.attach(backbone, **SMALL) for backbone in (llama, own))
    scramble(known.model.comet, 0.5)
    model.model.comet.load_state_dict(known.model.comet.state_dict())
    ids = random_ids(43)[None]
    assert error(model(ids).logits, known(ids).logits) < 1e-6


DECODERS = {"whisper": "max_target_positions", "blenderbot": "max_position_embeddings"}


@pytest.mark.parametrize("depths", [(4, 2), (2, 4)], ids=str)
@pytest.mark.parametrize(("model_type", "field"), DECODERS.items())
def test_a_decoder_that_is_not_as_deep_as_its_encoder(model_type, field, depths):
    config = tiny(model_type).config.to_dict()
    named = dict(zip(("encoder_layers", "decoder_layers"), depths, strict=True))
    backbone = AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config | named | {field: 48})
    ).double()
    model = cometlm.attach(backbone.eval(), **SMALL)
    assert model.config.num_hidden_layers == len(model.model.cells) == depths[1]
    ids = random_ids(43)
    assert error(model(ids[None]).logits[0], reference_logits(model, ids)) < 1e-6
    with refused(f"positions, but the backbone has {field}=48"):
        cometlm.attach(cometlm.detach(model), **SMALL | {"capacity": 40})


def sinks_of(heads):
    return torch.randn(heads, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("model_type", "option"), [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_plain_attention_is_the_familys_own(model_type, option):
    """Beside what transformers runs eagerly, logits and gradients."""
    module = tiny(model_type).base_model.layers[0].self_attn
    eager = __import__(type(module).__module__, fromlist=["_"]).eager_attention_forward
    shapes = ((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    value = 3.0 if option == "softcap" else sinks_of(4)
    module.sinks = torch.nn.Parameter(value) if option == "s_aux" else None
    bias = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    theirs = eager(module, *given, bias, scaling=0.4, dropout=0.0, softcap=3.0)[0].transpose(1, 2)
    options = {"softcap": value} if option == "softcap" else {"sinks": value}
    ours = plain_attention(*given, scale=0.4, **options)
    assert error(ours, theirs) < 1e-6  # theirs is a softmax in float32
    weights = torch.randn_like(ours)
    for a, b in zip(
        *(torch.autograd.grad((x * weights).sum(), given) for x in (ours, theirs)), strict=True
    ):
        assert error(a, b) < 1e-5


def test_a_window_that_only_the_mask_has():
    backbone = tiny("gemma2")
    for layer in backbone.model.layers:
        layer.self_attn.sliding_window = None
    model = cometlm.attach(backbone, **SMALL)
    windows = [cell.call.window for cell in model.model.cells]
    assert windows == [7, None]
    scramble(model.model.comet, 0.5)
    ids = random_ids(43)
    with torch.no_grad():
        assert error(model(ids[None]).logits[0], reference_logits(model, ids)) < 1e-6


@pytest.mark.parametrize(
    "given", ["Qwen/Qwen3-4B", None, torch.nn.Linear(2, 2), AutoModelForCausalLM, {}], ids=str
)
def test_attach_says_what_it_takes(given):
    with pytest.raises(TypeError, match="takes a causal language model of transformers"):
        cometlm.attach(given)


@pytest.mark.parametrize("given", ["a name", None, torch.nn.Linear(2, 2)], ids=str)
def test_detach_says_what_it_takes(given):
    with pytest.raises(TypeError, match="takes the model that attach"):
        cometlm.detach(given)


def test_detach_of_a_plain_model():
    with pytest.raises(TypeError, match="got a GPT2LMHeadModel"):
        cometlm.detach(tiny("gpt2"))


@pytest.mark.parametrize("offload", [accelerate.disk_offload, accelerate.cpu_offload])
@torch.no_grad()
def test_an_offloaded_backbone(offload, tmp_path):
    plain = cometlm.attach(tiny("gpt2"), **SMALL)
    scramble(plain.model.comet, 0.5)
    where = (tmp_path,) if offload is accelerate.disk_offload else ()
    backbone = offload(tiny("gpt2"), *where, execution_device=torch.device("cpu"))
    model = cometlm.attach(backbone, **SMALL)
    model.model.comet.load_state_dict(plain.model.comet.state_dict())
    ids = random_ids(43)[None]
    assert error(model(ids).logits, plain(ids).logits) < 1e-12


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize(
    ("model_type", "names"), [("gpt2", ["c_attn"]), ("deepseek_v3", ["kv_b_proj", "o_proj"])]
)
def test_an_adapter_reaches_the_slots(model_type, names):
    adapter = peft.LoraConfig(
        r=2, target_modules=names, init_lora_weights=False, fan_in_fan_out=model_type == "gpt2"
    )
    model = cometlm.attach(peft.get_peft_model(tiny(model_type), adapter), **SMALL)
    scramble(model.model.comet, 0.5)
    ids = random_ids(43)
    with torch.no_grad():
        assert error(model(ids[None]).logits[0], reference_logits(model, ids)) < 1e-6


@pytest.mark.slow
def test_compiled_cells():
    model = cometlm.attach(tiny("gpt2").float(), **SMALL).eval()
    ids = random_ids(43)[None]
    with torch.no_grad():
        want = model(ids).logits
        assert model.model.compile_cells(backend="eager")
        assert error(model(ids).logits, want) < 1e-6


def test_weights_that_are_not_there_are_named():
    config = tiny("gpt2").config
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config)
    with refused("its weights are on the meta device"):
        cometlm.attach(backbone, **SMALL)
