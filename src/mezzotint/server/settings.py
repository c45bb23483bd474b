"""Settings of the server, checked before anything is opened."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from mezzotint.errors import RequestError
from mezzotint.placement import parse_size

HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", re.IGNORECASE)
ORIGIN = re.compile(r"https?://[a-z0-9.\[\]:-]{1,260}", re.IGNORECASE)
CUDA = re.compile(r"cuda:\d{1,3}")
FOLDERS = ("vaes", "loras", "embeddings", "controls", "ip_adapters", "wildcards")  # of files that a request may name
MIN_TOKEN = 16  # characters


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, checked before any work.

    Attributes:
        body: Bytes of a body, whatever its Content-Length says.
        prompt: Characters of a prompt.
        pixels: Pixels of a picture, after the second pass.
        batch_pixels: Pixels of all pictures of one batch.
        steps: Steps of a picture.
        count: Pictures of a job.
        requests: Jobs of one call.
        queue: Jobs that wait.
        streams: Connections to the events at one time.
    """

    body: int = 64 * 2**20
    prompt: int = 32_000
    pixels: int = 2048 * 2048
    batch_pixels: int = 4 * 2048 * 2048
    steps: int = 150
    count: int = 100
    requests: int = 100
    queue: int = 1000
    streams: int = 100


@dataclass(frozen=True)
class Settings:
    """Settings of the server.

    Attributes:
        data: The data folder: the database, pictures and uploads.
        host: The address to listen on; another one than loopback needs a token.
        port: The port; 0 is any free one.
        token: What a client must send, or None.
        models: Model folders, files and hub ids; the first is the default. Empty means the bundled model.
        vaes: A folder of VAE files, or None.
        loras: A folder of LoRA files, or None.
        embeddings: A folder of textual inversions, or None.
        controls: A folder of ControlNets and T2I-Adapters, or None.
        ip_adapters: A folder of IP-Adapters, their encoders, and saved embeddings of pictures, or None.
        wildcards: A folder of wildcard files, or None.
        devices: The devices that draw, each a job at a time; empty means every CUDA device, else the best one.
        share_batches: Whether jobs that differ only in prompt and seed share a batch, on CUDA devices alone.
        dtype: The dtype of the weights, as in `mezzotint.load`.
        memory: What the process may take, such as "8GiB", or None.
        keep: Bytes of pictures and uploads that are kept, or None for all.
        allow_hosts: Names, besides the address, under which a browser may reach the server.
        cors: Origins of other pages that may read the replies.
        preview_every: Steps between two previews; 0 is none.
        preview_vaes: TAESDs that decode the previews, in the order of the models; others are shown by a matrix.
        stateless: Whether nothing is kept after a reply: no history, links or options, and jobs in memory alone.
        limits: What one request may ask for.
    """

    data: Path
    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = field(default=None, repr=False)
    models: tuple[str, ...] = ()
    vaes: Path | None = None
    loras: Path | None = None
    embeddings: Path | None = None
    controls: Path | None = None
    ip_adapters: Path | None = None
    wildcards: Path | None = None
    devices: tuple[str, ...] = ()
    share_batches: bool = False
    dtype: str | None = None
    memory: str | None = None
    keep: int | None = None
    allow_hosts: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    preview_every: int = 1
    preview_vaes: tuple[str, ...] = ()
    stateless: bool = False
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise RequestError(f"port is {self.port}; it must be a number from 0 to 65535")
        if self.token is not None and (len(self.token) < MIN_TOKEN or not self.token.isascii() or " " in self.token):
            raise RequestError(f"the token must have at least {MIN_TOKEN} ASCII characters and no spaces")
        if not is_loopback(self.host) and self.token is None:
            raise RequestError(
                f"host is {self.host!r}, which other machines can reach; give a token with --token-file, or listen on "
                "127.0.0.1"
            )
        devices = {each for each in self.devices if CUDA.fullmatch(each)}
        if len(self.devices) > 1 and len(devices) < len(self.devices):
            raise RequestError(
                f"device is {', '.join(self.devices)}; several must be CUDA devices, such as cuda:0 and cuda:1"
            )
        for name in self.allow_hosts:
            if not HOST_NAME.fullmatch(name):
                raise RequestError(
                    f"allow_host is {name!r}; it must be a host name without a port, such as example.org"
                )
        for origin in self.cors:
            if not ORIGIN.fullmatch(origin):
                raise RequestError(f"cors is {origin!r}; it must be an origin, such as https://example.org")
        for name, folder in self.folders().items():
            if not folder.is_dir():
                raise RequestError(f"{name} is {str(folder)!r}; it must be an existing folder")
        if self.memory is not None and self.memory != "auto":
            parse_size(self.memory)

    def folders(self) -> dict[str, Path]:
        """Return the given folders of files that a request may name."""
        given = {name: getattr(self, name) for name in FOLDERS}
        return {name: folder for name, folder in given.items() if folder is not None}


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
