"""The diagrams of docs/reading-kernels.md are drawn by one command."""

import pytest

from bench.diagrams import main


def test_both_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["--out", str(tmp_path)]) == 0
    drawn = {path.name for path in tmp_path.iterdir() if path.stat().st_size > 10_000}
    assert drawn == {"attention.png", "layer-norm.png"}
    assert capsys.readouterr().out.count("wrote") == 2
