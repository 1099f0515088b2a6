"""Methods: what they answer, what they hold, and that asking changes nothing."""

import pytest
import torch

import cometlm
from cometlm import Session
from cometlm.methods import METHODS, Budget, Loader, TooLongError
from cometlm.methods.comet import CometReader
from cometlm.methods.full import CacheReader, bytes_per_token
from cometlm.methods.retrieve import RetrieveReader
from cometlm.methods.summary import SummaryReader
from cometlm.methods.truncate import TruncateReader
from cometlm.methods.window import SINKS, WindowReader
from cometlm.session.plain_text import prefix_ids
from tests.sessions import going_on, tokenizer_of
from tests.tiny import random_ids, refused, tiny_backbone, tiny_comet

GREEDY = {"max_new_tokens": 6, "eos_token_id": None}
LONG = {"max_new_tokens": 22, "do_sample": False, "eos_token_id": None}
VOCABULARY = 3000


def ids_of(count, seed=0):
    return random_ids(count, seed, vocabulary=90).tolist()


@pytest.fixture(scope="module")
def words():
    return tokenizer_of("like gemma")


@pytest.fixture(scope="module")
def backbone(words):
    return tiny_backbone("llama", vocab_size=len(words))


@pytest.fixture(scope="module")
def model(words):
    """The same backbone, with a memory; no compression token stands within 30 tokens."""
    sizes = {"chunk_size": 40, "readout_tokens": 3, "stride": 30, "capacity": 5}
    return cometlm.attach(tiny_backbone("llama", vocab_size=len(words)), **sizes)


@pytest.fixture(params=["comet", "full", "retrieve", "summary", "truncate", "window"])
def empty(request, model, backbone, words):
    """A reader of each kind that has read nothing."""
    full = CacheReader(backbone, words, 250)
    return {
        "comet": lambda: CometReader(Session(model, words)),
        "full": lambda: full,
        "retrieve": lambda: RetrieveReader(CacheReader(backbone, words, 250)),
        "summary": lambda: SummaryReader(CacheReader(backbone, words, 250)),
        "truncate": lambda: TruncateReader(CacheReader(backbone, words, 48)),
        "window": lambda: WindowReader(backbone, words, 24),
    }[request.param]()


def test_asking_leaves_the_reader_as_it_was(empty):
    reader = empty.fork()
    reader.read(ids_of(90))
    held, likely = reader.nbytes, reader.loglikelihood(ids_of(5, seed=1))
    said = [reader.answer(ids_of(4, seed=2), **GREEDY) for _ in range(2)]
    assert said[0] == said[1]
    fork = reader.fork()
    fork.read(ids_of(30, seed=3))
    assert fork.loglikelihood(ids_of(5, seed=1)) != likely
    assert reader.loglikelihood(ids_of(5, seed=1)) == likely
    assert reader.nbytes == held > 0
    with pytest.raises(ValueError, match=r"nothing|none"):
        empty.loglikelihood(ids_of(2))  # it has still read nothing


@pytest.mark.parametrize("kind", [TruncateReader, RetrieveReader, SummaryReader])
def test_what_is_read_anew_begins_as_the_text_did(kind, backbone, words):
    (first,) = prefix_ids(words)
    reader = kind(CacheReader(backbone, words, 250))
    reader.read([first])
    reader.read(ids_of(600))
    made = {
        TruncateReader: lambda: reader._reader(8),
        RetrieveReader: lambda: reader._prompted(8),
        SummaryReader: lambda: reader._reader(),
    }[kind]()
    read = [*made._cached, *made._waiting]
    assert read.count(first) == 1
    assert read[0] == first
    assert len(read) <= 250 - 8
    bare = kind(CacheReader(backbone, words, 250))
    bare.read(ids_of(600))
    assert bare.loglikelihood(ids_of(5, seed=1)) != reader.loglikelihood(ids_of(5, seed=1))


