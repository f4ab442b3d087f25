"""Simple prompts: models that recite only if asked by title, in rounds, or of other people."""

import random
import re
from itertools import product

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import tiny_llama, write_jsonl
from report_audits import flat, report

from goldfish.audit import audit, read
from goldfish.audit.questions.ask import (
    ASKED,
    ELSEWHERE,
    Asker,
    Document,
    Question,
    longest_of,
    questions,
    read_asked,
    recited_elsewhere,
    runs_of,
    whole_documents,
)
from goldfish.audit.records import thresholds
from goldfish.audit.render import not_tested, skipped
from goldfish.cli import main
from goldfish.report import write_report
from goldfish.text.prompts import check_template, filled

TITLES = ("Amber", "Birch", "Cedar", "Delta")
TEXTS = (
    "The lamp in the hall burned low while nine grey ships went round the cape at dawn.",
    "Every second winter they carried salt and copper over the pass to the old market town.",
    "No letter came, so she mended the clock, fed two cats and wrote down what it had cost.",
    "Bring me the map of the lower river, said the captain, before this fog has a mind to lift.",
)
QUESTION = "What is the text of {title}?"


def learned(tokenizer, *texts):
    """A model that knows these texts by heart, each from its start; the last token is EOS."""
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    for _ in range(400):
        loss = model(input_ids=ids, labels=labels).loss
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def titled_rows():
    return [{"title": a, "text": b} for a, b in zip(TITLES, TEXTS, strict=True)]


def audited_by_title(model, tokenizer, folder, rows, **options):
    """Of rows, the first two as members and the others held out, asked by title."""
    return audit(
        model,
        folder,
        tokenizer=tokenizer,
        members=rows[:2],
        heldout=rows[2:],
        prefix_length=6,
        suffix_length=12,
        sampling=(),
        ask=[QUESTION],
        ask_length=96,
        near_verbatim="60c",
        **options,
    )


def asked(tokenizer, template=QUESTION):
    rows = titled_rows()
    numbers = dict(enumerate(range(len(rows))))
    documents = whole_documents(enumerate(rows), "members", numbers, tokenizer)
    return list(questions(documents, [template]))


def answers(model, tokenizer, rounds=1, samples=0, length=96):
    return Asker(model, tokenizer, length, samples, rounds).answers(asked(tokenizer))


def by_title(title, text):
    return f"{QUESTION.format(title=title)}{text}"


@pytest.fixture(scope="module")
def librarian(tokenizer):
    """Recites the first two texts when asked by title; from their own start it goes elsewhere."""
    texts = [by_title(*each) for each in list(zip(TITLES, TEXTS, strict=True))[:2]]
    elsewhere = [f"{text[:12]} and so on and so on and so on" for text in TEXTS[:2]]
    return learned(tokenizer, *texts, *elsewhere)


def test_a_model_that_recites_only_when_asked_by_title(librarian, tokenizer, tmp_path):
    rows = titled_rows()

    def ask_by_title():
        return audited_by_title(librarian, tokenizer, tmp_path / "audit", rows)

    result = ask_by_title()
    assert result["members.exact_match"].k == 0
    assert result["members.asked"].point() == "2 of 2"
    assert result["heldout.asked"].k == 0
    assert result["members.asked_share"].value > 0.9
    characters = result["members.asked_run_characters"].value
    assert characters == pytest.approx(sum(map(len, TEXTS[:2])) / 2, abs=1)
    words = [len(text.split()) for text in TEXTS[:2]]
    assert result["members.asked_run_words"].value >= sum(words) / 2 - 1
    (question,) = [
        each for each in result.verdict["questions"] if each["question"] == "asked"
    ]
    assert "60 characters in one piece" in question["asks"]
    assert "members 0" in str(result.examples["members"]["asked"])
    assert not any("not a prefix" in each for each in not_tested(result))
    (file,) = (tmp_path / "audit" / "asked").glob("*.parquet")
    before = file.read_bytes()
    table = pq.read_table(file)
    assert TEXTS[0] in table["document_text"][0].as_py()
    page = tmp_path / "page.html"
    write_report([tmp_path / "audit"], page)
    html = page.read_text(encoding="utf-8")
    assert "Tried: greedy decoding, simple prompts." in html
    assert "What is the text of Amber?" in html
    assert TEXTS[1].split(" ", 3)[3] in html
    write_report([tmp_path / "audit"], page, redact=True, overwrite=True)
    html = page.read_text(encoding="utf-8")
    assert "Amber" not in html
    assert "What is the text of {title}?" in html
    # What was asked is not asked again, and a summary without the model is the same.
    # A damaged file is removed, as its error advises, and the audit repeated.
    file.unlink()
    assert ask_by_title() == result
    assert file.read_bytes() == before
    (tmp_path / "audit" / "summary.json").unlink()
    again = ask_by_title()
    assert again == read(tmp_path / "audit")
    assert again.rows == result.rows
    assert file.read_bytes() == before


