"""Every model family of transformers: merged plainly, without data and with data, written and loaded back."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bmm
from bmm.api import make_recipe
from bmm.evaluation import own_names, swapped
from bmm.evaluation.experts import SeparateExperts
from bmm.grams import collect
from bmm.groups import relative_depths, roles_of
from bmm.layouts import matrix_layouts
from bmm.run import Run
from tests.families import KINDS, last, outputs, quiet, save

QUICK = ("clip_vision", "bert", "t5", "gpt2", "qwen2", "mixtral")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, tmp_path):
    kind = KINDS[name]
    keys, batch = save(name, tmp_path), kind.batch()
    tasks = [bmm.Task(t, validation=batch, calibration=batch, forward=last) for t in ("a", "b")]
    keys |= {"score_by": "agreement", "groups": "role", "anchor": "task_arithmetic"}
    run = Run(make_recipe(keys), tasks=tasks)
    grams = run.collect_grams()
    assert {roles_of(g.key_of)[n] for g in grams for n in g.key_of} >= kind.roles
    merges = {
        "plain": {},
        "datafree": {"lam": 0.1, "grams": "datafree"},
        "data": {"lam": 0.1, "grams": "data", "tasks": tasks},
    }
    seen = {}
    for how, options in merges.items():
        folder = bmm.merge(keys, out=tmp_path / how, **options)
        loaded = quiet(lambda folder=folder: getattr(transformers, kind.model).from_pretrained(folder).eval())
        with torch.no_grad():
            seen[how] = outputs(loaded, batch)
        tensors = bmm.merge(keys, **options)
        functional = run.outputs(tensors, run.tasks[0], [(batch, None)])[0]
        assert torch.isfinite(seen[how]).all()
        with torch.no_grad():
            torch.testing.assert_close(last(loaded, batch), functional, rtol=1e-4, atol=1e-5)
        state = loaded.state_dict()
        assert len({state[n].data_ptr() for n in kind.tied}) == bool(kind.tied)
    assert not torch.allclose(seen["plain"], seen["datafree"], atol=1e-6)
    assert not torch.allclose(seen["plain"], seen["data"], atol=1e-6)
    assert not torch.allclose(seen["datafree"], seen["data"], atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_solved_without_data_is_what_data_would_solve(name, tmp_path):
    """Embeddings, and what is tied to them, are no matrices of a regression; the layouts agree with the model's."""
    run = Run(make_recipe(save(name, tmp_path)), tasks=None, need_tasks=False)
    free = matrix_layouts(run.pool, None)
    skeleton = run.skeleton
    with swapped(skeleton, run._renamed(run.pool.base)):
        names = own_names(skeleton, run.pool.names, run._in_model)
        found = collect(skeleton, last, [KINDS[name].batch()], names=names)
    seen = found.renamed(run._stored).layout
    only_free = {n for n in free if n not in seen}
    assert set(seen) <= set(free)
    assert {n: free[n] for n in seen} == seen
    # SigLIP's pooling attends from a probe; a batch leaves BertForMaskedLM's and some experts' weights unread
    assert {roles_of(free)[n] for n in only_free} <= {"qkv", "gate", "up", "down", "pooler.dense"}
    assert not any("embed" in n and "patch" not in n for n in free)


