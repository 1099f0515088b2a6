"""The configuration of `cometlm train`: fields, changes to them, and what is no field."""

import json
import re
from pathlib import Path

import pytest
import yaml

from cometlm.train import prepare
from cometlm.train.arguments import typed
from cometlm.train.config import TrainConfig
from cometlm.train.config_file import read_config
from cometlm.train.trainer import last_checkpoint
from tests.real import tokenizer
from tests.runs import as_config, quietly, settings, start

__all__ = ["settings", "start"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")
MIXTURE = {"tasks": {"passkey": 1}, "steps": 1, "tokens": [60, 80], "batch_tokens": 80}
RECIPES = Path(__file__).parent.parent / "recipes"


def test_samples_that_are_too_short_are_known_before_the_run(settings, tmp_path):
    mixture = {**settings["mixture"], "tokens": [9, 200]}
    with pytest.raises(ValueError, match=r"mixture\.tasks\.passkey: tokens must be at least"):
        quietly(read_config(as_config(settings, tmp_path, mixture=mixture)))
    assert last_checkpoint(settings["output"]) is None


def test_a_mixture_is_not_evaluated(settings, tmp_path):
    with pytest.raises(ValueError, match="evaluate measures records: not with a mixture"):
        read_config(as_config(settings, tmp_path, evaluate="held-out.jsonl"))


def test_a_run_says_what_its_memory_is_trained_for(settings, tmp_path):
    ran = read_config(as_config(settings, tmp_path))
    assert ran.purpose == "the tasks passkey in texts of up to 80 tokens"
    said = read_config(as_config(settings, tmp_path, trained_for="ships"))
    assert said.purpose == "ships"
    records = TrainConfig(model="tiny", output="out", records="talks.jsonl")
    assert records.purpose == "what talks.jsonl asks"


def test_comet_is_for_new_memories(settings, start, tmp_path):
    """Which start as they are told to, also without any."""
    with pytest.raises(ValueError, match="is a checkpoint and has its memory: comet is for new"):
        quietly(read_config(as_config(settings, tmp_path, comet={"chunk_size": 12})))
    tokenizer("smollm2").save_pretrained(start / "backbone")
    plain = {"model": str(start / "backbone"), "start": {"readout": "the"}, "mode": "memory"}
    changes = {"mixture": {**settings["mixture"], "steps": 1}, **plain}
    changes["sizes"] = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5}
    seen = []
    own = prepare.start_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "start_like", lambda *args: seen.append(args[2]) or own(*args))
        model = quietly(read_config(as_config(settings, tmp_path, **changes)))
    assert [one.readout for one in seen] == ["the"]
    assert model.config.comet_config.chunk_size == 12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learnin_rate": 1}, "unknown field learnin_rate; there are model, output"),
        ({"mode": "all"}, "mode must be one of memory, lora, full, got 'all'"),
        ({"learning_rate": "fast"}, "learning_rate must be float, got 'fast'"),
        ({"learning_rate": 0}, "learning_rate must be more than 0, got 0.0"),
        ({"records": "x"}, "either records or a mixture"),
        ({"mixture": None}, "either records or a mixture"),
        ({"mixture": {"steps": 1}}, "mixture.tasks is missing"),
        (
            {"mixture": {**MIXTURE, "tasks": {"riddle": 1}}},
            "unknown task 'riddle'; there are passkey",
        ),
        (
            {"mixture": {**MIXTURE, "tasks": {"passkey": -1}}},
            "mixture.tasks.passkey must be at least 0",
        ),
        (
            {"mixture": {**MIXTURE, "tasks": {"passkey": 0}}},
            "mixture.tasks needs one of more than 0",
        ),
        (
            {"mixture": {**MIXTURE, "options": {"riddle": {}}}},
            "mixture.options must be of the tasks passkey",
        ),
        ({"mixture": {**MIXTURE, "tokens": [9, 8]}}, "mixture.tokens must be [shortest, longest]"),
        ({"mixture": {**MIXTURE, "text_share": 2}}, "mixture.text_share must lie in 0 … 1, got 2"),
        ({"mixture": {**MIXTURE, "ask": "never"}}, "mixture.ask must be one of end, probes"),
        ({"lora": {"r": 1.5}}, "lora.r must be int, got 1.5"),
        ({"chunks": {"sizes": 3}}, "chunks.sizes must be a list, got 3"),
        ({"recompute": {"every": 0}}, "recompute.every must be at least 1, got 0"),
        ({"recompute": {"truncate_after": -1}}, "recompute.truncate_after must be at least 0"),
        ({"lora": {"r": 0}}, "lora.r must be at least 1, got 0"),
        ({"lora": {"modules": ["q_proj["]}}, "lora.modules must be names or patterns of them"),
        ({"learning_rate": float("nan")}, "learning_rate must be more than 0, got nan"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"trainer": {"max_length": 9}}, "trainer.max_length is a field of the run itself"),
    ],
    ids=str,
)
def test_bad_configurations_name_the_field(settings, tmp_path, changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        read_config(as_config(settings, tmp_path, **changes))


def test_changes_on_the_command_line(settings, tmp_path):
    path = as_config(settings, tmp_path)
    changes = ["learning_rate=3e-4", "mixture.tokens.1=70", "lora.dropout=0.1"]
    config = read_config(path, changes)
    assert (config.learning_rate, config.lora.dropout) == (3e-4, 0.1)
    assert config.mixture.tokens == (60, 70)
    with pytest.raises(ValueError, match="must look like key=value, got 'seed'"):
        read_config(path, ["seed"])
    with pytest.raises(ValueError, match="the value of 'model=@x' is not YAML"):
        read_config(path, ["model=@x"])
    with pytest.raises(ValueError, match=r"seed\.x is no field: seed is "):
        read_config(path, ["seed=1", "seed.x=1"])


def test_a_change_does_not_reach_what_shares_its_anchor(settings, tmp_path):
    plain = {name: value for name, value in settings.items() if name != "chunks"}
    path = as_config(plain, tmp_path, output=str(tmp_path / "out"))
    shared = "chunks: {strides: &values [1, 2], capacities: *values}\n"
    path.write_text(path.read_text() + shared)
    chunks = read_config(path, ["chunks.strides.0=3"]).chunks
    assert (chunks.strides, chunks.capacities) == ((3, 2), (1, 2))


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read(path):
    config = read_config(path)
    assert config.mixture is not None


@pytest.mark.parametrize("path", sorted((RECIPES / "rivals").glob("*.yaml")), ids=lambda p: p.stem)
def test_rivals_differ_in_their_memory_alone(path):
    ours, rival = (read_config(one).to_dict() for one in (RECIPES / "smollm2.yaml", path))
    assert {name for name in ours if ours[name] != rival[name]} == {"output", "comet", "start"}
    assert rival["comet"]["chunk_size"] == ours["comet"]["chunk_size"]


def test_a_plan_or_a_trainer_field_that_does_not_exist(settings, tmp_path):
    with pytest.raises(ValueError, match="unknown chunk plan 'fix'"):
        quietly(read_config(as_config(settings, tmp_path, chunks={"plans": {"fix": 1}})))
    with pytest.raises(ValueError, match=r"trainer\.max_step is no field"):
        quietly(read_config(as_config(settings, tmp_path, trainer={"max_step": 1})))


def test_configurations_survive_json():
    config = TrainConfig(model="m", output="o", records="r")
    assert json.loads(json.dumps(config.to_dict()))["chunks"]["plans"] == {"fixed": 1.0}


# --- YAML as people write it --------------------------------------------------------------------


@pytest.mark.parametrize("key", ["learning_rate", "trainer"])
def test_a_key_that_stands_twice_is_refused(settings, tmp_path, key):
    path = as_config(settings, tmp_path)
    path.write_text(path.read_text() + f"\n{key}: 1\n{key}: 2\n")
    with pytest.raises(ValueError, match=f"{key} stands twice, first in line"):
        read_config(path)
    path = as_config(settings, tmp_path, trainer={"logging_steps": 3})
    path.write_text(
        path.read_text().replace("logging_steps: 3", "logging_steps: 3\n  logging_steps: 4")
    )
    with pytest.raises(ValueError, match="logging_steps stands twice"):
        read_config(path)


def test_a_key_may_override_what_is_merged_in(tmp_path):
    lines = ["model: x", "output: y", "records: z", "recompute: {<<: {every: 2}, every: 3}"]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    assert read_config(tmp_path / "run.yaml").recompute.every == 3


def test_a_home_is_expanded(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = read_config(as_config(settings, tmp_path, output="~/run", model="~/tiny"))
    assert (config.output, config.model) == (str(tmp_path / "run"), str(tmp_path / "tiny"))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("model: x".encode("utf-16"), "run.yaml is not UTF-8 text: byte 1, in line 1.* as utf-16"),
        ("a: 1\n# für mich".encode("latin-1"), "run.yaml is not UTF-8 text: byte 9, in line 2"),
    ],
)
def test_another_encoding_is_named(tmp_path, raw, said):
    (tmp_path / "run.yaml").write_bytes(raw)
    with pytest.raises(ValueError, match=said):
        read_config(tmp_path / "run.yaml")


