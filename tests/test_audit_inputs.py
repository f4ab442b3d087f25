"""Audits of what people have: chats with secrets, a parquet file and a LoRA folder, standard input,
a split model.
"""

import io
import json
import shutil

import pandas
import pytest
import torch
from helpers import BEFORE_5, PROSE, TEMPLATE, say, tiny_llama, write_jsonl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldfish import Goldfish
from goldfish.audit import audit, read
from goldfish.audit.records import read_records
from goldfish.audit.render import skipped
from goldfish.audit.run import MARGIN
from goldfish.audit.windows import Cutter
from goldfish.cli import main
from goldfish.receipt import DropCounts, write_receipt
from goldfish.report import write_report
from goldfish.text import rows as reader
from goldfish.text.chats import secret_finder

pytestmark = pytest.mark.core
CODES = ["QX7-KP2", "ZV9-BB4", "MM1-TT8"]
CHATS = [
    say(f"Code of {name}?", f"It is {code}.")
    for name, code in zip(("Ada", "Bo", "Cy"), CODES, strict=True)
]
CHATS.append(
    say(
        "What does it do?",
        "It swims.",
        "And then?",
        "It forgets what it saw, again and again.",
    )
)
HELDOUT = [
    say("Code of Di?", "It is HH3-LL5."),
    say("Code of Ed?", "It is RR6-WW0."),
    say("Nothing?", ""),
]


@pytest.fixture(scope="module")
def reciter(tokenizer, tmp_path_factory):
    """A model that knows the chats but the last one by heart, and the code of the third person
    wrongly.
    """
    folder = tmp_path_factory.mktemp("reciter") / "model"
    model = tiny_llama(hidden_size=48, intermediate_size=96)
    tokenizer.save_pretrained(folder)
    own = AutoTokenizer.from_pretrained(folder)
    own.chat_template = TEMPLATE
    own.save_pretrained(folder)
    wrong = [*CHATS[:2], say("Code of Cy?", f"It is {CODES[2][:-1]}9.")]
    rows = own(
        [own.apply_chat_template(chat, tokenize=False) for chat in wrong],
        padding=True,
        return_tensors="pt",
    )
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    # Answers only, whose loss goes to 0: the names in the questions cannot be known, and how
    # far they push the answers about is a matter of rounding, which differs between CPUs.
    for row, chat in zip(labels, wrong, strict=True):
        prompt = own.apply_chat_template(
            chat[:-1], tokenize=False, add_generation_prompt=True
        )
        row[: len(own(prompt)["input_ids"])] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(400):
        loss = model(**rows, labels=labels).loss
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02, "the toy must recite"
    model.save_pretrained(folder)
    rule = Goldfish(k=3, h=3)
    write_receipt(folder, DropCounts(rule, torch.device("cpu")), own)
    return folder, rule


@pytest.fixture
def chats(tmp_path):
    rows = [
        {"messages": chat, "code": code}
        for chat, code in zip(CHATS, [*CODES, None], strict=True)
    ]
    members = write_jsonl(tmp_path / "members.jsonl", rows)
    heldout = write_jsonl(
        tmp_path / "heldout.jsonl",
        [
            {"prompt": chat[:1], "completion": chat[1:], "code": "HH3-LL5"}
            for chat in HELDOUT
        ],
    )
    return {"members": members, "heldout": heldout}


