"""The models of the language benchmark: TEN, its variants, and other people's models of as many parameters.

All are called as ours are: model(input_ids, labels=labels)["loss"], prefill(prompt, room) and step(token, state).

A peer has the TEN's width and tied embeddings, and its MLP is as wide as brings its parameters to the TEN's. It has the
TEN's depth too, less a layer at a time while its MLP would be narrower than is usual (4/3 of the width where an MLP has
three matrices, 2 where it has two). Mamba-2 has no MLP: its width and depth are the nearest of a grid.
A learned position table is not counted, since it adds no arithmetic.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from kernels import linear_cross_entropy
from models.ten import TEN, TENConfig

HEAD_SIZE = 64  # of attention; of the recurrences too
MAX_DIFFERENCE = 0.01  # in parameters, between a peer and the TEN
THREE_MATRICES, TWO_MATRICES = 4 / 3, 2.0  # least d_ff / d_model

Build = Callable[[TENConfig, int], nn.Module]  # (the TEN's shape, longest sequence) -> model


class OtherModel(nn.Module):
    """A causal language model of transformers or fla behind our calls.

    Its logits and loss are its library's own; with `our_head` they are `kernels.linear_cross_entropy`, so that what the
    head gains and what the mixer gains can be told apart. It reads over document borders (`reset` is not used).
    """

    def __init__(self, inner: nn.Module, our_head: bool = False) -> None:
        super().__init__()
        inner.loss_type = "ForCausalLM"  # transformers cannot tell by the name GPT2LMHeadModel, and warns
        self.inner, self.our_head = inner, our_head
        self.from_transformers = type(inner).__module__.startswith("transformers.")

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_items: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """input_ids and labels [B, T] int64 -> {"loss"} in nats per label, without labels {"logits": [B, T, V]}."""
        if labels is None:
            return {"logits": self.inner(input_ids=input_ids, use_cache=False).logits}
        if self.our_head:
            hidden = self.inner.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            weight = self.inner.get_output_embeddings().weight
            return {"loss": linear_cross_entropy(hidden, weight, labels, num_items=num_items).loss}
        # fla shifts the labels once more: the same work, but no score to report.
        own_labels = {"shift_labels": labels} if self.from_transformers else {}
        return {"loss": self.inner(input_ids=input_ids, labels=labels, use_cache=False, **own_labels).loss}

    def prefill(self, input_ids: Tensor, room: int) -> tuple[Tensor, object]:
        """Read [B, T] tokens -> logits [B, V] of the last position, and a cache with room for `room` tokens more."""
        cache = None
        if self.from_transformers:
            # Half the cost of the growing cache at 8192 tokens, which is copied for every token.
            from transformers import StaticCache

            cache = StaticCache(config=self.inner.config, max_cache_len=input_ids.shape[1] + room)
        return self._read(input_ids, cache)

    def step(self, token: Tensor, cache: object) -> tuple[Tensor, object]:
        """Read one token per row, [B] -> logits [B, V] and the cache."""
        return self._read(token[:, None], cache)

    def _read(self, input_ids: Tensor, cache: object) -> tuple[Tensor, object]:
        out = self.inner(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values


# ----------------------------------------------------------------------------------------------------- equal parameters


def count_parameters(model: nn.Module) -> int:
    """All but a learned position table."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("wpe.weight"))


