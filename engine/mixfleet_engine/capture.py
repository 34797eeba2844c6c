"""Recording of device work that is done again and again, so that the host says it only once.

What is recorded must read and write tensors that stay where they are, and must not look at a
number on the host.
"""

from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], None]
"""Enqueues work on the current stream."""


class Recorder(Protocol):
    """Turns work into something that is cheaper to enqueue."""

    def record(self, work: Work) -> Work:
        """Return what enqueues ``work`` again; ``work`` has run here once before."""
        ...


class CudaGraphRecorder:
    """Records CUDA graphs that share one pool of memory, for they never run side by side."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        """Capture ``work``; nothing of it runs now."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        replay: Work = graph.replay
        return replay


class NoRecorder:
    """Records nothing: the host says everything each time. For a CPU, and to look for faults."""

    def record(self, work: Work) -> Work:
        """Return ``work`` itself."""
        return work