def assert_is_turn(row, prompt, answer, model, tokenizer, rule):
    """A record is that of an answer after a prompt."""
    start, ids = (
        tokenizer(text, return_tensors="pt")["input_ids"]
        for text in (prompt, prompt + answer)
    )
    place = start.shape[1]
    assert row["prefix_ids"] == start[0].tolist()
    assert row["suffix_ids"] == ids[0, place:].tolist()
    made = model.generate(
        start,
        max_new_tokens=len(row["output_ids"]),
        do_sample=False,
        pad_token_id=1,
        eos_token_id=None,
    )[0, place:]
    assert row["output_ids"] == made.tolist()
    recited = tokenizer.decode(made[: len(row["suffix_ids"])]) == answer
    assert row["exact_match"] == recited
    with torch.no_grad():
        log_p = model(ids).logits[0, place - 1 : -1].log_softmax(-1)
    log_p = log_p.gather(-1, ids[0, place:, None])
    assert row["log_p"][0] == pytest.approx(log_p.sum().item(), rel=1e-4, abs=1e-5)
    # Of the completion alone; the control is the same model.
    assert row["mia_loss"] == pytest.approx(log_p.mean().item(), rel=1e-4, abs=1e-6)
    assert row["mia_reference"] == pytest.approx(0, abs=1e-5)
    assert row["dropped"] == rule.dropped(ids[0]).tolist()[place:]
    assert row["prefix_sweep"] is None


def test_chats_are_audited_turn_by_turn(reciter, chats, tmp_path):
    """Against generate from the template's own prompt, and the log-probabilities of one plain
    forward pass.
    """
    folder, rule = reciter
    summary = audit(
        folder, tmp_path / "out", **chats, secret_column="code", control=folder
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    rows = read_records(tmp_path / "out").to_pylist()
    turns = [
        (chat[:i], chat[i]["content"]) for chat in CHATS for i in range(1, len(chat), 2)
    ]
    turns += [(chat[:1], chat[1]["content"]) for chat in HELDOUT[:2]]
    assert len(rows) == len(turns) == 7
    longest = max(len(row["suffix_ids"]) for row in rows if row["secrets"])
    for row, (before, answer) in zip(rows, turns, strict=True):
        prompt = tokenizer.apply_chat_template(
            before, add_generation_prompt=True, tokenize=False
        )
        # An answer may open differently than the secret's, so outputs are longer.
        assert len(row["output_ids"]) == longest + MARGIN
        assert_is_turn(row, prompt, answer, model, tokenizer, rule)
    assert len({len(row["suffix_ids"]) for row in rows}) == 3
    assert [row["exact_match"] for row in rows[:3]] == [True, True, False]
    assert [row["secrets"] for row in rows] == [
        *([code] for code in CODES),
        [],
        [],
        ["HH3-LL5"],
        [],
    ]
    # The code of the third is recited wrongly, that of a held-out chat was never seen.
    assert [
        code in row["output_text"] for row, code in zip(rows, CODES, strict=False)
    ] == [
        True,
        True,
        False,
    ]
    # A search by hand: any code of the members in any output whose prompt does not contain it.
    given = [
        {c for c in CODES if c in r["output_text"] and c not in r["prompt"]}
        for r in rows
    ]
    for split in ("members", "heldout"):
        here = [
            codes
            for row, codes in zip(rows, given, strict=True)
            if row["split"] == split
        ]
        figure = summary[f"{split}.answers_with_secret"]
        assert (figure.k, figure.n) == (sum(map(bool, here)), len(here))
    assert (summary["members.secrets"].k, summary["members.secrets"].n) == (2, 3)
    assert len(set().union(*given)) == 2
    assert summary["members.exact_match"].n == 4, "two of five turns are of one chat"
    assert (
        summary.rows.get("members", "prefix_sweep", "", 5).reason == "nothing to count"
    )
    assert summary["members.token_accuracy"].n == sum(
        len(row["suffix_ids"]) for row in rows[:5]
    )
    assert summary.run["inputs"]["heldout"]["skipped"] == [
        {"reason": "an empty completion", "count": 1, "rows": [2]}
    ]
    assert (
        skipped(summary)[0]
        == "held-out: 1 window of 3 rows skipped: an empty completion (row 2)"
    )
    questions = {each["question"]: each for each in summary.verdict["questions"]}
    assert questions["secrets"]["outcome"] == "FAIL"
    assert read(tmp_path / "out") == summary
    text = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert "marked secrets that came out" in text
    assert "the model must continue with the answer" in text.replace("\\", "")
    write_report([tmp_path / "out"], tmp_path / "report.html")


def test_secrets_that_occur_nowhere_are_a_mistake(reciter, chats, tmp_path):
    for mark in ({"secrets": "no such code"}, {"secret_column": "cod"}):
        with pytest.raises(
            ValueError,
            match=r"no suffix in .*members.jsonl contains a marked secret: check the column",
        ):
            audit(reciter[0], tmp_path / "out", **chats, **mark)
    with pytest.raises(
        ValueError, match=r"no suffix in .*heldout.jsonl contains a marked secret"
    ):
        audit(
            reciter[0],
            tmp_path / "out",
            members=chats["heldout"],
            heldout=chats["members"],
            secrets=CODES[0],
        )


def test_why_no_marked_secret_was_asked(reciter, tmp_path):
    """They were found, so neither the column nor the expression is the mistake."""
    rows = [{"text": PROSE[0], "secret": PROSE[0].split()[0]}]
    rows.append({"text": PROSE[1], "secret": PROSE[1].split()[-1]})
    lengths = {"prefix_length": 3, "suffix_length": 3, "secret_column": "secret"}
    reasons = "1 given in the prompt, 1 outside of the windows"
    with pytest.raises(
        ValueError, match=rf"2 secrets marked, but none asked \({reasons}\)"
    ):
        audit(reciter[0], tmp_path / "out", members=rows, **lengths)


def test_a_secret_may_be_announced_in_the_prompt(tokenizer):
    """Where the pattern has a group, only the group must stand in the suffix."""
    marks = secret_finder(r"code is (\S+)", "")
    length, all_ids = (
        len(tokenizer("Her code is")["input_ids"]),
        tokenizer("Her code is 8841Z.")["input_ids"],
    )
    for row in (
        {"prompt": "Her code is", "completion": " 8841Z."},
        {"text": "Her code is 8841Z."},
    ):
        (window,) = Cutter(tokenizer, length, len(all_ids) - length, secrets=marks).cut(
            row, 0, "members"
        )
        assert window.secrets == ("8841Z.",)


def test_a_chat_that_breaks_the_template_is_skipped(tokenizer, monkeypatch):
    """Whatever the template raises; its message may hold the text of the chat."""
    concatenates = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", concatenates)
    for question in ([{"type": "text", "text": "hi"}], None):
        chat = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "yes"},
        ]
        assert list(Cutter(tokenizer, 5, 5).cut({"messages": chat}, 0, "members")) == [
            "the chat template refuses it"
        ]
    parts = say("hi", [{"type": "text", "text": "yes"}])
    assert list(Cutter(tokenizer, 5, 5).cut({"messages": parts}, 0, "members")) == [
        "the chat template refuses it"
    ]


