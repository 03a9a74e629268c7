"""Training small LoRA adapters with PEFT on a frozen base model, one captured step after another.

Training a model of this size is bound by kernel launches, so on CUDA one whole step (forward, backward, AdamW) is captured
as a CUDA graph and replayed; shapes are fixed by padding on the right, which causal attention needs no mask for.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from batches import BATCH, IGNORED, Rows, batches
from model import BASE_MODEL
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from skills import EVERYWHERE, LoraShape

PEAK_LR = 1e-3
SKILL, SCAFFOLD = "skill", "scaffold"
State = dict[str, torch.Tensor]


class Step:
    """One optimizer step on a batch of fixed shape; on CUDA a captured graph, elsewhere eager."""

    def __init__(self, model: PeftModel, batch: int, length: int, device: torch.device) -> None:
        self.model = model
        self.ids_BL = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.labels_BL = torch.zeros_like(self.ids_BL)
        # A ready 4-D mask is the one that transformers takes as it is, under graph capture too.
        self.causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr = torch.zeros((), device=device)
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.lr, weight_decay=0.0, capturable=cuda, foreach=cuda)
        self.graph = self.capture() if cuda else None

    def capture(self) -> torch.cuda.CUDAGraph:
        # A stream of its own has a cuBLAS workspace of its own, so graphs of several steps may be replayed side by side.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        # Under autocast the casts happen anyway; PEFT's own would only add a kernel a module.
        with disable_input_dtype_casting(self.model):
            with torch.cuda.stream(side):
                for _ in range(3):  # at learning rate 0: warms up kernels and makes the optimizer's state
                    self.run()
            torch.cuda.current_stream().wait_stream(side)
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                self.loss = self.run()
        self.forget()
        return graph

    def forget(self) -> None:
        """Set the optimizer's state to zero, as before the first step."""
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    def run(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        device = self.ids_BL.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            logits_BLV = self.model(input_ids=self.ids_BL, attention_mask=self.causal, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BLV[:, :-1].float().flatten(0, 1), self.labels_BL[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()

    def __call__(self, ids_BL: torch.Tensor, labels_BL: torch.Tensor, lr: float) -> torch.Tensor:
        self.ids_BL.copy_(ids_BL, non_blocking=True)
        self.labels_BL.copy_(labels_BL, non_blocking=True)
        self.lr.fill_(lr)
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.loss


class Trainer:
    """Trains adapters of one shape, one after the other, with one step that is captured once."""

    def __init__(
        self, base: Any, shape: LoraShape, length: int, *, seed: int, scaffolded: bool = False, batch: int = BATCH
    ) -> None:
        """Put an adapter drawn from `seed` on the base, which is changed by that until `release`.

        Args:
            length: of all rows.
            scaffolded: whether a second adapter, of shape EVERYWHERE and not trained, is active beside it.
        """
        torch.manual_seed(seed)
        self.device, self.batch, self.rank = base.device, batch, shape.rank
        self.model: Any = get_peft_model(base, lora_config(shape), adapter_name=SKILL)
        self.slots: State = {}
        if scaffolded:  # its tensors are exchanged from step to step
            self.model.add_adapter(SCAFFOLD, lora_config(EVERYWHERE))
            self.model.base_model.set_adapter([SKILL, SCAFFOLD])
            self.slots = {name: p.requires_grad_(False) for name, p in self.model.named_parameters() if f".{SCAFFOLD}." in name}
        self.step = Step(self.model, batch, length, base.device)

    def restart(self, seed: int, rank: int) -> None:
        """Draw another adapter, of `rank` units or of as many as the shape has.

        Units beyond are zero on both sides and stay so, since the gradient of either side is a multiple of the other.
        """
        torch.manual_seed(seed)
        self.rank = rank
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters(SKILL, init_lora_weights=True)
                module.lora_A[SKILL].weight.data[rank:] = 0
        self.step.forget()

    def train(self, rows: Mapping[str, Rows], steps: int, seed: int, scaffolds: Mapping[str, State]) -> Iterator[torch.Tensor]:
        """Make `steps` steps, each on a batch of the next of `rows` in turn, and yield the loss after each.

        Args:
            rows: training rows by the scaffold that is active on them; where `scaffolds` has no such name, none is.
            seed: of the order of the rows.
        """
        generator = torch.Generator().manual_seed(seed)
        sources = {name: batches(part.to(self.device), generator, self.batch) for name, part in rows.items()}
        order = cycle(sources)
        for index in range(steps):
            name = next(order)
            scaffold = scaffolds.get(name, {})
            for key, slot in self.slots.items():
                tensor = scaffold.get(key.replace(f".{SCAFFOLD}.", "."))
                slot.copy_(torch.zeros_like(slot) if tensor is None else tensor)
            yield self.step(*next(sources[name]), learning_rate(index, steps))

    def state(self) -> State:
        """A copy of the adapter's tensors, without the units that are not in use."""
        tensors = get_peft_model_state_dict(self.model, adapter_name=SKILL, save_embedding_layers=False)
        return {
            key: (tensor[: self.rank] if ".lora_A." in key else tensor[:, : self.rank]).detach().clone()
            for key, tensor in tensors.items()
        }

    def release(self) -> None:
        """Leave the base as it was."""
        self.model.unload()


def lora_config(shape: LoraShape) -> LoraConfig:
    return LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=list(shape.modules),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE_MODEL,
    )


def learning_rate(index: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then linear decay to zero."""
    warmup = 1 + steps // 20
    return PEAK_LR * min((index + 1) / warmup, (steps - index) / steps)


def save(state: State, shape: LoraShape, folder: Path) -> None:
    """Write a PEFT adapter folder in bf16; it appears under its name only when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".adapter-") as name:
        scratch = Path(name) / folder.name
        config = lora_config(shape)
        config.inference_mode = True
        config.target_modules = sorted(shape.modules)  # PEFT keeps a set, whose order changes from run to run
        config.save_pretrained(str(scratch))
        tensors = {key: tensor.to("cpu", torch.bfloat16).contiguous() for key, tensor in state.items()}
        save_file(tensors, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
