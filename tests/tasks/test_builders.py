"""Scores of the task builders against plain computations with transformers."""

import json
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import bmm.tasks.likelihood
import bmm.tasks.rows  # noqa: F401
from bmm import tasks
from bmm.errors import RecipeError
from bmm.evaluation import score_tasks
from bmm.grams import collect
from tests.families import KINDS
from tests.tasks.words import save_tokenizer


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def model(name, seed=0, **settings):
    torch.manual_seed(seed)
    kind = KINDS[name]
    config = getattr(transformers, kind.config)(**kind.settings | settings)
    return getattr(transformers, kind.model)(config).eval()


def score(task, net):
    return score_tasks(net, {}, [task])[0]


QUESTIONS = [
    {"question": "the sky is", "options": ["blue", "red cat", "a dog"], "answer": 0},
    {"question": "a cat", "options": ["is good", "film"], "answer": "film"},
    {"question": "the", "options": ["dog is red", "sky", "photo of the dog"], "answer": 2},
]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_multiple_choice(name, normalise, tmp_path):
    words = save_tokenizer(tmp_path, end=name == "t5")
    net, splits = model(name), tasks.Splits(jsonl(tmp_path / "d.jsonl", QUESTIONS), train=tmp_path / "d.jsonl")
    task = tasks.multiple_choice("q", splits, tokenizer=tmp_path, normalise=normalise, seq2seq=name == "t5")
    (inputs, targets), right = task.validation, 0
    with torch.no_grad():
        found = task.forward(net, inputs)
    for row, text in enumerate(inputs["input_ids"][:, 0]):
        question = QUESTIONS[tasks.rows.drawn(3, None)[row]]
        prompt = words(question["question"])["input_ids"]
        assert prompt == text.tolist()[: len(prompt)]
        expected = []
        for option in question["options"]:
            after = words(option)["input_ids"]
            with torch.no_grad():
                if name == "t5":
                    out = net(input_ids=torch.tensor([prompt]), labels=torch.tensor([after])).logits[0]
                else:
                    out = net(input_ids=torch.tensor([prompt + after])).logits[0, len(prompt) - 1 : -1]
            each = out.log_softmax(-1)[torch.arange(len(after)), torch.tensor(after)]
            expected.append(float(each.mean() if normalise else each.sum()))
        torch.testing.assert_close(found[row, : len(expected)], torch.tensor(expected), rtol=1e-4, atol=1e-4)
        answer = (
            question["answer"] if isinstance(question["answer"], int) else question["options"].index(question["answer"])
        )
        assert int(targets[row]) == answer
        right += expected.index(max(expected)) == answer
    assert score(task, net).value == pytest.approx(right / 3)
    calibration = next(task.calibration_batches())
    assert calibration["input_ids"].shape[:2] == (3, 1)  # the right answer alone
    with torch.no_grad():
        assert task.forward(net, calibration).shape == (3, 1)
    grams = collect(net, task.forward, [calibration])
    tokens = {int(calibration[k].sum()) for k in ("attention_mask", "decoder_attention_mask") if k in calibration}
    assert {grams.count[k] for k in grams.grams} == tokens  # of prompt and answer, and no padding