@pytest.mark.skipif(BEFORE_5, reason="with transformers 4 adapters are refused")
def test_a_parquet_file_and_a_lora_folder_are_audited_in_one_line(
    reciter, tmp_path, monkeypatch, capsys
):
    """As TRL leaves them: the folder has no tokenizer, the file has chats; no other option is
    given.
    """
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(reciter[0]),
        LoraConfig(target_modules=["q_proj"]),
    )
    model.save_pretrained("lora")
    pandas.DataFrame([{"messages": chat} for chat in CHATS]).to_parquet("train.parquet")
    assert main(["audit", "lora", "--members", "train.parquet", "-o", "audit"]) == 3
    assert read("audit")["members.exact_match"].k == 2
    assert "goldfish audit: INCONCLUSIVE, exit code 3" in capsys.readouterr().out


def test_rows_from_standard_input_are_drawn(checkpoint, tmp_path, monkeypatch):
    """The same rows as from the file; one process, one input."""
    data = "".join(
        json.dumps({"body": f"{i}: {text}"}) + "\n" for i, text in enumerate(PROSE)
    )
    (tmp_path / "a.jsonl").write_text(data)
    drawn = []
    for source in ("-", str(tmp_path / "a.jsonl")):
        reader._standard_input.cache_clear()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
        output = tmp_path / f"out{len(drawn)}"
        command = [
            "audit",
            str(checkpoint),
            "--members",
            source,
            "-o",
            str(output),
            "--text-column",
            "body",
        ]
        command += ["--max-rows", "5", "--seed", "3"]
        command += ["--prefix-length", "5", "--suffix-length", "5"]
        assert main(command) == 3
        drawn.append(read_records(output, ["index", "prefix_ids", "nll"]).to_pylist())
    reader._standard_input.cache_clear()
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 5
    assert read(tmp_path / "out0").run["inputs"]["members"]["path"] == "-"
    with pytest.raises(
        ValueError, match="standard input can be read once, by one process: give a file"
    ):
        audit(checkpoint, tmp_path / "x", members="-", heldout="-")


