"""CLIP's vision encoder, its image processor and the safety checker against transformers and diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPVisionModelWithProjection
from transformers import CLIPVisionConfig as TheirConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mezzotint.config import CLIPVisionConfig, ImageProcessorConfig, SafetyCheckerConfig
from mezzotint.model_options import ModelOptions
from mezzotint.models import safety_checker
from mezzotint.models.clip_vision import CLIPVisionModel, preprocess
from mezzotint.models.safety_checker import SafetyChecker
from mezzotint.placement import Placement
from mezzotint.run.safety import PictureChecker
from mezzotint.weights.safety import scan_checker

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 16,
}
VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
CPU = torch.device("cpu")


def pictures(count: int, size: tuple[int, int] = (40, 32)) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    coarse = [Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(count)]
    return [picture.resize(size, Image.Resampling.BICUBIC) for picture in coarse]


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])  # ViT-L/14's; ViT-H/14's and ViT-bigG/14's
def test_the_vision_encoder_is_transformers(act: str) -> None:
    torch.manual_seed(0)
    theirs = CLIPVisionModelWithProjection(TheirConfig(**TINY, hidden_act=act)).eval()
    for parameter in theirs.parameters():  # so that attention is far from uniform
        torch.nn.init.normal_(parameter, std=0.3)
    ours = CLIPVisionModel(CLIPVisionConfig.model_validate({**TINY, "hidden_act": act})).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        want, have = theirs(pixels, output_hidden_states=True), ours(pixels)
    pairs = [*zip(have.hidden_states, want.hidden_states, strict=True), (have.embeds, want.image_embeds)]
    for mine, other in pairs:
        assert ((mine - other).abs().max() / other.abs().max()) < 1e-5


@pytest.mark.parametrize("size", [(512, 512), (301, 513), (64, 40), (8, 17)])
@pytest.mark.parametrize(
    "fields",
    [
        {},  # what the public model's file has, in its new spelling
        {"size": 224, "crop_size": 224, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"},
        {"size": {"shortest_edge": 50}, "crop_size": {"height": 61, "width": 49}},  # a black border
        {"size": {"height": 33, "width": 40}, "crop_size": [33, 40], "resample": 2},
        {"do_resize": False, "crop_size": 33, "do_rescale": False},
        {"do_center_crop": False, "do_normalize": False, "rescale_factor": 0.01},
    ],
)
def test_the_image_processor_is_transformers_bit_for_bit(size: tuple[int, int], fields: dict[str, Any]) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    want = CLIPImageProcessorPil(**fields)(picture, return_tensors="pt").pixel_values
    assert torch.equal(preprocess(ImageProcessorConfig.model_validate(fields), [picture]), want)


def calibrated(images: list[Image.Image]) -> tuple[StableDiffusionSafetyChecker, torch.Tensor]:
    """Diffusers' checker with thresholds just above and below what the pictures reach; their input."""
    torch.manual_seed(1)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=TINY, projection_dim=16)).eval()
    for name, parameter in checker.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "concept" in name or "special" in name else 0.2)
    fields = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    pixels = CLIPImageProcessorPil(**fields)(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = torch.nn.functional.normalize(checker.visual_projection(checker.vision_model(pixels)[1]))
        near = embeds @ torch.nn.functional.normalize(checker.concept_embeds).t()  # (pictures, 17)
        special = embeds @ torch.nn.functional.normalize(checker.special_care_embeds).t()
        # to three decimals only the second exceeds its threshold; the third and fourth with special care do
        above = torch.tensor([0.0004, 0.0006, -0.003, -0.0094, -0.0106]).repeat(4)[:17]
        checker.concept_embeds_weights.copy_(near.amax(0) - above)
        checker.special_care_embeds_weights.copy_(special.median(0).values)
    return checker, pixels


def write(folder: Path, tensors: dict[str, torch.Tensor], suffix: str) -> None:
    if suffix == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")


# the public files' keys, and those that transformers 5 writes
@pytest.mark.parametrize(("suffix", "doubled"), [("bin", True), ("safetensors", False)])
def test_flags_are_diffusers(tmp_path: Path, suffix: str, doubled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(24)
    checker, pixels = calibrated(images)
    want = checker(pixels, [np.zeros((2, 2, 3)) for _ in images])[1]
    assert 0 < sum(want) < len(want)
    folder, extractor = tmp_path / "safety_checker", tmp_path / "feature_extractor"
    checker.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if doubled:
        tensors = {f"vision_model.{k}" if k.startswith("vision_model.") else k: t for k, t in tensors.items()}
        tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        config = json.loads((folder / "config.json").read_text())  # as transformers 4.2x wrote it
        config["vision_config_dict"] = config["vision_config"]
        config["vision_config"] = None
        (folder / "config.json").write_text(json.dumps(config))
    write(folder, tensors, suffix)
    extractor.mkdir()
    (extractor / "preprocessor_config.json").write_text(json.dumps({"size": 28, "crop_size": 28, "resample": 3}))
    for place in (folder, tmp_path):  # the checker's folder, and the model's
        mine = PictureChecker(scan_checker(place, ModelOptions()), CPU, torch.float32, Placement())
        assert mine.check(images) == want
    monkeypatch.setattr(safety_checker, "SPECIAL_CARE", 0.0)
    assert sum(mine.check(images)) < sum(want)  # some are flagged for it alone


def test_the_public_checker_has_these_keys_and_shapes() -> None:
    fields = {"vision_config": VIT_L, "projection_dim": 768, "concepts": 17, "special_care": 3}
    with torch.device("meta"):
        ours = SafetyChecker(SafetyCheckerConfig.model_validate(fields))
        theirs = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VIT_L, projection_dim=768))
    prefix = "vision_model.vision_model."
    want = {
        "concept_embeds": (17, 768),
        "special_care_embeds": (3, 768),
        "concept_embeds_weights": (17,),
        "special_care_embeds_weights": (3,),
        "visual_projection.weight": (768, 1024),
        f"{prefix}embeddings.class_embedding": (1024,),
        f"{prefix}embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        f"{prefix}embeddings.position_embedding.weight": (257, 1024),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in (f"encoder.layers.{n}" for n in range(24)):
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        shapes = {f"self_attn.{name}_proj": (1024, 1024) for name in ("q", "k", "v", "out")}
        for name, shape in {**shapes, "mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}.items():
            want |= {f"{prefix}{layer}.{name}.weight": shape, f"{prefix}{layer}.{name}.bias": shape[:1]}
    want |= {f"{prefix}{norm}.{leaf}": (1024,) for norm in norms for leaf in ("weight", "bias")}
    have = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert have == want
    assert sum(int(np.prod(shape)) for shape in want.values()) == 303_981_588
    single = {name.replace(prefix, "vision_model."): shape for name, shape in have.items()}
    assert single == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