def test_numbers_that_yaml_takes_for_text_are_numbers():
    given = yaml.safe_load(
        "{adam_epsilon: 1e-8, max_steps: 1e1, num_train_epochs: '2', optim: sgd, loss_type: nll, "
        "neftune_noise_alpha: }"
    )
    assert typed(given) == {
        "adam_epsilon": 1e-8,
        "max_steps": 10,
        "num_train_epochs": 2.0,
        "optim": "sgd",
        "loss_type": "nll",
        "neftune_noise_alpha": None,
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weight_decay": "much"}, "trainer.weight_decay must be a number, got 'much'"),
        ({"max_steps": "1.5"}, "trainer.max_steps must be a whole number, got '1.5'"),
        ({"gradient_accumulation_steps": 1.5}, "must be a whole number, got 1.5"),
        ({"gradient_accumulation_steps": 0}, "accumulation_steps must be at least 1, got 0"),
        ({"max_grad_norm": None}, "trainer.max_grad_norm must be a number, got None"),
        ({"chat_template_path": "my.jinja"}, "chat_template_path would change nothing"),
        ({"loss_type": "dft"}, "trainer.loss_type would change nothing: the loss is the cross"),
        ({"label_smoothing_factor": 0.5}, "trainer.label_smoothing_factor would change nothing"),
        ({"steps": 3}, "trainer.steps is no field of trl's SFTConfig"),
        ({"deepspeed": "ds.json"}, "trainer.deepspeed: ds.json needs deepspeed"),
        ({"optim": "galore_adamw"}, "trainer.optim: galore_adamw needs galore_torch"),
    ],
    ids=str,
)
def test_wrong_fields_of_the_trainer_are_named(monkeypatch, given, said):
    monkeypatch.setattr("cometlm.extras.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape(said)):
        typed(given)