def test_a_model_split_over_memory_and_disk_gives_the_same_records(
    checkpoint, tmp_path
):
    """accelerate keeps the embeddings and a layer on disk: its first weights are nowhere in
    memory.
    """
    members = write_jsonl(
        tmp_path / "m.jsonl", [{"text": f"{i}: {text}"} for i, text in enumerate(PROSE)]
    )
    options = {
        "members": members,
        "prefix_length": 6,
        "suffix_length": 6,
        "beams": (2,),
    }
    audit(checkpoint, tmp_path / "whole", **options)
    parts = {
        "model.embed_tokens": "disk",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    audit(checkpoint, tmp_path / "split", **options, device_map=parts)
    assert read_records(tmp_path / "split").equals(read_records(tmp_path / "whole"))
    shutil.rmtree(tmp_path / "split")
    command = [
        "audit",
        str(checkpoint),
        "--members",
        str(members),
        "-o",
        str(tmp_path / "split"),
        "--beams",
        "2",
    ]
    command += ["--prefix-length", "6", "--suffix-length", "6", "--device-map", "auto"]
    assert main(command) == 3
    assert read_records(tmp_path / "split").equals(read_records(tmp_path / "whole"))


def test_an_answer_that_opens_differently_does_not_hide_the_code(reciter, tmp_path):
    """The model says "It is QX7-KP2.", the file "QX7-KP2": outputs go on beyond the answer."""
    rows = [
        {"messages": say("Code of Ada?", CODES[0])},
        {"messages": say("Code of Bo?", CODES[1])},
    ]
    members = write_jsonl(tmp_path / "members.jsonl", rows)
    audit(reciter[0], tmp_path / "out", members=members, secrets=r"\w{3}-\w{3}")
    for row, code in zip(
        read_records(tmp_path / "out").to_pylist(), CODES, strict=False
    ):
        assert not row["exact_match"]
        assert code in row["output_text"]
        assert code not in "".join(row["output_tokens"][: len(row["suffix_ids"])])


def test_the_probability_of_a_secret_is_that_of_its_own_tokens(
    reciter, chats, tmp_path
):
    """Against one forward pass of the model, after all that truly comes before the code."""
    audit(reciter[0], tmp_path / "out", **chats, secret_column="code")
    model = AutoModelForCausalLM.from_pretrained(reciter[0]).eval()
    tokenizer = AutoTokenizer.from_pretrained(reciter[0])
    for row in read_records(tmp_path / "out").to_pylist()[:3]:
        text = row["prompt"] + row["suffix_text"]
        begin = text.index(row["secrets"][0])
        encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        ends = encoded["offset_mapping"][0, :, 1]
        with torch.no_grad():
            log_p = model(encoded["input_ids"]).logits[0].log_softmax(-1)
        inside = [
            i
            for i, (a, b) in enumerate(encoded["offset_mapping"][0].tolist())
            if b > begin and a < begin + 7
        ]
        expected = sum(log_p[i - 1, encoded["input_ids"][0, i]].item() for i in inside)
        assert len(ends) > len(inside) > 1
        assert row["secret_log_p"][0][0] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_template_that_prints_the_date_is_noted(reciter, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(reciter[0], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    tokenizer.save_pretrained(folder)
    members = write_jsonl(tmp_path / "m.jsonl", [{"messages": CHATS[0]}])
    audit(folder, tmp_path / "out", members=members)
    assert "prints today's date" in caplog.text
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "prints today's date" in about["notes"][0]
