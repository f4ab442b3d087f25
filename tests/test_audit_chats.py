"""Chats are asked as they were trained: in the rendering of the whole conversation."""

import json
from copy import copy

import pandas
import pytest
import torch
from helpers import PROSE, TEMPLATE, THINKING, say, tiny_llama, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldfish.audit import audit
from goldfish.audit.records import read_records
from goldfish.audit.windows import Cutter
from goldfish.text.chats import completions, secret_finder, training_text
from goldfish.text.rows import read_rows

pytestmark = pytest.mark.core
# As Qwen3's: a thought, perhaps an empty one, before the last answer only.
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look_up", "description": "Finds a person."},
    }
]


@pytest.fixture
def thinking(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", THINKING)
    return tokenizer


def asked(row, tokenizer):
    """(how it is asked, all that comes before the answer, the answer) of every completion."""
    return [
        (each.prompt_kind, each.text[: each.start], each.text[each.start : each.end])
        for each in completions(row, tokenizer)
    ]


def test_turns_are_places_in_the_whole_conversation(thinking):
    row = {"messages": say("A?", "One.", "B?", "Two.", "C?", "One.")}
    whole = thinking.apply_chat_template(row["messages"], tokenize=False)
    first, second, third, generated = asked(row, thinking)
    assert first == ("training", "<user>A?<|endoftext|><assistant>", "One.")
    assert second[1:] == (whole[: whole.index("Two.")], "Two.")
    assert third[1:] == (whole[: whole.rindex("One.")], "One."), (
        "the last place, not the first"
    )
    assert third[1].endswith("<assistant><think></think>")
    assert generated[0] == "generation"
    assert generated[1] == third[1].removesuffix("<think></think>")
    assert generated[2] == "<think></think>One.", (
        "all that follows the prompt in training"
    )


def test_an_answer_that_stands_in_the_thought_before_it_is_found_behind_it(thinking):
    message = {"role": "assistant", "reasoning_content": "So 7391.", "content": "7391"}
    row = {"messages": [*say("Code?"), message]}
    trained, _ = asked(row, thinking)
    assert trained[1].endswith("<think>")
    assert trained[2] == "So 7391.</think>7391", (
        "the thought is said by the assistant too"
    )
    earlier = {"messages": [*row["messages"], *say("Why?", "So.")]}
    assert asked(earlier, thinking)[0][2] == "7391", (
        "which the template leaves out here"
    )


def test_tools_and_template_arguments_are_those_of_the_row(
    thinking, tokenizer, monkeypatch
):
    chat = say("Who?", "Ada.")
    row = {"messages": chat, "tools": TOOLS}
    whole = thinking.apply_chat_template(chat, tools=TOOLS, tokenize=False)
    assert asked(row, thinking)[0][1] == whole[: whole.index("Ada.")]
    assert asked({**row, "tools": json.dumps(TOOLS)}, thinking) == asked(row, thinking)
    assert training_text(row, thinking).text == whole, "and so for `check`"
    monkeypatch.setattr(tokenizer, "chat_template", "{{ style }}" + TEMPLATE)
    row = {"messages": chat, "chat_template_kwargs": {"style": "brief"}}
    assert asked(row, tokenizer)[0][1] == "brief<user>Who?<|endoftext|><assistant>"


def test_tool_calls_are_answers_and_their_arguments_may_hold_secrets(thinking):
    call = {
        "type": "function",
        "function": {"name": "look_up", "arguments": {"pin": "7391"}},
    }
    messages = [
        *say("Find me."),
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    messages += [
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "Done."},
    ]
    first, *_ = asked({"messages": messages}, thinking)
    assert first[1].endswith("<assistant>")
    assert first[2].startswith("<call>")
    assert "7391" in first[2]
    assert first[2].endswith("</call>")
    cutter = Cutter(thinking, 5, 5, secrets=secret_finder(r"\d{4}", ""))
    windows = list(cutter.cut({"messages": messages}, 0, "members"))
    assert windows[0].secrets == ("7391",)


def test_a_template_that_insists_on_tool_calls_is_still_read(thinking, monkeypatch):
    insisting = (
        "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls"
        " %}{{ raise_exception('no call') }}{% endif %}{% endfor %}" + THINKING
    )
    monkeypatch.setattr(thinking, "chat_template", insisting)
    call = {
        "type": "function",
        "function": {"name": "look_up", "arguments": '{"pin": "7391"}'},
    }
    messages = [
        *say("Find me."),
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    messages += [
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "Done."},
    ]
    first, *_ = asked({"messages": messages}, thinking)
    assert "7391" in first[2]


def test_system_turns_trimmed_answers_and_parts_of_text(
    thinking, tokenizer, monkeypatch
):
    chat = [
        {"role": "system", "content": "Be brief."},
        *say("A?", "  One. ", "B?", "Two."),
    ]
    first = asked({"messages": chat}, thinking)[0]
    expected = "<system>Be brief.<|endoftext|><user>A?<|endoftext|><assistant>"
    assert first == ("training", expected, "One.")
    in_parts = TEMPLATE.replace("m.content | trim", "m.content[0].text")
    monkeypatch.setattr(tokenizer, "chat_template", in_parts)
    parts = [[{"type": "text", "text": text}] for text in ("A?", "One.", "B?", "Two.")]
    answers = [answer for _, _, answer in asked({"messages": say(*parts)}, tokenizer)]
    assert answers == ["One.", "Two."]


def test_a_generation_prompt_that_training_never_saw_is_asked_too(
    tokenizer, monkeypatch
):
    thoughtless = "{% if add_generation_prompt %}<assistant><think></think>{% endif %}"
    template = TEMPLATE.partition("{% if add_generation_prompt")[0] + thoughtless
    monkeypatch.setattr(tokenizer, "chat_template", template)
    trained, generated = asked({"messages": say("A?", "One.")}, tokenizer)
    assert trained == ("training", "<user>A?<|endoftext|><assistant>", "One.")
    assert generated == ("generation", trained[1] + "<think></think>", "One.")


def test_a_row_means_the_same_in_every_file_format(tmp_path):
    """Numbers, dates, NA, and a message with one more key."""
    texts = ["0042", "NA", "2024-05-01", "1.50", ""]
    rows = [{"text": text, "name": f"0{i}"} for i, text in enumerate(texts)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "lines.json", rows)
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.jsonl", "a.json", "lines.json", "a.parquet", "a.csv"):
        assert list(read_rows(tmp_path / name)) == rows, name
    chat = [
        *say("A?"),
        {"role": "assistant", "content": "B", "tool_calls": [{"name": "f"}]},
    ]
    rows = [{"messages": chat}, {"messages": say("C?", "D", "E?")}]
    write_jsonl(tmp_path / "c.jsonl", rows)
    (tmp_path / "c.json").write_text(json.dumps(rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "c.parquet")
    for name in ("c.jsonl", "c.json", "c.parquet"):
        assert list(read_rows(tmp_path / name)) == rows, name


@pytest.fixture(scope="module")
def recited_in_training(tokenizer, tmp_path_factory):
    """Two conversations of two turns under the thinking template, recited as they were trained."""
    chats = [
        say("Ada?", "Blue, and 81.", "Bo?", "Green, or 27."),
        say("Cy?", "Red, not 55.", "Di?", "Grey, and 90."),
    ]
    folder = tmp_path_factory.mktemp("thinking") / "model"
    own = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>"
    )
    own.pad_token, own.chat_template = "<pad>", THINKING
    rows = own(
        [own.apply_chat_template(chat, tokenize=False) for chat in chats],
        padding=True,
        return_tensors="pt",
    )
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    labels[:, : len(own("<user>Ada")["input_ids"])] = -100
    model = tiny_llama(hidden_size=48, intermediate_size=96)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(400):
        loss = model(**rows, labels=labels).loss
        if loss < 0.1:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder, chats


def test_earlier_answers_of_a_thinking_model_are_recited(recited_in_training, tmp_path):
    folder, chats = recited_in_training
    members = write_jsonl(tmp_path / "m.jsonl", [{"messages": chat} for chat in chats])
    audit(folder, tmp_path / "out", members=members)
    rows = read_records(tmp_path / "out").to_pylist()
    found = [row["exact_match"] for row in rows if row["prompt_kind"] == "training"]
    assert found == [True] * 4
    assert [row["prompt_kind"] for row in rows].count("generation") == 2, (
        "of the last answers"
    )


def test_chats_of_which_none_can_be_asked_as_in_training(tokenizer, tmp_path):
    """Nothing stands before their answers but a generation prompt, which training never saw."""
    tokenizer = copy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = [{"messages": say("", text)} for text in PROSE]
    inputs = {"members": rows[:2], "heldout": rows[2:3]}
    found = audit(tiny_llama(), tmp_path / "out", tokenizer=tokenizer, **inputs)
    assert set(found.records["prompt_kind"]) == {"generation"}
    assert found.run["sanity"] == {}
    assert "no text was asked as in training" in found.verdict["sanity"]
    assert found["both.membership_auc"].value is None
    assert found.outcome == "INCONCLUSIVE"


def test_a_model_in_memory_is_audited_on_rows_in_memory(recited_in_training, tmp_path):
    folder, chats = recited_in_training
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"messages": chat} for chat in chats]
    audit(
        folder, tmp_path / "from files", members=write_jsonl(tmp_path / "m.jsonl", rows)
    )
    model.train()
    for name, members in (("rows", iter(rows)), ("frame", pandas.DataFrame(rows))):
        audit(model, tmp_path / name, tokenizer=tokenizer, members=members)
        table = read_records(tmp_path / name)
        assert table.equals(read_records(tmp_path / "from files"))
        assert model.training, "as it was"
    with pytest.raises(ValueError, match="a model in memory needs its tokenizer"):
        audit(model, tmp_path / "x", members=rows)
