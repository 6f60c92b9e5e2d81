"""The published test sets: how many mazes, and the SHA-256 of them (`tasks.maze.store.digest`), by (suite, min_path,
braid). A score says on which suite it was made; whoever has the same hash has scored on the same mazes."""

TEST_HASHES: dict[tuple[str, int, float], tuple[int, str]] = {
    ("perfect-8", 0, 0.0): (2000, "2d273e9b776408d06a5a78700e21cec5bca541d239a2ed141927af5de20cf95e"),
    ("perfect-12", 0, 0.0): (2000, "b5fdf2dfe4147a3e4fecddf496ea2ba0624c628796dc0fd707de9263d2dc76b2"),
    ("perfect-12", 50, 0.0): (2000, "096ec50dc4ff71edd771e2698bf32ef84062e5c36f39dd5bd6732ce480ad047f"),
    ("perfect-16", 0, 0.0): (2000, "f1a7844e781f8130b81e567ae227377121d48184f9893fa5a65ab9aff38c8aca"),
    ("perfect-16", 102, 0.0): (2000, "3e0669896a8f79f933faa56ebcbf1ff5529bf6a095a4bce1bfd4d00d90c5c76e"),
    ("perfect-20", 0, 0.0): (2000, "345be47c3b45f598713e0a158116ed7bca85b049652589e371d0aa5ae9926224"),
    ("perfect-30", 0, 0.0): (2000, "b99a9fcd6b1e408d922d10a8681da3a6a8780c4e85c87166ed1baf3754faa51d"),
    ("perfect30px", 0, 0.0): (2000, "71ddc222d8f3d3f43f65f575a4c2d04edd2ece7214e0cfcd5562a0f317bbe2c3"),
    ("randwall-20", 0, 0.0): (2000, "f88f6f1e52f4d01eb24b64c3d766b88ccd521362d40573dde660c08cc3b6a5a1"),
    ("randwall-30", 0, 0.0): (2000, "ff04577b41b0d70b056b538615f50fe3675870db008b991d5aa9eb37e9ffdff2"),
    ("hard30", 0, 0.0): (50, "8a4f76be6607a031270b4864e4af515d7a2f5bedb6b13c95cd40b0df3844e67d"),
}