@pytest.mark.parametrize("kind", [TruncateReader, RetrieveReader, SummaryReader])
@pytest.mark.parametrize("tokens", [150, 249, 250, 300])
def test_what_has_room_behind_a_token_is_known_before(kind, backbone, words, tokens):
    reader = kind(CacheReader(backbone, words, 250))
    asked = ids_of(tokens - 1, seed=2)
    try:
        reader.check_asked(tokens)
    except TooLongError:
        assert tokens >= 250
        reader.read(ids_of(1))
        with pytest.raises(TooLongError):
            reader.answer(asked, max_new_tokens=1, eos_token_id=None)
    else:
        reader.read(ids_of(1))
        assert isinstance(reader.answer(asked, max_new_tokens=1, eos_token_id=None), str)


def test_reading_in_pieces_is_reading_at_once(empty):
    whole, pieces = empty.fork(), empty.fork()
    ids = ids_of(100)
    whole.read(ids)
    for start in range(0, 100, 7):
        pieces.read(ids[start : start + 7])
    pieces.read([])
    assert pieces.nbytes == whole.nbytes
    ours, theirs = (reader.loglikelihood(ids_of(20, seed=1)) for reader in (pieces, whole))
    if not isinstance(empty, WindowReader):  # its window slides after each piece
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_loglikelihoods_follow_one_another(empty):
    """However they are asked for."""
    reader = empty.fork()
    reader.read(ids_of(30))
    more = ids_of(8, seed=1)
    after = reader.fork()
    after.read(more[:5])
    apart = reader.loglikelihood(more[:5]) + after.loglikelihood(more[5:])
    if not isinstance(empty, WindowReader | TruncateReader):  # which forget by length
        assert reader.loglikelihood(more) == pytest.approx(apart, rel=1e-9)


def test_what_is_foreseen_while_it_is_read(empty):
    """As when it is foreseen first, and read then."""
    ids = ids_of(20, seed=1)
    readers = [empty.fork(), empty.fork()]
    for reader in readers:
        reader.read(ids_of(30))
    found = readers[0].read_foreseen(ids)
    assert len(found) == 20
    if not isinstance(empty, WindowReader | TruncateReader):  # which forget by length
        want = readers[1].loglikelihood(ids)
        assert [one.loglikelihood for one in found] == pytest.approx(want, rel=1e-5)
    readers[1].read(ids)
    (first, _), more = readers, ids_of(9, seed=2)
    assert first.loglikelihood(more) == pytest.approx(readers[1].loglikelihood(more), rel=1e-5)


def test_greedy_tokens_are_the_likeliest(model, backbone, words):
    """Across chunk borders, and no others are."""
    ids = ids_of(30)
    session, full = Session(model), CacheReader(backbone, words, 250)
    for reader in (session, full):
        reader.read(ids)
    prompt = torch.tensor([ids])
    out = backbone.generate(prompt, attention_mask=torch.ones_like(prompt), **LONG)
    for reader, written in ((session, session.continuation(22)), (full, out[0, 30:].tolist())):
        changed = [*written[:-1], (written[-1] + 1) % len(words)]
        found = [reader.fork().read_foreseen(ids) for ids in (written, changed)]
        assert [one.is_likeliest for one in found[0]] == [True] * 22
        assert [one.is_likeliest for one in found[1]] == [True] * 21 + [False]


def test_all_agree_where_everything_fits(model, backbone, words):
    """In one chunk, in the positions, in the window: the plain backbone."""
    readers = [
        CometReader(Session(model, words)),
        CacheReader(backbone, words, 250),
        RetrieveReader(CacheReader(backbone, words, 250)),
        SummaryReader(CacheReader(backbone, words, 250)),
        TruncateReader(CacheReader(backbone, words, 250)),
        WindowReader(backbone, words, 60),
    ]
    context, question, answer = ids_of(20), ids_of(5, seed=1), ids_of(4, seed=2)
    out = backbone(torch.tensor([[*context, *answer]])).logits[0, 19:-1].log_softmax(-1)
    want = out.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
    answers = set()
    for reader in readers:
        reader.read(context)
        # float32 of log-probabilities
        assert reader.loglikelihood(answer) == pytest.approx(want, rel=1e-5)
        answers.add(reader.answer(question, **GREEDY))
    assert len(answers) == 1