def test_depths_of_an_encoder_and_its_decoder(tmp_path):
    run = Run(make_recipe(save("t5", tmp_path)), need_tasks=False)
    depth = relative_depths(run.pool.names)
    assert depth["encoder.block.1.layer.0.SelfAttention.q.weight"] == pytest.approx(1 / 3)
    assert depth["decoder.block.0.layer.1.EncDecAttention.q.weight"] == pytest.approx(2 / 3)
    assert depth["shared.weight"] == 0


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "qwen2_moe"])
def test_padding_stays_out_of_the_grams(name, tmp_path):
    """The same Grams whether a sentence comes padded or alone; a mixture's routed tokens included."""
    kind = KINDS[name]
    run = Run(make_recipe(save(name, tmp_path)), need_tasks=False)
    batch = kind.batch(4)
    lengths = batch["attention_mask"].sum(1).tolist()
    others = batch.get("decoder_attention_mask", batch["attention_mask"]).sum(1).tolist()

    def alone(n):
        own = {k: lengths[n] if "decoder" not in k else others[n] for k in batch}
        return {k: v[n : n + 1, : own[k]] for k, v in batch.items()}

    with swapped(run.skeleton, run._renamed(run.pool.experts[0])):
        padded = collect(run.skeleton, outputs, [batch], norms=True)
        single = collect(run.skeleton, outputs, [alone(n) for n in range(4)], norms=True)
    assert set(padded.key_of) == set(single.key_of)
    for weight in padded.key_of:
        assert padded.count[padded.key_of[weight]] == single.count[single.key_of[weight]], weight
        torch.testing.assert_close(padded.for_weight(weight), single.for_weight(weight), rtol=1e-4, atol=1e-5)
    for weight in padded.norms:
        torch.testing.assert_close(padded.norms[weight], single.norms[weight], rtol=1e-4, atol=1e-5)
    tokens = sum(lengths)
    assert {padded.count[k] for k in padded.grams} & {tokens}
    assert not any(hasattr(m, "token_mask") and m.token_mask is not None for m in run.skeleton.modules())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_separate_experts_compute_what_stacked_ones_do(name, tmp_path):
    kind, batch = KINDS[name], KINDS[name].batch()
    run = Run(make_recipe(save(name, tmp_path)), need_tasks=False)
    reference = getattr(transformers, kind.model).from_pretrained(tmp_path / "a").eval()
    assert any(isinstance(m, SeparateExperts) for m in run.skeleton.modules())
    with swapped(run.skeleton, run._renamed(run.pool.experts[0])), torch.no_grad():
        torch.testing.assert_close(run.skeleton(**batch).logits, reference(**batch).logits, rtol=1e-5, atol=1e-6)
    matrices = [n for n in run.pool.names if ".experts." in n]
    layers = {n.partition(".layers.")[2].partition(".")[0] for n in matrices}
    assert len(matrices) == 2 * 4 * 3
    assert len(layers) == 2


def _rewrite(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


OLD = {
    "gpt2": lambda t: {n.removeprefix("transformer."): x for n, x in t.items()}
    | {f"h.{k}.attn.bias": torch.ones(1, 1, 16, 16) for k in range(2)},
    "bert": lambda t: {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
                       for n, x in t.items()} | {"bert.embeddings.position_ids": torch.arange(16)[None]},
    "t5": lambda t: t | {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(32, 2)},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_checkpoints_of_earlier_times(name, tmp_path):
    """Names that transformers once wrote, and buffers it once saved, as the well-known checkpoints still have them."""
    kind, batch = KINDS[name], KINDS[name].batch()
    keys = save(name, tmp_path)
    for part in ("base", "a", "b"):
        _rewrite(tmp_path / part, OLD[name])
    tasks = [bmm.Task(t, validation=batch, calibration=batch, forward=last) for t in ("a", "b")]
    keys |= {"anchor": "task_arithmetic", "grams": "data", "groups": "role"}
    run = Run(make_recipe(keys | {"score_by": "agreement"}), tasks=tasks)
    folder = bmm.merge(keys, out=tmp_path / "out", lam=0.1, tasks=tasks, score_by="agreement")
    loaded = quiet(lambda: getattr(transformers, kind.model).from_pretrained(folder).eval())
    tensors = bmm.merge(keys, lam=0.1, tasks=tasks, score_by="agreement")
    with torch.no_grad():
        functional = run.outputs(tensors, run.tasks[0], [(batch, None)])[0]
        torch.testing.assert_close(last(loaded, batch), functional, rtol=1e-4, atol=1e-5)


def test_the_skeleton_has_transformers_own_buffers(tmp_path):
    """Its weights are not drawn, but what is computed and never stored is there."""
    for name in ("llama", "clip", "bert"):
        save(name, tmp_path / name)
        run = Run(make_recipe({"base": str(tmp_path / name / "base"), "experts": {"a": str(tmp_path / name / "a")}}),
                  need_tasks=False)  # fmt: skip
        own = dict(KINDS[name].build().named_buffers())
        for buffer, value in run.skeleton.named_buffers():
            assert torch.equal(value, own[buffer]), (name, buffer)
