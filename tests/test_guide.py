"""Strategy "entropy": what a guide decides is what the specification says, wherever text lies."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers import PROSE, tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import goldfish.guide
from goldfish import Goldfish, GoldfishCollator, mask_labels, premask, spec
from goldfish.cli import main
from goldfish.guide import Guide, load_decisions, save_decisions
from goldfish.letters import Vocabulary
from goldfish.masking import mask_batch, premasked
from goldfish.receipt import read_receipt, rules_of

VOCABULARY = 12
pytestmark = pytest.mark.core
RULE = Goldfish(k=2, strategy="entropy")


class Bigrams(nn.Module):
    """Predicts from the last token alone, so that entropies are known and many are equal."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.table = nn.Parameter(logits)
        config = SimpleNamespace(vocab_size=VOCABULARY)
        self.config = SimpleNamespace(get_text_config=lambda: config)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.table[input_ids])

    def entropies(self, document):
        """Those of the predictions of a document's tokens, in numpy; 0 for the first."""
        p = np.exp(self.table.detach().double().numpy())
        p /= p.sum(-1, keepdims=True)
        entropy = -(p * np.log(p)).sum(-1)
        return [0.0, *(float(entropy[last]) for last in document[:-1])]


def a_batch(pick):
    """Packed and padded rows with prompts, as lists."""
    rows, length = pick.choice([1, 3]), pick.choice([1, 2, 9, 40])
    ids = [[pick.randrange(VOCABULARY) for _ in range(length)] for _ in range(rows)]
    positions, masks, labels = [], [], []
    for row in ids:
        position, line = 0, []
        for _ in row:
            position = 0 if pick.random() < 0.1 else position + 1
            line.append(position)
        positions.append([0, *line[1:]])
        left, right = pick.randrange(length), pick.randrange(length)
        masks.append(
            [int(left // 3 <= i <= length - right // 3) for i in range(length)]
        )
        labels.append([-100 if pick.random() < 0.2 else token for token in row])
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": masks,
        "labels": labels,
    }


@pytest.mark.parametrize("trial", range(30))
def test_a_guide_decides_as_specified(trial, monkeypatch):
    pick = random.Random(trial)
    monkeypatch.setattr(goldfish.guide, "LOGITS", pick.choice([1, 200, 10**6]))
    monkeypatch.setattr(goldfish.guide, "PROBABILITIES", pick.choice([1, 100, 10**6]))
    k = pick.choice([1.5, 2, 4, 100])
    rule = Goldfish(k=k, strategy="entropy", exempt=pick.choice([(), (3, 4)]))
    model, lists = Bigrams(), a_batch(pick)
    batch = {name: torch.tensor(rows) for name, rows in lists.items()}
    labels = mask_batch(Guide(model).read(rule, batch), batch).batch["labels"].tolist()
    for b, ids in enumerate(lists["input_ids"]):
        given = lists["position_ids"][b], lists["attention_mask"][b]
        entropies = [0.0] * len(ids)
        for places in spec.documents(ids, *given, None):
            values = model.entropies([ids[i] for i in places])
            for place, value in zip(places, values, strict=True):
                entropies[place] = value
        expected = list(lists["labels"][b])
        drops = spec.dropped(
            ids,
            *given,
            k=k,
            strategy="entropy",
            exempt=rule.exempt,
            entropies=entropies,
            targets=[label != -100 for label in expected],
        )
        for place, drop in enumerate(drops):
            expected[place] = -100 if drop else expected[place]
        assert labels[b] == expected


def test_the_entropy_is_that_of_the_next_token():
    model = tiny_llama().train()
    documents = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 5])]
    found = Guide(model).entropies(documents)
    assert model.training
    model.eval()
    for line, ids in zip(found, documents, strict=True):
        logits = model(ids[None]).logits[0, :-1].double()
        expected = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(line[1 : len(ids)].double(), expected)


def test_every_part_of_the_model_is_left_as_it_was():
    """A frozen part in evaluation mode stays there; gradients and random numbers are untouched."""
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state()
    first, second = (
        Guide(model).entropies([torch.arange(5, 25)]).tolist() for _ in range(2)
    )
    assert first == second, "without dropout"
    assert [part.training for part in model.modules()] == modes
    assert torch.get_rng_state().equal(state)
    assert all(each.grad is None for each in model.parameters())