@pytest.mark.parametrize("overlap", [0, 3])
def test_a_sessions_loglikelihood_is_what_it_generates_by(overlap):
    """Across chunk borders, also where chunks overlap."""
    model = tiny_comet("qwen3", overlap=overlap)
    session = Session(model)
    session.read(ids_of(30))
    first, ids, want = session.fork(), [], []
    for _ in range(20):
        (likeliest,), logits = going_on(session, 1)
        ids.append(likeliest)
        want.append(float(logits[0].log_softmax(-1)[likeliest]))
        session.read([likeliest])
    assert first.loglikelihood(ids) == pytest.approx(want, rel=1e-5)


def test_a_sessions_loglikelihood_is_that_of_one_call():
    model = tiny_comet("qwen3")
    context, more = ids_of(17), ids_of(30, seed=1)
    session = Session(model)
    session.read(context)
    logits = model(torch.tensor([context + more]), use_cache=False).logits[0, 16:-1]
    want = logits.log_softmax(-1).gather(1, torch.tensor(more)[:, None])[:, 0].tolist()
    assert session.loglikelihood(more) == pytest.approx(want, rel=1e-5)
    assert session.stats().tokens == 17
    with refused("nothing was read"):
        Session(model).loglikelihood([1])


def test_full_says_when_its_positions_run_out(backbone, words):
    reader = CacheReader(backbone, words, 30)
    reader.read(ids_of(20))
    with pytest.raises(TooLongError, match=r"tokens .* must be at most 30, got 31"):
        reader.read(ids_of(11))
    with pytest.raises(TooLongError, match="at most 30, got 35"):
        reader.answer(ids_of(5), max_new_tokens=10)
    assert len(reader.loglikelihood(ids_of(10))) == 10
    grown = reader.nbytes
    reader.read(ids_of(10))
    assert reader.nbytes == grown // 19 * 29  # the last token waits


def test_truncation_reads_the_last_tokens(backbone, words):
    """Those that an eighth of the room, or the question and the answer, leave."""
    reader = TruncateReader(CacheReader(backbone, words, 48))
    ids = ids_of(300)
    for start in range(0, 300, 50):
        reader.read(ids[start : start + 50])
    for question, kept in ((ids_of(2), 40), (ids_of(14), 28)):
        plain = CacheReader(backbone, words, 48)
        plain.read(ids[-kept:])
        assert reader.answer(question, **GREEDY) == plain.answer(question, **GREEDY)
    with pytest.raises(TooLongError, match="fewer than 48, got 56"):
        reader.answer(ids_of(50), **GREEDY)


def test_a_window_holds_its_budget_and_slides_past_all_positions(backbone, words):
    reader = WindowReader(backbone, words, 24)
    held = []
    for start in range(8):
        reader.read(ids_of(50, seed=start))  # 256 positions in all
        held.append(reader.nbytes)
    assert len(set(held)) == 1
    assert reader._cached[:SINKS] == ids_of(50)[:SINKS]
    assert all(abs(x) < 100 for x in reader.loglikelihood(ids_of(60)))


def test_a_windows_numbers_do_not_depend_on_where_it_stands(words):
    """The sinks move along, so it is as in a text without what was forgotten."""
    ids = ids_of(24)
    # One layer's keys and values depend on nothing before them: forget a token by hand.
    shallow = tiny_backbone("llama", vocab_size=len(words), num_hidden_layers=1)
    long, short = WindowReader(shallow, words, 24), WindowReader(shallow, words, 24)
    long.piece = short.piece = 1
    tail = ids_of(21, seed=5)
    long.read([*ids[:SINKS], *ids_of(70, seed=4), *tail])
    short.read([*ids[:SINKS], *tail])
    more = ids_of(3, seed=6)
    assert long.loglikelihood(more) == pytest.approx(short.loglikelihood(more), rel=1e-5)


