"""Settings, as environment variables LORAMIX_*: `loramix serve` sets them, and the vLLM plugin reads them."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from merging import METHODS
from merging.errors import nearest
from merging.spec import MAX_TERMS
from server.errors import ConfigError


class Settings(BaseSettings):
    """What loramix can be told; the same by command line (`loramix serve --help`) and by environment."""

    model_config = SettingsConfigDict(env_prefix="LORAMIX_", env_parse_none_str="null", extra="forbid")

    adapters: list[Path] = Field(default_factory=list, description="Folders whose subfolders are adapters.")
    adapter: dict[str, str] = Field(
        default_factory=dict, description="Single adapters: name -> folder, or ORG/REPO on the Hub."
    )
    presets: dict[str, str] = Field(default_factory=dict, description="Named recipes: name -> expression, or FILE.json.")
    default_method: str = Field(default="cat", description="Merges a sum that names no method.")
    skip_bad_adapters: bool = Field(default=False, description="Start without the adapters that cannot be used.")
    merge_timeout: float = Field(default=30.0, gt=0, description="Seconds that a request waits for its merge at most.")
    merge_queue: int = Field(default=64, ge=1, description="Merges that wait for a slot at most.")
    cold_merges_per_minute: int | None = Field(default=None, ge=1, description="Merges that each client may ask for.")
    max_adapters_per_recipe: int = Field(default=MAX_TERMS, ge=1, le=MAX_TERMS, description="Adapters in one recipe at most.")
    max_body_mib: float = Field(default=32.0, gt=0, allow_inf_nan=False, description="Size of a request's body at most, MiB.")
    adapter_host_gib: float = Field(default=4.0, gt=0, description="Host memory for source adapters, GiB in each worker.")

    adapter_gpu_gib: float = Field(default=2.0, gt=0, description="GPU memory for source adapters, GiB on each GPU.")
    cache_dir: Path | None = Field(default=None, description="Folder in which merged adapters outlive the server.")
    cache_disk_gib: float = Field(default=20.0, gt=0, description="Disk space for merged adapters, GiB.")
    adapter_root: list[Path] = Field(default_factory=list, description="More folders below which admins may add adapters.")
    hub_allow: list[str] = Field(default_factory=list, description="Patterns of ORG/REPO from which admins may add adapters.")
    state_dir: Path | None = Field(default=None, description="Folder of the adapters and presets that admins added.")
    keys_file: Path | None = Field(default=None, description="TOML file of the keys that open this server.")

    @field_validator("default_method")
    @classmethod
    def _is_a_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"no merge method of that name{nearest(name, METHODS)}")
        return name

    @classmethod
    def read(cls, **given: Any) -> "Settings":
        """Settings as given, or else as the environment has them.

        Raises:
            ConfigError: naming the first that cannot be, as option and as variable.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            message = first["msg"].removeprefix("Value error, ").lower()
            raise ConfigError(
                f"--{name.replace('_', '-')} (LORAMIX_{name.upper()}): {message} (got {first['input']!r})"
            ) from error

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mib * 2**20)

    @property
    def adapter_host_bytes(self) -> int:
        return int(self.adapter_host_gib * 2**30)

    @property
    def adapter_gpu_bytes(self) -> int:
        return int(self.adapter_gpu_gib * 2**30)

    @property
    def cache_disk_bytes(self) -> int:
        return int(self.cache_disk_gib * 2**30)
