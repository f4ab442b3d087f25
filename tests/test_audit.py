"""The audit against generate at batch 1, against hand-made cases and other implementations of its numbers."""

import json
import shutil

import pyarrow.parquet
import pytest
import torch
from conftest import PROSE, tiny_llama
from rouge_score.rouge_scorer import _score_lcs
from toy_tokenizers import KINDS
from transformers import PreTrainedTokenizerFast

from goldfish import Goldfish
from goldfish.audit import audit
from goldfish.audit.extraction import first_divergence, make_record, rouge_l, text_pieces
from goldfish.audit.score import score
from goldfish.audit.windows import Window, cut_windows, read_rows
from goldfish.receipt import Tally, write_receipt

pytestmark = pytest.mark.core


def windows(count=6, prefix=7, suffix=9, vocab=320):
    ids = torch.randint(2, vocab, (count, prefix + suffix), generator=torch.Generator().manual_seed(0))
    return [Window("members", i, f"doc {i}", row, prefix) for i, row in enumerate(ids.tolist())]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_output_equals_generate_one_prefix_at_a_time(model):
    """Also where a window is exact, and so was never generated: half of them are made of the model's own words."""
    asked = windows()
    for i in range(0, 6, 2):
        prefix = torch.tensor([asked[i].ids[:7]])
        own = model.generate(
            prefix, attention_mask=torch.ones_like(prefix), do_sample=False, max_new_tokens=9, pad_token_id=0
        )
        asked[i] = Window("members", i, "own words", own[0].tolist(), 7)
    for window, found in zip(asked, score(model, asked), strict=True):
        prefix = torch.tensor([window.ids[:7]])
        expected = model.generate(
            prefix, attention_mask=torch.ones_like(prefix), do_sample=False, max_new_tokens=9, pad_token_id=0
        )
        assert found.output == expected[0, 7:].tolist()
        assert (found.output == window.suffix) == (window.document == "own words")


def test_teacher_forced_numbers_token_by_token(model):
    (window,) = windows(1)
    (found,) = score(model, [window])
    for t in range(9):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window.ids[: 7 + t]])).logits[0, -1].double()
        assert found.greedy[6 + t] == logits.argmax().item()
        assert found.nll[6 + t] == pytest.approx(-logits.log_softmax(-1)[window.ids[7 + t]].item(), rel=1e-5)


def test_generation_settings_of_the_checkpoint_are_ignored_and_restored(model):
    plain = score(model, windows())
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.eos_token_id = plain[0].output[0]
    assert [each.output for each in score(model, windows())] == [each.output for each in plain]
    assert model.generation_config.repetition_penalty == 5.0
    model.train()
    score(model, windows(1))
    assert model.training


def test_batches_of_any_size_agree(model, monkeypatch):
    finished = []
    together = score(model, windows(), finished.append)
    monkeypatch.setattr("goldfish.audit.score.LOGITS_BUDGET", 1)
    alone = score(model, windows(), finished.append)
    assert finished == [6, 1, 1, 1, 1, 1, 1]
    assert [s.output for s in alone] == [s.output for s in together]
    assert score(model, []) == []


def test_windows_longer_than_the_context_are_refused(model):
    with pytest.raises(ValueError, match="windows of 100 \\+ 29 tokens do not fit this model's context of 128 tokens"):
        score(model, windows(1, 100, 29))


def test_divergence_and_rouge_by_hand():
    assert first_divergence([1, 2, 3], [1, 2, 3]) == 3
    assert first_divergence([9, 2, 3], [1, 2, 3]) == 0
    assert first_divergence([1, 2, 4], [1, 2, 3]) == 2
    assert rouge_l([1, 2, 3, 4], [2, 4]) == pytest.approx(2 * 2 / 6)
    assert rouge_l([], []) == 0.0
    assert rouge_l([1], [2]) == 0.0


def test_rouge_equals_rouge_score():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        a, b = (torch.randint(0, 9, (n,), generator=generator).tolist() for n in (30, 25))
        assert rouge_l(a, b) == pytest.approx(_score_lcs(b, a).fmeasure, rel=1e-12)


def test_text_pieces_join_to_the_text(tokenizer):
    for text in [*PROSE, "naïve 日本語 “quotes” \x00 <script>"]:
        ids = tokenizer(text)["input_ids"]
        pieces = text_pieces(tokenizer, [], ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == text
        assert "".join(text_pieces(tokenizer, ids[:5], ids[5:])) in text


@pytest.mark.parametrize("kind", KINDS)
def test_text_pieces_of_a_long_text_take_linear_work(kind):
    """Counted in decoded tokens; with characters of several tokens wherever decoding may start anew."""
    fast = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]())
    ids = fast("Words, “日本語” naïve 🐠 and more. " * 40, add_special_tokens=False)["input_ids"]

    class Counting:
        decoded = 0

        def decode(self, ids, **options):
            self.decoded += len(ids)
            return fast.decode(ids, **options)

    counting = Counting()
    pieces = text_pieces(counting, [], ids)
    assert len(pieces) == len(ids) > 300
    assert "".join(pieces) == fast.decode(ids, clean_up_tokenization_spaces=False)
    assert counting.decoded < 70 * len(ids)


