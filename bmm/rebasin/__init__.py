"""Git Re-Basin (arXiv 2209.04836): permute experts that share no base into one basin, so that they can be merged."""

from .align import Aligner, Alignment, Options
from .barrier import Barrier, interpolate, measure_barrier, recompute_batchnorm
from .build import check_preserved, find_spec
from .matching import Matching, match
from .names import Transformer, transformer_spec
from .permutation import Arrangement, Permutation
from .spec import Group, Site, Spec, load_spec
from .trace import trace_spec

__all__ = [
    "Aligner", "Alignment", "Arrangement", "Barrier", "Group", "Matching", "Options", "Permutation", "Site", "Spec",
    "Transformer", "check_preserved", "find_spec", "interpolate", "load_spec", "match", "measure_barrier",
    "recompute_batchnorm", "trace_spec", "transformer_spec",
]  # fmt: skip
