import pytest
import torch

from models.ten import TEN, TENConfig

TINY = {
    "vocab_size": 31,
    "d_model": 16,
    "num_layers": 2,
    "num_eigenstates": 8,
    "num_heads": 2,
    "d_ff": 24,
    "max_seq_len": 64,
}


@pytest.fixture
def tiny_ten():
    """Build a small float64 TEN, moved off its initialisation so that no path through it is too weak to be seen."""

    def build(**changes) -> TEN:
        torch.manual_seed(0)
        model = TEN(TENConfig(**{**TINY, **changes})).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in model.fp32_parameters():
                    parameter += 0.3 * torch.randn_like(parameter)
        return model

    return build


@pytest.fixture
def tokens():
    """Draw token ids [B, T] for the tiny vocabulary."""

    def draw(batch: int, time: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, TINY["vocab_size"], (batch, time), generator=generator)

    return draw
