"""Every setting of the service, from `UNPERTURB_…` environment variables, checked at start."""

import ipaddress
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from unperturb.models.inference.captured import Execution, check_compiler, fastest
from unperturb.models.inference.folding import Precision
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service.keys import PAIR, KeyRing

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Keys = Annotated[dict[str, str], NoDecode]
MAX_BATCH = 64
SLOTS_OF_A_THREAD = 4  # more make a CPU's batch longer, and an image in it no cheaper
CPU_WORKERS = 2  # what interrupts one thread of a step keeps the others waiting, in that worker alone
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of each period, as control groups of version 2 have it
PREFIX = "UNPERTURB_"
ELSEWHERE = {f"{PREFIX}{name}" for name in ("CACHE", "DATA", "ALLOW_CODE", "REPLICAS")}  # read by other parts


class Computing(BaseSettings):
    """What the command line needs of the settings to run a model; nothing that is about serving is looked at."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    device: str = Field(
        default="auto",
        description="auto (every GPU; else the CPU, in halves where it has two cores or more), cpu, cuda, "
        "cuda:N, or several with commas: a worker each",
    )
    max_pixels: Positive = Field(default=50_000_000, description="of one image, before it is decoded; past it 413")

    @field_validator("device")
    @classmethod
    def device_exists(cls, value: str) -> str:
        """Refuse a device that torch does not know or that is not here."""
        for name in () if value == "auto" else value.split(","):
            try:
                device = torch.device(name)
            except RuntimeError as error:
                raise ValueError(f"{name!r} is not auto, cpu, cuda or cuda:N") from error
            if device.type not in ("cpu", "cuda"):
                raise ValueError(f"{name!r} is not auto, cpu, cuda or cuda:N")
            if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
                raise ValueError(f"{name!r}: torch finds {torch.cuda.device_count()} CUDA device(s) here")
        return value

    @property
    def first_device(self) -> torch.device:
        """Return the device, the first one where there are several."""
        return automatic(1)[0] if self.device == "auto" else torch.device(self.device.split(",")[0])


class Settings(Computing):
    """UNPERTURB_PORT=9000 sets `port`, and so on; an unknown value is refused at start."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(default=8000, description="port; 0: any that is free")
    checkpoint: str = Field(default="default", description="a shipped checkpoint's name, or a folder")
    threads: Annotated[int, Field(ge=0)] = Field(
        default=0, description="torch's CPU threads, shared by the workers; 0: one per core"
    )
    preset: str = Field(default="default", description="the purifier's preset where a request names none")

    max_body_bytes: Positive = Field(default=10_000_000, description="of one request; past it 413")
    max_images: Positive = Field(default=32, description="images in one request")
    max_per_client: Positive = Field(default=64, description="one client's images in progress; past it 429")
    max_in_progress: Positive = Field(
        default=256, description="all clients' images in progress, from the request's head on; past it 503"
    )
    max_connections: Positive = Field(
        default=2048, description="open connections; one more takes an unused or slow one's place, or is closed"
    )
    max_batch: Annotated[int, Field(ge=0)] = Field(
        default=0, description="slots of one worker; 0: 64 on a GPU, and on a CPU four for each of its threads"
    )
    max_queue: Positive = Field(default=256, description="images that may wait; past it 503")
    patience: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=15, description="how many times its own time others may add to a newcomer's, as estimated; past it 503"
    )
    timeout_s: Seconds = Field(default=30.0, description="a request's deadline; the header x-timeout-s shortens it")
    header_timeout_s: Seconds = Field(default=10.0, description="for a request's head to arrive; then it is closed")
    keep_alive_s: Positive = Field(
        default=75, description="for which an unused connection is kept; longer than a balancer keeps its own"
    )
    upload_timeout_s: Seconds = Field(default=15.0, description="for a request's body to arrive; past it 408")
    decode_timeout_s: Seconds = Field(default=10.0, description="for one file to be decoded; past it 422")
    decoders: Annotated[int, Field(ge=0)] = Field(default=0, description="decoding processes; 0: one per core")
    stall_s: Seconds = Field(default=60.0, description="without a finished step, after which the process gives up")
    drain_s: Annotated[float, Field(ge=0, le=3600)] = Field(
        default=5.0, description="from SIGTERM on, for which new requests are still taken though /readyz is 503"
    )
    grace_s: Seconds = Field(default=20.0, description="from SIGTERM to the end, for what is in progress")
    execution: Execution | Literal["auto"] = Field(
        default="auto",
        description="how steps run; captured: as CUDA graphs for 1, 2, 4 … images, made at start; compiled: fused by "
        "torch's compiler as well, which takes minutes and a C++ compiler; auto: eager at first, and the fastest that "
        "the machine has as soon as it is made",
    )
    precision: Precision | Literal["auto"] = Field(
        default="float32", description="of the backbone in the steps; auto: bfloat16 where the device computes in it"
    )

    api_keys: Keys = Field(default_factory=dict, description="name:sha256 pairs with commas")
    admin_keys: Keys = Field(default_factory=dict, description="the same, for POST /models")
    authentication: Literal["auto", "on", "off"] = Field(
        default="auto", description="whether an API key is needed; auto: on any address but loopback"
    )
    page: bool = Field(default=True, description="the page at / and POST /inspect, which attacks images on request")
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        default=None,
        description="of /metrics, without a key, on the same address; none: on the service's own, with one",
    )
    cors_origins: str = Field(
        default="",
        description="origins, with commas, whose pages may call the service from a browser; *: any; none: off",
    )
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        default="info", description="the least severe that is logged"
    )
    log_format: Literal["json", "text"] = Field(
        default="json", description="one JSON object a line, or text for people"
    )

    @field_validator("preset")
    @classmethod
    def preset_exists(cls, value: str) -> str:
        """Refuse an unknown preset."""
        if value not in PRESETS:
            raise ValueError(f"{value!r} is not one of {', '.join(PRESETS)}")
        return value

    @field_validator("api_keys", "admin_keys", mode="before")
    @classmethod
    def pairs(cls, value: Any) -> Any:  # noqa: ANN401
        """Turn `name:sha256,name:sha256` into a mapping; do not show any other value, since it may be a key."""
        if not isinstance(value, str):
            return value
        pairs = [PAIR.fullmatch(pair.strip()) for pair in value.split(",") if pair.strip()]
        if None in pairs:
            raise ValueError("not a list of name:sha256 pairs; `unperturb key NAME` makes one")
        names = [pair["name"] for pair in pairs if pair is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"{max(names, key=names.count)!r} is named twice; each key needs a name of its own")
        return {pair["name"]: pair["digest"] for pair in pairs if pair is not None}

    @model_validator(mode="after")
    def time_to_drain(self) -> "Settings":
        """Refuse to take new requests for longer than those in progress may last."""
        if self.drain_s >= self.grace_s:
            raise ValueError(f"UNPERTURB_DRAIN_S={self.drain_s:g} is not less than UNPERTURB_GRACE_S={self.grace_s:g}")
        return self

    @model_validator(mode="after")
    def compiler_where_needed(self) -> "Settings":
        """Refuse compiled steps where there is no compiler."""
        if self.execution == "compiled":
            check_compiler(self.devices[0])
        return self

    @model_validator(mode="after")
    def keys_where_needed(self) -> "Settings":
        """Refuse to serve strangers without keys, unless authentication is switched off by name."""
        if self.keys.required and not (self.api_keys or self.admin_keys):
            raise ValueError(
                f"host {self.host!r} is not loopback, so clients need an API key, and none is set: put the pair that "
                "`unperturb key NAME` prints into UNPERTURB_API_KEYS, or set UNPERTURB_AUTHENTICATION=off"
            )
        return self

    @property
    def keys(self) -> KeyRing:
        """Return who may do what."""
        required = self.authentication == "on" or (self.authentication == "auto" and not is_loopback(self.host))
        return KeyRing(self.api_keys, self.admin_keys, required)

    @property
    def devices(self) -> list[torch.device]:
        """Return the devices that the model runs on, one worker each."""
        if self.device != "auto":
            return [torch.device(name) for name in self.device.split(",")]
        return automatic(self.threads_alone)

    @property
    def threads_alone(self) -> int:
        """Return torch's CPU threads of a worker while no other does anything."""
        return self.threads or cores()

    @property
    def threads_each(self) -> int:
        """Return torch's CPU threads of one worker beside the others."""
        return max(1, self.threads_alone // len(self.devices))

    @property
    def first_execution(self) -> Execution:
        """Return how steps run at first."""
        return "eager" if self.execution == "auto" else self.execution

    def upgrade(self, device: torch.device) -> Execution | None:
        """Return how steps are to run as soon as what that takes is made; None: as at first."""
        best = fastest(device) if self.execution == "auto" else self.first_execution
        return best if best != self.first_execution else None

    @property
    def slots(self) -> int:
        """Return how many images may be in progress in one worker."""
        fitting = SLOTS_OF_A_THREAD * self.threads_each if self.devices[0].type == "cpu" else MAX_BATCH
        return self.max_batch or min(fitting, MAX_BATCH)

    @property
    def slots_in_all(self) -> int:
        """Return the same of all workers together."""
        return self.slots * len(self.devices)


def automatic(threads: int) -> list[torch.device]:
    """Return the devices that `auto` stands for: every GPU, or the CPU once for each worker."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return gpus or [torch.device("cpu")] * min(CPU_WORKERS, threads)


def cores() -> int:
    """Return how many CPU cores this process may use: no more than its container's share (`docker run --cpus 2`)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share, period = CPU_QUOTA.read_text().split() if CPU_QUOTA.is_file() else ("max", "")
    return count if share == "max" else min(count, math.ceil(int(share) / int(period)))


def unknown(environment: Mapping[str, str]) -> list[str]:
    """Return the names of an environment that begin as a setting does, and are none."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | ELSEWHERE
    return sorted(name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
