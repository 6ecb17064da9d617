"""Kimi Delta Attention beside a layer of a tiny random Kimi Linear model that was run by transformers."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import zoo
from zoo.blocks.positions import Positions

LAYER = Path(__file__).parents[1] / "data" / "kimi-linear-layer.safetensors"
OURS = {
    "self_attn.": "mixer.",
    "conv1d.weight": "conv",
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "mlp_norm",
}


@torch.no_grad()
def test_a_layer_of_kimi_linear() -> None:
    """Its output, in one piece and in several, and the fast weights and the inputs of the convolutions that it keeps."""
    stored = load_file(LAYER)
    hidden, out, recurrent, conv = (stored.pop(name) for name in ("hidden", "out", "recurrent_state", "conv_state"))
    options = {"heads": 3, "head_dim": 16, "norm_eps": 1e-5}
    config = {"name": "layer", "vocab_size": 4, "d_model": 64, "d_ff": 96, "layers": "kda", "blocks": {"kda": options}, "norm_eps": 1e-5}
    block = zoo.create(config).blocks[0]
    weights = {}
    for name, x in stored.items():
        for theirs, ours in OURS.items():
            name = name.replace(theirs, ours)
        weights[name] = x.squeeze(1) if name.endswith("conv") else x.flatten() if name.endswith("A_log") else x
    block.load_state_dict(weights)
    for pieces in [48], [5, 1, 2, 17, 3, 20]:
        fast, window, at, found = block.mixer.new_fast(2), block.mixer.new_window(2), 0, []
        for piece in hidden.split(pieces, dim=1):
            y, fast, window = block(piece, fast, window, Positions(at, piece.shape[1], piece.device))
            at += piece.shape[1]
            found.append(y)
        torch.testing.assert_close(torch.cat(found, dim=1), out, rtol=0, atol=2e-5)
        torch.testing.assert_close(fast, recurrent, rtol=0, atol=1e-5)
        torch.testing.assert_close(window.conv_state, conv[..., 1:], rtol=0, atol=1e-5)
