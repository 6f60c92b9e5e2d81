"""ICSplineTransport: spline couplings of bonds, angles and dihedrals, on top of the √T map.

    model = ICSplineTransport(ICTransportConfig(zmatrix=system.zmatrix, soft=system.soft, flips=system.flips))
    model.set_means(cold, hot)                              # frames [n, N, 3] nm of the two ends
    model.energy_fn = potential
    model(cold, hot, cold_energy, hot_energy)["loss"].backward()
    model.transport(x, 300.0, 450.0)                        # y, log-determinant

A harmonic coordinate deviates from its mean as √T. A flow without couplings, or one that has learned nothing, scales
the stiff coordinates so; soft dihedrals, which turn, it leaves alone, and peptide bonds stay trans or cis, whichever
they are. The couplings stand before that scaling, in units of the cold ensemble, and what they do is proportional to

    τ = ln(T / t_cold) / ln(t_hot / t_cold)

so that F at t_cold is the identity, and between t_cold and t_hot only one F has to run.
"""

# No `from __future__ import annotations` here: PyTorchModelHubMixin reads the type of `config` from each __init__.

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from zuko.transforms import MonotonicRQSTransform

from models.internal_coordinates import Frame, InternalCoordinates, depths, wrap, zmatrix_problems
from models.transport import Block, Transport, TransportConfig

# A spline acts on [-π, π], which is a soft dihedral's circle; beyond, a stiff coordinate stays as it is.
BOUND = math.pi
DEVIATIONS = 2.0  # standard deviations of a stiff coordinate that are one unit of the splines
HARMONICS = 3  # of a soft dihedral that a token is told: a methyl group looks the same after a third of a turn
TOLD = 3 + 2 * HARMONICS  # of an atom: bond, angle, stiff dihedral; sines and cosines of a soft one


@dataclass(frozen=True, kw_only=True)
class ICTransportConfig(TransportConfig):
    """zmatrix: see `InternalCoordinates`. Dihedrals are counted from its third row. soft: those that turn rather than
    vibrate. flips: stiff ones with two states half a turn apart (a peptide bond's, trans and cis), each left as it is.
    """

    zmatrix: tuple[tuple[int, int, int, int], ...]
    soft: tuple[int, ...]
    flips: tuple[int, ...] = ()
    num_couplings: int = 8  # 0: the √T map
    num_bins: int = 8
    d_ff: int = 128

    def __post_init__(self) -> None:
        # From JSON and numpy alike.
        object.__setattr__(self, "zmatrix", tuple(tuple(int(atom) for atom in row) for row in self.zmatrix))
        for name in ("soft", "flips"):
            object.__setattr__(self, name, tuple(int(k) for k in getattr(self, name)))
        super().__post_init__()

    def problems(self) -> list[str]:
        found = super().problems() + zmatrix_problems(self.zmatrix)
        found += self.below(0, "num_couplings") + self.below(2, "num_bins") + self.below(1, "d_ff")
        count = len(self.zmatrix) - 2
        named = self.soft + self.flips
        if len(set(named)) < len(named) or not all(0 <= k < count for k in named):
            found.append(
                f"soft and flips must name some of the {count} dihedrals, counted from 0, once each, not {self.soft} "
                f"and {self.flips}"
            )
        return found


# Everything but the molecule and its temperatures.
PRESETS = {
    "base": {"num_layers": 1},
    "tiny": {"d_model": 16, "num_heads": 2, "num_layers": 1, "num_couplings": 4, "d_ff": 32},
}


class Layout:
    """What the coordinates q = (bonds, angles, dihedrals) are, and which of them a coupling moves."""

    def __init__(self, config: ICTransportConfig):
        n, self.zmatrix = len(config.zmatrix), config.zmatrix
        self.atom = [config.zmatrix[row][0] for row in (*range(n), *range(1, n), *range(2, n))]  # that it places
        self.kind = [0] * n + [1] * (n - 1) + [2] * (n - 2)
        self.soft, self.flips = ([2 * n - 1 + k for k in of] for of in (config.soft, config.flips))

    def moved(self, coupling: int) -> list[int]:
        """In turn: the dihedrals, all but them, the atoms at an even number of bonds from the root, at an odd one."""
        depth = depths(self.zmatrix, 1)
        of_dihedrals, of_even = [kind == 2 for kind in self.kind], [depth[atom] % 2 == 0 for atom in self.atom]
        first = of_even if coupling % 4 >= 2 else of_dihedrals
        return [k for k in range(len(self.atom)) if first[k] == (coupling % 2 == 0)]

    def told(self, moved: list[int]) -> list[int]:
        """By atom, TOLD columns of (q, sines and cosines of soft dihedrals, whether others are turned over, 0): of what
        is not moved, or the last. No coupling turns a dihedral over, so all are told of that."""
        size, waves = len(self.atom), len(self.soft) * HARMONICS
        over = size + 2 * waves
        nothing = over + len(self.flips)
        table = [[nothing] * TOLD for _ in range(len(self.zmatrix) + 1)]
        for k in set(range(size)) - set(moved):
            row = table[self.atom[k]]
            if k in self.soft:
                start = size + self.soft.index(k) * HARMONICS
                row[3:] = [*range(start, start + HARMONICS), *range(start + waves, start + waves + HARMONICS)]
            else:
                row[self.kind[k]] = k
        for column, k in enumerate(self.flips, over):
            table[self.atom[k]][3] = column
        return [column for row in table for column in row]

    def distances(self) -> list[list[int]]:
        """Bonds between any two atoms, along the z-matrix."""
        root = self.zmatrix[0][1]
        lines = {root: {root}}
        for atom, parent, *_ in self.zmatrix:
            lines[atom] = lines[parent] | {atom}
        # Two lines to the root are one from where they meet.
        return [[len(lines[a] ^ lines[b]) for b in range(len(lines))] for a in range(len(lines))]


