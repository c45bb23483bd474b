"""Two tiny random models for the tests above the networks: SD1-shaped, as a folder, and SDXL-shaped, in memory.

Both draw 32x32 pixels (latents 4x4) in milliseconds. Their last layers are loud, so that pictures are not grey and any
two seeds, prompts or samplers give different ones.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os

# A tiny model gains nothing from a second thread, and on a busy machine its threads wait for each other. Processes that
# the tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# trio, which selenium depends on, registers a random generator in a way that hypothesis warns of.
os.environ.setdefault("HYPOTHESIS_NO_PLUGINS", "1")

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

import mezzotint
from mezzotint.config import CLIPConfig, UNetConfig, VAEConfig
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import UNet
from mezzotint.models.vae import VAE
from mezzotint.weights import Parts, save_folder

for key in ("CONFIG", "MODEL", "DEVICE", "DTYPE", "OUT", "SAMPLER"):
    os.environ[f"MEZZOTINT_{key}"] = ""  # the user's own configuration is not read
# diffusers and transformers each read the metadata of every installed package when they are imported.
importlib.metadata.packages_distributions = functools.cache(importlib.metadata.packages_distributions)

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
WIDTH = 16  # of the text encoders
LEVELS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (16, 32)}
SDXL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
}


def tiny_unet(seed: int, **fields: object) -> UNet:
    torch.manual_seed(seed)
    config = UNetConfig.model_validate(
        {
            "sample_size": 4,
            "layers_per_block": 1,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            **LEVELS,
            **fields,
        }
    )
    unet = UNet(config)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.25)
    for name, parameter in unet.named_parameters():  # the words must be heard
        if "attn2" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return unet


def tiny_vae(seed: int) -> VAE:
    torch.manual_seed(seed)
    vae = VAE(VAEConfig(block_out_channels=(8,) * 4, norm_num_groups=4, sample_size=32, scaling_factor=0.5))
    torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.1)
    return vae


def tiny_clip(seed: int, tokenizer: Tokenizer, architecture: str = "CLIPTextModel") -> CLIPTextModel:
    torch.manual_seed(seed)
    encoder = CLIPTextModel(
        CLIPConfig(
            vocab_size=len(tokenizer.vocab),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos,
            eos_token_id=tokenizer.eos,
            pad_token_id=tokenizer.pad,
            architectures=(architecture,),
        )
    )
    torch.nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight)
    return encoder


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave the million objects that imports and collection make to themselves; looking through them takes seconds."""
    gc.disable()
    result = yield
    gc.enable()
    gc.freeze()
    return result


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the session's own, also in processes that the tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SD1-shaped model as save_folder writes it, float32; its settings: 4 steps, guidance 3."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng():
        tokenizer = Tokenizer.subset(["a lemon on a blue background"])
        save_folder(
            folder,
            unet=tiny_unet(0),
            vae=tiny_vae(1),
            text_encoder=tiny_clip(2, tokenizer),
            tokenizer=tokenizer,
            scheduler_config=SCHEDULER,
            settings={"steps": 4, "guidance_scale": 3.0},
            dtype=torch.float32,
        )
    return folder


@pytest.fixture(scope="session")
def sd1(sd1_folder: Path) -> mezzotint.Pipeline:
    """The SD1-shaped model, loaded. A pipeline keeps nothing between calls, so all tests share it."""
    return mezzotint.load(sd1_folder, device="cpu")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore the number of threads, which some commands set for their process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def registered_solvers() -> Iterator[None]:
    """Remove the solvers that a test registered, which are the process's."""
    yield
    for name in [*mezzotint.samplers.OWN]:
        mezzotint.samplers.unregister(name)


FINGERPRINTS: dict[str, list[tuple[object, ...]]] = {}  # of the shared models, after the last test that used each


@pytest.fixture(autouse=True)
def shared_models_unchanged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that changes a shared model, rather than one that happens to run after it."""
    names = {"sd1", "sdxl"} & set(request.fixturenames)
    models = {name: request.getfixturevalue(name) for name in names}
    for name in models.keys() - FINGERPRINTS.keys():
        FINGERPRINTS[name] = fingerprint(models[name])
    yield
    for name, pipe in models.items():
        before, FINGERPRINTS[name] = FINGERPRINTS[name], fingerprint(pipe)
        assert FINGERPRINTS[name] == before, f"this test changed the shared {name}; load one of its own"


def fingerprint(pipe: mezzotint.Pipeline) -> list[tuple[object, ...]]:
    """Summarize what a test could leave behind: settings, writes to weights, gradient flags."""
    parts = [pipe.unet, pipe.vae, *pipe.text_encoders]
    weights = [(p._version, p.requires_grad) for part in parts for p in part.parameters()]
    return [(repr(pipe._model.info), repr(pipe.parts.settings)), *weights]


@pytest.fixture(scope="session")
def sdxl() -> mezzotint.Pipeline:
    """The SDXL-shaped model: two text encoders, the second padding with "!"; Euler, leading."""
    with torch.random.fork_rng():
        tokenizers = [Tokenizer.clip(), Tokenizer.clip(pad="!")]
        encoders = [tiny_clip(5, tokenizers[0]), tiny_clip(6, tokenizers[1], "CLIPTextModelWithProjection")]
        parts = Parts(
            family="sdxl",
            unet=tiny_unet(3, cross_attention_dim=2 * WIDTH, **SDXL),
            vae=tiny_vae(4),
            text_encoders=encoders,
            tokenizers=tokenizers,
            scheduler_config=SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
            model_index={"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
            settings={"steps": 4},
            source=Path("tiny-xl"),
            files=[],
        )
    return mezzotint.Pipeline(parts)
