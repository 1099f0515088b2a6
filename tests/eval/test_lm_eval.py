"""lm-evaluation-harness: what its own `hf` model says, without its bounds, each beginning once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from cometlm import Session
from cometlm.checkpoints.backbones import BUILT_IN, converted
from cometlm.eval import lm_eval
from cometlm.eval.lm_eval import CometLM
from cometlm.methods import Foreseen, Loader, Reader, TooLongError
from tests import real
from tests.sessions import TEXT, model_of, tokenizer_of
from tests.tiny import examples, refused

CHOICES = [" sea", " the keeper of the lamp", " wind"]
HOW = {"until": ["e", " wind"], "max_gen_toks": 12}
QUIET = {"disable_tqdm": True}


def asked(kind, *arguments):
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(real.save_backbone(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def full(folder):
    return CometLM(folder, method="full", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def theirs(folder):
    return HFLM(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def comet():
    return CometLM(model_of("llama"), tokenizer=tokenizer_of("llama"))


# --- as the harness's own model -----------------------------------------------------------------


def test_full_writes_what_hf_writes(full, theirs):
    contexts = [TEXT[:400], TEXT[:400], TEXT[200:500], TEXT[:90], " "]
    requests = asked("generate_until", *((context, HOW) for context in contexts))
    requests += asked("generate_until", *((context, {"max_gen_toks": 9}) for context in contexts))
    ours = full.generate_until(requests, **QUIET)
    assert ours == theirs.generate_until(requests, **QUIET)
    assert len(set(ours)) > 4


def test_full_foresees_what_hf_foresees(full, theirs):
    pairs = [(context, choice) for context in (TEXT[:300], TEXT[:90], "") for choice in CHOICES]
    (likeliest,) = theirs.generate_until(
        asked("generate_until", (TEXT[:300], {"max_gen_toks": 1})), **QUIET
    )
    pairs.append((TEXT[:300], likeliest))
    requests = asked("loglikelihood", *pairs)
    for ours, wanted in zip(
        full.loglikelihood(requests, **QUIET), theirs.loglikelihood(requests, **QUIET), strict=True
    ):
        assert ours[0] == pytest.approx(wanted[0], rel=1e-5)
        assert ours[1] == wanted[1]


def test_full_rolls_as_hf_does(full, theirs):
    requests = asked("loglikelihood_rolling", (TEXT[:300],), (TEXT[100:200],))
    wanted = theirs.loglikelihood_rolling(requests, **QUIET)
    assert full.loglikelihood_rolling(requests, **QUIET) == pytest.approx(wanted, rel=1e-5)


def test_every_method_is_a_model(folder):
    """All of a text that fits is foreseen alike."""
    said = set()
    for method in ("full", "retrieve", "truncate", "window"):
        lm = CometLM(folder, method=method, dtype="float32", device="cpu")
        said.add(lm.generate_until(asked("generate_until", (TEXT[:200], HOW)), **QUIET)[0])
    assert len(said) == 1


# --- without its bounds -------------------------------------------------------------------------


def test_a_long_text_is_scored_as_a_whole(comet):
    text = TEXT * 2
    model, tokenizer = model_of("llama"), tokenizer_of("llama")
    ids = tokenizer.encode(text)
    assert len(ids) > 2 * model.config.backbone_config.max_position_embeddings
    logits = model(torch.tensor([[comet.prefix_token_id, *ids]]), use_cache=False).logits
    want = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()
    (found,) = comet.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), **QUIET)
    assert found == pytest.approx(float(want.detach()), rel=1e-6)


def test_a_long_context_is_read_as_a_whole(comet):
    context = (TEXT * 2).strip()
    session = Session(model_of("llama"), tokenizer_of("llama"))
    session.read(tokenizer_of("llama").encode(context))
    wanted = session.ask("", template=False, max_new_tokens=7)
    requests = asked("generate_until", (context, {"max_gen_toks": 7}))
    assert comet.generate_until(requests, **QUIET) == [wanted]
    (found,) = comet.loglikelihood(asked("loglikelihood", (context, CHOICES[1])), **QUIET)
    choice = tokenizer_of("llama").encode(CHOICES[1])
    assert found[0] == pytest.approx(sum(session.loglikelihood(choice)), rel=1e-6)


def test_the_harness_own_model_cuts_no_text_of_a_model_with_memory(comet):
    """`HFLM` asks the config how long a text may be; it says the same as ours."""
    theirs = HFLM(model_of("llama"), tokenizer=tokenizer_of("llama"))
    text = TEXT * 2
    requests = asked("loglikelihood_rolling", (text,))
    wanted = comet.loglikelihood_rolling(requests, **QUIET)
    assert theirs.loglikelihood_rolling(requests, **QUIET) == pytest.approx(wanted, rel=1e-5)
    requests = asked("loglikelihood", (text.strip(), CHOICES[1]))
    (ours, _), (found, _) = (lm.loglikelihood(requests, **QUIET)[0] for lm in (comet, theirs))
    assert found == pytest.approx(ours, rel=1e-5)
    requests = asked("generate_until", (text.strip(), {"max_gen_toks": 7}))
    assert theirs.generate_until(requests, **QUIET) == comet.generate_until(requests, **QUIET)


def test_what_a_method_cannot_read_is_an_error(full):
    with pytest.raises(TooLongError, match="must be at most 256"):
        full.generate_until(asked("generate_until", (TEXT * 3, HOW)), **QUIET)


# --- what is asked of it ------------------------------------------------------------------------


def test_writing_stops_at_stop_texts_only_in_the_answer(comet):
    def write(**how):
        return comet.generate_until(asked("generate_until", (TEXT[:90], how)), **QUIET)[0]

    whole = write(max_gen_toks=30)
    for begin in range(2, len(whole), 11):
        stop = whole[begin : begin + 3]
        assert write(until=stop, max_gen_toks=30) == whole.split(stop)[0]
    assert write(until=[TEXT[80:90]], max_gen_toks=30) == whole  # stands in the context


def test_sampling_is_had(comet):
    how = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 20}
    torch.manual_seed(0)
    requests = asked("generate_until", (TEXT[:90], how), (TEXT[:90], how))
    assert len(set(comet.generate_until(requests, **QUIET))) == 2


def test_what_is_not_had_is_refused(folder):
    model, tokenizer = model_of("llama"), tokenizer_of("llama")
    for options, said in (
        ({"max_length": 512}, "max_length must be None, got 512"),
        ({"truncation": True}, "truncation must be False"),
        ({"think_end_token": 7}, "think_end_token must be text, got 7"),
        ({"method": "full"}, "method: a model that is loaded already takes none"),
        ({"capacity": 5}, "capacity: a model that is loaded already takes none"),
        ({"tokenizer": None}, "tokenizer must be given"),
    ):
        with refused(said):
            CometLM(model, **{"tokenizer": tokenizer, **options})
    with refused("unknown method 'telepathy'"):
        CometLM(folder, method="telepathy")
    with refused("budget must be tokens"):
        CometLM(folder, budget="many")
    lm = CometLM(model, tokenizer=tokenizer, batch_size=8)
    with refused("max_length=9 counts the prompt"):
        lm.generate_until(asked("generate_until", ("a", {"max_length": 9})), **QUIET)
    with pytest.raises(ValueError, match="colour"):
        lm.generate_until(asked("generate_until", ("a", {"colour": "red"})), **QUIET)


def test_it_is_found_by_name(folder):
    args = f"pretrained={folder},method=window,budget=64,dtype=float32"
    lm = get_model("cometlm").create_from_arg_string(args, {"batch_size": "auto", "device": "cpu"})
    assert isinstance(lm, CometLM)
    assert type(lm._empty).__name__ == "WindowReader"
    assert lm.model.dtype == torch.float32


# --- what is read once --------------------------------------------------------------------------


class Remembering(Reader):
    """Knows what it read, and how much was read by all of its forks."""

    def __init__(self, ids=(), total=None):
        self.ids, self.total = tuple(ids), total if total is not None else [0]

    def read(self, ids):
        self.ids += tuple(ids)
        self.total[0] += len(ids)

    def fork(self):
        return Remembering(self.ids, self.total)

    def answer(self, ids=(), **generation):
        raise AssertionError

    def foresee(self, ids):
        return [Foreseen(float(sum(self.ids)), True) for _ in ids]

    nbytes = 0


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=9)


@examples(100)
@given(prompts=PROMPTS, copies=st.integers(1, 3), length=st.sampled_from([1, 3]))
def test_what_prompts_share_is_read_once(comet, prompts, copies, length):
    prompts = [[i for i in prompt for _ in range(length)] for prompt in prompts] * copies
    empty = Remembering()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comet, "_empty", empty)
        patch.setattr(lm_eval, "_WORTH_A_FORK", 1)
        found = {n: reader.ids for n, reader in comet._readers(prompts, "", quiet=True)}
    assert found == {n: tuple(prompt) for n, prompt in enumerate(prompts)}
    beginnings = {tuple(prompt[:n]) for prompt in prompts for n in range(1, len(prompt) + 1)}
    assert empty.total[0] == len(beginnings)
    assert empty.ids == ()


def test_choices_of_a_question_share_its_reading(comet, monkeypatch):
    empty = Remembering()
    monkeypatch.setattr(comet, "_empty", empty)
    pairs = [(context, choice) for context in (TEXT[:300], TEXT[:200]) for choice in CHOICES]
    comet.loglikelihood(asked("loglikelihood", *pairs), **QUIET)
    assert empty.total[0] == len(tokenizer_of("llama").encode(TEXT[:300]))


# --- real ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_full_is_hf_on_the_harness_own_samples():
    from lm_eval import simple_evaluate

    loader = Loader("smollm2", "cpu", torch.float32)
    path = str(converted("smollm2", BUILT_IN["smollm2"]))
    found = []
    for lm in (CometLM(loader, method="full"), HFLM(path, dtype="float32", device="cpu")):
        results = simple_evaluate(
            model=lm,
            tasks=["niah_single_1", "niah_multikey_2"],
            limit=2,
            metadata={"tokenizer": path, "max_seq_lengths": [1024]},
        )
        answers = [row["resps"] for rows in results["samples"].values() for row in rows]
        scores = {name: figures["1024,none"] for name, figures in results["results"].items()}
        found.append((answers, scores))
    assert found[0] == found[1]
    assert found[0][1]["niah_single_1"] == 1.0
