"""SDXL's refiner against diffusers, live: as a model of its own, and after another model on one list of noise levels.

    python tests/parity/test_refiner.py

prints how far apart they are, in every case.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLAdapterPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

import mezzotint
import pictures
import tiny
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.samplers.diffusers_classes import CLASSES
from mezzotint.weights import Parts
from mezzotint.weights.save_single import _tensors, check_single
from mezzotint.weights.save_tensors import write_tensors
from mezzotint.weights.single import plan_file
from pictures import NEGATIVE, PROMPT, Drawn, Pair, apart, different, pixels, same
from test_img2img import fields, photograph, theirs
from test_ip_adapter import EMBED, adapter_weights
from test_single_file import full_size, hollow_file
from test_t2i_adapter import KINDS
from test_t2i_adapter import theirs as adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
]

CONFIG = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}  # as on the hub
SCHEDULER = tiny.SCHEDULER_CONFIGS["sdxl"]


def save_refiner(folder: Path, vae: Any, **changes: Any) -> StableDiffusionXLImg2ImgPipeline:
    """A refiner's folder as diffusers writes it, with a VAE of its own; `changes` are of the UNet."""
    tokenizer = Tokenizer.subset([PROMPT, NEGATIVE])
    tokenizer.save(folder / "cut")
    ids = {"vocab_size": len(tokenizer.vocab), "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=tiny.clip("sdxl", seed=13, projection=True, **ids),
        tokenizer=None,
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "cut", pad_token="!"),
        unet=tiny.unet("refiner", seed=10, **changes),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(SCHEDULER),
        **CONFIG,
    )
    pipe.save_pretrained(folder / "refiner")
    (folder / "refiner" / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("refiner")
    pipe = save_refiner(folder, tiny.vae(seed=14, scaling_factor=0.13025))
    return Pair(pipe, mezzotint.load(folder / "refiner", device="cpu"), pipe.scheduler)  # type: ignore[arg-type]


def ours(pair: Pair, request: dict[str, Any]) -> Drawn:
    result = pair.ours.generate(mezzotint.Request(**request, batch=2))
    return Drawn(result.latents, pixels(result.images))


# ---- alone -----------------------------------------------------------------------------------------------------------

ALONE: dict[str, dict[str, Any]] = {
    "euler": {"sampler": "euler", "count": 2},
    "scores": {"sampler": "dpmpp_2m", "aesthetic_score": 7.5, "negative_aesthetic_score": 1.0},
    "without a negative prompt": {"sampler": "ddim", "negative_prompt": None},
    "without guidance": {"sampler": "euler", "guidance_scale": 1.0},
}


@pytest.mark.parametrize("case", ["scores", "without a negative prompt"])
def test_pictures_from_pictures(refiner: Pair, case: str) -> None:
    request = fields(**ALONE[case])
    mine = ours(refiner, request)
    same(mine, theirs(refiner, StableDiffusionXLImg2ImgPipeline, request, **CONFIG))
    if request["guidance_scale"] != 1.0:
        different(mine, ours(refiner, request | {"negative_aesthetic_score": 9.0}))


def test_other_syntaxes_pool_the_last_encoder(refiner: Pair) -> None:
    encode = refiner.ours.encode
    plain, compel = (encode(PROMPT, mezzotint.Request("", prompt_syntax=syntax)) for syntax in ("plain", "compel"))
    assert plain.pooled is not None and compel.pooled is not None
    torch.testing.assert_close(compel.pooled, plain.pooled)
    torch.testing.assert_close(compel.context, plain.context)


def test_a_folder_and_a_file_that_were_saved_are_the_same_model(refiner: Pair, tmp_path: Path) -> None:
    request = mezzotint.Request(**fields(sampler="euler", steps=3))
    expected = refiner.ours.generate(request).latents
    folder = refiner.ours.save(tmp_path / "saved")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder"] == [None, None] and index["requires_aesthetics_score"] is True
    assert mezzotint.load(folder, device="cpu").generate(request).latents.equal(expected)
    again = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert again.text_encoder is None and again.config.requires_aesthetics_score


def test_the_published_sizes_are_written_as_they_are_read(tmp_path: Path) -> None:
    shapes = full_size("refiner")
    found = plan_file(hollow_file(tmp_path / "model.safetensors", shapes, "refiner"))
    networks: dict[str, Any] = {part.name: part.network() for part in found.parts}
    parts = Parts(
        family=found.family,
        unet=networks["unet"],
        vae=networks["vae"],
        text_encoders=[networks["text_encoder_2"]],
        tokenizers=[make() for make in found.tokenizers],
        scheduler_config=found.scheduler_config,
        model_index=found.model_index,
        settings={},
        source=found.path,
        files=found.files,
    )
    check_single(parts)
    written = {name: tuple(tensor.shape) for name, tensor in _tensors(parts)}
    assert written == {name: shape for name, shape in shapes.items() if not name.endswith("logit_scale")}


def test_what_fits_only_a_refiner(refiner: Pair, pairs: dict[str, Pair], tmp_path: Path) -> None:
    with pytest.raises(mezzotint.RequestError, match="aesthetic_score is given; only SDXL's refiner"):
        pairs["sdxl"].ours.plan(mezzotint.Request("", aesthetic_score=6.0))
    assert any("refiner" in notice for notice in refiner.ours.plan("a lemon").notices)
    assert not refiner.ours.plan(mezzotint.Request("", image=photograph())).notices
    index = refiner.ours.parts.source / "model_index.json"
    for name in ("unet", "vae", "text_encoder_2", "tokenizer_2", "scheduler"):
        (tmp_path / name).symlink_to(index.parent / name)
    (tmp_path / "model_index.json").write_text(index.read_text().replace("true", "false"))
    with pytest.raises(mezzotint.CheckpointError, match=r"takes 5 numbers .* there are 6"):
        mezzotint.load(tmp_path, device="cpu")


# ---- after another model ---------------------------------------------------------------------------------------------

FROM_PICTURE: dict[str, Any] = {"image": photograph(), "strength": 0.7, "width": None, "height": None}
AFTER: dict[str, dict[str, Any]] = {
    "euler": {"sampler": "euler", "count": 2},
    "euler, between two steps": {"sampler": "euler", "refiner_at": 0.73, "aesthetic_score": 8.0},
    "dpmpp_2m": {"sampler": "dpmpp_2m"},
    "dpmpp_2m, between two steps": {"sampler": "dpmpp_2m", "refiner_at": 0.55, "steps": 16},
    "ddim": {"sampler": "ddim", "negative_prompt": None},
    "ddim, between two steps": {"sampler": "ddim", "refiner_at": 0.65},
    "euler_a": {"sampler": "euler_a", "count": 2},
    "dpmpp_2m_sde": {"sampler": "dpmpp_2m_sde", "refiner_at": 0.5},
    "image to image": {"sampler": "dpmpp_2m", **FROM_PICTURE},
    "image to image, euler": {"sampler": "euler", "refiner_at": 0.6, **FROM_PICTURE},
}


def request_of(case: str) -> dict[str, Any]:
    usual = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "width": 40, "height": 56, "steps": 10}
    usual |= {"guidance_scale": 6.0, "seed": 7, "count": 1, "refiner_at": 0.8}
    no_negative = AFTER[case].get("negative_prompt", "") is None
    found = {name: value for name, value in (usual | AFTER[case]).items() if value is not None}
    return found | ({"negative_prompt": None} if no_negative else {})


