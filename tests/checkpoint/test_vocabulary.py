"""Experts with other tokens than the base: aligned by token, refused by name, written with a tokenizer that fits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import bmm
from bmm.checkpoint import ModelPool, open_checkpoint
from bmm.errors import CheckpointError, RecipeError, WriteError

WIDTH = 3
WORDS = ["<unk>", "a", "b", "c", "d"]
EMBEDDING, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"


def row(word, offset=0.0):
    """The embedding that all models of these tests give a word, up to ``offset``."""
    return torch.tensor([float(sum(map(ord, word))), float(len(word)), 1.0]) + offset


def rows(words, padding, offset=0.0):
    return torch.stack([*(row(w, offset) for w in words), *(torch.full((WIDTH,), -9.0) for _ in range(padding))])


def write(folder, added=(), padding=0, offset=0.0, words=WORDS, files=("tokenizer.json",), tied=False):
    """A folder of a small language model: words of the tokenizer's model, added tokens, rows without a token."""
    folder.mkdir()
    table = rows([*words, *added], padding, offset)
    tensors = {EMBEDDING: table, "model.norm.weight": torch.ones(WIDTH) + offset}
    if not tied:
        tensors |= {HEAD: 2 * table, BIAS: table[:, 0].clone(), "final_logits_bias": table[:, :1].mT.contiguous()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "x", "vocab_size": len(table), "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    entries = [{"id": len(words) + k, "content": t, "special": True} for k, t in enumerate(added)]
    vocabulary = {w: k for k, w in enumerate(words)}
    texts = {
        "tokenizer.json": {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": entries},
        "vocab.json": vocabulary,
        "added_tokens.json": {e["content"]: e["id"] for e in entries},
    }
    for name in files:
        (folder / name).write_text("\n".join(words) if name == "vocab.txt" else json.dumps(texts[name]))
    return folder


def merge(base, *experts, **keys):
    named = {e.name: str(e) for e in experts}
    return bmm.merge({"base": str(base), "experts": named}, **({"anchor": "average"} | keys))


def test_the_default_names_every_token_that_differs(tmp_path):
    base = write(tmp_path / "base")
    expert = write(tmp_path / "e", added=["<x>", "<y>"])
    with pytest.raises(
        CheckpointError, match=r"expert 'e' .*2 tokens the base lacks: '<x>' \(row 5\), '<y>' \(row 6\)"
    ):
        ModelPool.open(base, [expert])
    swapped = write(tmp_path / "s", words=["<unk>", "b", "a", "c", "e"])
    with pytest.raises(CheckpointError) as caught:
        ModelPool.open(base, [swapped])
    assert "1 tokens the base lacks: 'e' (row 4)" in caught.value.message
    assert "1 tokens it lacks: 'd' (row 4)" in caught.value.message
    assert "2 tokens in another row: 'b' (row 2, there 1), 'a' (row 1, there 2)" in caught.value.message
    assert "vocabulary: base" in caught.value.hint


@pytest.mark.parametrize(
    "files", [("tokenizer.json",), ("vocab.json", "added_tokens.json"), ("vocab.txt", "added_tokens.json")]
)
def test_base_keeps_the_base_s_tokens_by_token(tmp_path, files):
    base = write(tmp_path / "base", padding=2, files=files)
    more = write(tmp_path / "e", added=["<x>"], padding=4, offset=1.0, files=files)
    moved = write(tmp_path / "m", words=["d", "c", "b", "a", "<unk>"], offset=3.0, files=files)
    merged = merge(base, more, moved, vocabulary="base")
    expected = torch.cat([rows(WORDS, 0, 2.0), rows([], 2)]) if files else None
    assert torch.equal(merged[EMBEDDING], expected)
    assert torch.equal(merged[HEAD], 2 * expected)
    assert torch.equal(merged[BIAS], expected[:, 0])
    assert torch.equal(merged["final_logits_bias"], expected[:, :1].mT)
    assert torch.equal(merged["model.norm.weight"], torch.full((WIDTH,), 3.0))


@pytest.mark.parametrize("anchor", ["average", "ties", "task_arithmetic"])
def test_union_takes_in_tokens_and_a_token_of_one_expert_stays_its(tmp_path, anchor):
    base = write(tmp_path / "base", padding=1)
    one = write(tmp_path / "one", added=["<x>", "<both>"], offset=1.0)
    two = write(tmp_path / "two", added=["<both>", "<z>"], padding=3, offset=3.0)
    plain = write(tmp_path / "plain", padding=1, offset=2.0)
    out = bmm.merge({"base": str(base), "experts": {e.name: str(e) for e in (one, two, plain)}, "anchor": anchor},
                    vocabulary="union", out=tmp_path / "out")  # fmt: skip
    merged = load_file(out / "model.safetensors")
    tokens = [*WORDS, "<x>", "<both>", "<z>"]
    assert merged[EMBEDDING].shape == merged[HEAD].shape == (8, WIDTH)
    assert torch.equal(merged[EMBEDDING][5], row("<x>", 1.0))
    assert torch.equal(merged[EMBEDDING][7], row("<z>", 3.0))
    assert torch.equal(merged[HEAD][7], 2 * row("<z>", 3.0))
    if anchor == "average":
        assert torch.equal(merged[EMBEDDING][:5], rows(WORDS, 0, 2.0))
        assert torch.equal(merged[EMBEDDING][6], row("<both>", 2.0))
        assert torch.equal(merged[BIAS], merged[EMBEDDING][:, 0])
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    known = tokenizer["model"]["vocab"] | {e["content"]: e["id"] for e in tokenizer["added_tokens"]}
    assert [known[t] for t in tokens] == list(range(8))
    assert tokenizer["added_tokens"][0]["special"] is True
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 8


def test_union_of_a_tied_weight_stored_once(tmp_path):
    base = write(tmp_path / "base", tied=True)
    expert = write(tmp_path / "e", added=["<x>"], offset=1.0, tied=True)
    merged = merge(base, expert, vocabulary="union")
    assert torch.equal(merged[EMBEDDING], rows([*WORDS, "<x>"], 0, 1.0))
    assert HEAD not in merged


def test_tokens_of_a_tokenizer_s_own_model_are_not_taken_in(tmp_path):
    base, expert = write(tmp_path / "base"), write(tmp_path / "e", words=[*WORDS, "ab"])
    with pytest.raises(CheckpointError, match="1 tokens of the tokenizer's own model are not in the base: 'ab'"):
        ModelPool.open(base, [expert], vocabulary="union")


def test_a_base_whose_tokens_lie_beyond_its_rows_takes_in_none(tmp_path):
    """New rows come after the base's last token: one in row 2 000 000 000 would ask for as many."""
    base, expert = write(tmp_path / "base"), write(tmp_path / "e", added=["<x>"])
    raw = json.loads((base / "tokenizer.json").read_text())
    raw["added_tokens"] = [{"id": 2 * 10**9, "content": "<far>"}]
    (base / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="a token in row 2000000000, its embedding 5 rows"):
        ModelPool.open(base, [expert], vocabulary="union")


def test_padding_alone_is_no_difference(tmp_path):
    base, expert = write(tmp_path / "base", padding=1), write(tmp_path / "e", padding=4, offset=2.0)
    pool = ModelPool.open(base, [expert])
    assert len(pool.notices) == 1
    assert "9 rows of embeddings for 6; only padding differs" in pool.notices[0]
    assert torch.equal(pool.experts[0][EMBEDDING], torch.cat([rows(WORDS, 0, 2.0), rows([], 1)]))


def test_without_tokenizers_rows_are_counted_and_refused(tmp_path):
    base, expert = write(tmp_path / "base", files=()), write(tmp_path / "e", added=["<x>"])
    for how in ("refuse", "base", "union"):
        with pytest.raises(CheckpointError, match=r"6 rows of embeddings, the base 5 .* the base has no tokenizer"):
            ModelPool.open(base, [expert], vocabulary=how)
    with pytest.raises(CheckpointError, match="rows cannot pair them"):
        ModelPool.open(base, [expert], vocabulary="rows")


def test_rows_goes_by_number_whatever_the_tokens(tmp_path):
    base = write(tmp_path / "base")
    renamed = write(tmp_path / "r", words=["<unk>", "a", "b", "c", "<new>"])
    merged = merge(base, renamed, vocabulary="rows")
    assert torch.equal(merged[EMBEDDING][4], row("<new>"))
    with pytest.raises(CheckpointError, match="1 tokens the base lacks: '<new>'"):
        ModelPool.open(base, [renamed])
    assert torch.equal(merge(base, renamed, vocabulary="base")[EMBEDDING], rows(WORDS, 0))


def test_pieces_and_fingerprints_of_aligned_tensors(tmp_path):
    base = write(tmp_path / "base", padding=1)
    expert = write(tmp_path / "e", added=["<x>"], words=["d", "c", "b", "a", "<unk>"], offset=1.0)
    prints = set()
    for how in ("base", "union"):
        pool = ModelPool.open(base, [expert], vocabulary=how)
        prints.add(pool.fingerprint())
        assert pool.fingerprint() == ModelPool.open(base, [expert], vocabulary=how).fingerprint()
        for source in (pool.base, *pool.experts):
            for name in source.names:
                whole = source[name].flatten()
                pieces = [source.piece(name, k, min(k + 4, len(whole))) for k in range(0, len(whole), 4)]
                assert torch.equal(torch.cat(pieces), whole)
    assert len(prints) == 2


def test_a_damaged_tokenizer_is_an_error(tmp_path):
    base, expert = write(tmp_path / "base"), write(tmp_path / "e", added=["<x>"])
    (expert / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 0}}}))
    with pytest.raises(CheckpointError, match="two tokens the same row"):
        ModelPool.open(base, [expert])
    (expert / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no vocabulary"):
        ModelPool.open(base, [expert])
    assert open_checkpoint(expert).names  # alone it opens: only a merge needs the tokens


def test_what_cannot_go_with_new_tokens_is_refused(tmp_path):
    base, expert = write(tmp_path / "base"), write(tmp_path / "e", added=["<x>"], offset=1.0)
    with pytest.raises(WriteError, match="an adapter adds no rows"):
        merge(base, expert, vocabulary="union", adapter_rank=2, out=tmp_path / "out")
    for keys in ({"vocabulary": "union"}, {"heads": "keep"}):
        with pytest.raises(RecipeError, match="does not go with masks"):
            merge(base, expert, anchor="emr", masks=True, out=tmp_path / "out", **keys)


def test_other_sentencepiece_models_are_refused_where_no_file_tells_the_tokens(tmp_path):
    base, expert = write(tmp_path / "base", files=()), write(tmp_path / "e", files=())
    for folder, content in ((base, b"one"), (expert, b"another")):
        (folder / "tokenizer.model").write_bytes(content)
    for how in ("refuse", "base", "union"):
        with pytest.raises(CheckpointError, match=r"expert 'e' .*tokenizer\.model is not the base's"):
            ModelPool.open(base, [expert], vocabulary=how)
    ModelPool.open(base, [expert], vocabulary="rows")
    (expert / "tokenizer.model").write_bytes(b"one")
    ModelPool.open(base, [expert])


def test_a_token_beyond_the_rows_of_both_is_no_difference(tmp_path):
    base, expert = write(tmp_path / "base"), write(tmp_path / "e")
    for folder, version in ((base, "1"), (expert, "2")):
        raw = json.loads((folder / "tokenizer.json").read_text())
        raw |= {"version": version, "added_tokens": [{"id": 9, "content": "<far>"}]}
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert ModelPool.open(base, [expert]).notices == []