def test_packed_documents_are_decided_as_if_alone():
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randint(2, 320, (2, 12), generator=generator)
    guide = Guide(tiny_llama(initializer_range=0.5))
    alone = {"input_ids": torch.stack([first, second])}
    rule = guide.read(RULE, alone)
    expected = rule.dropped(alone["input_ids"]).flatten().tolist()
    assert 2 < sum(expected) < 22
    packed = torch.cat([first, second])[None]
    positions = torch.arange(24)[None] % 12
    assert rule.dropped(packed, positions)[0].tolist() == expected
    read_packed = guide.read(RULE, {"input_ids": packed, "position_ids": positions})
    assert read_packed.decisions.tolist() == rule.decisions.tolist()


def test_secrets_are_dropped_on_top():
    entries = [bytes([97 + i]) for i in range(VOCABULARY)]
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    plain = Guide(Bigrams()).read(RULE, {"input_ids": ids})
    bound = replace(plain, secrets="a|(b)c", vocabulary=Vocabulary(entries))
    assert bound.dropped(ids)[0].tolist() == [
        drop or i == 0 for i, drop in enumerate(plain.dropped(ids)[0].tolist())
    ]


def test_what_was_not_read_is_refused():
    ids = torch.tensor([[1, 2, 3, 4]])
    for use in (
        lambda: RULE.dropped(ids),
        lambda: mask_labels(RULE, ids),
        lambda: GoldfishCollator(lambda rows: {"input_ids": ids}, RULE)([]),
    ):
        with pytest.raises(ValueError, match=r"attach\(trainer, rule\).* premask"):
            use()
    rule = Guide(Bigrams()).read(RULE, {"input_ids": ids})
    for other in ([1, 2, 3], [1, 2, 3, 5], [0, 1, 2, 3, 4]):
        with pytest.raises(ValueError, match="a document that the guide did not read"):
            rule.dropped(torch.tensor([other]))
    # Padding and single tokens have nothing to decide.
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    padded = torch.tensor([[1, 2, 3, 4, 9, 9, 9]])
    assert rule.dropped(padded, attention_mask=mask)[0, :4].equal(rule.dropped(ids)[0])
    assert rule.dropped(torch.tensor([[7]])).tolist() == [[False]]
    assert (
        Guide(Bigrams()).read(RULE, {"input_ids": ids[:, :0]}).decisions.tolist() == []
    )


def test_rules_and_guides_that_do_not_fit():
    with pytest.raises(ValueError, match=r"multiple of 1/2, got 3\.3"):
        Goldfish(k=3.3, strategy="entropy")
    with pytest.raises(ValueError, match='max_kept needs strategy "hash" or "letters"'):
        Goldfish(k=4, strategy="entropy", max_kept=4)
    with pytest.raises(ValueError, match='a guide is for strategy="entropy"'):
        Goldfish(guide="0" * 16)
    with pytest.raises(TypeError, match=r"the guide must be a model.* got 'gpt2'"):
        Guide("gpt2")
    guide, ids = Guide(Bigrams()), torch.tensor([[1, 2]])
    other = replace(RULE, guide="0" * 16)
    with pytest.raises(ValueError, match=f"0000, this model has {guide.fingerprint}"):
        guide.read(other, {"input_ids": ids})
    with torch.no_grad():
        guide.model.table[1] = torch.nan
    assert Guide(guide.model).fingerprint != guide.fingerprint
    with pytest.raises(ValueError, match="predictions are not finite"):
        guide.read(RULE, {"input_ids": ids})


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}])
def test_new_adapters_are_no_part_of_the_fingerprint(way, more):
    """They are drawn at random and change nothing, so the base model is what decides."""
    peft = pytest.importorskip("peft")

    def with_adapter(seed):
        model = tiny_llama()
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], **more)
        if way == "add_adapter":
            model.add_adapter(config)
            return model
        return peft.get_peft_model(model, config)

    base = Guide(tiny_llama()).fingerprint
    model = with_adapter(seed=1)
    requires_grad = [each.requires_grad for each in model.parameters()]
    assert Guide(model).fingerprint == Guide(with_adapter(seed=2)).fingerprint == base
    assert [each.requires_grad for each in model.parameters()] == requires_grad
    (last,) = [
        each
        for name, each in model.named_parameters()
        if name.endswith("layers.1.self_attn.q_proj.lora_B.default.weight")
    ]
    with torch.no_grad():
        last[0] += 0.01
    ids = torch.arange(5, 25)[None]
    before = model(input_ids=ids).logits
    trained = Guide(model).fingerprint
    assert len({trained, Guide(with_adapter(seed=1)).fingerprint}) == 2
    assert torch.equal(model(input_ids=ids).logits, before), "adapters are on again"


