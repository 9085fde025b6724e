"""The one readout: at its extremes, and where its slope is zero, of classes and of many things at once."""

import numpy as np
import torch
import torch.nn.functional as F

from patchsae.world.probes import fit_readout, logistic_weights


def test_a_readout_reads_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = torch.arange(400) % 4
    told = torch.from_numpy(np.eye(4)[labels] + 0.1 * rng.normal(size=(400, 4))).float()
    noise = torch.from_numpy(rng.normal(size=(400, 6))).float()
    x = torch.cat([noise, told, torch.ones(400, 2)], 1)
    read = fit_readout(x[:200], labels[:200], 1e-3)
    assert (read(x[200:]).argmax(1) == labels[200:]).float().mean() > 0.99
    assert (read.weight[-2:] == 0).all()  # what never varies weighs nothing
    guess = fit_readout(noise[:200], labels[:200], 1e-3)(noise[200:]).argmax(1)
    assert (guess == labels[200:]).float().mean() < 0.4
    shifted = fit_readout(5 * x[:200] - 3, labels[:200], 1e-3)
    torch.testing.assert_close(shifted(5 * x[200:] - 3), read(x[200:]), atol=1e-2, rtol=0)


def test_weights_are_where_the_slope_is_zero():
    """Of the stated loss, by hand: d/dW of mean cross-entropy + penalty * sum of squares."""
    numbers = torch.Generator().manual_seed(0)
    x, labels = torch.randn(90, 5, generator=numbers), torch.arange(90) % 3
    weight = logistic_weights(x, labels, 0.01)
    slope = x.T @ ((x @ weight).softmax(1) - F.one_hot(labels).float()) / 90 + 2 * 0.01 * weight
    assert slope.abs().max() < 1e-3
    things = (torch.rand(90, 4, generator=numbers) < 0.3).float()
    weight = logistic_weights(x, things, 0.01, iterations=80)
    slope = x.T @ ((x @ weight).sigmoid() - things) / 90 + 2 * 0.01 * weight
    assert slope.abs().max() < 1e-3


def test_the_bias_of_a_rare_thing_is_not_held_down():
    x, rare = torch.randn(2000, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(2000, 1)
    rare[::100] = 1
    read = fit_readout(x, rare, 10.0, iterations=80)  # nothing can be read at this penalty but how rare it is
    np.testing.assert_allclose(read(x).sigmoid().mean(), 0.01, rtol=0.02)
