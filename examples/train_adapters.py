"""Train the demo's adapters with PEFT on SmolLM2-135M-Instruct, one small LoRA a skill.

    python examples/train_adapters.py --data DIR [--only json pirate] [--out examples/adapters]

Every skill sees its prompts through the model's chat template and learns its answers alone (no loss on prompts).
Training this model is bound by kernel launches, so on CUDA one whole step (forward, backward, AdamW) is captured as a
CUDA graph and replayed; shapes are fixed by padding on the right, which causal attention needs no mask for.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from difflib import get_close_matches
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from batches import BATCH, IGNORED, batches, streams
from model import BASE_MODEL, ModelError, ensure_model
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import save_file
from skills import EVERYWHERE, SCAFFOLDS, SKILLS, DataError, LoraShape, Skill, read_task
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

PEAK_LR = 1e-3
SKILL, SCAFFOLD = "skill", "scaffold"
State = dict[str, torch.Tensor]


class Step:
    """One optimizer step on a batch of fixed shape; on CUDA a captured graph, elsewhere eager."""

    def __init__(self, model: PeftModel, length: int, device: torch.device) -> None:
        self.model = model
        self.ids_BL = torch.zeros(BATCH, length, dtype=torch.long, device=device)
        self.labels_BL = torch.zeros_like(self.ids_BL)
        # A ready 4-D mask is the one that transformers takes as it is, under graph capture too.
        self.causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr = torch.zeros((), device=device)
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.lr, weight_decay=0.0, capturable=cuda, foreach=cuda)
        self.graph = self.capture() if cuda else None

    def capture(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # at learning rate 0: warms up kernels and makes the optimizer's state
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.run()
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        return graph

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


def lora_config(shape: LoraShape) -> LoraConfig:
    return LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=list(shape.modules),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE_MODEL,
    )


def train(base: Any, tokenizer: Any, skill: Skill, data: Path, seed: int, scaffolds: dict[str, State]) -> State:
    """Train one skill on the frozen base and return its adapter's tensors; the base is left as it was."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = streams(skill, tokenizer, data, seed)
    (length,) = {part.ids_RL.shape[1] for part in rows.values()}
    model: Any = get_peft_model(base, lora_config(skill.lora), adapter_name=SKILL)
    slots: State = {}
    if skill.scaffolds:  # one more adapter, whose tensors are exchanged from step to step
        model.add_adapter(SCAFFOLD, lora_config(EVERYWHERE))
        model.base_model.set_adapter([SKILL, SCAFFOLD])
        slots = {name: p.requires_grad_(False) for name, p in model.named_parameters() if f".{SCAFFOLD}." in name}
    sources = {name: batches(part, generator) for name, part in rows.items()}
    order = cycle(sources)
    # Under autocast the casts happen anyway; PEFT's own would only add a kernel a module.
    with (
        disable_input_dtype_casting(model, base.device.type == "cuda"),
        tqdm(range(skill.steps), desc=skill.name, unit="step") as bar,
    ):
        step = Step(model, length, base.device)
        for index in bar:
            name = next(order)
            for key, slot in slots.items():
                tensor = scaffolds[name].get(key.replace(f".{SCAFFOLD}.", ".")) if name else None
                slot.copy_(torch.zeros_like(slot) if tensor is None else tensor)
            loss = step(*next(sources[name]), lr=learning_rate(index, skill.steps))
            if index % 20 == 0 or index == skill.steps - 1:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    state = {k: v.detach().clone() for k, v in get_peft_model_state_dict(model, adapter_name=SKILL).items()}
    model.unload()
    return state


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


def main() -> None:
    """Train the chosen skills, scaffolds first where a form needs them, and save their adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the public data")
    parser.add_argument("--model", type=Path, metavar="DIR", help="base model; made by model.py if not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("adapters"), metavar="DIR")
    parser.add_argument("--only", nargs="+", default=list(SKILLS), metavar="NAME", help=f"of {', '.join(SKILLS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="overwrite adapters that are there")
    options = parser.parse_args()
    for name in options.only:
        if name not in SKILLS:
            near = get_close_matches(name, SKILLS, n=1, cutoff=0.0)[0]
            sys.exit(f"train_adapters.py: no skill {name!r}, did you mean {near!r}? There are {', '.join(SKILLS)}")
        if (options.out / name).exists() and not options.force:
            sys.exit(f"train_adapters.py: {options.out / name} exists: choose another --out, or overwrite with --force")
    chosen = [SKILLS[name] for name in options.only]
    needed = {name: SCAFFOLDS[name] for skill in chosen for name in skill.scaffolds if name}
    try:
        for task in {task for skill in [*chosen, *needed.values()] for task in skill.tasks}:
            read_task(task, options.data, "train")  # all data is checked before anything is trained
        model = options.model or ensure_model(say=print)
    except (DataError, ModelError) as error:
        sys.exit(f"train_adapters.py: {error}")
    device = torch.device(options.device)
    # A CPU without bf16 units emulates them at a tenth of float32's speed.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(model)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    base.to(device)
    scaffolds: dict[str, State] = {}
    for name, skill in needed.items():
        scaffolds[name] = train(base, tokenizer, skill, options.data, options.seed, {})
    for skill in chosen:
        state = train(base, tokenizer, skill, options.data, options.seed, scaffolds)
        save(state, skill.lora, options.out / skill.name)
        print(f"wrote {options.out / skill.name}")


if __name__ == "__main__":
    main()
