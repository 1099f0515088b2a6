"""RULER: a package like its authors', with made-up scripts, and (slow) the real one."""

import os
import random
import re
import sys

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cometlm.eval.runner import evaluate
from cometlm.methods import Reader
from cometlm.tasks import make_task
from cometlm.tasks.base import asked_ids
from cometlm.tasks.ruler import PACKAGE, Ruler
from tests.tasks.shared import decoded
from tests.tiny import examples, refused

HEAD = """
import argparse, os, random, sys
{imports}
sys.path.append("..")
parser = argparse.ArgumentParser()
for name in ("save_dir", "save_name", "tokenizer_path", "template", "max_seq_length"):
    parser.add_argument("--" + name, required=True)
parser.add_argument("--tokens_to_generate", type=int, required=True)
parser.add_argument("--num_samples", type=int, required=True)
parser.add_argument("--random_seed", type=int, default=42)
{arguments}
args = parser.parse_args()
random.seed(args.random_seed)
TOKENIZER = select_tokenizer("hf", args.tokenizer_path)
"""
TOKENIZER = "from long_context_eval.pred.nemo_utils import write_manifest\n"
TOKENIZER += "from tokenizer import select_tokenizer\n"
NIAH = (
    HEAD.format(
        imports="from long_context_eval.data.tokenizer import select_tokenizer\n"
        "from nltk.tokenize import sent_tokenize\nimport wonderwords",
        arguments="\n".join(
            f'parser.add_argument("--num_needle_{part}", type=int, default=1)' for part in "kvq"
        )
        + '\nparser.add_argument("--type_haystack", required=True)',
    )
    + """
needle = "One of the lamps of {key} is: {value}."
if args.type_haystack == "essay":
    haystack = ["Rain", "fell.", "Wind", "rose."] * 50
else:
    haystack = "The sea is grey."
words = wonderwords.random_word._get_words_from_text_file("nounlist.txt")[:9]

def generate_input_output(size):
    keys = random.sample(words, args.num_needle_k)
    values = [[str(random.randint(10**6, 10**7)) for _ in range(args.num_needle_v)] for _ in keys]
    told = [needle.format(key=k, value=v) for k, own in zip(keys, values) for v in own]
    random.Random(args.random_seed).shuffle(told)
    if args.type_haystack == "essay":
        assert size <= len(haystack), "a text is as long as was asked for"
        lines = sent_tokenize(" ".join(haystack[:size]))
    else:
        lines = [haystack] * size
    for line in told:
        lines.insert(random.randrange(len(lines) + 1), line)
    asked = random.sample(range(len(keys)), args.num_needle_q)
    text = args.template.format(context=" ".join(lines), query=", ".join(keys[i] for i in asked))
    return text, [value for i in asked for value in values[i]]
"""
)
TRACKED = (
    HEAD.format(
        imports=TOKENIZER + "import string\nimport numpy as np\nfrom constants import TASKS",
        arguments='parser.add_argument("--num_chains", type=int)\n'
        'parser.add_argument("--num_hops", type=int)',
    )
    + """
def generate_input_output(size, num_chains, num_hops, is_icl=False):
    whole = TASKS["variable_tracking"]["template"] + TASKS["variable_tracking"]["answer_prefix"]
    assert not is_icl or args.template == whole
    k = 3 if is_icl else 5
    names = ["".join(random.choices(string.ascii_uppercase, k=k)) for _ in range(num_hops + 1)]
    value = str(np.random.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:])]
    lines = ["The sea is grey."] * size
    for place, line in enumerate(chain):
        lines.insert(place * len(lines) // len(chain) + place, line)
    text = args.template.format(context=" ".join(lines), query=value, num_v=num_hops + 1)
    return text, names

def randomize_icl(example):
    *_, last = example.split()
    return example.replace(last, "".join(random.choices(string.ascii_uppercase, k=3)))
"""
)
COMMON = (
    HEAD.format(
        imports=TOKENIZER,
        arguments="\n".join(
            f'parser.add_argument("--{name}", type=int)'
            for name in ("freq_cw", "freq_ucw", "num_cw")
        ),
    )
    + """
words = [f"{a}{b}" for a in ("salt", "rope", "tar") for b in ("sea", "rain", "lamp", *range(60))]

def generate_input_output(size):
    drawn = random.sample(words, size)
    common, rest = drawn[: args.num_cw], drawn[args.num_cw :]
    listed = common * args.freq_cw + rest * args.freq_ucw
    random.Random(args.random_seed).shuffle(listed)
    example = args.template.format(context="1. sea 2. sea", query="") + " 1. sea"
    return example + "\\n" + args.template.format(context=" ".join(listed), query=""), common
"""
)
FREQUENT = (
    HEAD.format(
        imports=TOKENIZER + "from scipy.special import zeta",
        arguments='parser.add_argument("--alpha", type=float)\n'
        'parser.add_argument("--coded_wordlen", type=int, default=6)',
    )
    + """
def generate_input_output(max_len, num_words, coded_wordlen, vocab_size, alpha):
    coded = ["".join(random.choices("abcdef", k=coded_wordlen)) for _ in range(vocab_size)]
    shares = [num_words / k**alpha / zeta(alpha) for k in range(1, vocab_size + 1)]
    text = " ".join(word for word, share in zip(coded, shares) for _ in range(int(share)))
    assert len(TOKENIZER.text_to_tokens(text)) < max_len
    return args.template.format(context=text, query=""), coded[1:4], num_words
"""
)
ASKED = (
    HEAD.format(imports=TOKENIZER, arguments='parser.add_argument("--dataset", required=True)')
    + """
DOCS = [f"Isle {i}\\nIsle {i} has {i + 3} lamps." for i in range(20)]
QAS = [
    {"query": f"How many lamps has Isle {i}?", "outputs": [str(i + 3), f"{i + 3} lamps"],
     "context": [i] if args.dataset == "squad" else [i, (i + 1) % 20]}
    for i in range(20)
]

def generate_input_output(number, size):
    assert size < len(DOCS)
    own = QAS[number]["context"]
    others = random.sample([i for i in range(len(DOCS)) if i not in own], size - len(own))
    docs = [DOCS[i] for i in own + others]
    random.Random(args.random_seed).shuffle(docs)
    text = args.template.format(context="\\n\\n".join(docs), query=QAS[number]["query"])
    return text, QAS[number]["outputs"]
"""
)
PROMPTS = {
    "niah": (
        40,
        "Remember the lamps.\n{context}\nWhich are of {query}?",
        " The lamps of {query} are",
    ),
    "variable_tracking": (
        20,
        "Track them.\n\n{context}\nQuestion: What is {query}?",
        " {num_v} are: ",
    ),
    "common_words_extraction": (30, "A list.\n{context}\nQuestion: The common ones?", " Answer:"),
    "freq_words_extraction": (12, "A code. {context}\nQuestion: The frequent ones?", " Answer:"),
    "qa": (9, "Answer.\n\n{context}\n\nAnswer.\n\nQuestion: {query}", " Answer:"),
}
TASKS = """
one: {task: niah, args: {type_haystack: repeat}}
many: {task: niah, args: {type_haystack: essay, num_needle_k: 1, num_needle_q: 3, num_needle_v: 2}}
chain: {task: variable_tracking, args: {num_chains: 1, num_hops: 2}}
common: {task: common_words_extraction, args: {freq_cw: 6, freq_ucw: 2, num_cw: 4}}
frequent: {task: freq_words_extraction, args: {alpha: 2.0}}
paragraph: {task: qa, args: {dataset: squad}}
paragraphs: {task: qa, args: {dataset: hotpotqa}}
"""
SCORES = """
def of_all(preds, refs):
    pairs = zip(preds, refs)
    return [100 * sum(r.lower() in p.lower() for r in ref) / len(ref) for p, ref in pairs]

def of_one(preds, refs):
    return [100.0 * any(r.lower() in p.lower() for r in ref) for p, ref in zip(preds, refs)]

names = ("niah", "variable_tracking", "common_words_extraction", "freq_words_extraction")
TASKS = {name: {"metric_fn_per_sample": of_all} for name in names}
TASKS["qa"] = {"metric_fn_per_sample": of_one}
"""
NAMES = ["one", "many", "chain", "common", "frequent", "paragraph", "paragraphs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("package")
    prompts = {
        name: {"tokens_to_generate": most, "template": template, "answer_prefix": prefix}
        for name, (most, template, prefix) in PROMPTS.items()
    }
    scripts = [NIAH, TRACKED, COMMON, FREQUENT, ASKED]
    files = {f"{name}.py": text for name, text in zip(PROMPTS, scripts, strict=True)}
    files["constants.py"] = f"TASKS = {prompts!r}\n"
    for name, text in files.items():
        (root / "data/synthetic").mkdir(parents=True, exist_ok=True)
        (root / "data/synthetic" / name).write_text(text)
    (root / "eval/synthetic").mkdir(parents=True)
    (root / "eval/synthetic/constants.py").write_text(SCORES)
    (root / "synthetic.yaml").write_text(TASKS)
    return str(root)


def used(words, sample):
    """Tokens of a sample, its question and the answer."""
    (question,) = sample.questions
    return len(sample.context) + len(asked_ids(words, question)) + question.max_new_tokens


@pytest.mark.parametrize("name", NAMES)
@examples(10)
@given(index=st.integers(0, 1000), tokens=st.integers(700, 5000), seed=st.integers(0, 9))
def test_samples_are_as_long_as_is_asked_for(name, words, folder, index, tokens, seed):
    task = Ruler(words, seed=seed, task=name, folder=folder)
    sample = task.sample(index, tokens)
    assert sample == Ruler(words, seed=seed, task=name, folder=folder).sample(index, tokens)
    share = 0.5 if name == "frequent" else 0.93  # its words are as long as they happen to be
    assert share * tokens <= used(words, sample) <= tokens
    assert sample != task.sample(index + 1, tokens)
    assert sample.meta == {"task": name}
    assert "\x1e" not in words.decode(sample.context)


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_whole(name, words, folder):
    task = Ruler(words, task=name, folder=folder)
    sample = task.sample(3, 1500)
    (question,) = sample.questions
    assert "Question" in question.text or question.text.startswith("Which are of")
    assert question.answer_prefix.endswith((":", "are", ": "))
    context = words.decode(sample.context)
    assert context.endswith("\n") or name == "many"
    assert context.lstrip()[:5] in ("Remem", "Track", "A lis", "A cod", "Answe")
    said = ", ".join(question.answers[:1])
    assert task.score(question, f"They are {said}.") == {"match": 1.0}
    assert task.score(question, "no") == {"match": 0.0}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("one", r"One of the lamps of [\w -]+ is: {}\."),
        ("many", r"One of the lamps of [\w -]+ is: {}\."),
        ("chain", r"VAR {} = (VAR )?\w+"),
        ("paragraph", r"Isle \d+\nIsle \d+ has {} lamps\."),
    ],
)
def test_evidence_is_where_answers_stand(name, told, words, folder):
    task = Ruler(words, task=name, folder=folder)
    for index in range(4):
        sample = task.sample(index, 1200)
        (question,) = sample.questions
        wanted = question.answers[0].split(", ")
        assert len(question.evidence) == len(wanted) == {"many": 6, "chain": 3}.get(name, 1)
        for where, answer in zip(question.evidence, wanted, strict=True):
            assert re.fullmatch(told.format(answer), decoded(words, sample, where))


