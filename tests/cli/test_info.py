"""`cometlm info`: what a memory costs."""

import re

from cometlm import Session
from cometlm.cli import console
from cometlm.planner.flops import chunk_cost
from tests import real
from tests.cli.said import TEXT


def test_info_prints_what_a_memory_costs(command, model):
    code, out, _ = command("info", "tiny")
    assert code == 0
    added = sum(p.numel() for p in model.model.comet.parameters())
    total = sum(p.numel() for p in model._backbone.parameters())
    assert re.search(rf"backbone parameters .* {total:,} ", out)
    assert re.search(rf"new parameters .* {added:,} \({added / total:.3%}\)", out)
    assert "8 memory + 18 computed = 26" in out  # 3 + 5; 12 text, 3 compression, 3 readout
    gain = chunk_cost(model.config.backbone_config, model.config.comet_config).gain
    assert f"{gain:.2f} ×" in out


def test_info_says_what_a_session_holds(command, model):
    _, out, _ = command("info", "tiny")
    session = Session(model, real.tokenizer("smollm2"))
    session.read(TEXT)
    list(session.finish())
    held = session.stats().memory_bytes
    assert re.search(rf"memory held.* {console.readable_bytes(held)} ", out)


def test_names_are_printed_as_they_are(command, monkeypatch, model, text_file):
    """Whatever they mean to rich, and as one line each."""
    name = "a [red]very[/x] :heart: long " + "name " * 20
    monkeypatch.setattr(model.config, "backbone", name)
    code, out, _ = command("info", name)
    assert code == 0
    assert "[red]very[/x] :heart:" in out
    code, _, err = command("read", name, text_file, "--save", "a [b] :heart: " + "long " * 20)
    assert code == 0
    assert f"loading {name} …\n" in err
    assert f"{name} · " in err
    assert f"saved a [b] :heart: {'long ' * 20}\n" in err
