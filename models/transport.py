"""What the flows between temperatures share: the map for any two temperatures, its loss, and a transformer block.

A flow F_T carries the ensemble at `t_cold` to the one at T, and

    T_{A→B} = F_B ∘ F_A⁻¹,   F at t_cold = 1

so that identity, inverse and composition hold by construction. It works in a chart of the 3N - 6 coordinates of a
molecule's shape; where the molecule stands and how it is turned it leaves alone, so that T is SE(3)-equivariant and its
log-determinant is that of the whole 3N × 3N Jacobian.

With β = 1 / kT, A cold and B hot, Δ = a + b is the logarithm of the odds that a swap of x ~ A and y ~ B is accepted:

    a(x) = β_A U(x) - β_B U(T x) + log|det J_T(x)|,   b(y) = β_B U(y) - β_A U(T⁻¹ y) + log|det J_T⁻¹(y)|

The loss is the gap -E[Δ] = KL(T#A ‖ B) + KL(T⁻¹#B ‖ A) >= 0: 0 is the optimum, whatever the molecule.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.hub import HubModel

KB = 8.314462618e-3  # kJ/mol/K


@dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """What every flow has. Raises one ValueError for all faults."""

    t_cold: float = 300.0  # K
    t_hot: float = 450.0
    d_model: int = 64
    num_heads: int = 4
    num_layers: int = 2
    # kJ/mol/nm that one atom's force counts with in the gradient, at most.
    max_force: float = 2e4

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))

    def problems(self) -> list[str]:
        found = self.below(1, "d_model", "num_heads", "num_layers")
        if not 0 < self.t_cold < self.t_hot < math.inf:
            found.append(f"t_cold and t_hot must be 0 < t_cold < t_hot, in K, not {self.t_cold} and {self.t_hot}")
        if self.num_heads >= 1 and self.d_model % self.num_heads:
            found.append(f"d_model {self.d_model} must be a multiple of num_heads {self.num_heads}")
        if not self.max_force > 0:
            found.append(f"max_force must be above 0, not {self.max_force}")
        return found

    def below(self, least: float, *names: str) -> list[str]:
        return [f"{n} must be at least {least}, not {getattr(self, n)}" for n in names if not getattr(self, n) >= least]


class ClippedEnergy(torch.autograd.Function):
    """U [B] of x [B, N, 3], exactly, and which frames [B] had a force above `max_force`; only the gradient is clipped.

    A clash has a force of 10¹⁰ kJ/mol/nm that would drown all others in a batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, energy_fn: Callable[[Tensor], Tensor], max_force: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = energy_fn(x)
            (gradient,) = torch.autograd.grad(energy.sum(), x)
        gradient = gradient.nan_to_num()
        norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)  # [B, N, 1]
        clipped = (norm > max_force).any(1).squeeze(-1)
        ctx.save_for_backward(gradient * (max_force / norm.clamp(min=max_force)))
        ctx.mark_non_differentiable(clipped)
        return energy.detach(), clipped

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[:, None, None] * gradient, None, None


