"""``python -m bmm.zoo.build --work DIR``: fetch, render, train, export. Every step is skipped when it is done.

Stages: fetch packages; render and cut the splits; pretrain; joint training with heads; one expert a task; export
to ``bmm/zoo/vit8`` and ``examples/vit20/zoo``; the table of accuracies. About two hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from .. import VIT20
from . import export, sources, tasks, train


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bmm.zoo.build", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and checkpoints (1.5 GB)")
    parser.add_argument("--stage", choices=["fetch", "data", "base", "experts", "export", "all"], default="all")
    parser.add_argument("--only", nargs="*", help="experts to train (default: all twenty)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; one is fastest under load")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(args.work / "build.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    logging.getLogger("fontTools").setLevel(logging.CRITICAL)
    every = args.stage == "all"
    if every or args.stage == "fetch":
        sources.fetch(args.work)
    if every or args.stage == "data":
        tasks.pretraining(args.work)
        for name in VIT20:
            tasks.task_splits(args.work, name)
    if every or args.stage == "base":
        train.base_and_heads(args.work)
    if every or args.stage == "experts":
        for name in args.only or VIT20:
            train.expert(args.work, name)
    if every or args.stage == "export":
        export.export(args.work)


if __name__ == "__main__":
    main()