def test_an_option_tokenises_as_in_its_text(tmp_path):
    words = save_tokenizer(tmp_path)
    assert tasks.likelihood.pair(words, "the sky is", " blue", 10) == (
        words("the sky is")["input_ids"], words("blue")["input_ids"])  # fmt: skip
    assert tasks.likelihood.pair(words, "the sky is", " blue", 3)[0] == words("sky is")["input_ids"]
    assert tasks.likelihood.pair(words, "", "blue", 9)[0] == [words.bos_token_id]
    with pytest.raises(RecipeError, match="no tokens"):
        tasks.likelihood.pair(words, "the", "", 9)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_perplexity(name, tmp_path):
    words = save_tokenizer(tmp_path)
    texts = ["the sky is blue", "a cat", "photo of a red dog is good", "film"]
    splits = tasks.Splits(jsonl(tmp_path / "d.jsonl", [{"text": t} for t in texts]))
    task, net = tasks.perplexity("p", splits, tokenizer=tmp_path, max_tokens=4), model(name)
    expected = []
    for text in texts:
        tokens = words(text)["input_ids"]
        for start in range(0, len(tokens), 4):
            window = torch.tensor([tokens[start : start + 4]])
            if window.shape[1] > 1:
                with torch.no_grad():
                    loss = net(input_ids=window, labels=window).loss  # mean negative log-likelihood
                expected.append(float((-loss).exp()))
    assert len(expected) == 4  # the word alone predicts nothing
    found = score(task, net)
    assert found.value == pytest.approx(sum(expected) / 4, rel=1e-4)
    assert found.n == 4


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_exact_match(name, tmp_path):
    words = save_tokenizer(tmp_path, end=name == "t5")
    net = model(name, seed=2 if name == "t5" else 0)
    prompts = ["the sky is", "cat", "a photo of the dog"]

    def write(prompt):
        ids = torch.tensor([words(prompt)["input_ids"]])
        with torch.no_grad():
            out = [0] if name == "t5" else ids[0].tolist()
            for _ in range(4):
                decoder = torch.tensor([out])
                batch = {"input_ids": ids, "decoder_input_ids": decoder} if name == "t5" else {"input_ids": decoder}
                out.append(int(net(**batch).logits[0, -1].argmax()))
                if out[-1] == 2:
                    break
        return words.decode(out[1 if name == "t5" else len(ids[0]) :], skip_special_tokens=True)

    written = [write(p) for p in prompts]
    rows = [{"question": prompts[0], "answer": [written[0].upper() + ".", "zebra"]},
            {"question": prompts[1], "answer": "zebra"}, {"question": prompts[2], "answer": written[2]}]  # fmt: skip
    splits = tasks.Splits(jsonl(tmp_path / "d.jsonl", rows), train=tmp_path / "d.jsonl", test=tmp_path / "d.jsonl")
    options = {"tokenizer": tmp_path, "seq2seq": name == "t5", "max_new_tokens": 4}
    task = tasks.exact_match("x", splits, **options)
    assert all(written)
    assert score(task, net).value == pytest.approx(2 / 3)
    first = tasks.exact_match("x", splits, pattern=r"^\s*(\S+)", **options)
    assert first.score.extract("  Cat. and dog") == "cat"
    assert first.score.extract("") == "\0"
    with torch.no_grad():
        batch = next(task.calibration_batches())
        assert task.forward(net, batch).dim() == 3
        pairs = list(task.labelled_calibration())
        assert bool(torch.isfinite(task.log_likelihood(task.forward(net, pairs[0][0]), pairs[0][1])).all())
    with pytest.raises(RecipeError, match="regular expression"):
        tasks.exact_match("x", splits, pattern="(", **options)


