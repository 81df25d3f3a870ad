"""bmm merge --from-mergekit against mergekit 0.1.5 itself: python benchmarks/crosscheck/mergekit_recipes.py

The same recipes and checkpoints (a Llama of four layers, three experts) through both, mergekit in an environment of its
own; prints the largest difference of any entry, and that over the largest change from the base. What is random is
compared where nothing is dropped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from environments import environment

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 4, 32, 48, 64

SLERP = """
slices: [{sources: [{model: e1, layer_range: [0, 4]}, {model: e2, layer_range: [0, 4]}]}]
merge_method: slerp
base_model: e1
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - value: 0.5
"""
TIES = """
models:
- {model: base}
- {model: e1, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
- {model: e2, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
- {model: e3, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0.2}]}}
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
"""


def listed(method: str, own: str = "weight: 1", whole: str = "", base: str = "base", more: str = "") -> str:
    """A recipe over the three experts with the same parameters for each, %d being 1, 2 and 3."""
    models = "".join(f"- {{model: e{t}, parameters: {{{own.replace('%d', str(t))}}}}}\n" for t in (1, 2, 3))
    head = f"merge_method: {method}\n" + (f"base_model: {base}\n" if base else "")
    return f"{head}models:\n{models}parameters: {{{whole}}}\n{more}"


def pair(method: str, own: str, whole: str = "", base: str = "") -> str:
    """The same over two experts."""
    return listed(method, own, whole, base).replace("- {model: e3, parameters: {" + own.replace("%d", "3") + "}}\n", "")


CROSSED = "weight: [{filter: mlp, value: 0.%d}, {filter: q_proj, value: [0, 1, -1]}, {value: 1}]"
RECIPES: tuple[tuple[str, str, str], ...] = (
    ("linear, weights", listed("linear", "weight: 0.%d", base=""), ""),
    ("linear, base_model is an input", listed("linear", "weight: %d", "weight: 0.5"), ""),
    ("linear, filters and gradients, normalize: false", listed("linear", CROSSED, "normalize: false", base=""), ""),
    ("slerp, slices, filters and gradients", SLERP, ""),
    ("nuslerp, weights", pair("nuslerp", "weight: %d"), ""),
    ("nuslerp, base_model", pair("nuslerp", "weight: %d", base="base"), ""),
    ("multislerp, weights", listed("multislerp", "weight: %d", base=""), ""),
    ("multislerp, base_model", listed("multislerp", "weight: %d"), ""),
    ("karcher", listed("karcher", "", base=""), ""),
    ("karcher, base_model is an input, tol", listed("karcher", "", "tol: 1e-7, max_iter: 50"), ""),
    ("model_stock", listed("model_stock", ""), ""),
    ("model_stock, filter_wise", listed("model_stock", "", "filter_wise: true"), ""),
    ("task_arithmetic, filters and gradients, lambda", listed("task_arithmetic", CROSSED, "lambda: [0.5, 1]"), ""),
    ("task_arithmetic, normalize", listed("task_arithmetic", "weight: 0.%d", "normalize: true"), ""),
    ("ties, density and weight by model, gradients, filters", TIES, ""),
    ("ties, negative weights", listed("ties", "weight: [-1, 0.%d], density: 0.%d5"), ""),
    ("ties, not normalized, rescaled",
     listed("ties", "weight: 1, density: 0.%d", "normalize: false, rescale: true"), ""),
    ("ties, next to nothing kept", listed("ties", "weight: 1, density: [0, 0.001]"), ""),
    ("breadcrumbs, density and gamma", listed("breadcrumbs", "weight: 0.%d, density: 0.6, gamma: 0.0%d"), ""),
    ("breadcrumbs, gamma too large", listed("breadcrumbs", "weight: 1, density: 0.9, gamma: 0.%d"), ""),
    ("breadcrumbs_ties", listed("breadcrumbs_ties", "weight: 0.%d, density: [0.3, 0.9]"), ""),
    ("dare_linear, density 1", listed("dare_linear", "weight: 0.%d, density: 1"), "nothing dropped"),
    ("dare_ties, density 1", listed("dare_ties", "weight: 0.%d, density: 1"), "nothing dropped"),
    ("della, density 1", listed("della", "weight: 0.%d, density: 1"), "nothing dropped"),
    ("della_linear, density 1", listed("della_linear", "weight: 0.%d, density: 1"), "nothing dropped"),
    ("linear, dtype: bfloat16", listed("linear", "weight: 0.%d", base="", more="dtype: bfloat16"),
     "mergekit rounds the inputs first"),
    ("task_arithmetic, dtype: bfloat16", listed("task_arithmetic", "weight: 0.%d", more="dtype: bfloat16"),
     "mergekit computes in bfloat16"),
    ("ties, out_dtype: float16", listed("ties", "weight: 1, density: 0.5", more="out_dtype: float16"), ""),
)  # fmt: skip


def write_family(folder: Path) -> None:
    """Base and three experts, float32, whose changes have something in common."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
        shapes |= {f"{at}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}

    def draw(size: float) -> dict[str, Tensor]:
        return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    base, shared = draw(0.05), draw(0.006)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "intermediate_size": INTERMEDIATE, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": VOCABULARY, "torch_dtype": "float32", "tie_word_embeddings": False,
    }  # fmt: skip
    for place in ("base", "e1", "e2", "e3"):
        (folder / place).mkdir(parents=True)
        step = draw(0.008)
        model = base if place == "base" else {n: w + shared[n] + step[n] for n, w in base.items()}
        save_file(model, folder / place / "model.safetensors", metadata={"format": "pt"})
        (folder / place / "config.json").write_text(json.dumps(config))