class Transport(HubModel):
    """A flow between temperatures; a subclass has a chart, the F_T in it, `num_atoms` and a buffer `unit`.

    Set `energy_fn` before a call with energies: frames [B, N, 3] nm -> U [B] kJ/mol, differentiable. Call `set_means`
    with frames of both ends, or load a checkpoint, before any other: until then every result is NaN.
    """

    energy_fn: Callable[[Tensor], Tensor] | None = None
    num_atoms: int
    unit: Tensor

    def __init__(self, config: TransportConfig):
        super().__init__()
        self.config = config

    # ---- a subclass's ------------------------------------------------------------------------------------------------

    def set_means(self, cold: Tensor, hot: Tensor) -> None:
        """Take the flow's fixed statistics from frames [n, N, 3] at t_cold and t_hot."""
        raise NotImplementedError

    def chart(self, x: Tensor) -> tuple[Tensor, Any, Tensor]:
        """x [B, N, 3] -> shape q [B, 3N - 6], a frame, log-volume [B] of dx by dq."""
        raise NotImplementedError

    def unchart(self, q: Tensor, frame: Any) -> tuple[Tensor, Tensor]:
        """-> x, log-volume; -inf where q is no shape."""
        raise NotImplementedError

    def flow(self, q: Tensor, temperature: float, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """F_T, or its inverse -> q, log-determinant [B]; -inf where q is not in its domain."""
        raise NotImplementedError

    # ---- the map -----------------------------------------------------------------------------------------------------

    def transport(self, x: Tensor, t_from: float, t_to: float) -> tuple[Tensor, Tensor]:
        """Frames x [B, N, 3] nm at one temperature in K -> frames at the other, log-determinant [B].

        In the model's dtype, and x itself where the temperatures are the same. A log-determinant of -inf says
        that x has no image: a swap with it is to be rejected. Raises ValueError for other shapes and temperatures.
        """
        for t in (t_from, t_to):
            if not 0 < t < math.inf:
                raise ValueError(f"a temperature must be a finite number of K above 0, not {t}")
        x = self._checked(x)
        if t_from == t_to:
            return x, x.new_zeros(len(x))
        with torch.autocast(x.device.type, enabled=False):
            q, frame, before = self.chart(x)
            q, logdet = self._between(q, t_from, t_to)
            y, after = self.unchart(q, frame)
        return y, logdet + after - before

    def _between(self, q: Tensor, t_from: float, t_to: float) -> tuple[Tensor, Tensor]:
        logdet = q.new_zeros(len(q))
        for t, inverse in ((t_from, True), (t_to, False)):
            if t != self.config.t_cold:
                q, more = self.flow(q, t, inverse=inverse)
                logdet = logdet + more
        return q, logdet

    def _checked(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or tuple(x.shape[1:]) != (self.num_atoms, 3):
            raise ValueError(f"frames must be [B, {self.num_atoms}, 3] in nm, not {list(x.shape)}")
        return x.to(self.unit.dtype)

    def forward(
        self,
        cold: Tensor,
        hot: Tensor,
        cold_energy: Tensor | None = None,
        hot_energy: Tensor | None = None,
        num_items: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Pairs of frames [B, N, 3] nm -> {"hot": T(cold), "forward_logdet" [B], "cold": T⁻¹(hot), "inverse_logdet"}.

        With their energies [B] in kJ/mol, sums over the pairs / num_items:
            loss: the gap, in nats = forward_energy - forward_logdet + inverse_energy - inverse_logdet - floor
            forward_energy, inverse_energy: β_B U(T x) and β_A U(T⁻¹ y)
            floor: β_A U(x) + β_B U(y), what the loss would be without it where no map can do better
            acceptance: min(1, exp Δ) of these pairs
            clipped: pairs with a force above max_force; outside: pairs without an image or with an infinite energy,
            whose swap is rejected: no other part counts them.
        A NaN is a fault, and goes into the loss.
        """
        c, size = self.config, len(cold)
        cold, hot = self._checked(cold), self._checked(hot)
        with torch.autocast(cold.device.type, enabled=False):
            # Both ways in one batch wherever the same is done.
            q, frame, before = self.chart(torch.cat([cold, hot]))
            hotter, up = self._between(q[:size], c.t_cold, c.t_hot)
            colder, down = self._between(q[size:], c.t_hot, c.t_cold)
            y, after = self.unchart(torch.cat([hotter, colder]), frame)
            logdet = torch.cat([up, down]) + after - before
            up, down = logdet[:size], logdet[size:]
            if cold_energy is None or hot_energy is None:
                return {"hot": y[:size], "forward_logdet": up, "cold": y[size:], "inverse_logdet": down}
            if self.energy_fn is None:
                raise ValueError("the loss needs a potential: set model.energy_fn")
            energy, clipped = ClippedEnergy.apply(y, self.energy_fn, c.max_force)
            b_cold, b_hot = 1 / (KB * c.t_cold), 1 / (KB * c.t_hot)
            floor = b_cold * cold_energy + b_hot * hot_energy
            up_energy, down_energy = b_hot * energy[:size], b_cold * energy[size:]
            delta = floor - up_energy + up - down_energy + down
            outside = delta.isinf()
            count = size if num_items is None else num_items

            def total(values: Tensor) -> Tensor:
                return values.masked_fill(outside, 0).sum() / count

            parts = {"forward_energy": up_energy, "inverse_energy": down_energy, "forward_logdet": up}
            parts |= {"inverse_logdet": down, "floor": floor, "acceptance": delta.clamp(max=0).exp()}
            parts = {name: total(value).detach() for name, value in parts.items()}
            either = clipped[:size] | clipped[size:]
            parts |= {"clipped": either.sum() / count, "outside": outside.sum() / count}
            return {"loss": total(-delta), **parts}


class Cache:
    """The keys and values [B H, n, C] that a block has seen."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, ...] | None = None

    def add(self, *new: Tensor) -> tuple[Tensor, ...]:
        """-> all of them. Never in place: backward needs those of each step as they were."""
        self.kept = new if self.kept is None else tuple(torch.cat(pair, 1) for pair in zip(self.kept, new, strict=True))
        return self.kept


class Block(nn.Module):
    """Attention and an MLP, norms first (arXiv 2002.04745), and no dropout: T⁻¹ has to meet the map that T was."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.query_key_value, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor, bias: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """x [B, n, D], bias [H, n, m] -> [B, n, D]. A cache makes x see what was seen before."""
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).flatten(1, 2)  # [B H, n, C]
        if cache is not None:
            keys, values = cache.add(keys, values)
        # By hand: where the bias learns, PyTorch's function is not fused either, and looks for rows of -inf besides.
        scores = queries * queries.shape[-1] ** -0.5 @ keys.transpose(1, 2)
        if bias is not None:
            scores = (scores.unflatten(0, (-1, self.num_heads)) + bias).flatten(0, 1)
        y = (scores.softmax(-1) @ values).unflatten(0, (-1, self.num_heads))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))
