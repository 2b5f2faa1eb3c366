"""Every setting of the service, from `UNPERTURB_…` environment variables, checked at start."""

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.reverse_attack import PRESETS

Positive = Annotated[int, Field(gt=0)]


class Settings(BaseSettings):
    """UNPERTURB_PORT=9000 sets `port`, and so on; an unknown value is refused at start."""

    model_config = SettingsConfigDict(env_prefix="UNPERTURB_", extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    checkpoint: str = Field(default="default", description="a shipped checkpoint's name, or a folder")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    threads: Annotated[int, Field(ge=0)] = Field(default=0, description="torch's CPU threads; 0: torch's own choice")
    preset: str = Field(default="default", description="the purifier's preset where a request names none")
    max_body_bytes: Positive = 10_000_000
    max_pixels: Positive = 50_000_000
    max_batch: Positive = Field(default=32, description="images in one batch on the device")
    batch_wait_ms: Annotated[float, Field(ge=0, le=1000)] = Field(
        default=3.0, description="longest wait for further images to share a batch"
    )
    max_queue: Positive = Field(default=256, description="images that may wait; past it 503")
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info"

    @field_validator("device")
    @classmethod
    def device_exists(cls, value: str) -> str:
        """Refuse a device that torch does not know or that is not here."""
        if value == "auto":
            return value
        try:
            device = torch.device(value)
        except RuntimeError as error:
            raise ValueError(f"{value!r} is not auto, cpu, cuda or cuda:N") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"{value!r}: torch finds {torch.cuda.device_count()} CUDA device(s) here")
        return value

    @field_validator("preset")
    @classmethod
    def preset_exists(cls, value: str) -> str:
        """Refuse an unknown preset."""
        if value not in PRESETS:
            raise ValueError(f"{value!r} is not one of {', '.join(PRESETS)}")
        return value

    @property
    def torch_device(self) -> torch.device:
        """The device that the model runs on."""
        name = self.device if self.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(name)
