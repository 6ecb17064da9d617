"""Memory and convolutions at initialisation, against closed forms."""

import math

import pytest
import torch

from zoo.blocks.mixer import mixers
from zoo.blocks.positions import Positions

TOKENS = 24
STEPS = torch.logspace(-3, -1, 20_001, dtype=torch.float64)  # step sizes are log-uniform; the midpoint rule suffices


def kept_on_average(low, high, tokens):
    """The mean of exp(-A dt tokens) over A, uniform in (low, high), and dt, log-uniform in (0.001, 0.1):
    the mean over dt of (exp(-low c) - exp(-high c)) / ((high - low) c) with c = dt tokens."""
    c = STEPS * tokens
    return (((-low * c).exp() - (-high * c).exp()) / ((high - low) * c)).mean().item()


def share_kept(mixer, tokens):
    """The share of fast weights that is left after tokens of zeros, which open no gate and write nothing."""
    before = torch.ones_like(mixer.new_fast(1))
    _, after, _ = mixer(torch.zeros(1, tokens, 2048), before, mixer.new_window(1), Positions(0, tokens, torch.device("cpu")))
    return after.double()


def made(kind, **fields):
    cls = mixers.get(kind)
    mixer = cls(2048, cls.Options(**fields), None)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.zero_()
        mixer.init_weights(torch.Generator().manual_seed(0))
        for name, parameter in mixer.named_parameters():
            if name.endswith("bias") and not name.startswith("dt_"):
                parameter.zero_()  # of convolutions: so that zeros stay zeros
    return mixer


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("decay", [1.0, 16.0])
@pytest.mark.parametrize(
    ("kind", "fields", "lowest"),
    [
        ("gdn", {"heads": 1024, "expand_v": 1}, 1e-3),
        ("jet", {"heads": 1024, "expand_v": 1, "generator_reduction": 1024}, 1e-3),
        ("mamba2", {"head_dim": 4, "state_dim": 2}, 1 / 16),
    ],
)
def test_memory_at_initialisation(kind, fields, lowest, decay, passes):
    """1,024 heads: the standard error of the mean is below 0.012. N passes over a window decay N times."""
    kept = share_kept(made(kind, decay_init=decay, **fields), passes * TOKENS).mean().item()
    assert kept == pytest.approx(kept_on_average(lowest * decay, decay, passes * TOKENS), abs=0.03)


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("decay", [None, 1.0])
def test_memory_of_mamba_at_initialisation(decay, passes):
    """The n-th of 8 fast weights of a channel decays with A = n decay_init / 8; over its 4,096 channels, dt is log-uniform."""
    kept = share_kept(made("mamba", state_dim=8, decay_init=decay), passes * TOKENS).mean(dim=(0, 1))
    for n, share in enumerate(kept.tolist(), 1):
        rate = n * (decay or 8.0) / 8 * passes * TOKENS
        assert share == pytest.approx((-rate * STEPS).exp().mean().item(), abs=0.02)


@pytest.mark.parametrize("kind", ["gdn", "jet"])
@pytest.mark.parametrize("init", ["uniform", "identity"])
def test_convolutions_at_initialisation(kind, init):
    """Close to the identity: the newest tap is 1, all are off by at most a tenth of taps^-0.5."""
    mixer = made(kind, heads=8, expand_v=1, conv_init=init)
    with torch.no_grad():
        mixer.init_weights(torch.Generator().manual_seed(0))
    for taps in [mixer.kernel_out.bias.view(-1, 4)] if kind == "jet" else [mixer.q_conv, mixer.k_conv, mixer.v_conv]:
        off = taps.detach() - torch.tensor([0.0, 0.0, 0.0, 1.0 if init == "identity" else 0.0])
        widest = (0.1 if init == "identity" else 1.0) * 4**-0.5
        assert off.abs().max() <= widest + 1e-6
        assert off.std().item() == pytest.approx(widest / math.sqrt(3), rel=0.05)
