"""Throw-away environments for the peers that bmm is compared with: none of them is ever a dependency.

Each lies under ``runs/envs``, sees the running interpreter's packages (torch above all) behind its own, and gets the
peer and what it needs at fixed versions without letting pip resolve: a looser request would download gigabytes.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

PACKAGES = {
    "mergekit": (
        "mergekit==0.1.5", "peft==0.21.0", "accelerate==1.15.0", "datasets==5.2.0", "immutables==0.21",
        "click==8.2.1", "protobuf==7.36.2", "sentencepiece==0.2.3", "tqdm==4.70.1", "pyarrow==26.0.1", "dill==0.4.1",
        "multiprocess==0.70.19", "xxhash==4.1.0",
    ),
    "peft": ("peft==0.21.0", "accelerate==1.15.0"),
    "fusion_bench": (
        "fusion-bench==0.2.33", "omegaconf==2.4.0", "hydra-core==1.3.8", "antlr4-python3-runtime==4.9.3",
        "lightning==2.6.6", "lightning-utilities==0.15.3", "lightning-fabric==2.6.6", "pytorch-lightning==2.6.6",
        "torchmetrics==1.9.0", "datasets==5.2.0", "peft==0.21.0", "accelerate==1.15.0", "bidict==0.24.1",
        "joblib==1.6.0", "h5py==3.16.0", "matplotlib==3.11.2", "pyarrow==26.0.1", "dill==0.4.1",
        "multiprocess==0.70.19", "xxhash==4.1.0",
    ),
}  # fmt: skip


def environment(name: str, root: Path = Path("runs/envs")) -> Path:
    """The python of the peer's environment, made on first use (needs a package index then)."""
    folder = root / name
    python, done = folder / "bin" / "python", folder / ".installed"
    wanted = "\n".join(PACKAGES[name])
    if not done.exists() or done.read_text() != wanted:
        print(f"making {folder} ...", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        own = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        hosts = dict.fromkeys([sysconfig.get_path("purelib"), *_torch_folder()])
        Path(own, "host.pth").write_text("\n".join(hosts) + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES[name]], check=True)
        done.write_text(wanted)
    return python.absolute()


def _torch_folder() -> list[str]:
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed here: run this with the interpreter bmm is installed in")
    return [str(Path(spec.origin).parent.parent)]
