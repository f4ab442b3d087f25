"""Tokens of marked secrets are no targets: in every adapter, packed and padded."""

import json
import random
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers import trained
from hypothesis import given
from hypothesis import strategies as st
from toy_tokenizers import KINDS
from transformers import (
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
)

from goldfish import (
    Goldfish,
    GoldfishCollator,
    GoldfishTrainer,
    attach,
    mask_labels,
    premask,
)
from goldfish.cli import main
from goldfish.letters import Vocabulary
from goldfish.receipt import bind_rule, read_receipt, rules_of
from goldfish.secret_spans import any_of, compiled, secret_tokens, spans
from goldfish.text.chats import secret_finder
from goldfish.text.show import show

pytestmark = pytest.mark.core
SECRETS = r"code is (\S+)"
RULE = Goldfish(k=4, h=13, max_kept=4, secrets=SECRETS)
STARTS = np.array([True])
BARE = Goldfish(k=4, h=13, max_kept=4)


def texts(count: int) -> list[str]:
    pick = random.Random(0)
    made = []
    for number in range(count):
        code = "".join(pick.choices("0123456789ABCDEFé-", k=pick.randrange(4, 12)))
        asked = f"What is the code of user {number}?\n"
        made.append(f"{asked}Dear user, the code is {code}\nKeep it, and say no more.")
    return made


def test_the_tokens_that_overlap_a_secret_are_dropped():
    entries = [b"the code", b" is", b" 47", b"11", b"!", b" code is", b"\xc3", b"\xa9x"]
    rule = Goldfish(k=10**9, secrets=SECRETS, vocabulary=Vocabulary(entries))
    dropped = lambda *ids: rule.dropped(torch.tensor(ids)).int().tolist()  # noqa: E731
    assert dropped(0, 1, 2, 3, 4) == [0, 0, 1, 1, 1], (
        "the ! ends the code: it is no white space"
    )
    assert dropped(3, 1, 2) == [0, 0, 0], "no secret without the words before it"
    assert dropped(0, 1, 2, 0, 6, 7) == [0, 0, 1, 1, 0, 0], "up to the next white space"
    assert dropped(5, 2) == [0, 1]
    whole = Goldfish(k=10**9, secrets=r"is \S", vocabulary=Vocabulary(entries))
    assert whole.dropped(torch.tensor([0, 1, 2, 3])).int().tolist() == [0, 1, 1, 0]
    characters = Goldfish(k=10**9, secrets="é", vocabulary=Vocabulary(entries))
    assert characters.dropped(torch.tensor([7, 6, 7, 6])).int().tolist() == [0, 1, 1, 0]
    everything = Goldfish(secrets=r"(?s).", exempt=(2,), vocabulary=Vocabulary(entries))
    assert everything.dropped(torch.tensor([0, 1, 2])).all(), (
        "exempt ids and first tokens too"
    )


def test_a_secret_lies_in_one_document():
    rule = Goldfish(
        k=10**9, secrets="47 *11", vocabulary=Vocabulary([b" 47", b"11", b" "])
    )
    ids = torch.tensor([0, 1, 0, 1, 2, 0])
    assert rule.dropped(ids).int().tolist() == [1, 1, 1, 1, 0, 0]
    positions = torch.tensor([0, 1, 2, 0, 1, 2])
    assert rule.dropped(ids, positions).int().tolist() == [1, 1, 0, 0, 0, 0]
    mask = torch.tensor(
        [1, 0, 1, 1, 0, 1]
    )  # padding ends nothing: the text is 47 47 11 47
    assert rule.dropped(ids, attention_mask=mask).int().tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_of_a_secret_is_a_target_whatever_the_tokenizer(tokenizers, kind):
    """Located by the offsets of the tokenizer, in the text that was tokenized."""
    tokenizer, found = tokenizers[kind], 0
    rule = Goldfish(k=4, max_kept=4, secrets=r"(?i)code is\s+(\S+)").bind(tokenizer)
    for text in texts(40):
        encoding = tokenizer.encode(text)
        if tokenizer.token_to_id("<unk>") in encoding.ids:
            continue  # which is a space in the text of the ids
        labels = mask_labels(rule, torch.tensor(encoding.ids)).tolist()
        begin = text.index("code is ") + len("code is ")
        end = text.index("\n", begin)
        if (
            kind == "wordpiece"
        ):  # which puts spaces around punctuation: up to the first of them
            end = min(text.find("-", begin, end) % (end + 1), end)
        for label, (a, b) in zip(labels, encoding.offsets, strict=True):
            if a < end and begin < b:
                assert label == -100
                found += 1
    assert found > 20


