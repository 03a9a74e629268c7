"""Train the demo's adapters with PEFT on SmolLM2-135M-Instruct, one small LoRA a skill.

    python examples/train_adapters.py --data DIR [--only json pirate] [--out examples/adapters]

Every skill sees its prompts through the model's chat template and learns its answers alone (no loss on prompts).
"""

from __future__ import annotations

import argparse
import sys
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from batches import streams
from model import ModelError, ensure_model
from skills import SCAFFOLDS, SKILLS, DataError, Skill, read_task
from tqdm import tqdm
from training import State, Trainer, save
from transformers import AutoModelForCausalLM, AutoTokenizer


def train(base: Any, tokenizer: Any, skill: Skill, data: Path, seed: int, scaffolds: dict[str, State]) -> State:
    """Train one skill on the frozen base and return its adapter's tensors; the base is left as it was."""
    rows = streams(skill, tokenizer, partial(read_task, data=data, split="train"), seed, SCAFFOLDS)
    (length,) = {part.ids_RL.shape[1] for part in rows.values()}
    trainer = Trainer(base, skill.lora, length, seed=seed, scaffolded=bool(skill.scaffolds))
    with tqdm(total=skill.steps, desc=skill.name, unit="step") as bar:
        for index, loss in enumerate(trainer.train(rows, skill.steps, seed, scaffolds)):
            bar.update()
            if index % 20 == 0 or index == skill.steps - 1:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    state = trainer.state()
    trainer.release()
    return state


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