class Each(nn.Module):
    """A linear map of its own for each of some places: x [B, places, in] -> [B, places, out]."""

    def __init__(self, places: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(places, in_features, out_features) * in_features**-0.5)
        self.bias = nn.Parameter(torch.randn(places, 1, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.transpose(0, 1), self.weight).transpose(0, 1)


class Coupling(nn.Module):
    """Rational-quadratic splines of some coordinates (arXiv 1906.04032, on circles 2002.02428) whose knots depend on τ
    and on the other coordinates, through attention over one token an atom."""

    moved: Tensor
    movers: Tensor
    told: Tensor
    soft: Tensor
    distances: Tensor
    circle: Tensor

    def __init__(self, config: ICTransportConfig, layout: Layout, index: int):
        super().__init__()
        moved, distances = layout.moved(index), layout.distances()
        self.bins = config.num_bins
        self.tokens = Each(len(distances), TOLD, config.d_model)
        self.warmth = nn.Parameter(torch.zeros(2, config.d_model))  # by τ and τ²
        self.near = nn.Parameter(torch.zeros(config.num_heads, max(map(max, distances)) + 1))
        self.blocks = nn.ModuleList(
            Block(config.d_model, config.num_heads, config.d_ff) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.knots = Each(len(moved), config.d_model, 3 * self.bins - 1)
        for parameter in self.knots.parameters():
            nn.init.zeros_(parameter)  # knots at equal distances and slopes of 1: the identity
        indices = {"moved": moved, "movers": [layout.atom[k] for k in moved], "told": layout.told(moved)}
        for name, values in (indices | {"soft": layout.soft, "distances": distances}).items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)
        self.register_buffer("circle", torch.tensor([k in layout.soft for k in moved]), persistent=False)
        # Where the ends of a circle meet its spline is the identity: opposite places in even and odd rounds.
        self.seam = math.pi * (index // 4 % 2)

    def forward(self, z: Tensor, over: Tensor, tau: float, inverse: bool) -> tuple[Tensor, Tensor]:
        """z [B, 3N - 6], flips that are turned over [B, flips] -> z, log-determinant [B]."""
        widths, heights, slopes = (tau * self._knots(z, over, tau)).split([self.bins, self.bins, self.bins - 1], -1)
        spline = MonotonicRQSTransform(widths, heights, slopes, bound=BOUND)
        moved = self._turned(z.index_select(1, self.moved), -self.seam)
        moved, logdet = (spline.inv if inverse else spline).call_and_ladj(moved)
        return z.index_copy(1, self.moved, self._turned(moved, self.seam)), logdet.sum(-1)

    def _turned(self, moved: Tensor, angle: float) -> Tensor:
        return torch.where(self.circle, wrap(moved + angle), moved)

    def _knots(self, z: Tensor, over: Tensor, tau: float) -> Tensor:
        """[B, moved, 3 bins - 1], from what is not moved."""
        waves = torch.stack([k * z.index_select(1, self.soft) for k in range(1, HARMONICS + 1)], -1).flatten(1)
        known = torch.cat([z, waves.sin(), waves.cos(), over, z.new_zeros(len(z), 1)], 1)
        h = self.tokens(known.index_select(1, self.told).unflatten(1, (-1, TOLD)))  # [B, N, D]
        h = h + (tau * self.warmth[0] + tau**2 * self.warmth[1])
        bias = self.near[:, self.distances]  # [H, N, N]
        for block in self.blocks:
            h = block(h, bias)
        # Adam moves all d_model weights of an output together, however small the gradient. Without the factor, 27 steps
        # at rates rising to 1e-3 took the gap of alanine dipeptide from 0.5 to 4.6 nats.
        return self.knots(self.norm(h.index_select(1, self.movers))) * h.shape[-1] ** -0.5


class ICSplineTransport(Transport):
    config: ICTransportConfig
    stiff: Tensor
    flips: Tensor
    reach: Tensor
    mean: Tensor
    drift: Tensor
    excess: Tensor

    def __init__(self, config: ICTransportConfig):
        super().__init__(config)
        self.num_atoms = len(config.zmatrix) + 1
        self.coordinates = InternalCoordinates(config.zmatrix)
        layout = Layout(config)
        self.couplings = nn.ModuleList(Coupling(config, layout, i) for i in range(config.num_couplings))
        n = len(config.zmatrix)
        self.sizes = [n, n - 1, n - 2]
        stiff = torch.tensor([k not in layout.soft for k in range(sum(self.sizes))])
        self.register_buffer("stiff", stiff, persistent=False)
        self.register_buffer("flips", torch.tensor(layout.flips, dtype=torch.int64), persistent=False)
        reach = torch.full((len(stiff),), math.pi)  # of a deviation from the mean
        reach[layout.flips] = math.pi / 2
        self.register_buffer("reach", reach, persistent=False)
        # At t_cold, and how far it moves up to t_hot; one unit of the splines.
        for name in ("mean", "drift", "unit"):
            self.register_buffer(name, torch.full((len(stiff),), torch.nan))
        # What the logarithm of the scale at t_hot has beyond √T.
        self.register_buffer("excess", torch.zeros(len(stiff)))

    @torch.no_grad()
    def set_means(self, cold: Tensor, hot: Tensor, *, fit_scale: bool = False) -> None:
        """Take means and units from frames [n, N, 3] nm at t_cold and t_hot, of training data.

        fit_scale: the ratio of the ends' standard deviations in place of √T. Without couplings this is the diagonal
        affine map that fits the data.
        """
        mean, deviation = self._moments(cold)
        hot_mean, hot_deviation = self._moments(hot)
        for name, value, soft in (
            ("mean", mean, 0.0),
            ("drift", self._wrapped(hot_mean - mean), 0.0),
            ("unit", DEVIATIONS * deviation, 1.0),
        ):
            getattr(self, name).copy_(torch.where(self.stiff, value, soft))
        if fit_scale:
            root = 0.5 * math.log(self.config.t_hot / self.config.t_cold)
            self.excess.copy_(torch.where(self.stiff, (hot_deviation / deviation).log() - root, 0.0))

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each coordinate, [3N - 6], in float64; of angles about the circular mean."""
        q = torch.cat(self.coordinates(x.to(self.mean.device, torch.float64))[:3], 1)
        centre = torch.atan2(q.sin().mean(0), q.cos().mean(0))  # of a bond in nm, too, near enough to its mean
        deviation = self._folded(self._wrapped(q - centre))[0]
        return self._wrapped(centre + deviation.mean(0)), deviation.std(0)

    def _wrapped(self, q: Tensor) -> Tensor:
        bonds, angles, dihedrals = q.split(self.sizes, -1)
        return torch.cat([bonds, angles, wrap(dihedrals)], -1)

    def _folded(self, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """Deviations [B, 3N - 6], those of flips from the nearer of their two states; and 1 where that is the one half
        a turn from the mean, else 0 [B, flips]."""
        of_flips = deviation.index_select(1, self.flips)
        over = (of_flips.abs() > math.pi / 2).to(of_flips)
        return deviation.index_copy(1, self.flips, wrap(of_flips + math.pi * over)), over

    # ---- the map -----------------------------------------------------------------------------------------------------

    def chart(self, x: Tensor) -> tuple[Tensor, Frame, Tensor]:
        *q, log_volume = self.coordinates(x)
        return torch.cat(q, 1), self.coordinates.frame(x), log_volume

    def unchart(self, q: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        bonds, angles, dihedrals = q.split(self.sizes, 1)
        return self.coordinates.inverse(bonds, angles, dihedrals, frame)

    def flow(self, q: Tensor, temperature: float, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        c = self.config
        tau = math.log(temperature / c.t_cold) / math.log(c.t_hot / c.t_cold)
        mean = self.mean + (temperature - c.t_cold) / (c.t_hot - c.t_cold) * self.drift  # thermal expansion is linear
        log_scale = torch.where(self.stiff, 0.5 * math.log(temperature / c.t_cold) + tau * self.excess, 0.0)
        source, target = (self.mean, self.unit), (mean, self.unit * log_scale.exp())
        logdet = log_scale.sum()
        if inverse:
            source, target, logdet = target, source, -logdet
        z, over = self._folded(self._wrapped(q - source[0]))
        z = z / source[1]
        for coupling in reversed(self.couplings) if inverse else self.couplings:
            z, more = coupling(z, over, tau, inverse)
            logdet = logdet + more
        deviation = z * target[1]
        # A stiff dihedral that the scaling takes more than half way to its next state would come back as another.
        too_far = ((deviation.abs() > self.reach) & self.stiff).any(1)
        deviation = deviation.index_add(1, self.flips, math.pi * over)
        return self._wrapped(target[0] + deviation), torch.where(too_far, -torch.inf, logdet)