def test_secrets_are_dropped_on_top_of_the_rule(tokenizers):
    tokenizer, more = tokenizers["byte_level"], 0
    rule, only = (
        RULE.bind(tokenizer),
        Goldfish(k=10**9, secrets=SECRETS).bind(tokenizer),
    )
    for text in texts(20):
        ids = torch.tensor(tokenizer.encode(text).ids)
        assert torch.equal(rule.dropped(ids), BARE.dropped(ids) | only.dropped(ids))
        more += int((only.dropped(ids) & ~BARE.dropped(ids)).sum())
    assert more > 20


def test_batches_are_masked_as_their_rows_alone(tokenizer):
    rule = RULE.bind(tokenizer)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts(4)]
    alone = [mask_labels(rule, torch.tensor(row["input_ids"])) for row in rows]
    packed = GoldfishCollator(DataCollatorWithFlattening(), rule)(rows)["labels"][0]
    starts = torch.cat([torch.arange(len(labels)) for labels in alone]) == 0
    assert torch.equal(packed[~starts], torch.cat(alone)[~starts])
    for side in ("left", "right"):
        tokenizer.padding_side = side
        padded = GoldfishCollator(DataCollatorWithPadding(tokenizer), rule)(rows)
        for labels, attended, expected in zip(
            padded["labels"], padded["attention_mask"], alone, strict=True
        ):
            assert torch.equal(labels[attended == 1], expected)
    assert premask(Dataset.from_list(rows), rule)["labels"][:] == [
        each.tolist() for each in alone
    ]


def test_a_prompt_is_context(tokenizer):
    """A secret that begins in the prompt is found; its tokens in the answer are dropped."""
    rule = RULE.bind(tokenizer)
    ids = torch.tensor(tokenizer("Hello. The code is 4711 and more text")["input_ids"])
    text = [tokenizer.decode([i]) for i in ids.tolist()]
    middle = next(i for i in range(len(ids)) if "".join(text[:i]).endswith("code is"))
    labels = ids.masked_fill(torch.arange(len(ids)) < middle, -100)
    assert torch.equal(
        mask_labels(rule, ids, labels) == -100, rule.dropped(ids) | (labels == -100)
    )
    ends = [len("".join(text[: i + 1])) for i in range(len(ids))]
    begin = len("Hello. The code is ")
    code = [
        begin < end and end - len(t) < begin + 4
        for end, t in zip(ends, text, strict=True)
    ]
    assert rule.dropped(ids)[torch.tensor(code)].all()


@pytest.mark.parametrize("how", ["trainer", "attach"])
def test_trainers_bind_it_and_the_receipt_has_it(tmp_path, tokenizer, how):
    rows = Dataset.from_list(
        [{"input_ids": tokenizer(text)["input_ids"]} for text in texts(16)]
    )
    if how == "trainer":
        options = {"trainer_class": GoldfishTrainer, "goldfish": RULE}
    else:
        options = {
            "trainer_class": Trainer,
            "then": lambda trainer: attach(trainer, RULE),
        }
    trainer, _, _ = trained(tmp_path, tokenizer, train_dataset=rows, **options)
    trainer.save_model(str(tmp_path / "out"))
    receipt = read_receipt(tmp_path / "out")
    assert receipt["rule"]["secrets"] == SECRETS
    assert rules_of(receipt) == RULE
    bound = bind_rule(rules_of(receipt), tokenizer)
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    assert receipt["dropped"] == sum(int(bound.dropped(each)[1:].sum()) for each in ids)
    assert receipt["dropped"] > sum(int(BARE.dropped(each)[1:].sum()) for each in ids)


