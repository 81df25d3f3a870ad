"""All cross-checks, written to docs/crosscheck.md: python benchmarks/crosscheck/write.py"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEAD = """# Cross-checks against other packages

Written by `python benchmarks/crosscheck/write.py`, which installs each package in an environment of its own under
`runs/envs` and gives it and bmm the same checkpoints: one Llama layer with embeddings, 64 wide, three experts, float32.
"absolute" is the largest difference of any entry, "relative" the same over the largest change that the merge makes.
About 1e-6 is agreement of float32 arithmetic; where a definition differs, the last column says how.

What to know when comparing numbers with these packages:

- **Trimming.** peft and mergekit trim TIES tensor by tensor, bmm and fusion-bench over the whole model, as the paper
  does (arXiv 2306.01708). Run tensor by tensor, bmm gives peft's and mergekit's numbers to the bit.
- **The k-th entry.** fusion-bench keeps k + 1 entries of a task vector where bmm and the others keep k: one entry a
  task differs, by as much as the cut.
- **Mean or sum.** mergekit's `dare_ties` sums the entries that agree where its `ties` averages them; bmm averages in
  both unless `reduce=sum`.
- **Random masks.** DARE and DELLA draw from streams of their own in every package, so that they are compared where
  nothing is dropped; that bmm's masks have the stated probabilities is tested in `tests/anchors`.
- **Low precision.** mergekit computes in the stored dtype unless told otherwise, bmm always in float32 or better.
- **SVDs.** TSV-M differs by more than the others because fusion-bench's SVDs are in float32 and bmm's in float64.
- **Negative angles.** Where experts' changes point apart on average, Model Stock's formula leaves the segment between
  base and mean; the experts here have changes with a positive cosine, as fine-tuning gives.
- **Fisher floors.** fusion-bench adds 1e-6 to every Fisher, which tells where random ones come close to zero.
"""


def main() -> None:
    parts = [HEAD]
    for package in ("mergekit", "peft", "fusion_bench"):
        command = [sys.executable, str(HERE / f"with_{package}.py")]
        table = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        title, rest = table.split("\n", 1)
        parts.append(f"## {title.split(',')[0].replace('_', '-')}\n\n{title.split(',', 1)[1].strip()}.\n{rest}\n")
    (HERE.parents[1] / "docs" / "crosscheck.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