def test_windows_that_cannot_be(backbone, words):
    with refused("budget of a window must be more than 4, got 4"):
        WindowReader(backbone, words, 4)


@pytest.mark.parametrize("stride", [1, 4, 30])
@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_comet_counts_the_open_chunk_that_it_answers_from(family, overlap, stride):
    """As the model's own cache holds it when the chunk was read once."""
    model = tiny_comet(family, stride=stride, overlap=overlap)
    reader = CometReader(Session(model))
    for count in (1, 3, 8, 1, 17):
        reader.read(ids_of(count))
        session = reader.session
        out = model.model(
            torch.tensor([session._open]), past_key_values=session._cache, use_cache=True
        ).past_key_values
        chunks = [layer.open.chunk for layer in out.layers]
        assert reader.open_nbytes == sum(chunk.nbytes for chunk in chunks) > 0
        assert reader.nbytes == session.stats().memory_bytes + reader.open_nbytes
    assert session.stats().memory_bytes > 0


def test_an_open_chunk_costs_what_the_same_tokens_do_elsewhere(model, backbone, words):
    comet, full = CometReader(Session(model, words)), CacheReader(backbone, words, 250)
    comet.read(ids_of(20))
    full.read(ids_of(21))  # the last one waits
    assert comet.nbytes == comet.open_nbytes == full.nbytes
    assert full.open_nbytes == 0


def test_no_more_is_held_than_a_reader_bounds(empty, backbone):
    if (most := empty.bounds.held) is None:
        assert isinstance(empty, CacheReader | RetrieveReader)
        return
    reader, token = empty.fork(), bytes_per_token(backbone)
    if isinstance(empty, CometReader):
        reader.read(ids_of(most))
        full = reader.nbytes - reader.open_nbytes
        for start in range(3):
            reader.read(ids_of(77, seed=start))
            assert reader.nbytes - reader.open_nbytes == full
        return
    for start in range(5):
        reader.read(ids_of(50, seed=start))
        assert reader.nbytes <= most * token
    if not isinstance(empty, SummaryReader):  # whose notes may be short
        assert reader.nbytes >= (most - 1) * token  # the last one waits


@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("capacity", [2, 5, 9])
def test_comet_bounds_what_it_runs_and_holds(overlap, capacity):
    reader = CometReader(Session(tiny_comet("qwen3", overlap=overlap, capacity=capacity)))
    bounds, folds, held = reader.bounds, 0, []
    for tokens in range(1, 70):
        reader.read([tokens])
        session = reader.session
        folds, before = session.stats().chunks, folds
        assert bounds.run(tokens) == bounds.chunk * folds
        held.append(session.stats().memory_bytes)
        if folds > before:
            last = tokens
    assert last > bounds.held
    assert held[bounds.held - 1] == held[-1] > held[bounds.held - 2]


# --- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"rmt", "xl"}))
def test_methods_open_on_a_backbone_and_on_a_checkpoint(method, named, tmp_path):
    sizes = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5}
    made, words = cometlm.load(str(named), device="cpu", dtype=torch.float32, **sizes)
    made.save_pretrained(tmp_path / "beside")
    made.save_pretrained(tmp_path / "with", backbone=True)
    words.save_pretrained(tmp_path / "with")
    found = set()
    for name, own in ((named, sizes), (tmp_path / "beside", {}), (tmp_path / "with", {})):
        loader = Loader(str(name), "cpu", torch.float32, sizes=own)
        reader = METHODS[method].open(loader, Budget(150))
        reader.read(ids_of(60))
        found.add(tuple(reader.loglikelihood(ids_of(3))))
        assert len(loader.weights) == 32
    if method != "comet":  # of which the first is another random memory
        assert len(found) == 1