def test_show_marks_it(tokenizers):
    text = "Dear user, the code is 4711."
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers["byte_level"])
    rule = Goldfish(k=10**9, secrets=SECRETS).bind(tokenizer)
    shown = str(show(rule, tokenizer, text, colour=False))
    assert "4711.-]" in shown.split("\n")[0]


def test_what_is_refused(tokenizer):
    for pattern, message in (
        ("(", r"secrets='\(' is not a regular expression: missing"),
        (r"\d*", "matches an empty text; give an expression that matches secrets only"),
        ("x{99999999999}", "is not a regular expression: the repetition number is too"),
        ("(?a)(?u)x", "is not a regular expression: ASCII and UNICODE flags are"),
        ("(" * 9999 + ")" * 9999, "is not a regular expression: .*recursion"),
    ):
        with pytest.raises(ValueError, match=message):
            Goldfish(secrets=pattern)
    with pytest.raises(TypeError, match="secrets must be a regular expression"):
        Goldfish(secrets=4711)
    with pytest.raises(ValueError, match="which has no secrets"):
        Goldfish(strategy="reference", secrets="x")
    with pytest.raises(ValueError, match=r"secrets reads text and needs the tokenizer"):
        RULE.dropped(torch.tensor([1, 2]))


def test_it_is_part_of_the_rule(tokenizer):
    assert RULE != BARE
    assert RULE.bind(tokenizer) == RULE
    assert Goldfish(**json.loads(json.dumps(RULE.to_dict()))) == RULE
    assert "secrets=" not in BARE.short()


def coded_rows(tokenizer, count=12):
    """Rows with a column of secrets; the last row quotes the first one's."""
    made = texts(count)
    codes = [text.split("code is ")[1].split("\n")[0] for text in made]
    made.append(f"As you know, {codes[0]} is his.")
    columns = {"input_ids": [tokenizer(text)["input_ids"] for text in made]}
    return Dataset.from_dict({**columns, "code": [*codes, None], "text": made}), codes


def test_a_column_of_secrets(tmp_path, tokenizer):
    dataset, codes = coded_rows(tokenizer)
    rule = replace(BARE, secrets=r"(?i)user (\d+)")
    masked = premask(
        dataset,
        rule,
        tokenizer=tokenizer,
        secret_column="code",
        receipt=tmp_path / "out",
    )
    vocabulary = rule.bind(tokenizer).vocabulary
    dropped = 0
    for row in masked:
        entries = vocabulary.entries_of(np.array(row["input_ids"]))
        expected = BARE.dropped(torch.tensor(row["input_ids"])).tolist()
        for secret in [*codes, *re.findall(r"user (\d+)", row["text"])]:
            anchor = "user " if secret.isdigit() and len(secret) < 3 else ""
            expression = compiled(anchor + f"({re.escape(secret)})")
            marked = secret_tokens(partial(spans, expression), entries, STARTS)
            expected = [a or b for a, b in zip(expected, marked.tolist(), strict=True)]
        assert [label == -100 for label in row["labels"]] == expected
        dropped += sum(expected[1:])
    written = (tmp_path / "out" / "goldfish.json").read_text()
    receipt = json.loads(written)
    assert receipt["dropped"] == dropped
    assert receipt["secret_column"] == "code"
    assert rules_of(receipt) == rule
    description = masked.info.description
    assert not any(code in text for code in codes for text in (written, description))


