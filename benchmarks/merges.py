"""Whole merges from disk to disk, side by side with mergekit 0.1.5: wall time and peak memory of the process.

    python benchmarks/merges.py                 Llama-shaped checkpoints of about 0.16 B parameters, 3 experts
    python benchmarks/merges.py --quick         0.02 B parameters, two rounds
    python benchmarks/merges.py --layers 16 --hidden 1536 --intermediate 4096      about 0.5 B

Both are started as a user starts them (`bmm merge`, `mergekit-yaml`), in turn, on the same random bfloat16 safetensors
folders; medians over rounds. mergekit gets an environment of its own under runs/envs. Its arithmetic is in the stored
dtype, bfloat16, and its trimming is per tensor; ours is in float32, over the whole model. Memory is the kernel's
high-water mark of resident pages, which counts the pages of mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from environments import environment

METHODS = {  # ours, our knobs; mergekit's, its parameters
    "task_arithmetic": (["scale=0.4"], "task_arithmetic", {"weight": 0.4}),
    "ties": (["density=0.3"], "ties", {"weight": 1.0, "density": 0.3}),
    "dare_ta": (["drop=0.7", "scale=0.4"], "dare_linear", {"weight": 0.4, "density": 0.3}),
    "dare_ties": (["drop=0.7", "density=1"], "dare_ties", {"weight": 1.0, "density": 0.3}),
    "slerp": ([], "slerp", {"t": 0.5}),
}

BMM, MERGEKIT = f"bmm-{os.getpid()}", f"mergekit-{os.getpid()}"  # results; two runs may share their inputs

MAKE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
root, experts, layers, hidden, intermediate, vocabulary = Path(sys.argv[1]), *map(int, sys.argv[2:])
shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden),
          "model.norm.weight": (hidden,)}
for k in range(layers):
    at = f"model.layers.{k}"
    shapes |= {f"{at}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
    shapes |= {f"{at}.mlp.{p}_proj.weight": (intermediate, hidden) for p in ("gate", "up")}
    shapes |= {f"{at}.mlp.down_proj.weight": (hidden, intermediate)}
    shapes |= {f"{at}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
          "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
          "num_key_value_heads": hidden // 64, "vocab_size": vocabulary, "torch_dtype": "bfloat16",
          "tie_word_embeddings": False}
base = {n: (0.02 * torch.randn(s, generator=torch.Generator().manual_seed(k))).bfloat16()
        for k, (n, s) in enumerate(shapes.items())}
for t in range(experts + 1):
    folder = root / ("base" if t == 0 else f"e{t}")
    folder.mkdir(parents=True)
    state = base if t == 0 else {
        n: (w + 0.002 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1000 * t + k))).bfloat16()
        for k, (n, w) in enumerate(base.items())}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
print(sum(w.numel() for w in base.values()))
"""


def checkpoints(root: Path, *sizes: int) -> int:
    """Write base and experts unless they are there; returns the number of parameters."""
    done = root / "parameters"
    if not done.exists():
        shutil.rmtree(root, ignore_errors=True)
        out = subprocess.run(
            [sys.executable, "-c", MAKE, str(root), *map(str, sizes)], capture_output=True, text=True, check=True
        )
        done.write_text(out.stdout)
    return int(done.read_text())


def measure(command: list[str], environ: dict[str, str], out: Path) -> tuple[float, float, float]:
    """Wall seconds, processor seconds (user and system) and peak resident MiB of one process.

    It must succeed and leave a checkpoint in ``out``.
    """
    start = time.perf_counter()
    child = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    error = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)  # this process alone, not the largest child so far
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode or not list(out.glob("*.safetensors")):
        raise SystemExit(f"{' '.join(command)}\n{error.decode()[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def ours(method: str, root: Path, experts: int) -> list[str]:
    shutil.rmtree(root / BMM, ignore_errors=True)
    run = "from bmm_cli.main import main; main()"
    command = [sys.executable, "-c", run, "merge", "--anchor", method, "--base", str(root / "base")]
    for t in range(experts):
        command += ["--expert", str(root / f"e{t + 1}")]
    for knob in METHODS[method][0]:
        command += ["--knob", knob]
    return [*command, "--out", str(root / BMM), "--quiet"]


def theirs(method: str, root: Path, experts: int, python: Path) -> list[str]:
    _, name, parameters = METHODS[method]
    base = {"model": str(root / "base")}
    models = [{"model": str(root / f"e{t + 1}"), "parameters": parameters} for t in range(experts)]
    config = {"merge_method": name, "base_model": base["model"], "models": models, "dtype": "bfloat16"}
    if name == "slerp":
        config = {
            "merge_method": name, "base_model": models[0]["model"], "models": [{"model": m["model"]} for m in models],
            "parameters": parameters, "dtype": "bfloat16",
        }  # fmt: skip
    (root / f"{MERGEKIT}.yaml").write_text(json.dumps(config))  # JSON is YAML
    shutil.rmtree(root / MERGEKIT, ignore_errors=True)
    run = "from mergekit.scripts.run_yaml import main; main()"
    out = str(root / MERGEKIT)
    return [str(python), "-c", run, str(root / f"{MERGEKIT}.yaml"), out, "--no-copy-tokenizer", "--quiet"]


def registered() -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", "from bmm.anchors import ANCHORS; print(*ANCHORS)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(out.stdout.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/merges"))
    args = parser.parse_args()
    if args.quick:
        args.layers, args.hidden, args.intermediate, args.vocabulary, args.rounds = 4, 512, 1408, 8000, 2
    sizes = (args.experts, args.layers, args.hidden, args.intermediate, args.vocabulary)
    root = args.work / "-".join(map(str, sizes))
    python, parameters, known = environment("mergekit"), checkpoints(root, *sizes), registered()
    # both run from compiled bytecode, as after an installation
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environ = kept | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "BMM_CACHE": str(root)}
    print(f"{parameters / 1e6:.0f} M parameters, bfloat16, {args.experts} experts (SLERP: 2)")
    print(f"{args.threads} thread(s), medians of {args.rounds} interleaved rounds\n")
    print("| method | bmm s | mergekit s | times faster | bmm CPU s | mergekit CPU s | times less |", end="")
    print(" bmm MiB | mergekit MiB | share of memory |")
    print(10 * "|---" + "|")
    for method in args.methods:
        if method not in known:
            print(f"| {method} | not in the registry: skipped |" + 8 * " |")
            continue
        count = 2 if method == "slerp" else args.experts
        rounds = [
            (
                measure(ours(method, root, count), environ, root / BMM),
                measure(theirs(method, root, count, python), environ, root / MERGEKIT),
            )
            for _ in range(args.rounds)
        ]
        (s, c, m), (their_s, their_c, their_m) = (
            [statistics.median(r[side][k] for r in rounds) for k in range(3)] for side in range(2)
        )
        cells = [method, f"{s:.2f}", f"{their_s:.2f}", f"{their_s / s:.1f}", f"{c:.2f}", f"{their_c:.2f}"]
        cells += [f"{their_c / c:.1f}", f"{m:.0f}", f"{their_m:.0f}", f"{m / their_m:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    for left in (root / BMM, root / MERGEKIT):
        shutil.rmtree(left, ignore_errors=True)
    (root / f"{MERGEKIT}.yaml").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
