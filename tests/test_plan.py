"""What a cell costs, counted and measured, and the command that plans with it."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from cometlm.checkpoints.source import Source
from cometlm.cli.main import app
from cometlm.config import CometConfig
from cometlm.core.attach import attach
from cometlm.model_loader import load
from cometlm.planner.calibrate import Weights, counted, measured
from cometlm.planner.simulate import Costs, Job, Span, simulate
from cometlm.planner.timeline import draw, merged
from tests.real import tokenizer
from tests.tiny import SMALL, tiny_backbone, tiny_comet

SIZES = CometConfig(chunk_size=2048, readout_tokens=512, stride=8, capacity=2048)


@pytest.fixture
def qwen():
    """Qwen3-4B's sizes: the paper's backbone."""
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
    )


def test_counted_costs_of_the_papers_sizes(qwen):
    costs = counted(qwen, SIZES, speed=400e12, weights=Weights(trained=1.0, shards=16))
    # 101M weights times 2,816 items; attention to 2,560 slots and, causal, to the items; keys and
    # values of 512 slots and 256 new entries. Two operations each.
    products = 100.9e6 * 2816 + 2 * 4096 * 2816 * (2560 + 1408.5) + 768 * 2560 * 2048
    assert costs.forward * 400e12 == pytest.approx(2 * products, rel=1e-3)
    assert costs.backward == 2 * costs.forward
    assert costs.memory_bytes == 4 * 512 * 2560 + 2 * 2048 * 2048  # a state is float32
    assert costs.hidden_bytes == 2 * 2816 * 2560
    assert costs.weight_bytes == pytest.approx(101e6 * 16 / 16, rel=0.01)


def test_a_speed_of_nothing_is_refused(qwen):
    with pytest.raises(ValueError, match="speed must be more than 0"):
        counted(qwen, SIZES, speed=0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_measured_costs_of_a_model(family):
    model = tiny_comet(family).train()
    costs = measured(model, repeats=1)
    by_count = counted(model.config.backbone_config, model.config.comet_config, 1e9, Weights(8))
    assert min(costs.forward, costs.backward, costs.head) > 0
    assert costs.memory_bytes == by_count.memory_bytes
    assert costs.hidden_bytes == by_count.hidden_bytes
    assert 0.5 < costs.kept_bytes / by_count.kept_bytes < 3
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        measured(model, repeats=0)


def test_a_memory_without_temporary_half_is_measured_after_one_chunk():
    model = tiny_comet("llama", temporary_memory=False, capacity=999).train()
    costs = measured(model, repeats=1)
    width = model.config.hidden_size
    assert costs.memory_bytes == model.config.comet_config.readout_tokens * width * 8


def test_a_frozen_backbone_costs_less_backward(qwen):
    whole, frozen = (counted(qwen, SIZES, 1e12, Weights(trained=part)) for part in (1.0, 0.0))
    assert (whole.backward, frozen.backward) == (2 * whole.forward, whole.forward)
    assert frozen.weight_bytes < whole.weight_bytes / 7


@pytest.mark.parametrize("sizes", [{}, {"chunk_size": 96}, {"readout_tokens": 5}])
def test_a_plan_is_of_the_memory_that_load_gives(sizes):
    model, _ = load("smollm2", device="cpu", **sizes)
    source = Source.resolve("smollm2")
    assert source.comet_config(**sizes) == model.config.comet_config
    assert source.backbone_config.hidden_size == model.config.hidden_size


def test_spans_without_a_pause_are_drawn_as_one():
    spans = [
        Span(("forward", 0, 0), 0, 0.0, 1.0),
        Span(("forward", 1, 0), 0, 1.0, 2.0),
        Span(("forward", 0, 1), 0, 2.0, 3.0),
        Span(("forward", 1, 1), 0, 3.5, 4.0),
        Span(("forward", 2, 0), 1, 2.0, 3.0),
    ]
    got = [(s.device, s.key[2], s.start, s.end) for s in merged(spans)]
    assert got == [(0, 0, 0, 2), (0, 1, 2, 3), (0, 1, 3.5, 4), (1, 0, 2, 3)]


def test_a_picture_of_every_way(tmp_path):
    job = Job(chunks=4, layers=3, devices=2)
    ways = [simulate(name, job, Costs(1, 2, head=1)) for name in ("wave", "naive", "layers")]
    for name in ("plan.png", "plan.svg"):
        draw(ways, 3, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    with pytest.raises(ValueError, match="nothing"):
        draw(ways, 3, tmp_path / "plan.nothing")


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = CliRunner().invoke(app, ["plan", "no-such-model", "--picture", str(tmp_path / "p.png")])
    assert "a picture needs matplotlib" in str(done.exception)


def test_the_command_plans_from_a_config_alone(qwen, tmp_path):
    qwen.save_pretrained(tmp_path)
    picture = tmp_path / "plan.svg"
    arguments = [
        "plan",
        str(tmp_path),
        "--speed",
        "400",
        "--memory",
        "1",
        "--tokens",
        "16384",
        "--devices",
        "4",
        "--picture",
        str(picture),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "16,384 tokens in 8 chunks of 2,048, 36 layers, 4 devices" in result.output
    assert "GiB > 1" in result.output
    assert picture.exists()


def test_a_counted_plan_is_in_the_dtype_that_is_asked_for(tmp_path):
    tiny_comet("llama").save_pretrained(tmp_path, backbone=True)
    tokenizer("smollm2").save_pretrained(tmp_path)

    def said(*more):
        arguments = ["plan", str(tmp_path), "--tokens", "4000", "--devices", "2", "--speed", "1"]
        result = CliRunner().invoke(app, [*arguments, *more])
        assert result.exit_code == 0, result.output
        return result.output

    assert said() == said("--dtype", "bfloat16") != said("--dtype", "float32")


def test_the_weights_of_a_quantised_backbone_are_counted_as_they_are_held(tmp_path):
    pytest.importorskip("bitsandbytes")
    backbone = tiny_backbone("llama", hidden_size=128, num_attention_heads=4, head_dim=32)
    backbone.to(torch.bfloat16).save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.bfloat16
    )
    model = attach(quantised, **SMALL).train()
    model.requires_grad_(False)
    model.model.comet.requires_grad_(True)
    costs = measured(model, Weights(trained=0.0), repeats=1)
    held = sum(weight.nbytes for weight in model.model.cells[0].layer.parameters())
    assert costs.weight_bytes == pytest.approx(held)


def test_the_command_measures_a_model(tmp_path):
    model = tiny_comet("llama")
    model.save_pretrained(tmp_path, backbone=True)
    tokenizer("smollm2").save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--tokens", "40", "--devices", "2", "--dtype", "float32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "measured: torch.float32" in result.output
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "cometlm"