def located(text: str, folder: Path) -> str:
    """A recipe with the models' folders in place of their names: mergekit asks a hub for what is no absolute path."""
    return re.sub(r"\b(base|e[123])\b(?=[,}\n])", lambda found: str(folder / found[1]), text)


def theirs(folder: Path) -> None:
    """mergekit's side, in its environment."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    for number, (_, text, _) in enumerate(RECIPES):
        config = MergeConfiguration.model_validate(yaml.safe_load(located(text, folder)))
        run_merge(config, str(folder / f"theirs-{number}"), MergeOptions(copy_tokenizer=False, quiet=True))


def row(folder: Path, number: int, base: dict[str, Tensor]) -> list[str]:
    """Our side of one recipe, and the row of the table."""
    import bmm

    title, text, differs = RECIPES[number]
    file = folder / f"recipe-{number}.yml"
    file.write_text(located(text, folder))
    out = bmm.merge_mergekit(file, out=folder / f"ours-{number}")
    assert isinstance(out, Path)
    mine, peers = load_file(out / "model.safetensors"), load_file(folder / f"theirs-{number}" / "model.safetensors")
    if {n: w.dtype for n, w in mine.items()} != {n: w.dtype for n, w in peers.items()}:
        raise SystemExit(f"{title}: other tensors or dtypes than mergekit's")
    gap = max(float((mine[n].double() - peers[n].double()).abs().max()) for n in mine)
    size = max(float((mine[n].double() - base[n].double()).abs().max()) for n in mine)
    return [title, f"{gap:.1e}", f"{gap / size:.1e}", differs]


def main() -> None:
    parser = argparse.ArgumentParser(description="bmm merge --from-mergekit against mergekit 0.1.5")
    parser.add_argument("--work", type=Path, default=Path("runs/crosscheck"))
    parser.add_argument("--envs", type=Path, default=Path("runs/envs"), help="where the environments of peers lie")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peer:
        theirs(args.peer)
        return
    folder = args.work.absolute() / "mergekit-recipes"
    shutil.rmtree(folder, ignore_errors=True)
    write_family(folder)
    command = [str(environment("mergekit", args.envs)), __file__, "--peer", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    from bmm.report import markdown

    base = load_file(folder / "base" / "model.safetensors")
    rows = [row(folder, number, base) for number in range(len(RECIPES))]
    print(f"mergekit 0.1.5, {datetime.date.today()}\n")
    print(markdown(["recipe", "absolute", "relative", "what differs"], rows))


if __name__ == "__main__":
    main()
