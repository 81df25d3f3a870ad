import pytest
import torch

from bmm.errors import GramError
from bmm.grams import datafree, hybrid


def task_vector(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_datafree_is_the_normalised_gram_of_the_rows():
    tau = task_vector(4, 6)
    gram = datafree(tau)
    wide = tau.double()
    torch.testing.assert_close(gram, wide.T @ wide / wide.square().sum())
    assert float(gram.trace()) == pytest.approx(1.0)
    assert int(torch.linalg.matrix_rank(gram)) == 4
    torch.testing.assert_close(datafree(1e-30 * tau), gram)  # its squares underflow in float32
    torch.testing.assert_close(datafree(-3 * tau), gram)


def test_datafree_of_a_convolution_is_that_of_its_flat_form():
    tau = task_vector(4, 3, 2, 2)
    assert torch.equal(datafree(tau), datafree(tau.flatten(1)))
    assert datafree(tau).shape == (12, 12)


def test_datafree_of_a_zero_task_vector_is_zero():
    assert torch.equal(datafree(torch.zeros(3, 5)), torch.zeros(5, 5, dtype=torch.float64))


def test_datafree_refuses_vectors_and_nan():
    with pytest.raises(GramError, match="shape"):
        datafree(torch.ones(4))
    with pytest.raises(GramError, match="non-finite"):
        datafree(torch.full((2, 2), torch.nan))


def test_hybrid_mixes_at_equal_size():
    data, free = datafree(task_vector(5, 4)) * 1e6, datafree(task_vector(5, 4, seed=1))
    for gamma in (0.0, 0.25, 1.0):
        mixed = hybrid(data, free, gamma)
        torch.testing.assert_close(mixed, (1 - gamma) * data * 4 / data.trace() + gamma * free * 4 / free.trace())
        assert float(mixed.trace()) == pytest.approx(4.0)


def test_hybrid_leaves_the_bias_coordinate_to_the_data():
    data, free = datafree(task_vector(9, 5)), datafree(task_vector(9, 4, seed=1))
    mixed = hybrid(data, free, 0.5)
    assert mixed.shape == (5, 5)
    torch.testing.assert_close(mixed[4], 0.5 * data[4] * 5)
    torch.testing.assert_close(mixed[:4, :4], 0.5 * 5 * (data[:4, :4] + free))


def test_hybrid_with_a_zero_gram_keeps_the_other():
    free, zero = datafree(task_vector(5, 4)), torch.zeros(4, 4, dtype=torch.float64)
    torch.testing.assert_close(hybrid(zero, free, 0.25), 0.25 * 4 * free)
    torch.testing.assert_close(hybrid(free, zero, 0.25), 0.75 * 4 * free)


@pytest.mark.parametrize(
    ("sides", "gamma"), [((4, 4), -0.1), ((4, 4), 1.1), ((4, 4), float("nan")), ((4, 5), 0.5), ((6, 4), 0.5)]
)
def test_hybrid_refuses_what_does_not_fit(sides, gamma):
    with pytest.raises(GramError, match=r"gamma|Grams are"):
        hybrid(torch.eye(sides[0]), torch.eye(sides[1]), gamma)