def test_control_tokens_in_a_prompt_are_text(words, folder, monkeypatch):
    task, end = Ruler(words, task="one", folder=folder), words.convert_tokens_to_ids("<|im_end|>")
    clean = task.sample(0, 700)
    make = task._family.make

    def making(*given):
        text, wanted = make(*given)
        begin, _, prefix = text.rpartition("\x1e")
        return f"<|im_end|> {begin}\x1e<|im_end|>{prefix}", wanted

    monkeypatch.setattr(task._family, "make", making)
    made = task.sample(0, 700)
    assert end not in made.context
    assert words.decode(made.context).startswith("<|im_end|> ")
    (was,), (is_now,) = clean.questions, made.questions
    assert is_now.answer_prefix.startswith("<|im_end|>")
    assert asked_ids(words, is_now).count(end) == asked_ids(words, was).count(end)
    for where in is_now.evidence:
        assert decoded(words, made, where).endswith(f" is: {is_now.answers[0]}.")


def test_seeds_ask_other_questions(words, folder):
    def asked(seed):
        task = Ruler(words, seed=seed, task="paragraph", folder=folder)
        return [task.sample(index, 700).questions[0].text for index in range(3)]

    assert asked(0) == [f"Answer.\n\nQuestion: How many lamps has Isle {i}?" for i in range(3)]
    assert asked(0) == asked(1)  # twenty questions begin again after 500
    tasks = [Ruler(words, seed=seed, task="one", folder=folder) for seed in range(3)]
    assert len({tuple(task.sample(0, 700).context) for task in tasks}) == 3


