"""Small models with every kind of parameter, for the tests of the anchors."""

from collections import Counter
from collections.abc import Mapping

import torch
from hypothesis import strategies as st

SHAPES = {
    "linear.weight": (6, 5),
    "wide.weight": (4, 9),
    "tall.weight": (9, 4),
    "row.weight": (1, 7),
    "column.weight": (7, 1),
    "conv.weight": (4, 3, 2, 2),
    "conv1d.weight": (4, 3, 2),
    "position": (1, 5, 4),
    "token": (1, 1, 6),
    "norm.weight": (6,),
    "temperature": (),
    "empty": (0, 4),
}


def random_model(generator, scale=1.0, dtype=torch.float32):
    model = {k: (scale * torch.randn(s, generator=generator)).to(dtype) for k, s in SHAPES.items()}
    return model | {"steps": torch.randint(0, 100, (3,), generator=generator)}


def family(experts, seed=0, size=0.1, dtype=torch.float32):
    """A base and experts that differ from it by entries of about ``size``; integer buffers differ too."""
    generator = torch.Generator().manual_seed(seed)
    base = random_model(generator, dtype=dtype)
    out = []
    for _ in range(experts):
        step = random_model(generator, size)
        out.append({k: (base[k] + step[k]).to(base[k].dtype) for k in base})
    return base, out


def grams_for(base, experts, seed=1, rows=40, dtype=torch.float32):
    """Grams of random inputs for every weight that has inputs."""
    generator = torch.Generator().manual_seed(seed)
    grams = {}
    for name, tensor in base.items():
        if name.endswith(".weight") and tensor.dim() >= 2:
            width = tensor[0].numel()
            inputs = [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(experts)]
            grams[name] = [(x.mT @ x / rows).to(dtype) for x in inputs]
    return grams


def fisher_for(model):
    """A diagonal Fisher that is a smooth function of the weights, entry by entry: from 0 to 1, mostly small."""
    wide = {k: v.detach().double() for k, v in model.items() if v.is_floating_point()}
    return {k: torch.nan_to_num(torch.sin(3 * v) ** 12).float() for k, v in wide.items()}


def float32_lists():
    """Lists of any finite float32 numbers, ties and denormals among them."""
    any_number = st.floats(width=32, allow_nan=False, allow_infinity=False)
    return st.lists(st.one_of(any_number, st.sampled_from([0.0, 1.0, -1.0, 1e-42])), min_size=1, max_size=40)


class Lazy(Mapping):
    """A checkpoint that counts how often each tensor is read, and hands out a new copy every time."""

    def __init__(self, tensors):
        self.tensors, self.reads = tensors, Counter()

    def __getitem__(self, name):
        self.reads[name] += 1
        return self.tensors[name].clone()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)