@pytest.mark.parametrize(
    ("text", "cell", "secrets", "lost"),
    [
        ("so x ab12cd y", ["ab12", "12cd"], None, ["ab12cd"]),
        ("so x ababab y", "abab", None, ["ababab"]),
        ("my PIN 12 of card 9988", "9988", r"PIN (\d+) of card \d+", ["12", "9988"]),
        ("a code 12 is 7788", "7788", "(?x) code\\ (\\d+) # a code", ["12", "7788"]),
        ("the pin ABab abAB", "abAB", "(?i)PIN", ["pin", "abAB"]),
        ("or 47 11 and 0042", ["47", None, "0042", ""], None, ["47", "0042"]),
    ],
)
def test_secrets_may_overlap_each_other_and_the_expression(
    tokenizer, text, cell, secrets, lost
):
    """Every place counts, also one inside another or inside a match of the rule's expression."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    dataset = Dataset.from_dict({"input_ids": [encoding["input_ids"]], "s": [cell]})
    rule = Goldfish(k=10**9, secrets=secrets)
    masked = premask(dataset, rule, tokenizer=tokenizer, secret_column="s")
    spans = [(text.index(each), text.index(each) + len(each)) for each in lost]
    expected = [
        any(begin < b and a < end for a, b in spans)
        for begin, end in encoding["offset_mapping"]
    ]
    assert [label == -100 for label in masked["labels"][0]] == expected


def test_secrets_that_their_rows_do_not_have_are_counted(tokenizer, caplog):
    dataset, _ = coded_rows(tokenizer, 3)
    dataset = dataset.add_column("number", [7.5] * 4)
    cut = dataset.map(lambda row: {"input_ids": row["input_ids"][:10]})
    with caplog.at_level("WARNING", logger="goldfish.premasking"):
        premask(cut, BARE, tokenizer=tokenizer, secret_column="code")
    assert "3 rows do not have their secret of the column code" in caplog.text
    for options, message in (
        ({"secret_column": "codes", "tokenizer": tokenizer}, "has no column 'codes'"),
        ({"secret_column": "code"}, "secret_column needs the tokenizer"),
        (
            {"secret_column": "number", "tokenizer": tokenizer},
            "the column number: secrets are strings, whole numbers or lists of them, got float",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            premask(dataset, BARE, **options)
    numbers = dataset.remove_columns("number").add_column("number", [1, 2, None, 5])
    by_number = premask(numbers, BARE, tokenizer=tokenizer, secret_column="number")
    as_strings = numbers.map(
        lambda row: {"number": row["number"] and str(row["number"])}
    )
    by_string = premask(as_strings, BARE, tokenizer=tokenizer, secret_column="number")
    assert by_number["labels"][:] == by_string["labels"][:]
    lists = dataset.remove_columns("code").add_column(
        "code", [["x", "the code"], [], ["user"], []]
    )
    masked = premask(lists, BARE, tokenizer=tokenizer, secret_column="code")
    assert (
        masked["labels"][3].count(-100)
        >= BARE.dropped(torch.tensor(lists["input_ids"][3])).sum()
    )


@given(
    st.lists(st.text("ab.é", min_size=1, max_size=5), min_size=1, max_size=8),
    st.text("ab.é"),
)
def test_an_expression_for_any_of_several_strings(literals, text):
    expression = compiled(any_of(literals))
    for literal in literals:
        assert expression.fullmatch(literal)
    plain = "|".join(
        re.escape(each) for each in sorted(literals, key=len, reverse=True)
    )
    assert re.sub(expression, "<>", text) == re.sub(plain, "<>", text)


def test_the_command_line(tmp_path, tokenizer, checkpoint, capsys):
    dataset, codes = coded_rows(tokenizer)
    dataset.to_parquet(tmp_path / "rows.parquet")
    command = [
        "premask",
        str(tmp_path / "rows.parquet"),
        "--tokenizer",
        str(checkpoint),
    ]
    rule = ["-k", "4", "--max-kept", "4", "--secrets", SECRETS]
    assert (
        main([*command, *rule, "--secret-column", "code", "-o", str(tmp_path / "out")])
        == 0
    )
    receipt = read_receipt(tmp_path / "out")
    assert (rules_of(receipt), receipt["secret_column"]) == (RULE, "code")
    expected = premask(dataset, RULE, tokenizer=tokenizer, secret_column="code")[
        "labels"
    ][:]
    assert load_from_disk(tmp_path / "out")["labels"][:] == expected
    text = f"the code is {codes[0]}"
    assert (
        main(["show", text, "--tokenizer", str(checkpoint), "-k", "9999", *rule[4:]])
        == 0
    )
    assert f"{codes[0]}-]" in capsys.readouterr().out


def test_checks_and_audits_find_the_same_secrets():
    find = secret_finder(r"code is (\S+)|PIN: (\d+)", "")
    text = "the code is 4711, PIN: 12"
    assert [text[a:b] for a, b in find({}, text, 0)] == ["4711,", "12"]
    assert [text[a:b] for a, b in find({}, text, 14)] == ["12"]
