"""A maze solver that says the whole way: MLM-U (arXiv 2412.05117), a way with any of its cells hidden, all to be named.

    model = MLMU(MLMUConfig(maze_size=12))
    model(passages, start, goal, path, labels=labels)["loss"].backward()     # path: -1 where a cell is hidden
    model(passages, start, goal)["path"]                                     # int64 [B, N * N - 1], -1 behind its end

The cells of the maze go through the blocks as in models/maze_transformer.py, whatever the way is. The way goes through
the same blocks beside them, and each of its cells attends to the maze and to the known cells of the way, before and
behind it. What is hidden is attended to by nobody, so that how much of it there is does not tell how long the way is:
when a way is said, step by step, nothing but its beginning is there.
"""

# No `from __future__ import annotations` here: PyTorchModelHubMixin reads the type of `config` from each __init__.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.maze_layers import Attention, Block, MazeConfig, MazeModel


@dataclass(frozen=True, kw_only=True)
class MLMUConfig(MazeConfig):
    def problems(self) -> list[str]:
        found = super().problems()
        if self.position != "table":
            found.append(
                f"a way's cells are named, not pointed at from others: position must be table, not {self.position!r}"
            )
        if self.horizons != 1 or self.validity_mask or self.legacy:
            found.append(
                "the whole way is ahead, and any cell may be named: leave out horizons, validity_mask and legacy"
            )
        return found


class PathAttention(Attention):
    def forward(self, x: Tensor, cells: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """x [B, L, D] to itself; or, with cells [B, n, D], to these and to those of its own that are known [B, L]."""
        if cells is None:
            return super().forward(x)
        assert known is not None, "a way beside cells says which of its own are known"
        n = cells.shape[1]
        together = torch.cat([cells, x], 1)
        q, k, v = self.qkv(together).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, n + L, C]
        seen = F.pad(known, (n, 0), value=True)[:, None, None]  # [B, 1, 1, n + L]
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=seen, dropout_p=dropout)
        return self.out(heads.transpose(1, 2).flatten(2))


class PathBlock(Block):
    def __init__(self, config: MLMUConfig):
        super().__init__(config)
        self.attention = PathAttention(config)

    def forward(self, x: Tensor, cells: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """Cells alone, x [B, n, D]; or a way x [B, L, D] beside cells as this block was given them."""
        cells = None if cells is None else self.attention_norm(cells)
        x = x + self.dropout(self.attention(self.attention_norm(x), cells, known))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class MLMU(MazeModel):
    config: MLMUConfig

    def __init__(self, config: MLMUConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(PathBlock(config) for _ in range(config.num_layers))
        self.known = nn.Embedding(2, config.d_model)
        self.step = nn.Embedding(config.maze_size**2 - 1, config.d_model)
        self.init_weights()

    def forward(
        self,
        passages: Tensor,
        start: Tensor,
        goal: Tensor,
        path: Tensor | None = None,
        labels: Tensor | None = None,
        num_items: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Name the hidden cells of a way, or say it from its start.

        Args:
            passages, start, goal: as models.maze_layers.MazeModel has them.
            path: int64 [B, L], the cell after each step from the start; -1 where it is hidden, and behind the goal.
            labels: int64 [B, L], what is hidden; -100 is not counted.
            num_items: 0-d int64, what the loss is divided by; default the labels here that count.

        Returns:
            With labels 0-d "loss" and "ce_loss". Without them {"scores": [B, L, N * N]} of a path, and where none is
            given {"path": int64 [B, N * N - 1]}: step by step the best cell, up to the goal or to the first step that
            no passage allows, for nothing said after that counts; -1 from there on.

        Raises:
            ValueError for shapes, dtypes or sizes that do not fit.
        """
        self._check_mazes(passages, start, goal)
        self._check_path(passages, path, labels)
        cells = [self.embedding(passages, start, goal)]
        for block in self.blocks[:-1]:  # no way looks at what the last would make of them
            cells.append(self.run(block, cells[-1]))
        if path is None:
            return {"path": self._said(cells, passages, start, goal)}
        hidden = self._along(cells, path)
        if labels is None:
            return {"scores": self._scores(hidden)}
        counted = labels >= 0
        num_items = (counted.sum() if num_items is None else num_items).clamp(min=1)
        true = labels.masked_fill(~counted, -1).flatten().unsqueeze(1)  # [B * L, 1]
        smoothing = {"label_smoothing": self.config.label_smoothing, "num_items": num_items}
        loss = self.heads[0](hidden.flatten(0, 1), true, torch.ones_like(true, dtype=torch.bool), **smoothing)
        return {"loss": loss, "ce_loss": loss.detach()}

    def _along(self, cells: list[Tensor], path: Tensor) -> Tensor:
        """cells: what each block was given, [B, n, D]; path [B, L] -> hidden [B, L, D]."""
        known = path >= 0
        place = self.embedding.place(path.clamp(min=0)) * known.unsqueeze(2)  # type: ignore[misc]  # always a table
        h = self.known(known.long()) + self.step.weight[: path.shape[1]] + place
        for block, around in zip(self.blocks, cells, strict=True):
            h = self.run(block, h, around, known)
        return self.norm(h)

    def _scores(self, hidden: Tensor) -> Tensor:
        """hidden [B, L, D] -> [B, L, N * N], of all cells."""
        flat = hidden.flatten(0, 1)
        every = torch.arange(self.config.maze_size**2, device=flat.device).expand(len(flat), -1)
        return self.heads[0](flat, every).unflatten(0, hidden.shape[:2])

    def _said(self, cells: list[Tensor], passages: Tensor, start: Tensor, goal: Tensor) -> Tensor:
        size = passages.shape[-1]
        path = start.new_full((len(start), size**2 - 1), -1)
        offsets = torch.tensor([-size, size, -1, 1], device=start.device)
        rows, here = torch.arange(len(start), device=start.device), start
        for step in range(size**2 - 1):
            hidden = self._along(cells, path[rows, : step + 1])
            ahead = self._scores(hidden[:, -1:]).squeeze(1).argmax(1)
            path[rows, step] = ahead
            codes = passages[rows].flatten(1).gather(1, here.unsqueeze(1))  # [b, 1]
            open_ = (codes >> torch.arange(4, device=codes.device) & 1).bool()
            passage = (open_ & (here.unsqueeze(1) + offsets == ahead.unsqueeze(1))).any(1)
            left = passage & (ahead != goal[rows])
            rows, here, cells = rows[left], ahead[left], [c[left] for c in cells]
            if not len(rows):
                break
        return path

    def _check_path(self, passages: Tensor, path: Tensor | None, labels: Tensor | None) -> None:
        if path is None:
            if labels is not None:
                raise ValueError("labels belong to a path: give both")
            return
        longest = self.config.maze_size**2 - 1
        if path.dtype != torch.int64 or path.dim() != 2 or len(path) != len(passages) or path.shape[1] > longest:
            found = f"{path.dtype} {list(path.shape)}"
            raise ValueError(f"path must be int64 [{len(passages)}, at most {longest} steps], not {found}")
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != path.shape):
            raise ValueError(f"labels must be int64 {list(path.shape)}, not {labels.dtype} {list(labels.shape)}")