SENTENCES = [
    {"text": t, "label": n} for t, n in (("good film", 1), ("bad film is", 0), ("the sky is good ?", 1), ("red", 0))
]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_text_classification_with_the_experts_own_head(name, tmp_path):
    words = save_tokenizer(tmp_path)
    splits = tasks.Splits(jsonl(tmp_path / "d.jsonl", SENTENCES))
    expert = model(name, seed=3)
    expert.save_pretrained(tmp_path / "expert")
    batch = words([s["text"] for s in SENTENCES], padding=True, return_tensors="pt")
    labels = torch.tensor([s["label"] for s in SENTENCES])
    with torch.no_grad():
        right = expert(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits.argmax(-1) == labels
    own = tasks.text_classification("t", splits, tokenizer=tmp_path, labels=2)
    assert score(own, expert).value == pytest.approx(float(right.float().mean()))
    merged = model(name, seed=3)
    for parameter in merged.classifier.parameters():
        parameter.data.fill_(float("nan"))
    head = tasks.load_head(tmp_path / "expert")
    assert all(n.startswith("classifier.") for n in head.modules)
    assert head.classes == 2
    with_head = tasks.text_classification("t", splits, tokenizer=tmp_path, head=head)
    assert score(with_head, merged).value == score(own, expert).value
    with pytest.raises(RecipeError, match="not merged"):
        score(own, merged)
    assert with_head.forward.cache_key != own.forward.cache_key


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_linear_heads_read_the_tokens_they_are_told_to(pooling, tmp_path):
    save_tokenizer(tmp_path)
    net = model("bert", seed=3)
    save_file({"weight": torch.randn(2, 16), "bias": torch.randn(2)}, tmp_path / "head.safetensors")
    head = tasks.load_head(tmp_path / "head.safetensors")
    splits = tasks.Splits(jsonl(tmp_path / "d.jsonl", SENTENCES))
    made = {"tokenizer": tmp_path, "head": head}
    task = tasks.text_classification("t", splits, pooling=pooling, **made)
    with torch.no_grad():
        batch = task.validation[0]
        logits = task.forward(net, batch)
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], logits, strict=True):
            hidden = net.bert(ids[mask.bool()][None]).last_hidden_state[0]  # by itself, nothing is padded
            seen = hidden[0] if pooling == "first" else hidden.mean(0)
            torch.testing.assert_close(row, head.logits(seen), rtol=1e-4, atol=1e-5)
    assert task.forward.cache_key != tasks.text_classification("t", splits, **made).forward.cache_key
    with pytest.raises(RecipeError, match="for a linear head"):
        tasks.text_classification("t", splits, tokenizer=tmp_path, pooling=pooling, labels=2)
    with pytest.raises(RecipeError, match="no 'median'"):
        tasks.text_classification("t", splits, pooling="median", **made)


def pictures(folder, size=12):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for n in range(3):
            Image.fromarray(generator.integers(0, 255, (size, size + 4, 3), dtype=np.uint8)).save(
                folder / name / f"{n}.png"
            )
    return folder


