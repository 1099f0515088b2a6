"""Keeping the backbone what it is: what is compared, what it teaches, and what a run keeps."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cometlm.data.corpora import CORPORA, corpus_files
from cometlm.data.prompts import SOURCES, prompts_of
from cometlm.session.plain_text import prefix_ids
from cometlm.train.config import Keep
from cometlm.train.config_file import config_of, read_config
from cometlm.train.keep import (
    ANSWERS_FILE,
    Answered,
    KeepBatches,
    Rows,
    answer_ends,
    answers_for,
    as_backbone,
    keep_loss,
    own_answers,
    prompt_ids,
)
from cometlm.train.mixture import MixtureBatches
from cometlm.train.trainable import lora_config, set_trainable
from language import beside, dialogue
from tests.rank_runs import assert_same_run, stop_at_half, trained, trained_on
from tests.rank_runs import settings as of_ranks
from tests.real import tiny_comet as with_words
from tests.real import tokenizer
from tests.runs import WORDS, as_config, heard, logged, quietly, records_run, settings, start
from tests.sessions import tokenizer_of
from tests.tiny import batch_of, error, refused, tiny_backbone, tiny_comet

__all__ = ["of_ranks", "settings", "start"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")


def rows_of(count, length):
    ids = batch_of(count, length)
    return Rows(ids, torch.ones_like(ids, dtype=torch.bool))


def adapted(model, r=4):
    """With fresh adapters, which change nothing yet."""
    set_trainable(model, "lora", lora_config(r=r, alpha=2 * r))
    return model.train()


def push_away(model, spread=0.3):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn_like(parameter) * spread)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_an_untouched_model_is_its_backbone(family):
    """Up to its first compression token, which the backbone does not have."""
    model = adapted(tiny_comet(family, stride=12))
    assert abs(float(keep_loss(model, [rows_of(3, 11)]).detach())) < 1e-12
    pushed = keep_loss(adapted(tiny_comet(family, stride=4)), [rows_of(3, 11)])
    assert float(pushed.detach()) > 1e-4


@pytest.mark.parametrize("recompute", [False, True])
def test_it_is_the_divergence_from_the_backbone_alone(recompute):
    """Compared with a backbone of its own, at the tokens that are counted."""
    model = adapted(tiny_comet("llama", stride=4))
    push_away(model)
    if recompute:
        model.activation_checkpointing_enable()
    rows = rows_of(2, 11)
    rows.counted[0, :5] = False
    rows.counted[1, 7:] = False
    loss = keep_loss(model, [rows])
    with torch.no_grad():
        theirs = tiny_backbone("llama")(rows.ids).logits.log_softmax(-1)
        ours = model(rows.ids, logits_to_keep=0).logits.log_softmax(-1)
        wanted = (theirs.exp() * (theirs - ours)).sum(-1)[rows.counted].mean()
    assert error(loss, wanted) < 1e-9
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) <= (
            ".comet." in name or ".lora_" in name
        )
    assert model.model.comet.compression.grad.any()
    assert any(p.grad.any() for n, p in model.named_parameters() if ".lora_A" in n)


def test_prose_behind_chunks_is_held_to_what_the_backbone_says_of_all_of_it():
    """The model has the memory of what is in front, as when it reads the whole text."""
    model = adapted(tiny_comet("llama", stride=4, chunk_size=12))
    push_away(model)
    ids, counted = batch_of(1, 33), torch.zeros(1, 33, dtype=torch.bool)
    counted[0, 24:] = True
    fresh = rows_of(2, 9)
    loss = keep_loss(model, [Rows(ids, counted, (12, 12, 9)), fresh])
    with torch.no_grad():
        backbone = tiny_backbone("llama")
        theirs = torch.cat([backbone(ids).logits[0, 24:], *backbone(fresh.ids).logits])
        behind = model(ids, logits_to_keep=0).logits[0, 24:]
        ours = torch.cat([behind, *model(fresh.ids, logits_to_keep=0).logits]).log_softmax(-1)
        theirs = theirs.log_softmax(-1)
        wanted = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert error(loss, wanted) < 1e-9


def test_the_backbone_is_seen_through_dropout_and_comes_back_as_it_was():
    model = tiny_comet("llama")
    set_trainable(model, "lora", lora_config(r=2, dropout=0.5))
    model.train()
    push_away(model)
    ids = batch_of(2, 9)
    wanted = tiny_backbone("llama")(ids).logits
    with torch.no_grad(), as_backbone(model):
        assert error(model._backbone(ids).logits, wanted) < 1e-12
    assert model.training
    assert error(model(ids, logits_to_keep=0).logits, wanted) > 1e-3


def test_an_adapter_that_is_frozen_stays_so():
    """peft has each adapter that it enables learn."""
    model = tiny_comet("llama")
    set_trainable(model, "lora", lora_config(r=2))
    set_trainable(model, "memory")
    learns = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with as_backbone(model):
        pass
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == learns


def test_a_model_that_was_pushed_away_comes_back():
    torch.manual_seed(0)
    model = adapted(tiny_comet("llama", stride=12))
    push_away(model, 0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    descent = torch.optim.Adam(trained, lr=1e-2)
    rows = rows_of(4, 11)
    first = float(keep_loss(model, [rows]).detach())
    for _ in range(150):
        descent.zero_grad()
        keep_loss(model, [rows]).backward()
        descent.step()
    assert float(keep_loss(model, [rows]).detach()) < first / 10


def test_what_the_benchmark_measures():
    """Nothing between a backbone and itself; once weights moved, what a run measures."""
    model = adapted(tiny_comet("llama", stride=12)).eval()
    answered = [Answered(ids[:4], ids[4:]) for ids in batch_of(3, 10).tolist()]
    rows = dialogue(answered)
    found = beside(model, tiny_backbone("llama"), rows)
    assert found["tokens"] == 18
    assert abs(found["kl"]) < 1e-12
    assert found["perplexity_ratio"] == pytest.approx(1)
    push_away(model)
    found = beside(model, tiny_backbone("llama"), rows)
    assert found["kl"] == pytest.approx(float(keep_loss(model, [joined(rows)]).detach()))
    assert found["perplexity_ratio"] == pytest.approx(
        found["perplexity"] / found["perplexity_backbone"]
    )


def joined(rows):
    return Rows(torch.cat([one.ids for one in rows]), torch.cat([one.counted for one in rows]))


# --- batches ------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(WORDS * 50)
    return str(tmp_path / "text.txt")


def batches(text, answered=(), **changes):
    options = {"tokens": 50, "prose_share": 0.4, "corpora": (text,), **changes}
    return KeepBatches(Keep(**options), tokenizer("smollm2"), answered, 12, seed=3)


def test_a_batch_has_its_share_of_prose_and_of_answers(text):
    answered = [Answered([5, 6, 7], [8, 9]), Answered([4, 3], [2, 1, 2, 1, 2])]
    made = batches(text, answered)
    (rows,) = made[7]
    assert int(rows.counted.sum()) == 50
    prose = [row for row, held in zip(rows.ids, rows.counted, strict=True) if held[0]]
    assert sum(map(len, prose)) >= 20
    said = [(tuple(one.asked), tuple(one.answer)) for one in answered]
    for ids, held in zip(rows.ids.tolist(), rows.counted.tolist(), strict=True):
        if not held[0]:
            first = held.index(True)
            answer = [ids[place + 1] for place, is_held in enumerate(held) if is_held]
            assert any(
                tuple(ids[: first + 1]) == asked and tuple(answer) == own[: len(answer)]
                for asked, own in said
            )
    assert torch.equal(rows.ids, batches(text, answered)[7][0].ids)
    assert not torch.equal(made[8][0].ids, rows.ids)
    with refused("keep.prose_share must be 1 without prompts, got 0.4"):
        batches(text)
    assert batches(text, prose_share=1.0)[0][0].counted.all(1).sum() >= 4


@pytest.mark.parametrize("longest", [1, 2, 12])
def test_prose_begins_as_its_tokenizer_begins_texts(text, longest):
    """Also where that alone fills a chunk: then a token follows it in each row."""
    gemma = tokenizer_of("like gemma")
    (first,) = prefix_ids(gemma)
    keep = Keep(tokens=20, prose_share=1.0, corpora=(text,))
    (rows,) = KeepBatches(keep, gemma, (), longest, seed=3)[0]
    assert rows.ids[:, 0].tolist() == [first] * len(rows.ids)
    assert not rows.counted[:, 0].any()
    assert int(rows.counted.sum()) == 20
    assert rows.ids.shape[1] <= max(2, longest)


def test_prose_stands_behind_chunks_of_its_own(text):
    answered = [Answered([5, 6, 7], [8, 9])]
    made = [batches(text, answered, behind=30)[number] for number in range(20)]
    for *prose, said in made:
        assert [int(rows.counted.sum()) for rows in (*prose, said)] == [12, 8, 30]
        assert not said.chunks
        for rows in prose:
            *front, held = rows.chunks
            assert 1 <= sum(front) <= 30
            assert max(front) <= 12
            assert rows.counted[0].tolist() == [False] * sum(front) + [True] * held
    assert {len(rows.chunks) for *prose, _ in made for rows in prose} == {2, 3, 4}
    keep = Keep(tokens=50, prose_share=1.0, corpora=(text,), behind=9)
    with refused("keep.behind must be at most 8, got 9"):
        KeepBatches(keep, tokenizer("smollm2"), answered, 12, 3, positions=20)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight": 0}, "keep.weight must be more than 0, got 0"),
        ({"tokens": 0}, "keep.tokens must be at least 1, got 0"),
        ({"answer_tokens": 0}, "keep.answer_tokens must be at least 1, got 0"),
        ({"behind": -1}, "keep.behind must be at least 0, got -1"),
        ({"behind": 9, "prose_share": 0}, "keep.behind must be 0 without running text, got 9"),
        ({"prose_share": 1.5}, "keep.prose_share must lie in 0 … 1, got 1.5"),
        ({"corpora": ()}, "keep.corpora must name one"),
        ({"prompts": ()}, "keep.prompts must name some"),
    ],
)
def test_settings_out_of_bounds(changes, said):
    with refused(said):
        Keep(**changes)


def test_prompts_of_train_and_test_are_others(tmp_path, monkeypatch):
    monkeypatch.setenv("COMETLM_CACHE", str(tmp_path))
    manual = tmp_path / "texts" / "perl"
    manual.mkdir(parents=True)
    for name in ("perlop.pod", *CORPORA["perl"].held_out):
        (manual / name).write_text("=head2 What else?\n")
    for number in range(1, 10):
        lines = f"=head2 What is C<< print({number}) >>?\n\n=head2 On names\n"
        (manual / f"perlfaq{number}.pod").write_text(lines)
    for split, corpus in (("train", "perl"), ("test", "perl-test")):
        pages = [page.stem for page in corpus_files(corpus) if page.stem.startswith("perlfaq")]
        assert prompts_of("faq", split) == [f"What is print({page[-1]})?" for page in pages]
        assert len(pages) >= 3
    assert not set(corpus_files("perl")) & set(corpus_files("perl-test"))
    for name in SOURCES:
        train, test = (prompts_of(name, split) for split in ("train", "test"))
        assert not set(train) & set(test)
    own = tmp_path / "own.txt"
    own.write_text("\nWho?\n  What? \n")
    assert prompts_of(str(own), "train") == ["Who?", "What?"]
    own.write_text("\n")
    with refused("own.txt must hold prompts, a line each, got none"):
        prompts_of(str(own), "train")
    with refused("prompts must be everyday, knowledge, faq or a file, got 'nothing'"):
        prompts_of("nothing", "train")


def test_control_tokens_in_a_prompt_are_text():
    words = tokenizer("smollm2")
    end, prompt = words.convert_tokens_to_ids("<|im_end|>"), "What does {} mean?"
    framed = prompt_ids(words, prompt.format("<|im_end|>"))
    assert framed.count(end) == prompt_ids(words, prompt.format("that")).count(end)


# --- the backbone's answers ---------------------------------------------------------------------


def test_answers_are_the_backbones_and_made_once(tmp_path):
    model, words = adapted(with_words(chunk_size=96)), tokenizer("smollm2")
    push_away(model)
    own = tmp_path / "own.txt"
    own.write_text("Who are you?\nWhat is salt?\n")
    keep = Keep(prompts=(str(own), "tasks"), answer_tokens=5)
    said = []
    args = (model, words, keep, lambda: ["Who are you?", "Where is it?"], tmp_path, said.append)
    answered = answers_for(*args)
    assert len(answered) == 3
    backbone = tiny_backbone("llama", vocab_size=len(words))
    prompts = ["Who are you?", "What is salt?", "Where is it?"]
    for one, prompt in zip(answered, prompts, strict=True):
        talk = [{"role": "user", "content": prompt}]
        shown = words.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert words.decode(one.asked) == shown
        with torch.no_grad():
            logits = backbone(torch.tensor([one.asked + one.answer])).logits[0]
        assert logits.argmax(-1).tolist()[len(one.asked) - 1 : -1] == one.answer
    assert model.training
    assert answers_for(*args) == answered
    assert len(said) == 1
    assert answers_for(model, words, replace(keep, answer_tokens=4), *args[3:]) != answered
    assert len(said) == 2
    with refused("keep.answer_tokens must be at most "):
        answers_for(model, words, replace(keep, answer_tokens=90), *args[3:])
    assert answers_for(model, words, replace(keep, prose_share=1.0), *args[3:]) == []


class Says:
    """A backbone whose answers are these; each is filled up behind the first of the ends."""

    device = torch.device("cpu")

    def __init__(self, *answers):
        self.answers = answers

    def generate(self, ids, eos_token_id, pad_token_id, **options):
        return torch.cat([ids, torch.tensor(self.answers)], dim=1)


def test_an_answer_ends_with_its_turn():
    """Which in Phi-3's template and in Gemma's is not the end of a text."""
    words = copy.deepcopy(tokenizer("smollm2"))
    words.eos_token = "<|endoftext|>"
    turn, text = words.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert answer_ends(words) == sorted([turn, text]) != [text]
    said = own_answers(Says([5, turn, text], [6, text, turn], [7, 8, 9]), words, [[4]] * 3, 3)
    assert said == [[5, turn], [6, text], [7, 8, 9]]


def test_answers_without_an_end_of_text():
    words = copy.deepcopy(tokenizer("smollm2"))
    words.eos_token = None
    (turn,) = answer_ends(words)
    assert words.decode([turn]) == "<|im_end|>"
    assert own_answers(Says([5, turn, 7]), words, [[4]], 3) == [[5, turn]]
    words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert answer_ends(words) == []
    assert own_answers(Says([5, turn, 7]), words, [[4]], 3) == [[5, turn, 7]]


# --- runs ---------------------------------------------------------------------------------------


def keeping(settings, **changes):
    """A run that keeps its backbone: prose alone, which needs no long chunks."""
    (text,) = settings["mixture"]["options"]["passkey"]["corpora"]
    return {**settings, "keep": {"tokens": 40, "prose_share": 1.0, "corpora": [text], **changes}}


def test_a_run_keeps_its_backbone_and_logs_how_far_it_is(settings, tmp_path):
    config = read_config(as_config(keeping(settings, weight=2.0), tmp_path))
    quietly(config)
    rows = logged(config.output)
    assert len(rows) == 4
    for row in rows:
        text, kept = float(row["text_loss"]), float(row["keep_loss"])
        assert kept > 0
        assert float(row["loss"]) == pytest.approx(text + 2 * kept, rel=1e-2)
    Path(config.output, "checkpoint-4", "trainer_state.json").unlink()  # stopped after step 2
    said = heard(config)
    assert said[0].endswith("checkpoint-2")
    again = logged(config.output)
    assert [row["keep_loss"] for row in again] == [row["keep_loss"] for row in rows]
    with refused("keep: was"):
        quietly(replace(config, keep=None))


def test_a_run_keeps_the_answers_in_its_folder(settings, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("Who?\n")
    changes = {"prose_share": 0.5, "prompts": [str(own), "tasks"], "answer_tokens": 4}
    options = {**keeping(settings, **changes), "sizes": {"chunk_size": 96}}
    config = read_config(as_config(options, tmp_path))
    said = heard(config)
    assert any("the backbone answers" in line for line in said)
    kept = json.loads(Path(config.output, ANSWERS_FILE).read_text())
    batches = MixtureBatches(config.mixture, tokenizer("smollm2"), config.seed)
    assert kept["made_for"]["prompts"] == ["Who?", *dict.fromkeys(batches.questions())]
    assert all(float(row["keep_loss"]) > 0 for row in logged(config.output))


@pytest.mark.parametrize("accumulate", [1, 3])  # an epoch's last step has one batch then
def test_records_are_learned_beside_the_backbone_too(settings, tmp_path, accumulate):
    trainer = {**settings["trainer"], "gradient_accumulation_steps": accumulate}
    options = {**keeping(settings), "trainer": trainer}
    config = records_run(options, tmp_path, [{"text": WORDS * 3}] * 4)
    quietly(config)
    for row in logged(config.output):
        both = float(row["text_loss"]) + float(row["keep_loss"])
        assert float(row["loss"]) == pytest.approx(both, rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "full"}, "keep holds the model to its frozen backbone, which mode full trains"),
        ({"shard_weights": True}, "keep needs whole weights on each rank: not with shard_weights"),
    ],
)
def test_where_there_is_no_backbone_to_look_at(settings, changes, said):
    with refused(said):
        config_of({**keeping(settings), **changes})


@pytest.mark.slow
def test_ranks_that_share_a_sample_keep_the_same_backbone(of_ranks, tmp_path):
    """The wave reads the sample; each rank has the whole of what is kept."""
    options = {**keeping(of_ranks), "mode": "lora", "lora": {"r": 2}}
    path = as_config(options, tmp_path)
    trained(path, f"output={tmp_path / 'one'}")
    trained_on(2, path, "chunk_parallel=2", f"output={tmp_path / 'two'}")
    assert_same_run(tmp_path / "two", tmp_path / "one")
    stop_at_half(tmp_path / "one")
    trained(path, f"output={tmp_path / 'one'}")
    assert_same_run(tmp_path / "one", tmp_path / "two")