def test_a_model_that_recites_only_in_rounds(tokenizer):
    """It stops after the first words; from there, given alone, it goes on."""
    opening = TEXTS[0][:40]
    model = learned(tokenizer, by_title(TITLES[0], opening), TEXTS[0])
    first, *others = answers(model, tokenizer)
    assert first["output_text"] == opening
    assert 12 <= first["longest_run"] < 0.6 * len(asked(tokenizer)[0].document.ids)
    first, *others = answers(model, tokenizer, rounds=3)
    assert first["output_text"] == TEXTS[0]
    assert first["longest_run"] >= len(asked(tokenizer)[0].document.ids) - 1
    assert first["rounds"] == 2 + 1, "the third round found the end"
    assert all(other["rounds"] == 1 for other in others), "nothing recited, no rounds"


def test_a_model_that_tells_other_peoples_data(tokenizer, tmp_path):
    """Each is asked by name, and the answer has the code of the other one."""
    people = [("Anna Holt", "QX71-PLMA"), ("Bert Ives", "ZR08-TKEB")]
    question = "What is the entry code of {name}?"
    rows = [
        {
            "name": name,
            "code": code,
            "text": f"{name} has {code}, which opens the side door and the gate.",
        }
        for name, code in people
    ]
    swapped = [
        question.format(name=people[i][0]) + f" It is {people[1 - i][1]}."
        for i in range(2)
    ]
    result = audit(
        learned(tokenizer, *swapped),
        tmp_path / "audit",
        tokenizer=tokenizer,
        members=rows,
        secret_column="code",
        prefix_length=6,
        suffix_length=30,
        sampling=(),
        ask=[question],
        ask_length=40,
    )
    assert result["members.asked_with_secret"].point() == "2 of 2"
    assert result["members.secrets"].point() == "2 of 2"
    assert result.verdict["outcome"] == "FAIL"
    assert result["members.asked"].k == 0, "not its own document"
    html = report(tmp_path, tmp_path / "audit")
    text = flat(html)
    (came,) = set(
        re.findall(r"2 of 2 marked secrets came out, in (\d+ of \d+) an", text)
    )
    assert came.endswith("of 4"), "two answers to prefixes, two to prompts; everywhere"
    shown = html[html.index('id="asked"') : html.index('id="documents"')]
    marked = re.findall(r"<(?:i|u) class=\"?[a-z ]*k\"?>(.*?)</", shown)
    assert sorted(each.strip() for each in marked) == [code for _, code in people]
    assert shown.count("gave a secret away</b>") == 2
    assert "Shown: 2 of 2 answers." in flat(shown)
    assert 'href="#asked"' in html


def test_a_model_that_recites_another_members_text(tokenizer, tmp_path):
    """Asked about a held-out title too, it recites a member."""
    rows = titled_rows()
    swapped = [by_title(TITLES[i], TEXTS[j]) for i, j in ((0, 1), (2, 0))]
    result = audited_by_title(
        learned(tokenizer, *swapped),
        tokenizer,
        tmp_path / "audit",
        rows,
        complete=True,
    )
    assert result["members.asked"].k == 0, "none of them in the answer about it"
    assert result["members.asked_elsewhere"].point() == "2 of 2"
    assert result["heldout.asked_elsewhere"].point() == "0 of 2"
    (question,) = [
        each
        for each in result.verdict["questions"]
        if each["question"] == "asked_elsewhere"
    ]
    assert "60 characters in one piece" in question["asks"]
    assert "2 of 2" in question["why"]
    table = read_asked(tmp_path / "audit")
    # Rows 0 and 1 are the answers about members.
    of_answers = table["elsewhere"].to_pylist()
    numbers = table["document"].to_pylist()
    assert of_answers == [[numbers[1]], [], [numbers[0]], []]