def test_a_random_rule_has_no_holes_to_tell(tokenizer, model):
    """It drew anew in every epoch, so no token of the window was dropped or kept throughout."""
    (window,) = windows(1)
    (found,) = score(model, [window])
    assert make_record(window, found, Goldfish(strategy="random"), tokenizer)["dropped"] is None
    assert make_record(window, found, Goldfish(), tokenizer)["dropped"] is not None


def test_audit_of_a_checkpoint(tmp_path, tokenizer, checkpoint):
    rule = Goldfish(k=2, h=3)
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    write_receipt(folder, Tally(rule, torch.device("cpu")), tokenizer)
    ids = torch.randint(2, 320, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()
    members = write_jsonl(tmp_path / "m.jsonl", [{"input_ids": row, "name": f"n{i}"} for i, row in enumerate(ids)])
    heldout = write_jsonl(tmp_path / "h.jsonl", [{"text": PROSE[0]}, {"text": "short"}, {"text": PROSE[1]}])
    summary = audit(folder, tmp_path / "out", members=members, heldout=heldout, prefix_length=10, suffix_length=8)

    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert summary["rule"] == rule.to_dict()
    assert (summary["splits"]["heldout"]["n"], summary["splits"]["heldout"]["skipped"]) == (2, 1)
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "records.parquet").to_pylist()
    assert [(row["split"], row["index"]) for row in rows] == [
        ("members", 0), ("members", 1), ("members", 2), ("heldout", 0), ("heldout", 2),
    ]  # fmt: skip
    assert rows[1]["document"] == "n1"
    assert rows[1]["prefix_ids"] + rows[1]["suffix_ids"] == ids[1][:18]
    assert rows[1]["dropped"] == rule.dropped(torch.tensor(ids[1])).tolist()[10:18]
    assert "".join(rows[3]["suffix_tokens"]) in PROSE[0]
    for row in rows:
        assert row["correct"][: row["first_divergence"]] == [True] * row["first_divergence"]

    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        audit(folder, tmp_path / "out", members=members)


def test_bad_input_to_an_audit(tmp_path, tokenizer, checkpoint):
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": PROSE[0]}])

    def refused(error, text, checkpoint=checkpoint, **arguments):
        with pytest.raises(error, match=text):
            audit(
                checkpoint, tmp_path / "out", **{"members": good, "prefix_length": 5, "suffix_length": 5, **arguments}
            )
        assert not (tmp_path / "out").exists(), "a refused audit leaves nothing behind"

    refused(ValueError, "nothing to audit", members=None)
    refused(ValueError, "at least one token each, got 0 and 5", prefix_length=0)
    refused(FileNotFoundError, "no file .*missing.jsonl", members=tmp_path / "missing.jsonl")
    refused(FileNotFoundError, "no checkpoint folder", checkpoint=tmp_path / "nowhere")
    refused(ValueError, r"good.jsonl has no usable window: 1 rows, none with 500 \+ 5 tokens", prefix_length=500)
    refused(ValueError, "has no usable window: 0 rows", members=write_jsonl(tmp_path / "empty.jsonl", []))
    other = write_jsonl(tmp_path / "other.jsonl", [{"input_ids": [1] * 10}, {"input_ids": [1] * 9 + [320]}])
    refused(ValueError, "other.jsonl, row 1: token id 320, but the model knows 320 ids; .*`text`", members=other)
    bare = tmp_path / "bare"
    tiny_llama().save_pretrained(bare)
    refused(ValueError, r"bare holds no tokenizer; save it there with tokenizer.save_pretrained\(", checkpoint=bare)


def test_bad_lines_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    for line, text in (
        ("{", "line 2: not JSON"),
        ("[]", 'line 2: expected an object such as {"text": "..."}, got list'),
        ('{"body": ""}', r"expected a string `text` or a list `input_ids`, got the fields \['body'\]"),
        ('{"input_ids": [1, -1]}', "input_ids must be a list of token ids"),
    ):
        path.write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(ValueError, match=text):
            list(read_rows(path))
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        list(read_rows(path))


def test_a_text_file_is_one_row(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(PROSE[0])
    assert list(read_rows(path)) == [{"text": PROSE[0], "name": "a.txt"}]
    cut, skipped = cut_windows(read_rows(path), "heldout", tokenizer, 4, 3)
    assert (len(cut), skipped, len(cut[0].ids), cut[0].suffix) == (1, 0, 7, cut[0].ids[4:])
