"""Without a GPU the functions that would be captured are simply run."""

from __future__ import annotations

import torch

from medusa.engine.graphs import Graphs


def test_functions_run_each_time_where_there_is_no_gpu():
    graphs, calls = Graphs(torch.device("cpu")), []
    assert graphs.has("any")
    for number in range(3):
        assert graphs.run("any", lambda number=number: calls.append(number) or number) == number
    assert calls == [0, 1, 2]
    assert len(graphs) == 0
