"""The routes that draw and answer at once, as a Ray Serve application on any number of machines.

    serve run mezzotint.server.ray:app token_file=token replicas=4

Each replica is the whole server without what it would have to remember: AUTOMATIC1111's txt2img, img2img and listings,
OpenAI's generations, edits and models, behind the same guard. Ray spreads the requests over the replicas. A replica's
jobs are in its memory, its pictures in a temporary folder until they are sent.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mezzotint.errors import MissingExtraError
from mezzotint.files import read_text
from mezzotint.server.settings import Settings

try:
    from ray import serve
except ImportError:
    raise MissingExtraError("mezzotint.server.ray needs Ray Serve: pip install 'mezzotint[serve,scale]'") from None

WAITING = 8  # requests that a replica has at one time, of which it draws one
NAME = "mezzotint"
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class Options(BaseModel):
    """What `serve run` takes as NAME=VALUE, and a configuration file under `args`.

    Attributes:
        token_file: File with the token that clients must send, read where the application is deployed.
        model: Model folders, files and hub ids, which every node must see; the first is the default.
        vaes: A folder of VAE files.
        loras: A folder of LoRA files.
        embeddings: A folder of textual inversions.
        controls: A folder of ControlNets and T2I-Adapters.
        ip_adapters: A folder of IP-Adapters, their encoders, and saved embeddings of pictures.
        wildcards: A folder of wildcard files.
        allow_host: Names of reverse proxies.
        cors: Origins whose pages may read replies.
        dtype: The dtype of the weights.
        memory: What a replica may take, such as "8GiB".
        replicas: How many processes draw.
        threads: CPU threads of each, for which Ray reserves as many CPUs.
        gpus: GPUs of each: 0 draws on the CPU.
    """

    model_config = ConfigDict(extra="forbid")

    token_file: Path
    model: Names = ()
    vaes: Path | None = None
    loras: Path | None = None
    embeddings: Path | None = None
    controls: Path | None = None
    ip_adapters: Path | None = None
    wildcards: Path | None = None
    allow_host: Names = ()
    cors: Names = ()
    dtype: str | None = None
    memory: str | None = None
    replicas: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    gpus: float = Field(default=0, ge=0)

    def settings(self) -> Settings:
        """Return the settings of a replica, whose data folder is not made yet. Raises RequestError."""
        return Settings(
            data=Path(tempfile.gettempdir()),
            host="0.0.0.0",  # the proxy's address is the cluster's; every address counts as reachable
            token=read_text(self.token_file.expanduser()).strip(),
            models=self.model,
            vaes=self.vaes,
            loras=self.loras,
            embeddings=self.embeddings,
            controls=self.controls,
            ip_adapters=self.ip_adapters,
            wildcards=self.wildcards,
            devices=("cuda" if self.gpus else "cpu",),
            dtype=self.dtype,
            memory=self.memory,
            allow_hosts=("localhost", *self.allow_host),
            cors=self.cors,
            stateless=True,
        )


class Replica:
    """A process that draws."""

    app: Any  # which Ray sets

    def check_health(self) -> None:
        """Tell Ray to start another replica in its place when the worker has ended."""
        if not self.app.state.service.alive:
            raise RuntimeError("the worker has ended")


def app(args: Options | dict[str, Any]) -> Any:
    """Return the application for `serve run` and `serve.run`.

    Raises:
        MezzotintError: If an option is wrong.
    """
    options = Options.model_validate(args)
    settings, threads = options.settings(), options.threads

    def build() -> Any:
        from dataclasses import replace

        import torch

        from mezzotint.server.app import create_app

        torch.set_num_threads(threads)
        folder = tempfile.TemporaryDirectory(prefix="mezzotint-")
        found = create_app(replace(settings, data=Path(folder.name)))
        found.state.folder = folder  # which is deleted with the application
        return found

    deployment = serve.deployment(
        serve.ingress(build)(Replica),
        name=NAME,
        num_replicas=options.replicas,
        max_ongoing_requests=WAITING,
        max_queued_requests=settings.limits.queue,
        ray_actor_options={"num_cpus": options.threads, "num_gpus": options.gpus},
    )
    return deployment.bind()
