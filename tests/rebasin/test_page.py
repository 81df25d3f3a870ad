"""What docs/rebasin.md shows as a specification is one."""

import re
from pathlib import Path

from bmm.rebasin import load_spec

PAGE = (Path(__file__).parents[2] / "docs" / "rebasin.md").read_text()


def test_the_written_spec_fits_the_tensors_it_names(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "spec.yaml").write_text(text)
    shapes = {"conv.weight": (32, 3, 3, 3), "bn.running_mean": (32,), "head.weight": (10, 32 * 49),
              "qkv.weight": (1536, 512), "o.weight": (512, 512)}  # fmt: skip
    for n in range(12):
        shapes |= {f"layers.{n}.fc1.weight": (3072, 768), f"layers.{n}.fc1.bias": (3072,),
                   f"layers.{n}.fc2.weight": (768, 3072)}  # fmt: skip
    assert len(load_spec(tmp_path / "spec.yaml").check(shapes).groups) == 14


def test_every_flag_the_page_names_exists():
    from bmm_cli.align import command

    flags = {flag for option in command.params for flag in option.opts}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE)) - {"--base"}
    assert {"--within", "--residual", "--to", "--heads", "--points", "--seed"} <= named <= flags