def mine_after(base: Pair, refiner: Pair, request: dict[str, Any], **changes: Any) -> Drawn:
    fields = {**request, "refiner": refiner.ours.parts.source, "batch": 2, **changes}
    result = base.ours.generate(mezzotint.Request(**fields))
    return Drawn(result.latents, pixels(result.images))


def theirs_after(base: Pair, refiner: Pair, request: dict[str, Any], adapter: Any = None, **of_it: Any) -> Drawn:
    """Two pipelines of theirs, one after the other, with the same generators; the first may have a T2I-Adapter."""
    row, parts = CLASSES[request["sampler"]], base.theirs.components
    skipped = ("seed", "sampler", "refiner_at", "aesthetic_score")
    options = {pictures.NAMES.get(name, name): value for name, value in request.items() if name not in skipped}
    options["generator"] = [torch.Generator().manual_seed(request["seed"] + k) for k in range(request["count"])]
    kind: Any = StableDiffusionXLImg2ImgPipeline if "image" in request else StableDiffusionXLPipeline
    first = StableDiffusionXLAdapterPipeline(**adapted(parts), adapter=adapter) if adapter else kind(**parts)
    own = {**refiner.theirs.components, "vae": parts["vae"]}
    second = StableDiffusionXLImg2ImgPipeline(**own, **CONFIG)
    for pipe in (first, second):
        pipe.scheduler = getattr(diffusers, row.name).from_config(SCHEDULER, **row.flags)
        pipe.set_progress_bar_config(disable=True)
    at = request["refiner_at"]
    latents = first(**options, **of_it, denoising_end=at, output_type="latent").images
    for name in ("width", "height", "strength"):
        options.pop(name, None)
    final: list[torch.Tensor] = []

    def keep(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        final[:] = [tensors["latents"]]
        return {}

    score = request.get("aesthetic_score", 6.0)
    options |= {"image": latents, "denoising_start": at, "aesthetic_score": score, "callback_on_step_end": keep}
    images = second(**options).images
    return Drawn(final[0], pixels(images))


@pytest.mark.parametrize("case", [case for case in AFTER if case not in ("dpmpp_2m_sde", "image to image, euler")])
def test_the_last_steps_are_the_refiners(pairs: dict[str, Pair], refiner: Pair, case: str) -> None:
    request = request_of(case)
    mine = mine_after(pairs["sdxl"], refiner, request)
    same(mine, theirs_after(pairs["sdxl"], refiner, request))


def adapted(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if name != "image_encoder"}


def test_a_t2i_adapter_acts_before_the_refiner(pairs: dict[str, Pair], refiner: Pair, tmp_path: Path) -> None:
    """As their adapter's pipeline with denoising_end; the refiner's plan has nothing of it, nor of an IP-Adapter."""
    net = adapter("full", **KINDS["xl"])
    net.save_pretrained(tmp_path / "net")
    request = request_of("euler") | {"width": 48, "height": 64, "count": 1, "steps": 5}
    control = [{"file": tmp_path / "net", "image": photograph(48, 64), "scale": 0.8}]
    mine = mine_after(pairs["sdxl"], refiner, request, control=control)
    options = {"image": photograph(48, 64), "adapter_conditioning_scale": 0.8}
    with torch.no_grad():
        same(mine, theirs_after(pairs["sdxl"], refiner, request, net, **options))
    different(mine, mine_after(pairs["sdxl"], refiner, request))
    write_tensors(tmp_path / "ip.safetensors", adapter_weights(pairs["sdxl"].theirs.unet, "plain"))
    prompted = {"file": tmp_path / "ip.safetensors", "embeds": torch.zeros(2, 1, EMBED)}
    fields = {**request, "refiner": refiner.ours.parts.source, "control": control, "ip_adapter": [prompted]}
    plan = pairs["sdxl"].ours.plan(mezzotint.Request(**fields))
    assert plan.controls and plan.ip_adapters and plan.refined is not None
    assert not (plan.refined.controls or plan.refined.ip_adapters or plan.refined.request.ip_adapter)


def main() -> None:
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        base = pictures.build(Path(place))["sdxl"]
        pipe = save_refiner(Path(place), tiny.vae(seed=14, scaling_factor=0.13025))
        second = Pair(pipe, mezzotint.load(Path(place) / "refiner", device="cpu"), pipe.scheduler)  # type: ignore[arg-type]
        for case in ALONE:
            request = fields(**ALONE[case])
            expected = theirs(second, StableDiffusionXLImg2ImgPipeline, request, **CONFIG)
            print(f"alone, {case:32}", *(f"{n:.2g}" for n in apart(ours(second, request), expected)))
        for case in AFTER:
            request = request_of(case)
            pair = mine_after(base, second, request), theirs_after(base, second, request)
            print(f"after, {case:32}", *(f"{number:.2g}" for number in apart(*pair)))


if __name__ == "__main__":
    main()
