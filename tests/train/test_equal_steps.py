from train.engine.equal_steps import cut_short


def test_a_table_says_which_runs_the_clock_cut_short():
    assert cut_short({"champion": [1257, 1257], "borders": [1257, 1257]}) == []
    (line,) = cut_short({"champion": [1257, 1257], "grid2d": [1257, 186]})
    assert line.startswith("Not at equal steps") and "their 1,257 (grid2d 1,257, 186)" in line