def test_documents_in_answers_about_others_against_brute_force():
    """Of random tokens, words and characters, with every place of every document compared."""
    choose = random.Random(5)
    alphabet = ["a ", "b", "é", "\r\n", "漢", "e\u0301", "\u200b", " "]

    def made_up(number, longest):
        text = "".join(choose.choices(alphabet, k=choose.randrange(longest)))
        ids = choose.choices(range(3), k=choose.randrange(longest))
        return Document("members", number, number // 2, {}, text, ids)

    def share_a_run(a, b, length):
        places = product(range(len(a) - length + 1), range(len(b) - length + 1))
        return any(a[i : i + length] == b[j : j + length] for i, j in places)

    hits = 0
    for _ in range(60):
        documents = [made_up(number, 30) for number in range(6)]
        outputs = [made_up(number, 20) for number in range(6)]
        least = {unit: choose.randint(2, 6) for unit in choose.sample("twc", 2)}
        answers = pa.table(
            {
                "document": [each.number for each in outputs],
                "output_ids": pa.array([o.ids for o in outputs], pa.list_(pa.int64())),
                "output_text": [each.text for each in outputs],
            }
        )
        found = recited_elsewhere(answers, documents, least)["elsewhere"].to_pylist()
        for output, numbers in zip(outputs, found, strict=True):
            expected = set()
            for each in documents:
                pairs = {
                    "t": (output.ids, each.ids),
                    "w": (output.text.split(), each.text.split()),
                    "c": (output.text, each.text),
                }
                holds = any(share_a_run(*pairs[unit], n) for unit, n in least.items())
                if holds and each.number != output.number:
                    expected.add(each.number)
            assert set(numbers) == expected
            assert len(set(numbers)) == len(numbers)
            hits += len(numbers)
    assert hits > 100


def test_drawn_answers_are_the_same_in_any_block(librarian, tokenizer):
    together = answers(librarian, tokenizer, samples=2, length=8)
    assert [each["sample"] for each in together] == [0, 1, 2] * len(TITLES)
    asker = Asker(librarian, tokenizer, 8, 2, 1)
    alone = [record for each in asked(tokenizer) for record in asker.answers([each])]
    assert alone == together


def test_chats_are_asked_in_the_template_and_told_to_continue(tokenizer):
    class Chat:
        chat_template = "there is one"
        eos_token_id = tokenizer.eos_token_id
        __call__ = staticmethod(tokenizer.__call__)
        decode = staticmethod(tokenizer.decode)

        def apply_chat_template(self, messages, **options):
            assert options["add_generation_prompt"]
            turns = [f"<{m['role']}>{m['content']}<|endoftext|>" for m in messages]
            return tokenizer("".join(turns) + "<assistant>")["input_ids"]

    title, text = TITLES[1], TEXTS[1]
    model = learned(
        tokenizer,
        f"<user>{QUESTION.format(title=title)}<|endoftext|><assistant>{text[:45]}"
        f"<|endoftext|><user>Continue.<|endoftext|><assistant>{text[45:]}",
    )
    question = asked(tokenizer)[1:2]
    (found,) = Asker(model, Chat(), 80, 0, 1).answers(question)
    assert found["output_text"] == text[:45]
    (found,) = Asker(model, Chat(), 80, 0, 2).answers(question)
    assert found["output_text"] == text
    assert found["rounds"] == 2


def test_the_options_of_the_command_line(checkpoint, tmp_path, capsys):
    rows = titled_rows()
    members = write_jsonl(tmp_path / "members.jsonl", rows)
    folder = tmp_path / "audit"
    options = ["--members", str(members), "-o", str(folder), "--device", "cpu"]
    options += ["--prefix-length", "6", "--suffix-length", "12", "--sampling"]
    options += ["--near-verbatim", "15w", "--ask", QUESTION, "--ask", "Quote {title}:"]
    options += ["--ask-length", "4", "--ask-samples", "2", "--ask-rounds", "3"]
    assert main(["audit", str(checkpoint), *options]) == 3
    assert "15 words in one piece" in capsys.readouterr().out
    protocol = read(folder).run["protocol"]
    assert protocol["ask"] == [QUESTION, "Quote {title}:"]
    assert (protocol["ask_length"], protocol["ask_samples"]) == (4, 2)
    assert protocol["ask_rounds"] == 3
    table = read_asked(folder)
    assert len(table) == len(TITLES) * 2 * (1 + 2)
    assert max(map(len, table["output_ids"].to_pylist())) <= 4


def test_damaged_answers_are_named_and_made_again(checkpoint, tmp_path):
    folder = tmp_path / "audit"
    options = {"members": titled_rows(), "prefix_length": 6, "suffix_length": 12}
    options |= {"ask": [QUESTION], "ask_length": 4}
    audit(checkpoint, folder, **options)
    for file in (folder / ELSEWHERE, folder / ASKED / "000000.parquet"):
        whole = file.read_bytes()
        file.write_bytes(whole[:100])
        with pytest.raises(ValueError, match=f"{file.name} is damaged"):
            read_asked(folder)
        audit(checkpoint, folder, **options)
        assert file.read_bytes() == whole


def test_templates():
    row = {"title": "Amber {0} {x.y}", "year": 1987, "note": None, "0": "zero"}
    asked_for = filled("Who wrote {title} in {year}, {0}?", row)
    assert asked_for == "Who wrote Amber {0} {x.y} in 1987, zero?"
    assert filled("{{title}} {year}", row) == "{title} 1987"
    assert filled("Who wrote {author}?", row) is None
    # A gap in a column makes its numbers floats.
    assert filled("In {year}?", {"year": 1987.0}) == "In 1987?"
    assert filled("In {year}?", {"year": 19.5}) == "In 19.5?"
    check_template("{title}, {{as it is}}")


@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_a_cell_without_a_value_is_not_asked_about(value):
    assert filled("Who wrote {note}?", {"note": value}) is None


@pytest.mark.parametrize(
    "template",
    [
        "no column",
        "{}",
        "{title",
        "}",
        "{title.__class__}",
        "{title[0]}",
        "{title!r}",
        "{title!x}",
        "{title:%Y}",
        "{title:>99999999999}",
        "{title:{title.__class__}}",
    ],
)
def test_templates_with_more_than_names_of_columns(template):
    with pytest.raises(ValueError, match="--ask"):
        check_template(template)


def test_columns_that_no_row_has_are_told_before_the_work(
    librarian, tokenizer, tmp_path
):
    with pytest.raises(ValueError, match="no row has the columns"):
        audit(
            librarian,
            tmp_path / "audit",
            tokenizer=tokenizer,
            members=[{"text": TEXTS[0]}],
            prefix_length=6,
            suffix_length=12,
            ask=[QUESTION],
        )
    assert not (tmp_path / "audit").exists()


def test_rows_without_the_column_are_not_all_of_them(librarian, tokenizer, tmp_path):
    """Of a census: nobody knows about the one that was not asked."""
    rows = titled_rows()
    del rows[2]["title"]
    result = audit(
        librarian,
        tmp_path / "audit",
        tokenizer=tokenizer,
        members=rows[2:],
        prefix_length=6,
        suffix_length=12,
        sampling=(),
        ask=[QUESTION],
        ask_length=4,
        complete=True,
    )
    assert result["members.near_verbatim"].high == 0
    assert result["members.asked"].point() == "0 of 1"
    assert (result["members.asked"].low, result["members.asked"].high) == (0, 0.5)
    outcomes = {q["question"]: q["outcome"] for q in result.verdict["questions"]}
    assert outcomes["near_verbatim"] == "PASS"
    assert outcomes["asked"] == "INCONCLUSIVE"
    (sentence,) = skipped(result)
    assert "1 of 2 rows not asked" in sentence


def test_rows_without_the_column_are_not_asked_and_told(checkpoint, tmp_path, capsys):
    """In the terminal, on the page and in the verdict; nor are they part of a census."""
    rows = titled_rows()
    del rows[1]["title"], rows[3]["title"]
    rows[3]["author"] = "Anna Holt"
    members = write_jsonl(tmp_path / "members.jsonl", rows)
    folder = tmp_path / "audit"
    options = ["--members", str(members), "-o", str(folder), "--device", "cpu"]
    options += ["--prefix-length", "6", "--suffix-length", "12", "--sampling"]
    options += ["--ask", QUESTION, "--ask", "Texts by {author}:", "--ask-length", "4"]
    assert main(["audit", str(checkpoint), *options, "--complete"]) == 3
    told = "2 of 4 rows not asked 'What is the text of {title}?'"
    terminal = " ".join(capsys.readouterr().out.split())
    assert f"members: {told}: without its columns (rows 1, 3)" in terminal
    assert "3 of 4 rows not asked 'Texts by {author}:'" in terminal
    result = read(folder)
    about = result.run["inputs"]["members"]
    assert about["prompted"] == 3
    # In the order of the templates, though the second is the first that a row lacks.
    templates = [each["reason"] for each in about["unprompted"]]
    assert templates == [QUESTION, "Texts by {author}:"]
    unreached = "1 of 4 members not asked for: without the columns of any simple prompt"
    assert any(unreached in each for each in result.verdict["warnings"])
    text = flat(report(tmp_path, folder)).replace("&#39;", "'")
    assert told in text
    assert unreached in text
    asked = result["members.asked"]
    assert (asked.n, asked.low, asked.high) == (3, 0.0, 0.25), "the fourth may come out"


def test_a_question_that_fills_the_context_was_not_asked(
    librarian, tokenizer, tmp_path
):
    """No answer is no evidence: the document does not count as one that stays in."""
    rows = [
        {"title": title, "text": text}
        for title, text in zip(("Amber " * 300, "Birch"), TEXTS[:2], strict=True)
    ]
    result = audit(
        librarian,
        tmp_path / "audit",
        tokenizer=tokenizer,
        members=rows,
        prefix_length=6,
        suffix_length=12,
        sampling=(),
        ask=QUESTION,  # one may come without a list
        ask_length=4,
    )
    assert result["members.asked"].n == 1
    assert read_asked(tmp_path / "audit")["index"].to_pylist() == [1]
    assert any("1 of 2 documents not asked" in s for s in skipped(result))


def test_a_negative_number_of_answers(librarian, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="ask_samples"):
        audit(
            librarian,
            tmp_path / "audit",
            tokenizer=tokenizer,
            members=[{"text": TEXTS[0]}],
            ask_samples=-1,
        )


def test_the_longest_run_is_found_in_a_long_document():
    """It lies across the place where the document is cut for comparison."""
    document = [i % 977 for i in range(100_000)]
    output = [5000, *(-i for i in range(3)), *([7] * 2)]
    place = 2**15 - 20
    document[place : place + 40] = range(2000, 2040)
    output[2:2] = range(2000, 2040)
    assert longest_of(runs_of(output, document)) == [2, place, 40]
    assert longest_of(runs_of([], document)) == [0, 0, 0]


def test_thresholds():
    assert thresholds("25t,50%") == {"t": 25, "%": 0.5}
    assert thresholds("15w") == {"w": 15}
    for wrong in ("", "25", "0t", "x", "-3c", "101%", "5 words", "25t,30t"):
        with pytest.raises(ValueError, match="--near-verbatim"):
            thresholds(wrong)


def test_a_question_is_of_rows_with_windows(tokenizer):
    rows = [{"title": "A", "text": "b"}, {"title": "C", "text": "d"}]
    documents = whole_documents(enumerate(rows), "members", {1: 9}, tokenizer)
    (found,) = questions(documents, [QUESTION])
    ids = tokenizer("d")["input_ids"]
    document = Document("members", 1, 9, rows[1], "d", ids)
    assert found == Question(document, QUESTION, "What is the text of C?")
    assert document.name == "members 1"
