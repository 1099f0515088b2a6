"""Published checkpoints become ours, and say the same numbers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import cometlm
from cometlm import CometForCausalLM
from cometlm.checkpoints import published as checkpoint
from tests import real
from tests.tiny import GOLDEN, error, load_golden

PUBLISHED = {
    "compression_stride": "temp_beacon_stride",
    "temporary_capacity": "temp_mem_budget",
    "readout_token_ids": "global_beacon_ids",
    "compression_token_id": "temp_beacon_id",
    "placeholder_token_id": "placeholder_id",
}


def published(folder, path, shards=1, rename=False):
    """A golden file as the folder that its authors would have uploaded."""
    _, tensors, config = load_golden(path)
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    if rename:
        config = {PUBLISHED.get(name, name): value for name, value in config.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return tensors
    names, index = sorted(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    document = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    return tensors


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize(("shards", "rename"), [(1, False), (2, True)])
def test_published_checkpoints_are_converted(path, shards, rename, tmp_path):
    tensors = published(tmp_path / "theirs", path, shards, rename)
    model = checkpoint.convert_published(CometForCausalLM, tmp_path / "theirs", tmp_path / "ours")
    shutil.rmtree(tmp_path / "theirs")
    loaded = CometForCausalLM.from_pretrained(tmp_path / "ours")
    ids = tensors["input_ids"][None]
    with torch.no_grad():
        ours = loaded(ids).logits
        assert torch.equal(ours, model(ids).logits)
    assert error(ours[0], tensors["logits"]) < 5e-5
    assert loaded.config.suppressed_tokens == model.config.suppressed_tokens
    assert loaded.config.suppressed_tokens


def test_the_published_tokenizer_comes_along(tmp_path):
    published(tmp_path / "theirs", GOLDEN[0])
    real.tokenizer("like gemma").save_pretrained(tmp_path / "theirs")
    checkpoint.convert_published(CometForCausalLM, tmp_path / "theirs", tmp_path / "ours")
    _, tokenizer = cometlm.load(str(tmp_path / "ours"), device="cpu")
    assert len(tokenizer) == len(real.tokenizer("like gemma"))


def test_a_missing_shard_is_named(tmp_path):
    published(tmp_path / "theirs", GOLDEN[0], shards=2)
    (tmp_path / "theirs" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks model-00002-of-00002"):
        checkpoint.convert_published(CometForCausalLM, tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_shard_outside_of_the_folder_is_refused(tmp_path):
    published(tmp_path / "theirs", GOLDEN[0], shards=2)
    shard = tmp_path / "theirs" / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / shard.name)
    index = tmp_path / "theirs" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with pytest.raises(ValueError, match="lacks"):
        checkpoint.convert_published(CometForCausalLM, tmp_path / "theirs", tmp_path / "ours")


def test_a_folder_without_weights_is_refused(tmp_path):
    published(tmp_path / "theirs", GOLDEN[0])
    (tmp_path / "theirs" / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match="theirs"):
        checkpoint.convert_published(CometForCausalLM, tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("field", ["chunk_size", "temp_beacon_stride", "global_beacon_ids"])
def test_a_missing_field_is_named(tmp_path, field):
    published(tmp_path / "theirs", GOLDEN[0], rename=True)
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    del config[field]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=field):
        checkpoint.convert_published(CometForCausalLM, tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("config", [{}, {"model_type": "qwen3"}, [], "text", None], ids=repr)
def test_a_config_that_says_too_little_is_refused_before_anything_is_built(
    tmp_path, monkeypatch, config
):
    """A backbone of default sizes would fill the memory of the machine."""

    def built(*arguments, **options):
        pytest.fail("a backbone was built")

    published(tmp_path / "theirs", GOLDEN[0])
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", built)
    with pytest.raises(ValueError, match=r"theirs|published"):
        checkpoint.convert_published(CometForCausalLM, tmp_path / "theirs", tmp_path / "ours")
