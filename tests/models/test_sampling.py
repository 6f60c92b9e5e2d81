import pytest
import torch

from models.sampling import sample_token

LOGITS = torch.tensor([0.5, 0.05, 0.3, 0.15]).log()


def frequencies(**arguments) -> torch.Tensor:
    draws = sample_token(LOGITS.expand(20_000, 4), generator=torch.Generator().manual_seed(0), **arguments)
    return draws.bincount(minlength=4) / 20_000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.5, 0.05, 0.3, 0.15]),
        ({"temperature": 0.0}, [1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 0.5}, [0.6849, 0.0068, 0.2466, 0.0616]),
        ({"top_k": 1}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_k": 2}, [0.625, 0.0, 0.375, 0.0]),
        ({"top_k": 99}, [0.5, 0.05, 0.3, 0.15]),
        ({"top_p": 1e-6}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_p": 0.6}, [0.625, 0.0, 0.375, 0.0]),
        ({"top_k": 3, "top_p": 0.8}, [0.625, 0.0, 0.375, 0.0]),
    ],
)
def test_tokens_are_drawn_with_the_right_frequencies(arguments, expected):
    torch.testing.assert_close(frequencies(**arguments), torch.tensor(expected), rtol=0, atol=0.015)


def test_the_logits_are_left_alone():
    logits = LOGITS.expand(2, 4).clone()
    sample_token(logits, top_k=1, top_p=0.5)
    assert torch.equal(logits, LOGITS.expand(2, 4))
