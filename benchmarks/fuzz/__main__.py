"""The command: every reader in a process of its own, and a table of what became of its mutations."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import fuzz
from bmm.report import markdown

from .attack import Watch, attack, confine
from .readers import READERS

ROOT = Path(__file__).parents[2]


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.fuzz", description=fuzz.__doc__, formatter_class=form)
    parser.add_argument("--mutations", type=int, default=1_100, help="of each reader: 10,000 in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, action="append", help="only this one; repeatable")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # task files change faster than the clock of the cache
    if args.child:
        (name,) = args.reader
        watch = Watch()
        with tempfile.TemporaryDirectory() as folder:
            if name.endswith("built"):
                import transformers.models.vit.modeling_vit  # noqa: F401 - loaded before memory is counted
            attack(name, 3, -1, Path(folder) / "warm")
            confine()
            print(json.dumps(vars(attack(name, args.mutations, args.seed, Path(folder) / "run", watch))))
        return
    rows, failed = [], False
    for name in args.reader or READERS:
        command = [sys.executable, "-m", "benchmarks.fuzz", "--child", "--reader", name, "--seed", str(args.seed)]
        command += ["--mutations", str(args.mutations)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            rows.append([name, "", "", "", f"the process ended with {done.returncode}", "", "", ""])
            print(done.stderr[-2000:], file=sys.stderr)
            failed = True
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        crashes = sum(found["crashed"].values())
        failed = failed or bool(crashes or found["outside"])
        for what in ("crashed", "outside"):
            for text in list(found[what])[:20]:
                print(f"{name}: {what}: {text}", file=sys.stderr)
        total = found["opened"] + found["refused"] + crashes
        cells = [total, found["opened"], found["refused"], crashes, sum(found["outside"].values())]
        rows.append([name, *map(str, cells), f"{found['memory'] / 2**20:.1f}", f"{1000 * found['seconds']:.0f}"])
    header = ["reader", "mutations", "opened", "refused", "crashed", "read outside", "most MiB", "slowest ms"]
    print(markdown(header, rows))
    sys.exit(failed)


if __name__ == "__main__":
    main()
