"""A CUDA graph of some launches, captured beside other threads' work on the same GPU.

torch's own CUDAGraph is not for that: while it captures, no other thread may draw random numbers, as an engine's sampler
does at every step. Here the runtime captures, torch's allocator is told by `use_mem_pool` what to keep, and only the capturing
thread is held to what a capture allows.
"""

from collections.abc import Callable
from typing import Any

import torch
from cuda.bindings import runtime


class Graph:
    """What `work` launches on the current stream, to be launched again and again.

    Args:
        work: must not synchronise, nor copy from the host. What it raises goes on to the caller.
        memory: where its tensors go. Graphs may share it, if no two run at a time.
    """

    def __init__(self, work: Callable[[], None], memory: torch.cuda.MemPool) -> None:
        self._memory = memory
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # A thread's first product makes its cuBLAS handle, which no capture allows.
        torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
        with torch.cuda.use_mem_pool(memory), torch.cuda.stream(stream):
            _checked(
                runtime.cudaStreamBeginCapture(
                    stream.cuda_stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
                )
            )
            try:
                work()
            except BaseException:
                runtime.cudaStreamEndCapture(stream.cuda_stream)  # its own complaint would hide the cause
                raise
            graph = _checked(runtime.cudaStreamEndCapture(stream.cuda_stream))
        self._executable = _checked(runtime.cudaGraphInstantiate(graph, 0))
        _checked(runtime.cudaGraphDestroy(graph))

    def launch(self, stream: torch.cuda.Stream) -> None:
        _checked(runtime.cudaGraphLaunch(self._executable, stream.cuda_stream))

    def __del__(self) -> None:
        if hasattr(self, "_executable"):
            runtime.cudaGraphExecDestroy(self._executable)


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a runtime call, which answers with an error code and, maybe, one value."""
    code, *values = result
    if code != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA: {runtime.cudaGetErrorString(code)[1].decode()}")
    return values[0] if values else None
