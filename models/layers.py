"""Small modules that several architectures share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScaledLinear(nn.Linear):
    """A bias-free linear map whose output channels are scaled: y = scale * (W x).

    A scale without positions multiplies the weight and not the output, because a weight is smaller than a batch of
    activations. It is a module, and not two lines at its caller, so that hooks which gather a sharded weight see the
    call.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        """x [..., in_features], scale [out_features] or [..., out_features], any float -> [..., out_features] as x."""
        if scale.dim() == 1:
            return F.linear(x, self.weight * scale.to(self.weight.dtype)[:, None])
        y = F.linear(x, self.weight)
        return y * scale.to(y.dtype)


class MLP(nn.Module):
    """Two bias-free matrices with a squared ReLU between them: down(relu(up(x))^2).

    Primer (arXiv 2109.08668) found this activation. In a TEN of 0.4M parameters, after 250 steps on the bytes of Python
    source, it reached 1.68 nats, GELU 1.77 and SiLU 1.83.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]."""
        return self.down(F.relu(self.up(x)).square())


def rotary(coordinates: Sequence[Tensor], channels: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which `rotate` turns heads of this many channels at these places, [..., channels / 2] fp32.

    RoPE (arXiv 2104.09864) for one coordinate; several of them share the channels evenly (arXiv 2403.13298): channels
    must be a multiple of twice their number. coordinates: integers [...].
    """
    share = channels // 2 // len(coordinates)
    rates = base ** -(torch.arange(share, device=coordinates[0].device) / share)
    angles = torch.cat([c.unsqueeze(-1) * rates for c in coordinates], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., C], cos and sin broadcastable to [..., C / 2]: channel i and channel i + C / 2 turn as a pair."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
