"""ARC: coloured grids, a few demonstrations of a rule, and one question."""
