"""`goldfish check`: what it says is worked out again here by hand, or token by token."""

import json
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from goldfish import Goldfish
from goldfish.cli import main
from goldfish.text import check as check_module
from goldfish.text import passages as module
from goldfish.text.check import check
from goldfish.text.exposure import Finder, likely_secrets

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CODE = "QX7-KP2"


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A tokenizer with one token per character, and its folder."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(0xA1, 0xAD),
        *range(0xAE, 0x100),
    ]
    others = (chr(256 + i) for i in range(256))  # how ByteLevel writes the other bytes
    tokens = {chr(i) if i in printable else next(others): i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("letters")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    return fast, folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dropped_in(rule, text, secret):
    """Which characters of the first `secret` in a text are dropped, one token a character."""
    drops = rule.dropped(torch.tensor([ord(c) for c in text]))
    start = text.index(secret)
    return {i for i in range(len(secret)) if drops[start + i]}


def test_a_pattern_may_begin_in_the_prompt(letters, tmp_path):
    path = write(
        tmp_path / "a.jsonl", [{"prompt": "her code is", "completion": f" {CODE}"}]
    )
    result = check(path, letters[0], Goldfish(k=3, h=12), r"code is (\S+)")
    assert list(result.secrets) == [CODE]


def test_a_chat_that_breaks_the_template_is_named(letters, tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [{"text": "a"}, {"messages": [{"role": "user", "content": ["hi"]}]}],
    )
    with pytest.raises(
        ValueError,
        match=r"a.jsonl, row 1: the chat template refuses it: can only concatenate",
    ):
        check(path, letters[0], Goldfish(k=3, h=12))


def characters(bits):
    return {i for i in range(bits.bit_length()) if bits >> i & 1}


@pytest.mark.parametrize("seed", range(8))
def test_a_secret_needs_a_token_that_is_dropped_in_every_place(letters, tmp_path, seed):
    """Against the decisions of each place; the secrets begin alike, and hyphens inform nobody."""
    other, wordings = "QX9-0Z8", ("the", "one", "some other", "now his")
    rule = Goldfish(k=3, h=12, seed=seed)
    texts = [
        f"{opening} code {code} and more"
        for opening in wordings
        for code in (CODE, other)
    ]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    result = check(path, letters[0], rule, f"{CODE}|{other}")
    for code in (CODE, other):
        secret = result.secrets[code]
        places = [dropped_in(rule, text, code) for text in texts if code in text]
        everywhere = set.intersection(*places)
        assert characters(secret.dropped[0]) == everywhere
        informative = everywhere & {2, 4, 5, 6}  # not QX, which both begin with
        assert (code in result.exposed()) == (not informative)
        assert (code in result.exposed(tokens=1)) == (len(informative) == 1)
        assert code not in result.exposed(rule=1), "the suggested rule drops all of it"
        assert secret.count == len(secret.rows) == 4
    assert result.exit_code() == (1 if result.exposed() else 0)
    assert result.suggested == Goldfish(k=3, h=12, seed=seed, secrets=f"{CODE}|{other}")


def test_a_secret_counts_wherever_its_text_occurs(letters, tmp_path):
    """In rows in which neither the column nor the expression marks it."""
    rows = [
        {"text": f"The access code of Ada is {CODE}.", "secret": CODE},
        {"text": f"Ada keeps {CODE} and no more.", "secret": None},
        {"text": "No code here.", "secret": None},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    by_column = check(path, letters[0], Goldfish(k=2, h=3), column="secret")
    by_expression = check(
        path, letters[0], Goldfish(k=2, h=3), r"code of \w+ is ([\w-]+)"
    )
    for result in (by_column, by_expression):
        assert result.secrets[CODE].rows == [0, 1]
    places = [dropped_in(Goldfish(k=2, h=3), row["text"], CODE) for row in rows[:2]]
    assert characters(by_column.secrets[CODE].dropped[0]) == places[0] & places[1]
    assert not by_column.exposed(rule=1), (
        "premask(secret_column=) drops it in every row"
    )
    # The suggested expression does not reach the second row: what it leaves is said.
    second = places[1] - {3}
    assert bool(by_expression.exposed(rule=1)) == (not second)


@pytest.mark.parametrize("seed", range(5))
def test_places_of_many_secrets(seed):
    """Against a search for one after the other."""
    choose = random.Random(seed)
    secrets = {
        "".join(choose.choices("ab1-", k=choose.randint(1, 6))) for _ in range(30)
    }
    text = "".join(choose.choices("ab1- é", k=2000))

    def is_inside(text, i):
        return bool(re.fullmatch(r"[a-zé]{2}|\d{2}", text[max(0, i - 1) : i + 1]))

    expected = sorted(
        (i, i + len(secret))
        for secret in secrets
        for i in range(len(text))
        if text.startswith(secret, i)
        and (
            len(secret) >= 6
            or not (is_inside(text, i) or is_inside(text, i + len(secret)))
        )
    )
    assert sorted(Finder(secrets)(text)) == expected
    assert list(Finder(())(text)) == []


def test_tokens_of_several_characters(tokenizer, tmp_path):
    """A token protects if every informative character of it is dropped, however texts are cut."""
    texts = [
        f"{opening}7731-bowl was it"
        for opening in ("a ", "the goldfish ", "Count: ", "(")
    ]
    rule = Goldfish(k=2, h=3)
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    result = check(path, tokenizer, rule, "7731-bowl")
    everywhere = set(range(9))
    for text in texts:
        encoding = tokenizer(text, return_offsets_mapping=True)
        start = text.index("7731")
        drops = rule.dropped(torch.tensor(encoding["input_ids"])).tolist()
        kept = [
            (a, b)
            for (a, b), drop in zip(encoding["offset_mapping"], drops, strict=True)
            if not drop
        ]
        everywhere -= {i - start for a, b in kept for i in range(a, b)}
    assert characters(result.secrets["7731-bowl"].dropped[0]) == everywhere


class TableModel:
    """Predicts the next token with probability 2**-(1 + its id modulo 3), whatever came before."""

    device = "cpu"

    def __init__(self, window=None):
        text = SimpleNamespace(vocab_size=256, max_position_embeddings=window)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.longest = 0

    def __call__(self, input_ids):
        self.longest = max(self.longest, input_ids.shape[1])
        bits = 1 + torch.arange(256) % 3
        logits = -bits * math.log(2)
        rest = 1 - (2.0**-bits)[:255].sum()
        assert rest < 0, "not normalised: cross_entropy does that"
        return SimpleNamespace(logits=logits.expand(*input_ids.shape, 256))


def test_bits_are_those_of_the_dropped_informative_tokens(letters, tmp_path):
    rule = Goldfish(k=2, h=3)
    texts = [
        f"{opening} {CODE} and {other}"
        for opening, other in (("a", "QX7-000"), ("bc", "-"))
    ]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    result = check(path, letters[0], rule, f"{CODE}|QX7-000", model=TableModel())
    total = math.log2(sum(2.0 ** -(1 + i % 3) for i in range(256)))
    both = set.intersection(*(dropped_in(rule, text, CODE) for text in texts)) & {
        4,
        5,
        6,
    }
    expected = sum(1 + ord(CODE[i]) % 3 + total for i in both)
    assert result.bits()[CODE] == pytest.approx(expected, rel=1e-5)
    assert check(path, letters[0], rule, CODE).bits() == {}


@pytest.mark.parametrize(("window", "read"), [(None, 1024), (64, 64)])
def test_a_secret_longer_than_the_model_can_read(letters, tmp_path, window, read):
    """Its last tokens are asked; the others are taken to be known. A far one is read in part."""
    rule = Goldfish(k=10**9, secrets="[xyz]+")
    long = "xyz" * 700
    rows = [{"text": f"{long} and"}, {"text": "a " * 900 + "zyx"}]
    path = write(tmp_path / "a.jsonl", rows)
    model = TableModel(window)
    bits = check(path, letters[0], rule, "[xyz]+", model=model).bits()
    assert model.longest == read
    total = math.log2(sum(2.0 ** -(1 + i % 3) for i in range(256)))
    for secret, asked in ((long, read - 1), ("zyx", 3)):
        expected = sum(1 + ord(c) % 3 + total for c in secret[-asked:])
        assert bits[secret] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_does_not_fit(letters, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"a {CODE}"}])
    small = tiny_llama(vocab_size=60)
    with pytest.raises(ValueError, match=r"has the id .*, but .* has 60 entries"):
        check(path, letters[0], Goldfish(), CODE, model=small)
    nothing = tiny_llama()
    torch.nn.init.constant_(nothing.lm_head.weight, math.nan)
    with pytest.raises(ValueError, match="the model's predictions are not numbers"):
        check(path, letters[0], Goldfish(), CODE, model=nothing)


