"""What transformers saves and loads, read and written again."""

import pytest
import torch

from bmm.checkpoint import open_checkpoint, write_checkpoint


@pytest.fixture(scope="module", params=["bert", "vit"])
def pretrained(request):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if request.param == "bert":
        network = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **small))
        return network.eval(), {"input_ids": torch.arange(12).reshape(2, 6)}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **small)
    generator = torch.Generator().manual_seed(1)
    return transformers.ViTForImageClassification(config).eval(), {
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator)
    }


@pytest.mark.parametrize("form", ["single", "shards", "bin"])
def test_transformers_loads_what_is_written_after_reading_what_it_saved(pretrained, form, tmp_path):
    network, inputs = pretrained
    base = tmp_path / "base"
    network.save_pretrained(base, max_shard_size="8KB" if form == "shards" else "1GB")
    if form == "bin":  # as older releases saved it: every name, the tied ones sharing storage
        (base / "model.safetensors").unlink()
        torch.save(network.state_dict(), base / "pytorch_model.bin")
    checkpoint = open_checkpoint(base)
    assert len(list(base.glob("model-*.safetensors"))) > 1 or form != "shards"
    written = write_checkpoint(tmp_path / "out", checkpoint.items(), like=checkpoint, max_shard_bytes=6_000)
    assert len(list(written.glob("model-*.safetensors"))) > 1
    assert open_checkpoint(written).fingerprint() == checkpoint.fingerprint()
    loaded, report = type(network).from_pretrained(written, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(**inputs).logits, network(**inputs).logits)


def test_a_tied_bert_stays_tied_through_reading_and_writing(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    network = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=20, **sizes))
    network.save_pretrained(tmp_path / "base")
    torch.save(network.state_dict(), tmp_path / "state.bin")
    head, embedding = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    stored = open_checkpoint(tmp_path / "base")
    assert head not in stored
    groups = open_checkpoint(tmp_path / "state.bin").tied
    assert (embedding, head) in groups
    changed = {name: stored[name] + 1 if stored.info(name).floating else stored[name] for name in stored}
    write_checkpoint(tmp_path / "out", changed, like=stored, tied=groups)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    assert parameters[head] is parameters[embedding]
    assert torch.equal(parameters[head], changed[embedding])