def _count(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return count_parameters(build())


def fit(build: Callable[[int, int], nn.Module], base: TENConfig, least_ratio: float) -> tuple[int, int]:
    """The (num_layers, d_ff) at which build(num_layers, d_ff) has the parameters of TEN(base); d_ff a multiple of 8."""
    target = _count(lambda: TEN(base))
    for num_layers in range(base.num_layers, 0, -1):
        one, two = (_count(partial(build, num_layers, d_ff)) for d_ff in (8, 16))  # linear in d_ff
        d_ff = 8 * (1 + round((target - one) / (two - one)))
        if d_ff >= least_ratio * base.d_model:
            return num_layers, d_ff
    raise ValueError(f"no depth gives a peer of {target:,} parameters an MLP {least_ratio:.2f} times as wide as itself")


# --------------------------------------------------------------------------------------------------------------- models


def ten(base: TENConfig, max_length: int, **changes: object) -> TEN:
    return TEN(dataclasses.replace(base, **changes))


def selective(base: TENConfig, max_length: int) -> TEN:
    config = dataclasses.replace(base, selective=True)
    # The projection to decays and phases is paid for by a narrower MLP at the same depth.
    _, d_ff = fit(lambda _, d_ff: TEN(dataclasses.replace(config, d_ff=d_ff)), base, least_ratio=0.0)
    return TEN(dataclasses.replace(config, d_ff=d_ff))


def llama(base: TENConfig, max_length: int, our_head: bool = False, least_ratio: float = THREE_MATRICES) -> OtherModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(num_layers: int, d_ff: int) -> nn.Module:
        heads = max(1, base.d_model // HEAD_SIZE)
        config = LlamaConfig(
            vocab_size=base.vocab_size,
            hidden_size=base.d_model,
            intermediate_size=d_ff,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=max_length,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config)

    return OtherModel(build(*fit(build, base, least_ratio)), our_head)


def gpt2(base: TENConfig, max_length: int) -> OtherModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    def build(num_layers: int, d_ff: int) -> nn.Module:
        config = GPT2Config(
            vocab_size=base.vocab_size,
            n_positions=max_length,
            n_embd=base.d_model,
            n_inner=d_ff,
            n_layer=num_layers,
            n_head=max(1, base.d_model // HEAD_SIZE),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
        return GPT2LMHeadModel(config)

    return OtherModel(build(*fit(build, base, TWO_MATRICES)))


def gated_deltanet(base: TENConfig, max_length: int) -> OtherModel:
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    def build(num_layers: int, d_ff: int) -> nn.Module:
        config = GatedDeltaNetConfig(
            vocab_size=base.vocab_size,
            hidden_size=base.d_model,
            intermediate_size=d_ff,
            num_hidden_layers=num_layers,
            head_dim=HEAD_SIZE,
            num_heads=max(1, 3 * base.d_model // (4 * HEAD_SIZE)),  # keys 3/4, values 3/2 of the width: its paper's
            tie_word_embeddings=True,
        )
        return GatedDeltaNetForCausalLM(config)

    return OtherModel(build(*fit(build, base, THREE_MATRICES)))


def mamba2(base: TENConfig, max_length: int) -> OtherModel:
    from fla.models import Mamba2Config, Mamba2ForCausalLM

    def build(width: int, num_layers: int) -> nn.Module:
        config = Mamba2Config(
            vocab_size=base.vocab_size, hidden_size=width, num_hidden_layers=num_layers, tie_word_embeddings=True
        )
        return Mamba2ForCausalLM(config)

    target = _count(lambda: TEN(base))
    widths = range(max(HEAD_SIZE, base.d_model - 2 * HEAD_SIZE), base.d_model + 2 * HEAD_SIZE + 1, HEAD_SIZE // 2)
    shapes = []
    for width in widths:
        one, two = (_count(partial(build, width, n)) for n in (1, 2))  # linear in the depth
        num_layers = max(1, 1 + round((target - one) / (two - one)))
        shapes.append((abs(one + (num_layers - 1) * (two - one) - target), width, num_layers))
    _, width, num_layers = min(shapes)
    return OtherModel(build(width, num_layers))


MODELS: dict[str, Build] = {
    "ten": ten,
    "ten_no_energy": lambda base, n: ten(base, n, energy_reg_weight=0.0),
    "hten": lambda base, n: ten(base, n, hten_scales=(1, 2, 4)),
    "hten_hold": lambda base, n: ten(base, n, hten_scales=(1, 2, 4), hten_mode="hold"),
    "selective": selective,
    "gpt2": gpt2,
    "llama": llama,
    # In Llama's own proportions. At nano size it has two layers, and after 160k bytes 3.58 bits per byte, `llama` 3.69.
    "llama_wide": lambda base, n: llama(base, n, least_ratio=8 / 3),
    "llama_our_head": lambda base, n: llama(base, n, our_head=True),
    "mamba2": mamba2,
    "gated_deltanet": gated_deltanet,
}
FROM_FLA = ("mamba2", "gated_deltanet")
OURS = ("ten", "ten_no_energy", "hten", "hten_hold", "selective")


def missing(name: str, device: str) -> str | None:
    """Why a model cannot run here, or None."""
    if name in FROM_FLA and device != "cuda":
        return "its kernels need a GPU"
    library = "fla" if name in FROM_FLA else None if name in OURS else "transformers"
    if library is not None and importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    return None


def build_model(name: str, base: TENConfig, max_length: int, seed: int = 0) -> nn.Module:
    """The named model, its parameters within 1 % of TEN(base)'s. Raises ValueError where no shape comes that near."""
    torch.manual_seed(seed)
    model = MODELS[name](base, max_length)
    target, got = _count(lambda: TEN(base)), count_parameters(model)
    if abs(got - target) > MAX_DIFFERENCE * target:
        raise ValueError(f"the nearest {name} has {got:,} parameters where the TEN has {target:,}")
    return model