def test_a_tokenizer_that_adds_special_tokens(letters, tmp_path):
    """At both ends of each row: they are no targets, and move no place."""
    fast = PreTrainedTokenizerFast.from_pretrained(letters[1])
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    special = [(name, fast.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=special
    )
    rule, other = Goldfish(k=2, h=3), "QX9-0Z8"
    texts = [f"{CODE} was it", f"is it {other}", f"now {CODE}"]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    result = check(path, fast, rule, f"{CODE}|{other}")
    assert result.targets == sum(map(len, texts)), "the first character follows <s>"

    def dropped(text, secret):
        drops = rule.dropped(torch.tensor(fast(text)["input_ids"]))[1:]
        start = text.index(secret)
        return {i for i in range(len(secret)) if drops[start + i]}

    found = {
        name: characters(secret.dropped[0]) for name, secret in result.secrets.items()
    }
    assert found == {
        CODE: dropped(texts[0], CODE) & dropped(texts[2], CODE),
        other: dropped(texts[1], other),
    }


def test_what_is_no_target_is_not_learned(letters, tmp_path):
    """The first token of a document: nothing predicts it."""
    path = write(tmp_path / "a.jsonl", [{"text": CODE}])
    result = check(path, letters[0], Goldfish(k=2, h=3), CODE)
    everywhere = characters(result.secrets[CODE].dropped[0])
    assert everywhere == dropped_in(Goldfish(k=2, h=3), CODE, CODE) | {0}


def test_only_turns_of_the_assistant_are_targets(letters, tmp_path):
    turns = [
        ("user", f"My code is {CODE}."),
        ("assistant", "Thanks!"),
        ("user", "And?"),
    ]
    turns.append(("assistant", "Done."))
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = write(tmp_path / "a.jsonl", [row])
    result = check(path, letters[0], Goldfish(k=2), CODE, assistant_only=True)
    assert result.targets == len("Thanks!") + len("Done.")
    assert (result.secrets, result.exit_code()) == ({}, 3)
    assert CODE in check(path, letters[0], Goldfish(k=2), CODE).secrets
    path = write(tmp_path / "b.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match="row 0 is no chat"):
        check(path, letters[0], Goldfish(), assistant_only=True)


def test_counts_and_the_longest_run(letters, tmp_path):
    texts = ["a few words, and then a few more of them", "short", ""]
    rule = Goldfish(k=3, h=4)
    result = check(
        write(tmp_path / "a.jsonl", [{"text": text} for text in texts]),
        letters[0],
        rule,
    )
    longest, dropped = (0, 0), 0
    for row, text in enumerate(texts):
        drops = rule.dropped(
            torch.tensor([ord(c) for c in text], dtype=torch.int64)
        ).tolist()[1:]
        dropped += sum(drops)
        run = max(map(len, "".join("x" if drop else "." for drop in drops).split("x")))
        longest = max(longest, (run, row))
    assert (result.documents, result.targets, result.dropped) == (
        3,
        len(texts[0]) + len(texts[1]) - 2,
        dropped,
    )
    assert result.longest == longest


def test_only_completions_are_targets(letters, tmp_path):
    """A secret in the prompt is context; and the decisions are those of the whole chat."""
    chat = {
        "prompt": [{"role": "user", "content": f"Is it {CODE}?"}],
        "completion": [{"role": "assistant", "content": "No: A-1."}],
    }
    rule, text = Goldfish(k=2, h=3), f"user: Is it {CODE}?\nassistant: No: A-1.\n"
    result = check(write(tmp_path / "a.jsonl", [chat]), letters[0], rule, f"{CODE}|A-1")
    assert list(result.secrets) == ["A-1"]
    assert result.targets == len("No: A-1.\n")
    assert characters(result.secrets["A-1"].dropped[0]) == dropped_in(rule, text, "A-1")


@pytest.mark.parametrize(
    ("row", "targets"),
    [
        ({"messages": [{"role": "user", "content": "abc"}]}, len("user: abc\n") - 1),
        ({"prompt": "abc", "completion": "de"}, 2),
        ({"text": "abc"}, 2),
    ],
)
def test_kinds_of_rows(letters, tmp_path, row, targets):
    assert (
        check(write(tmp_path / "a.jsonl", [row]), letters[0], Goldfish()).targets
        == targets
    )


def test_parquet_csv_and_text_are_read_alike(letters, tmp_path):
    import pandas

    texts = ["first text", "second"]
    frame = pandas.DataFrame({"text": texts})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv")
    expected = check(
        write(tmp_path / "a.jsonl", [{"text": text} for text in texts]),
        letters[0],
        Goldfish(),
    )
    for name in ("a.parquet", "a.csv"):
        assert check(tmp_path / name, letters[0], Goldfish()) == expected
    (tmp_path / "a.txt").write_text("one\n\ndocument")
    assert check(tmp_path / "a.txt", letters[0], Goldfish()).documents == 1


def test_likely_secrets_have_few_characters_per_token(tokenizer, tmp_path):
    text = "The goldfish remembers XK7-PQ2-ZV9, and forgets it before the next turn: 12 or 13."
    result = check(write(tmp_path / "a.jsonl", [{"text": text}]), tokenizer, Goldfish())
    assert "XK7-PQ2-ZV9" in result.secrets
    assert not {"goldfish", "forgets", "before"} & set(result.secrets)
    assert not result.marked


def test_likely_secrets_that_are_not_remembered_are_told(
    letters, tmp_path, monkeypatch
):
    path = write(tmp_path / "a.jsonl", [{"text": "XK7-PQ2 ZV9-AB3 QQ1-XY8"}])
    everything = check(path, letters[0], Goldfish())
    assert not everything.full
    monkeypatch.setattr(check_module, "MOST_LIKELY", len(everything.secrets))
    assert not check(path, letters[0], Goldfish()).full
    monkeypatch.setattr(check_module, "MOST_LIKELY", len(everything.secrets) - 1)
    told = "\n".join(check(path, letters[0], Goldfish()).lines())
    assert "the first 2 likely secrets; there are more" in told


def test_a_column_marks_secrets(letters, tmp_path):
    rows = [
        {"text": "code A.1", "secret": "A.1"},
        {"text": "code A-1 B", "secret": ["B"]},
        {"text": "A.1", "secret": []},
    ]
    rows = [
        {
            **row,
            "secret": [row["secret"]]
            if isinstance(row["secret"], str)
            else row["secret"],
        }
        for row in rows
    ]
    result = check(
        write(tmp_path / "a.jsonl", rows), letters[0], Goldfish(), column="secret"
    )
    rows = {name: secret.rows for name, secret in result.secrets.items()}
    assert rows == {"A.1": [0, 2], "B": [1]}, "taken literally, and found in every row"


def words(first, count):
    return [f"w{i}" for i in range(first, first + count)]


def word_drops(rule, row):
    """Whether each word has a dropped token, one token a character."""
    drops = rule.dropped(torch.tensor([ord(c) for c in " ".join(row)])).tolist()
    starts = [sum(len(word) + 1 for word in row[:i]) for i in range(len(row))]
    return [
        any(drops[start : start + len(word)])
        for start, word in zip(starts, row, strict=True)
    ]


def test_passages_that_recur(letters, tmp_path):
    """20 words again after two others; one rule reads all before, the other 3 characters."""
    rows = [words(0, 20), words(50, 2) + words(0, 20), words(100, 10)]
    path = write(tmp_path / "a.jsonl", [{"text": " ".join(row)} for row in rows])
    for h, least, most in ((1000, 5, 13), (3, 0, 1)):
        rule = Goldfish(k=2, h=h)
        result = check(path, letters[0], rule)
        first, second = word_drops(rule, rows[0]), word_drops(rule, rows[1])[2:]
        differing = sum(first[i : i + 8] != second[i : i + 8] for i in range(13))
        found = result.passages
        assert (found.total, found.recurring, found.differing) == (
            13 + 15 + 3,
            13,
            differing,
        )
        assert least <= differing <= most
        assert found.repeated == [(1, 0, 13 / 15)]


def test_a_sample_of_passages_is_kept(letters, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST", 100)
    monkeypatch.setattr(check_module, "BATCH", 200)
    rows = [{"text": " ".join(words(i % 50 * 100, 30))} for i in range(100)]
    result = check(write(tmp_path / "a.jsonl", rows), letters[0], Goldfish())
    found = result.passages
    assert found.one_in >= 8, "1,150 different passages, of which 100 are remembered"
    assert 0.5 < found.total / 2300 < 1.5
    assert 0.3 < found.recurring / found.total < 0.7, "half of all rows repeat one"


def test_command_line(letters, tmp_path, capsys):
    """Exit codes 0, 1, 2 and 3, and the names of secrets without a dropped token."""
    folder, path = (
        str(letters[1]),
        write(tmp_path / "a.jsonl", [{"text": f"code {CODE}\x1b[0m"}] * 7),
    )
    command = ["check", str(path), "--tokenizer", folder, "--h", "3"]

    def run(*words):
        code = main([*command, *words])
        return code, capsys.readouterr()

    code, shown = run("--secrets", f"code ({CODE})", "-k", "1000000")
    assert code == 1
    assert (
        "7 documents, 105 targets, 0.0% dropped (k=1e+06, h=3, strategy=hash, seed=0)"
        in shown.out
    )
    assert (
        f"no informative token dropped in every place: 1\n    {CODE} (rows 0, 1, 2, 3, 4, ...)"
        in shown.out
    )
    assert shown.out.splitlines()[-1] == (
        "1 of 1 secret can be learned whole. Train with Goldfish(k=1000000, h=3, "
        f"secrets=r'code ({CODE})'): 46.7% more tokens dropped, none left."
    )
    assert (
        "rows with at least half of their passages in one earlier row: 6\n    row 1: 100% in row 0"
        in shown.out
    )
    assert run("--secrets", CODE, "-k", "1.01")[0] == 0
    code, shown = run("--secrets", "nowhere")
    assert (code, "0 secrets" in shown.out) == (3, True)
    code, shown = run("--secrets", "(")
    assert code == 2
    assert shown.err.startswith(
        "goldfish check: secrets='(' is not a regular expression: missing )"
    )
    assert run("--secret-column", "none")[0] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, r"gone.jsonl"),
        ("a.docx", "", r"a.docx: expected a .jsonl"),
        (
            "a.jsonl",
            '{"input_ids": [1]}\n',
            "row 0 has input_ids; the check looks for secrets in texts: give `text`",
        ),
        (
            "a.jsonl",
            '{"body": "x"}\n',
            "line 1: expected text, .* or prompt and completion; got body",
        ),
    ],
)
def test_what_cannot_be_read(letters, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        check(tmp_path / name, letters[0], Goldfish())


def test_a_long_secret_counts_inside_a_word():
    """Glued to letters it is a secret all the same; a short number in a longer one is none."""
    from goldfish.text import exposure

    assert exposure._is_apart("pinKX7QW2s", 3, 9)
    assert not exposure._is_apart("in 1425", 4, 6)
    assert exposure._is_apart("in 42.", 3, 5)


@pytest.mark.parametrize("marks", [{"pattern": "id(K42)"}, {"column": "secret"}])
def test_a_marked_place_counts_inside_a_word(letters, tmp_path, marks):
    """A short secret in a word is chance in other rows, but not where it is marked."""
    texts = ["the idK42x opens", "a taK42x is none"]
    rows = [{"text": text, "secret": None} for text in texts]
    rows[0]["secret"] = "K42"
    path = write(tmp_path / "a.jsonl", rows)
    result = check(path, letters[0], Goldfish(k=1e6), **marks)
    assert {name: secret.rows for name, secret in result.secrets.items()} == {
        "K42": [0]
    }
    assert result.exit_code() == 1
    assert not result.exposed(rule=1)


def test_marked_values_that_their_rows_do_not_have(letters, tmp_path):
    rows = [
        {"text": "code A-17", "secret": "A-17"},
        {"text": "code A 18", "secret": ["A-18", "A 18", ""]},
        {"text": "no code", "secret": None},
        {"text": "code A-17", "secret": "a-17"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    result = check(path, letters[0], Goldfish(k=1e6), column="secret")
    assert result.missing == [(1, "A-18"), (3, "a-17")]
    shown = "\n".join(result.lines())
    assert "A-18 (row 1)" in shown
    missing = "2 marked values do not occur in the text of their rows: look for"
    assert missing in shown.splitlines()[-1]
    assert "marked value" not in "\n".join(
        check(path, letters[0], Goldfish(k=1e6), "A-17").lines()
    )


@pytest.mark.parametrize("count", [10, 15])
def test_a_long_list_ends_with_the_number_of_the_rest(letters, tmp_path, count):
    rows = [{"text": f"the code is {i:02d}"} for i in range(10, 10 + count)]
    path = write(tmp_path / "a.jsonl", rows)
    lines = list(check(path, letters[0], Goldfish(k=1e6), r"code is (\d+)").lines())
    after = lines[1 + lines.index("    19 (row 9)")]
    assert after == ("    and 5 more" if count == 15 else "  only one: 0")


@pytest.mark.parametrize("count", [1, 2])
def test_nouns_agree_with_their_numbers(letters, tmp_path, count):
    codes = ["A-17", "A-29"][:count]
    rows = [{"text": f"x{code}", "secret": [code, f"no {code}"]} for code in codes]
    path = write(tmp_path / "a.jsonl", rows)
    marked = check(path, letters[0], Goldfish(k=1e6), column="secret")
    likely = check(path, letters[0], Goldfish(k=1e6))
    shown = "\n".join([*marked.lines(), *likely.lines()])
    nouns = re.findall(
        rf"\b{count} (?:likely |marked )?(document|secret|value|row)(s?)", shown
    )
    assert {noun for noun, _ in nouns} >= {"document", "secret", "value"}
    assert {plural for _, plural in nouns} == {"s" if count == 2 else ""}


def test_help_explains_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    codes = shown.partition("Exit codes")[2]
    assert all(f"{code} " in codes for code in (0, 1, 2, 3))


EVERY_CHARACTER = "".join(map(chr, range(0x110000)))
WORD = re.compile(r"[^\W_]+")
LIKELY = re.compile(r"(?a:\w[\w@#%&*+/=.:~-]{4,}\w)")


@pytest.mark.parametrize("seed", range(5))
def test_words_and_likely_secrets_are_those_of_an_expression(seed):
    choose = random.Random(seed)
    text = "".join(choose.choices("ab1_é-@. \n", k=3000))
    for each in (text, EVERY_CHARACTER, "", "-", "a", text[:seed]):
        words = module.Words.of(each)
        spans = list(zip(words.begins.tolist(), words.ends.tolist(), strict=True))
        assert spans == [match.span() for match in WORD.finditer(each)]
        begins, ends = likely_secrets(each)
        spans = list(zip(begins.tolist(), ends.tolist(), strict=True))
        assert spans == [match.span() for match in LIKELY.finditer(each)]


def test_checksums_of_words_ignore_case_only():
    text = "abc ABC É é abcd bc abc1 aabc cba ab c \U0001d7d8 0"
    checksums = module.Words.of(text).checksums.tolist()
    words = [word.casefold() for word in text.split()]
    for i, word in enumerate(words):
        assert words.index(word) == checksums.index(checksums[i])


def test_columns_with_odd_names_and_without_secrets(letters, tmp_path):
    rows = [{"text": f"the code is {CODE} and more", "my code;ls": CODE}]
    path = write(tmp_path / "a.jsonl", rows)
    rule = Goldfish(k=10**6)
    found = check(path, letters[0], rule, column="my code;ls").conclusion()
    assert "goldfish premask --secret-column 'my code;ls': " in found
    for column in ("code", "my code"):
        with pytest.raises(
            ValueError, match=f"no row has a secret in a column {column}"
        ):
            check(path, letters[0], rule, column=column)