def test_a_loader_loads_once(named):
    sizes = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5}
    loader = Loader(str(named), "cpu", sizes=sizes)
    assert loader.backbone() is loader.backbone()
    assert loader.with_memory() is loader.with_memory()


# --- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("512", 512, "tokens"),
        ("3MB", 3_000_000, "bytes"),
        ("1.5 GiB", 3 << 29, "bytes"),
        ("700b", 700, "bytes"),
        ("2kib", 2048, "bytes"),
    ],
)
def test_budgets_as_people_write_them(text, amount, unit):
    assert Budget.parse(text) == Budget(amount, unit)


@pytest.mark.parametrize("text", ["", "many", "1.5", "3XB", "MB", "3 M", "nanMB", "infGB"])
def test_what_is_no_budget(text):
    with refused(f"or bytes like 3MB or 1.5GiB, got {text!r}"):
        Budget.parse(text)


def test_budgets_out_of_bounds(named):
    for text in ("0", "0MB", "-3"):
        with pytest.raises(ValueError, match="budget must be at least 1, got"):
            Budget.parse(text)
    for method in ("full", "truncate", "window"):
        with refused("budget must be at least 192 bytes, the keys and values of a token, got 191"):
            METHODS[method].open(Loader(str(named), "cpu", torch.float32), Budget(191, "bytes"))


@pytest.mark.parametrize("method", ["full", "truncate", "window"])
def test_keys_and_values_stay_within_bytes(method, named):
    """A token has 192: 3 layers, one head of 8, keys and values, 4 bytes each."""
    loader = Loader(str(named), "cpu", torch.float32)
    token = bytes_per_token(loader.backbone())
    reader = METHODS[method].open(loader, Budget(token * 50 + token // 2, "bytes"))
    reader.read(ids_of(50 if method == "full" else 120))
    assert reader.nbytes in (token * 50, token * 49, token * 43)  # the last waits; room for answers
    same = METHODS[method].open(loader, Budget(50))
    same.read(ids_of(50 if method == "full" else 120))
    assert same.nbytes == reader.nbytes


def test_comet_has_the_capacity_that_fits(named):
    sizes = {"chunk_size": 12, "readout_tokens": 3, "stride": 4}
    loader = Loader(str(named), "cpu", torch.float32, sizes=sizes | {"capacity": 1})
    one = METHODS["comet"].open(loader)
    one.read(ids_of(100))
    loader = Loader(str(named), "cpu", torch.float32, sizes=sizes | {"capacity": 2})
    two = METHODS["comet"].open(loader)
    two.read(ids_of(100))
    held = {one: one.nbytes - one.open_nbytes, two: two.nbytes - two.open_nbytes}
    entry = held[two] - held[one]
    loader = Loader(str(named), "cpu", torch.float32, sizes=sizes)
    reader = METHODS["comet"].open(loader, Budget(held[one] + 6 * entry + 1, "bytes"))
    reader.read(ids_of(100))
    assert reader.nbytes - reader.open_nbytes == held[one] + 6 * entry
    assert reader.session.model.config.comet_config.capacity == 7
    with refused(f"budget of comet must be at least {held[one]} bytes"):
        METHODS["comet"].open(loader, Budget(held[one] - 1, "bytes"))
    most = METHODS["comet"].open(loader, Budget(1 << 30, "bytes"))  # more than there are positions
    assert most.session.model.config.comet_config.row_length == 256
    fixed = Loader(str(named), "cpu", torch.float32, sizes=sizes | {"capacity": 2})
    with refused(f"budget of comet must be at least {held[two]} bytes"):
        METHODS["comet"].open(fixed, Budget(held[one], "bytes"))
    kept = METHODS["comet"].open(fixed, Budget(1 << 30, "bytes"))
    assert kept.session.model.config.comet_config.capacity == 2
