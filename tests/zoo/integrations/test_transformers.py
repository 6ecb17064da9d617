"""A model that sleeps in transformers: generation, padding, packing, training, saving. Needs `pip install '.[integrations]'`."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import zoo

PAGE = Path(__file__).parents[3] / "docs/integrations.md"
pytestmark = pytest.mark.extended

SIZE = {"layers": "attn gdn", "d_model": 16, "d_ff": 16, "vocab_size": 32, "blocks": {"mamba2": {"head_dim": 8}}}
WINDOW = 16


def new(name=f"gdn4-sleep2-hard{WINDOW}", **fields):
    return zoo.create(name, **{**SIZE, "seed": 3, **fields}).eval()


@pytest.fixture(scope="module")
def wrap():
    """Turns a zoo model into one of transformers."""
    from zoo.integrations.transformers import SleepZooForCausalLM

    return SleepZooForCausalLM.from_zoo


def tokens(*shape, vocab=32, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, count):
    return torch.stack(list(zoo.Session(model, len(ids)).generate(ids, count)), dim=1)


MODELS = {
    "hard": {},
    "sliding": {"name": f"gdn4-sleep3-slide{WINDOW}"},
    "span": {"layers": "attn gdn attn", "span": (1, 1)},
    "mamba2": {"layers": "mamba2 attn", "tie_embeddings": True, "logits_scale": 0.5, "logits_cap": 5.0},
    "awake": {"name": "gdn4"},
}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_generation_and_logits_are_those_of_a_session(wrap, fields):
    """Greedy over three windows; a second call continues the streams of the first."""
    model = new(**fields)
    hf, ids = wrap(model), tokens(2, 20)
    out = hf.generate(ids, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences[:, 20:], greedy(model, ids, 30))
    stats = out.past_key_values.groups[0].session.stats()
    assert (stats.tokens, stats.sleeps) == (49, 0 if model.config.window is None else 3)
    longer = torch.cat([out.sequences, tokens(2, 5, seed=1)], dim=1)
    again = hf.generate(longer, max_new_tokens=20, do_sample=False, past_key_values=out.past_key_values)
    assert torch.equal(again[:, 55:], greedy(model, longer, 20))
    expected = zoo.Session(model, 2).feed(longer)
    for cached in (True, False):
        torch.testing.assert_close(hf(longer, use_cache=cached).logits, expected, atol=1e-5, rtol=0)
        assert hf(longer, use_cache=cached, logits_to_keep=1).logits.shape == (2, 1, 32)


def brute_force(session, logits, count):
    """The likeliest of all continuations, by forks: its log-probability and its tokens."""
    best = (-torch.inf, [])
    for token, logp in enumerate(logits.log_softmax(-1).tolist()):
        fork = session.fork()
        rest, path = brute_force(fork, fork.feed(torch.tensor([[token]]))[0, -1], count - 1) if count > 1 else (0.0, [])
        best = max(best, (logp + rest, [token, *path]))
    return best


def beam_search(model, prompt, count, beams):
    """The best continuations, by forks of a session."""
    session = zoo.Session(model)
    kept = [(0.0, [], session, session.feed(prompt)[0, -1])]
    for _ in range(count):
        scored = [
            (total + logp.item(), [*path, token], session)
            for total, path, session, logits in kept
            for token, logp in enumerate(logits.log_softmax(-1))
        ]
        kept = []
        for total, path, session in sorted(scored, key=lambda one: -one[0])[:beams]:
            fork = session.fork()
            kept.append((total, path, fork, fork.feed(torch.tensor([path[-1:]]))[0, -1]))
    return [(total, path) for total, path, _, _ in kept]


@pytest.mark.parametrize("evict", ["hard", "slide"])
def test_beams_select_the_states_of_their_streams(wrap, evict):
    few = new(f"gdn4-sleep2-{evict}3", vocab_size=4)
    prompt = tokens(1, 5, vocab=4)
    found = wrap(few).generate(prompt, max_new_tokens=4, num_beams=64, do_sample=False, return_dict_in_generate=True, output_scores=True)
    session = zoo.Session(few)
    total, path = brute_force(session, session.feed(prompt)[0, -1], 4)
    assert found.sequences[0, 5:].tolist() == path
    assert found.sequences_scores.item() * 4 == pytest.approx(total, abs=1e-4)

    model = new(f"gdn4-sleep2-{evict}{WINDOW}")
    prompts = [tokens(1, 20, seed=5), tokens(1, 9, seed=6)]
    ids = torch.cat([prompts[0], torch.cat([torch.zeros(1, 11, dtype=torch.int64), prompts[1]], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    found = wrap(model).generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=3, **options)
    expected = [one for prompt in prompts for one in beam_search(model, prompt, 20, 3)]
    assert found.sequences[:, 20:].tolist() == [path for _, path in expected]
    torch.testing.assert_close(found.sequences_scores * 20, torch.tensor([total for total, _ in expected]), atol=1e-3, rtol=0)


LENGTHS = (5, 40, 23, 23)


def padded(rows, side="left"):
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for n, row in enumerate(rows):
        there = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[n, there], mask[n, there] = row, 1
    return ids, mask


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_a_left_padded_batch_equals_its_rows_alone(wrap, fields):
    model = new(**fields)
    hf, rows = wrap(model), [tokens(n, seed=n) for n in LENGTHS]
    ids, mask = padded(rows)
    said = hf.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    assert torch.equal(said[:, 40:], torch.cat([greedy(model, row[None], 30) for row in rows]))
    for cached in (True, False):
        logits = hf(ids, attention_mask=mask, use_cache=cached).logits
        for n, row in enumerate(rows):
            torch.testing.assert_close(logits[n, -len(row) :], zoo.Session(model).feed(row[None])[0], atol=1e-5, rtol=0)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", ["left", "right", "packed"])
@pytest.mark.parametrize("sleep_on", ["every", "unsupervised"])
def test_padded_and_packed_losses_are_those_of_the_documents_alone(wrap, layout, sleep_on):
    documents = [tokens(n, seed=n) for n in LENGTHS]
    apart = new(dtype=torch.float64, sleep_on=sleep_on)
    losses = []
    for row in documents:
        mask = torch.zeros(1, len(row), dtype=torch.bool)
        mask[:, -4:] = True
        losses.append(apart.answers(row[None], mask).losses())
    expected = torch.cat(losses).mean()
    expected.backward()

    together = new(dtype=torch.float64, sleep_on=sleep_on)
    hf = wrap(together)
    if layout == "packed":
        ids, inputs = torch.cat(documents)[None], {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
        labels = torch.cat([torch.cat([torch.full((n - 4,), -100), row[-4:]]) for n, row in zip(LENGTHS, documents, strict=True)])[None]
    else:
        ids, mask = padded(documents, layout)
        inputs = {"attention_mask": mask}
        labels, _ = padded([torch.cat([torch.full((n - 4,), -100), row[-4:]]) for n, row in zip(LENGTHS, documents, strict=True)], layout)
        labels[mask == 0] = -100
    out = hf(ids, labels=labels, **inputs)
    torch.testing.assert_close(out.loss, expected, atol=1e-10, rtol=0)
    out.loss.backward()
    for name, grad in gradients(together).items():
        torch.testing.assert_close(grad, gradients(apart)[name], atol=1e-10, rtol=0)
    if sleep_on == "every":  # then the logits for the loss are those without it
        plain = hf(ids, use_cache=False, **inputs).logits
        there = (labels != -100).roll(-1, dims=1)
        torch.testing.assert_close(out.logits[there], plain[there], atol=1e-10, rtol=0)
        loss = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_packed_documents_are_apart_without_gradients_too(wrap):
    model = new()
    hf, documents = wrap(model), [tokens(n, seed=n) for n in LENGTHS]
    ids, places = torch.cat(documents)[None], torch.cat([torch.arange(n) for n in LENGTHS])[None]
    out = hf(ids, position_ids=places)
    assert out.past_key_values is None
    expected = torch.cat([zoo.Session(model).feed(row[None]) for row in documents], dim=1)
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(zoo.ZooError, match=r"^use_cache: True; the documents that position_ids pack"):
        hf(ids, position_ids=places, use_cache=True)
    assert hf(ids, position_ids=torch.arange(ids.shape[1])[None]).past_key_values is not None


@torch.no_grad()
def test_streams_with_labels_are_refused(wrap):
    hf, ids = wrap(new()), tokens(1, 10)
    streams = hf(ids).past_key_values
    with pytest.raises(zoo.ZooError, match=r"^past_key_values: not with labels"):
        hf(ids, labels=ids, past_key_values=streams)


def test_recomputation_changes_no_gradient(wrap):
    hf, ids = wrap(new(sleep_on="every").train()), tokens(2, 40)

    def step():
        hf.zero_grad()
        loss = hf(ids, labels=ids).loss + hf(ids).logits.logsumexp(-1).mean()
        loss.backward()
        return loss.item(), gradients(hf)

    plain = step()
    hf.activation_checkpointing_enable()
    assert hf.model.gradient_checkpointing
    again = step()
    assert again[0] == plain[0]
    torch.testing.assert_close(again[1], plain[1])


def byte_tokenizer():
    """Bytes as a tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    alphabet = {**{b: chr(b) for b in plain}, **{b: chr(256 + n) for n, b in enumerate(rest)}}
    tokenizer = Tokenizer(models.BPE(vocab={c: b for b, c in alphabet.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0], pad_token=alphabet[0], padding_side="left")


def settings(folder, **more):
    return {
        "output_dir": str(folder), "max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "save_steps": 10, "report_to": [], "use_cpu": True, "disable_tqdm": True, **more,
    }  # fmt: skip


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}], ids=["plain", "accumulated"])
def test_the_trainer_trains_with_sleeps_and_resumes_bit_for_bit(wrap, tmp_path, more):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(40).repeat(64, 1) * 3 + tokens(64, 1)) % 32]
    trainer = Trainer(wrap(new(sleep_on="every")), TrainingArguments(**settings(tmp_path / "run", **more)), train_dataset=rows)
    trainer.train()
    found = losses(trainer)
    assert len(found) == 20
    assert found[-1] < 0.8 * found[0]
    first = next(iter(trainer.get_train_dataloader()))["input_ids"]
    mask = torch.ones_like(first, dtype=torch.bool)
    model = new(sleep_on="every")
    with torch.no_grad():
        assert wrap(model)(first, labels=first).loss.item() == pytest.approx(model.loss(first, mask).item(), abs=1e-6)
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-10")
    again = Trainer(resumed, TrainingArguments(**settings(tmp_path / "again", **more)), train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-10"))
    assert again.state.global_step == 20
    ended = trainer.model.state_dict()
    assert all(torch.equal(tensor, ended[name]) for name, tensor in again.model.state_dict().items())


@pytest.mark.parametrize(("side", "smoothing"), [("right", 0.0), ("right", 0.1), ("left", 0.0)])
def test_the_trainer_evaluates_and_predicts(wrap, tmp_path, side, smoothing):
    """Rows of different lengths."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tokenizer, model = byte_tokenizer(), new(vocab_size=256, sleep_on="every")
    tokenizer.padding_side = side
    texts = [list(b"sleep on it"), list(b"a text that is longer than a window of sixteen tokens")]
    arguments = TrainingArguments(**settings(tmp_path, label_smoothing_factor=smoothing), per_device_eval_batch_size=2)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(wrap(model), arguments, data_collator=collate, eval_dataset=[{"input_ids": text} for text in texts])
    found = trainer.evaluate()["eval_loss"]
    if not smoothing:
        rows = [torch.tensor([text]) for text in texts]
        losses = torch.cat([model.answers(row, torch.ones_like(row)).losses() for row in rows])
        assert found == pytest.approx(losses.mean().item(), abs=1e-5)
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (2, len(texts[1]), 256)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_supervised_fine_tuning_with_trl(wrap, tmp_path, packing):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = [{"prompt": "# " + f"x{n} = {7 * n}; " * (1 + n % 5) + "->", "completion": f" {7 * n}\n"} for n in range(64)]
    options = {"packing": packing, "max_length": 96, "completion_only_loss": True, "bf16": False, "gradient_checkpointing": False}
    model = new(vocab_size=256, sleep_on="every")

    def trainer(hf, folder):
        arguments = SFTConfig(**settings(folder, **options))
        return SFTTrainer(hf, arguments, train_dataset=Dataset.from_list(texts), processing_class=byte_tokenizer())

    one = trainer(wrap(model), tmp_path / "run")
    batch = next(iter(one.get_train_dataloader()))
    with torch.no_grad():
        theirs = one.compute_loss(one.model, dict(batch)).item()
        ids, place = _streams(batch)
        mask = (batch["labels"].flatten()[place.clamp(min=0)] != -100) & (place >= 0)
        mask[:, 0] = False
        assert theirs == pytest.approx(model.loss(ids, mask).item(), abs=1e-5)
    one.train()
    found = losses(one)
    assert len(found) == 20
    assert found[-1] < 0.8 * found[0]
    again = trainer(wrap(new(vocab_size=256, sleep_on="every")), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-10"))
    ended = one.model.state_dict()
    assert all(torch.equal(tensor, ended[name]) for name, tensor in again.model.state_dict().items())


def _streams(batch):
    """The documents of a batch, one a row: of a padded one, or of a packed one."""
    ids = batch["input_ids"]
    number = torch.arange(ids.numel()).view_as(ids)
    if "attention_mask" in batch:
        documents = [row[mask.bool()] for row, mask in zip(number, batch["attention_mask"], strict=True)]
    else:
        starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), ids.numel()]
        documents = [number[0, a:b] for a, b in itertools.pairwise(starts)]
    place = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=-1)
    return ids.flatten()[place.clamp(min=0)], place


CODE = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.tensor([[1, 2, 3, 4, 5] * 5])
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert any(name.startswith("transformers_modules.") for name in sys.modules)
    with torch.no_grad():
        torch.save([model(ids).logits, model.generate(ids, max_new_tokens=20, do_sample=False)], folder + "/said.pt")
"""


def test_a_saved_model_is_the_same_bit_for_bit(wrap, tmp_path):
    """Through the Auto classes, by the code in the folder, and back."""
    from transformers import AutoModel, AutoModelForCausalLM

    ids, expected, folders = torch.tensor([[1, 2, 3, 4, 5] * 5]), [], []
    for dtype in ("float32", "bfloat16"):
        model, folder = new(dtype=dtype, layers="attn gdn mamba2", tie_embeddings=True), tmp_path / dtype
        model.companions = {"tokenizer.json": b"{}", "generation_config.json": json.dumps({"eos_token_id": 7}).encode()}
        hf = wrap(model)
        assert hf.generation_config.eos_token_id == 7
        hf.save_pretrained(folder)
        assert (folder / "tokenizer.json").read_bytes() == b"{}"
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        weights, right = loaded.zoo.state_dict(), model.state_dict()
        assert {name: tensor.dtype for name, tensor in weights.items()} == {name: tensor.dtype for name, tensor in right.items()}
        assert all(torch.equal(tensor, weights[name]) for name, tensor in right.items())
        assert loaded.generation_config.eos_token_id == 7
        with torch.no_grad():
            folders.append(str(folder))
            expected.append([hf(ids).logits, hf.generate(ids, max_new_tokens=20, do_sample=False)])
            assert torch.equal(loaded(ids).logits, expected[-1][0])
            body = AutoModel.from_pretrained(folder)
            torch.testing.assert_close(model.head(body(ids).last_hidden_state), expected[-1][0])
        zoo.save(loaded.zoo, tmp_path / f"back-{dtype}")
        assert torch.equal(greedy(zoo.load(tmp_path / f"back-{dtype}"), ids, 5), greedy(model, ids, 5))
        assert (tmp_path / f"back-{dtype}/tokenizer.json").exists()

    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", CODE, *folders], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for folder, outputs in zip(folders, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(torch.load(f"{folder}/said.pt"), outputs, strict=True))


def test_another_number_of_passes_and_fresh_weights(wrap, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = new()
    wrap(model).save_pretrained(tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    config.zoo["loops"] = 4
    deeper, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", config=config), tokens(1, 20)
    assert torch.equal(deeper.generate(ids, max_new_tokens=30, do_sample=False)[:, 20:], greedy(new("gdn4-sleep4-hard16"), ids, 30))
    fresh = AutoModelForCausalLM.from_config(config)
    weights, same = fresh.zoo.state_dict(), zoo.create(fresh.zoo.config, seed=0).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights.items())


def test_a_label_that_nothing_predicts_has_no_loss(wrap):
    """The first token of a window that follows a sleep."""
    ids = tokens(2, WINDOW + 1)
    labels = torch.full_like(ids, -100)
    labels[:, WINDOW] = ids[:, WINDOW]
    assert wrap(new())(ids, labels=labels).loss.item() == 0


def test_bad_inputs_are_refused_in_one_line(wrap, tmp_path):
    import peft
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, DynamicCache

    from zoo.integrations.transformers import SleepZooConfig, SleepZooForCausalLM, Streams

    hf, inside = wrap(new()), new()
    hf.save_pretrained(tmp_path / "saved")
    peft.get_peft_model(inside, peft.LoraConfig(r=2, target_modules=r".*_proj"))
    adapted = wrap(inside)
    ids, mask = padded([tokens(n) for n in (5, 9)], "right")
    holes = torch.ones_like(ids)
    holes[0, 3] = 0
    streams = hf(ids[:, :4], use_cache=True).past_key_values
    for message, call in {
        "attention_mask: padding that is not on the left": lambda: hf.generate(ids, attention_mask=mask, max_new_tokens=2),
        "attention_mask: padding between tokens": lambda: hf(ids, attention_mask=holes, labels=ids),
        "input_ids: 1 row for 2 streams": lambda: hf(ids[:1], past_key_values=streams),
        "attention_mask: pads tokens that continue streams": lambda: hf(ids, attention_mask=mask.flip(1), past_key_values=streams),
        r"vocab_size: 32": lambda: hf.resize_token_embeddings(40),
        "past_key_values: DynamicCache; want the Streams": lambda: hf.generate(ids, past_key_values=DynamicCache(), max_new_tokens=2),
        "inputs_embeds: is not supported": lambda: hf.generate(inputs_embeds=torch.zeros(1, 4, 16), max_new_tokens=2),
        "output_hidden_states: is not supported": lambda: hf(ids, output_hidden_states=True),
        "output_attentions: is not supported": lambda: hf.generate(
            ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2
        ),
        "interval: 0": lambda: Streams(hf.zoo, when="interval(0)"),
        "config: zoo: is missing; want a folder that save_pretrained wrote": lambda: SleepZooForCausalLM(SleepZooConfig()),
        r"tensor 'blocks.0.mixer.k_proj.weight' is missing in the model": lambda: adapted.save_pretrained(tmp_path / "adapted"),
        "save_pretrained wrote it": lambda: zoo.load(tmp_path / "saved"),
    }.items():
        with pytest.raises(zoo.ZooError, match=message):
            call()
    assert hf(ids, labels=torch.full_like(ids, -100)).loss.item() == 0
    file = tmp_path / "saved/model.safetensors"
    tensors = load_file(file)
    del tensors["model.inner.head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(zoo.ZooError, match=r"tensor 'head.weight' is missing in the folder \(1 such"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zoo.save(new(vocab_size=256), "model")
    names = {}
    for example in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE):
        exec(example, names)
    assert names["tokens"].shape == (1, 56)
    assert names["deeper"].zoo.config.loops == 4
    assert zoo.load("back").config.loops == zoo.load("merged").config.loops == 2


def test_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import zoo.integrations.transformers"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].endswith("ZooError: transformers: not installed; pip install 'sleep-zoo[integrations]'")