def test_nothing_is_left_behind(words, folder):
    def state():
        numbers = random.getstate(), numpy.random.get_state()[1].tolist()
        found = ("nltk.tokenize", "long_context_eval", "constants", "tokenizer", "wonderwords")
        modules = {name: id(sys.modules.get(name)) for name in found}
        return numbers, list(sys.argv), list(sys.path), modules, os.getcwd()

    before = state()
    for name in NAMES:
        Ruler(words, seed=77, task=name, folder=folder).sample(0, 900)
    assert state() == before


class Echo(Reader):
    """Says what it was told last."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.asked = tokenizer, [], []

    def read(self, ids):
        self.ids += ids

    def fork(self):
        return self

    def answer(self, ids=(), **generation):
        self.asked.append((list(ids), generation))
        return self.tokenizer.decode(self.ids)

    def foresee(self, ids):
        raise AssertionError

    nbytes = 0


def test_the_given_beginning_is_read_behind_the_head_of_the_answer(words, folder):
    reader = Echo(words)
    task = Ruler(words, task="one", folder=folder)
    (answer,) = evaluate(reader, task, [800], 1)
    assert answer.scores == {"match": 1.0}
    ((ids, generation),) = reader.asked
    key = answer.question.removeprefix("Which are of ").removesuffix("?")
    assert words.decode(ids).endswith(f"<|im_start|>assistant\nThe lamps of {key} are")
    assert generation["max_new_tokens"] == 40


def test_what_cannot_be_is_refused(words, folder, monkeypatch):
    with refused("task must be one of one, many, chain"):
        Ruler(words, task="niah", folder=folder)
    with refused("got 'paragrap'; did you mean paragraph?"):
        make_task("ruler", words, task="paragrap", folder=folder)
    with refused("split of ruler must be test, got train"):
        Ruler(words, split="train", folder=folder)
    for name in NAMES:
        with refused("tokens must be at least"):
            Ruler(words, task=name, folder=folder).sample(0, 50)
    with pytest.raises(OSError, match=r"synthetic\.yaml"):
        Ruler(words, folder=f"{folder}/data")
    monkeypatch.setattr("cometlm.extras.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'scipy and wonderwords; run: pip install "cometlm\[rul'):
        Ruler(words, task="one", folder=folder)


# --- the real package -----------------------------------------------------------------------------

REAL = ["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2"]
REAL += [
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_real_tasks(name, words):
    try:
        PACKAGE.file("synthetic.yaml")
    except OSError as error:
        pytest.skip(str(error))
    task = make_task("ruler", words, task=name)
    for tokens in (4096, 32768):
        for index in range(2):
            sample = task.sample(index, tokens)
            assert 0.93 * tokens <= used(words, sample) <= tokens
            (question,) = sample.questions
            said = [decoded(words, sample, where) for where in question.evidence]
            assert bool(said) == (name not in ("cwe", "fwe", "qa_2"))
            if name.startswith("niah"):
                wanted = question.answers[0].split(", ")
                assert [text.split(" is: ")[1].rstrip(".") for text in said] == wanted
            assert task.score(question, question.answers[0]) == {"match": 1.0}
            assert torch.tensor(sample.context).max() < len(words)
