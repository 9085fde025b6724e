"""Where b_dec starts: a median that a point holds. What else it must be is in tests/test_sae.py."""

import pytest
import torch

from patchsae.fast.medians import geometric_median


@pytest.mark.parametrize("points, held", [
    ([[0, 0], [8, 0], [-4, 0.9], [-4, -0.9]], True), ([[0, 0], [8, 0], [-4, 0.5], [-4, -0.5]], True),
    ([[0, 0], [4, 0], [-1, 0.5], [-1, -0.5], [-2, 0]], False)])
def test_a_point_at_the_mean_is_the_median_where_the_others_pull_less_than_it_holds(points, held):
    """The unit vectors to the others add up to less than 1, or to more: then it is left at once."""
    points = torch.tensor(points, dtype=torch.float64)
    others = points[1:]
    assert not points.sum(0).any() and ((others / others.norm(dim=1, keepdim=True)).sum(0).norm() < 1) == held
    assert torch.equal(geometric_median(points), torch.zeros(2)) == held
