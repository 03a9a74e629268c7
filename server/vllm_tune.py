"""Times vLLM's LoRA kernels under a given configuration, on the GPU, by launches like those of a decode step."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources
from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink, utils

from server.tuning import Config, Launch

_KERNELS: tuple[Any, ...] = tuple(import_module(f"vllm.lora.ops.triton_ops.lora_{name}_op") for name in ("shrink", "expand"))
_CACHE_BYTES = 100 << 20  # over any GPU's last-level cache: in a step, other layers' weights come between
_WRONG = 2e-2  # relative error of a bfloat16 product that is only rounded: 4e-3


class Timer:
    """Measures launches for a server of so many slots.

    Args:
        max_loras: slots. A batch has as many adapters in it as tokens and slots allow.
        device: the GPU; checking results works on a CPU too, under Triton's interpreter.
    """

    def __init__(self, max_loras: int, device: str = "cuda") -> None:
        self._max_loras = max_loras
        self._device = torch.device(device)

    def default(self, launch: Launch) -> Config:
        """vLLM's own configuration of a launch."""
        slices, tokens, _, _ = launch.place
        config: Config = utils.get_lora_op_configs(
            launch.kernel, self._max_loras + 1, tokens, launch.inputs if launch.kernel == "shrink" else max(launch.outputs),
            launch.rank, slices, None if launch.kernel == "shrink" else True,
        )  # fmt: skip
        return dict(config)

    def __call__(self, launch: Launch) -> Callable[[Config], float]:
        """A function from configuration to microseconds of GPU time; infinite where the result is wrong or nothing fits.

        The launch is captured in a CUDA graph, once for each of so many layers that no cache holds their weights.
        """
        case = _Case(launch, self._max_loras, self._device)

        def microseconds(config: Config) -> float:
            with _configured(config):
                try:
                    wrong = case.error() > _WRONG
                except (OutOfResources, CompilationError, AssertionError):
                    return math.inf
                return math.inf if wrong else case.microseconds()

        return microseconds


class _Case:
    """Tensors of a launch, one set of weights a layer."""

    def __init__(self, launch: Launch, max_loras: int, device: torch.device) -> None:
        self._launch = launch
        active = min(launch.tokens, max_loras)
        sizes = [launch.inputs] * len(launch.outputs) if launch.kernel == "shrink" else list(launch.outputs)
        read = 2 * active * launch.rank * sum(sizes)
        layers = min(256, math.ceil(_CACHE_BYTES / read)) if device.type == "cuda" else 1
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        shapes = [(launch.rank, size) if launch.kernel == "shrink" else (size, launch.rank) for size in sizes]
        self._weights = [[draw(max_loras, 1, *shape) for shape in shapes] for _ in range(layers)]
        self._x = draw(launch.tokens, launch.inputs)
        self._low = draw(len(sizes), launch.tokens, launch.rank, dtype=torch.float32)
        self._before = draw(launch.tokens, sum(launch.outputs))
        self._y = self._before.clone()
        self._slots = torch.arange(launch.tokens, device=device, dtype=torch.int32) % active
        meta = LoRAKernelMeta.make(max_loras, launch.tokens, device=device)
        meta.prepare_tensors(self._slots)
        self._meta = meta.meta_args(launch.tokens, False)
        # vLLM remembers strides by address, and addresses come back.
        utils._LORA_A_PTR_DICT.clear()
        utils._LORA_B_PTR_DICT.clear()

    def launch(self, layer: int) -> None:
        if self._launch.kernel == "shrink":
            lora_shrink(self._x, self._weights[layer], self._low, *self._meta, 1.0)
        else:
            lora_expand(self._low, self._weights[layer], self._y, *self._meta, offset_start=0, add_inputs=True)

    def error(self) -> float:
        """Relative error of the first layer's launch, against a product in float32."""
        self._y.copy_(self._before)
        slots = self._slots.long()
        chosen = [weights[slots, 0].float() for weights in self._weights[0]]
        if self._launch.kernel == "shrink":
            expected = torch.stack([torch.einsum("ti,tri->tr", self._x.float(), a) for a in chosen])
        else:
            parts = [torch.einsum("tr,tor->to", low, b) for low, b in zip(self._low, chosen, strict=True)]
            expected = self._before.float() + torch.cat(parts, 1)
        self.launch(0)
        result = (self._low if self._launch.kernel == "shrink" else self._y).float()
        return float((result - expected).norm() / expected.norm())

    def microseconds(self) -> float:
        """GPU time of one launch: the median of seven replays of a graph with all layers."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for layer in range(len(self._weights)):  # fills vLLM's tables of addresses, which copy to the device
                self.launch(layer)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for layer in range(len(self._weights)):
                self.launch(layer)
        graph.replay()
        times: list[float] = []
        for _ in range(7):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / len(self._weights))
        return statistics.median(times)


@contextlib.contextmanager
def _configured(config: Config) -> Iterator[None]:
    """vLLM's launches take that configuration, whatever their shape."""
    own = [kernel.get_lora_op_configs for kernel in _KERNELS]
    for kernel in _KERNELS:
        kernel.get_lora_op_configs = lambda *_, **__: config
    try:
        yield
    finally:
        for kernel, function in zip(_KERNELS, own, strict=True):
            kernel.get_lora_op_configs = function
