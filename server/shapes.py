"""The linear layers of a Llama-like model, from its config.json: what adapters target, and what LoRA kernels meet."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.errors import nearest
from server.errors import ConfigError

# What a model of that size says of itself; the vocabulary is its tokenizer's.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "hidden_act": "silu",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder: `query` and `kv` are heads times head dimension."""

    layers: int
    hidden: int
    query: int
    kv: int
    mlp: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Raises ConfigError where the configuration is not that of a Llama-like model."""
        try:
            heads = config["num_attention_heads"]
            size = config.get("head_dim") or config["hidden_size"] // heads
            kv = config.get("num_key_value_heads") or heads
            return cls(config["num_hidden_layers"], config["hidden_size"], heads * size, kv * size, config["intermediate_size"])
        except KeyError as error:
            raise ConfigError(f"config.json has no {error}; only models laid out like Llama can be measured") from error

    @classmethod
    def read(cls, model: Path) -> "ModelShape":
        """The shape of the model in a folder. Raises ConfigError."""
        try:
            return cls.of(json.loads((model / "config.json").read_text()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{model / 'config.json'} cannot be read ({error}); name the folder of a model") from error

    @classmethod
    def named(cls, name: str) -> "ModelShape":
        """The shape of a model of CONFIGS. Raises ConfigError."""
        if name not in CONFIGS:
            raise ConfigError(f"unknown shape {name!r}{nearest(name, CONFIGS)}")
        return cls.of(CONFIGS[name])

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of the linear layers of one block, by name."""
        return {
            "self_attn.q_proj": (self.query, self.hidden), "self_attn.k_proj": (self.kv, self.hidden),
            "self_attn.v_proj": (self.kv, self.hidden), "self_attn.o_proj": (self.hidden, self.query),
            "mlp.gate_proj": (self.mlp, self.hidden), "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }  # fmt: skip

    @property
    def parameters(self) -> int:
        """Parameters of all linear layers, embeddings left out."""
        return self.layers * sum(d_out * d_in for d_out, d_in in self.linears.values())