def test_zero_shot_heads_are_clips_own(tmp_path):
    net = model("clip")
    net.save_pretrained(tmp_path)
    words = save_tokenizer(tmp_path, end=True)
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(
        tmp_path
    )
    head = tasks.zero_shot(tmp_path, ["cat", "dog"])
    splits = tasks.Splits(pictures(tmp_path / "images"))
    task = tasks.image_classification("i", splits, processor=tmp_path, head=head, classes=["cat", "dog"])
    inputs, targets = task.validation
    text = words([f"a photo of a {c}." for c in ("cat", "dog")], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = net(**inputs, input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits_per_image
        torch.testing.assert_close(task.forward(net, inputs), expected, rtol=1e-4, atol=1e-4)
        tower = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path, projection_dim=8).eval()
        torch.testing.assert_close(task.forward(tower, inputs), expected, rtol=1e-4, atol=1e-4)
    assert sorted(targets.tolist()) == [0, 0, 0, 1, 1, 1]
    assert inputs["pixel_values"].shape == (6, 3, 8, 8)
    with pytest.raises(RecipeError, match="place for the class"):
        tasks.zero_shot(tmp_path, ["cat"], ["a photo"])
    with pytest.raises(RecipeError, match="class names for a head of 2"):
        tasks.image_classification("i", splits, processor=tmp_path, head=head, classes=["cat", "dog", "sky"])


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip_vision", "siglip_vision"])
def test_linear_heads_on_every_vision_tower(name, tmp_path):
    net = model(name)
    width = {"clip_vision": 8}.get(name, 16)
    save_file({"weight": torch.randn(2, width), "bias": torch.randn(2)}, tmp_path / "head.safetensors")
    head = tasks.load_head(tmp_path / "head.safetensors")
    splits = tasks.Splits(pictures(tmp_path / "images"))
    task = tasks.image_classification("i", splits, image_size=8, head=head)
    with torch.no_grad():
        logits = task.forward(net, task.validation[0])
        out = (
            getattr(net, net.base_model_prefix, net)(**task.validation[0])
            if name in ("vit", "dinov2")
            else net(**task.validation[0])
        )
        seen = next(
            getattr(out, k)
            for k in ("image_embeds", "pooler_output", "last_hidden_state")
            if getattr(out, k, None) is not None
        )
        seen = seen[:, 0] if seen.dim() == 3 else seen
        torch.testing.assert_close(logits, seen @ head.linear["weight"].T + head.linear["bias"], rtol=1e-4, atol=1e-5)
    save_file({"weight": torch.randn(2, 5)}, tmp_path / "wrong.safetensors")
    wrong = tasks.image_classification("i", splits, image_size=8, head=tasks.load_head(tmp_path / "wrong.safetensors"))
    with pytest.raises(RecipeError, match="takes 5 features"):
        score(wrong, net)


def test_pixels_from_arrays_bytes_and_processors(tmp_path):
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 255, (5, 8, 8, 3), dtype=np.uint8)
    ready = generator.standard_normal((5, 3, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "raw.npz", image=raw, label=np.arange(5) % 2)
    np.savez(tmp_path / "ready.npz", image=ready, label=np.arange(5) % 2)
    order = tasks.rows.drawn(5, None)
    plain = tasks.image_classification("i", tasks.Splits(tmp_path / "raw.npz"), image_size=8, labels=2)
    scaled = torch.from_numpy(raw[order]).permute(0, 3, 1, 2) / 255 * 2 - 1
    torch.testing.assert_close(plain.validation[0]["pixel_values"], scaled)
    kept = tasks.image_classification("i", tasks.Splits(tmp_path / "ready.npz"), labels=2)
    assert torch.equal(kept.validation[0]["pixel_values"], torch.from_numpy(ready[order]))
    with pytest.raises(RecipeError, match="no image processor"):
        tasks.image_classification("i", tasks.Splits(tmp_path / "raw.npz"), labels=2)
    with pytest.raises(RecipeError, match="preprocessor_config"):
        tasks.image_classification("i", tasks.Splits(tmp_path / "raw.npz"), processor=tmp_path, labels=2)
    with pytest.raises(RecipeError, match=r"task 'i', validation: .*row \d: label 1 is outside"):
        tasks.image_classification("i", tasks.Splits(tmp_path / "raw.npz"), image_size=8, labels=1)
    (tmp_path / "bad" / "cat").mkdir(parents=True)
    (tmp_path / "bad" / "cat" / "x.png").write_text("no picture")
    with pytest.raises(RecipeError, match=r"cat/x\.png: no image"):
        tasks.image_classification("i", tasks.Splits(tmp_path / "bad"), image_size=8)


def test_function_tasks():
    net = torch.nn.Linear(2, 2)
    task = tasks.function_task("f", lambda m: float(m.weight.sum()), lambda m: 2.0)
    assert score_tasks(net, {"weight": torch.ones(2, 2)}, [task])[0].value == 4.0
    assert score_tasks(net, {}, [task], "test")[0].value == 2.0
    with pytest.raises(RecipeError, match="returned nan"):
        score_tasks(net, {}, [tasks.function_task("f", lambda m: float("nan"))])


def test_the_harness_is_an_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match="need lm-evaluation-harness") as caught:
        tasks.harness_task("h", ["arc_easy"], tmp_path, include=tmp_path)
    assert "bmm-tuner[lm-eval]" in caught.value.hint
    with pytest.raises(RecipeError, match="overlap"):
        tasks.harness_task("h", ["a"], tmp_path, validation=(0, 5), test=(4, 9))