def test_documents_that_the_model_cannot_read():
    ids = torch.tensor([[1, 2, 59, 60]])
    with pytest.raises(ValueError, match=r"has the id 60, but .* has 60 entries"):
        Guide(tiny_llama(vocab_size=60)).read(RULE, {"input_ids": ids})
    sizes = {"vocab_size": 64, "n_embd": 8, "n_layer": 1, "n_head": 1}
    short = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=3))
    with pytest.raises(ValueError, match=r"a document of 4 tokens .* cut"):
        Guide(short).read(RULE, {"input_ids": ids})


def test_decisions_are_stored(tmp_path):
    ids = torch.tensor([[1, 2, 3, 4]])
    rule = Guide(Bigrams()).read(RULE, {"input_ids": ids})
    save_decisions(tmp_path, rule)
    again = load_decisions(tmp_path)
    assert again == rule != RULE
    assert again.decisions.equal(rule.decisions)
    assert [path.name for path in tmp_path.iterdir()] == [goldfish.guide.FILE_NAME]
    with pytest.raises(FileNotFoundError, match="copy it there"):
        load_decisions(tmp_path / "other")


def rows_of_ids(count=12):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [torch.randint(2, 300, (n,), generator=generator).tolist() for n in lengths]


def test_premask_with_a_guide(tmp_path, monkeypatch):
    """Rows, packed rows and prompts; cached by the weights; a receipt that names them."""
    rows, model = rows_of_ids(), tiny_llama(initializer_range=0.5)
    prompt = [-100 if i < 5 else token for i, token in enumerate(rows[0])]
    labels = [prompt, *rows[1:]]
    guide = Guide(model)
    Dataset.from_dict({"input_ids": rows, "labels": labels}).save_to_disk(
        tmp_path / "d"
    )
    dataset = load_from_disk(tmp_path / "d")
    masked = premask(dataset, RULE, guide=model, receipt=tmp_path / "receipt")
    for given, ids, written in zip(labels, rows, masked["labels"], strict=True):
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([given])}
        expected = mask_batch(guide.read(RULE, batch), batch).batch["labels"]
        assert written == expected[0].tolist()
    receipt = read_receipt(tmp_path / "receipt")
    assert rules_of(receipt) == replace(RULE, guide=guide.fingerprint)
    assert 0.3 < receipt["dropped"] / receipt["targets"] < 0.7
    assert guide.fingerprint in premasked(masked)

    used = []
    monkeypatch.setattr(Guide, "decisions", lambda *_: used.append(1) or 1 / 0)
    premask(dataset, RULE, guide=model, receipt=tmp_path / "again")
    assert used == [], "the second time the labels come from the cache"
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    with pytest.raises(ZeroDivisionError):
        premask(dataset, RULE, guide=model)


def test_premask_refuses_guides_that_do_not_fit():
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3]]})
    model = Bigrams()
    with pytest.raises(ValueError, match="premask\\(dataset, rule, guide=model\\)"):
        premask(dataset, RULE)
    with pytest.raises(ValueError, match='a guide is for strategy="entropy"'):
        premask(dataset, Goldfish(), guide=model)
    with pytest.raises(ValueError, match=r"in one process, .* got num_proc=2"):
        premask(dataset, RULE, guide=model, num_proc=2)
    with pytest.raises(ValueError, match="use a map-style dataset"):
        premask(dataset.to_iterable_dataset(), RULE, guide=model)


def test_the_command_line_takes_a_guide(checkpoint, tmp_path, capsys):
    rows = rows_of_ids()
    Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "rows")
    options = ["--tokenizer", str(checkpoint), "--strategy", "entropy", "-k", "2"]
    guide = ["--guide", str(checkpoint)]
    command = ["premask", str(tmp_path / "rows"), "-o", str(tmp_path / "out"), *options]
    assert main(command) == 2
    assert "premask(dataset, rule, guide=model)" in capsys.readouterr().err
    assert main([*command, *guide]) == 0
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    expected = premask(Dataset.from_dict({"input_ids": rows}), RULE, guide=model)
    assert load_from_disk(tmp_path / "out")["labels"] == expected["labels"]
    assert read_receipt(tmp_path / "out")["rule"]["guide"] == Guide(model).fingerprint

    capsys.readouterr()
    assert main(["show", PROSE[0], *options, *guide]) == 0
    assert "strategy=entropy" in capsys.readouterr().out
    for text in ("", "a"):
        assert main(["show", text, *options, *guide]) == 0
    assert main(["show", PROSE[0], *options]) == 2
    (tmp_path / "text.jsonl").write_text('{"text": "some words of a text"}\n')
    assert main(["check", str(tmp_path / "text.jsonl"), *options]) == 2
    assert "needs a model that reads the data first" in capsys.readouterr().err
