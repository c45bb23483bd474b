"""Previews of latents: the matrix is the decoder's where that is linear, and near it on a trained VAE."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import mezzotint
from mezzotint.images.io import from_pil, to_pil
from mezzotint.run.preview import LatentPreview, matrix_path


def test_the_matrix_of_a_linear_decoder_is_found() -> None:
    """Eight bits a channel round by at most 1/255; the fit's error is no larger, and its own picture rounds again."""
    random = torch.Generator().manual_seed(1)
    matrix, offset = 0.1 * torch.randn(3, 4, generator=random), 0.1 * torch.randn(3, generator=random)

    def decode(z: Tensor) -> list[Image.Image]:
        rgb = torch.einsum("rc,bchw->brhw", matrix, z) + offset[:, None, None]
        return to_pil(F.interpolate(rgb, scale_factor=8, mode="nearest"))

    latents = torch.randn(2, 4, 3, 5, generator=random)
    shown = LatentPreview(decode, 4, 8).picture(latents)
    assert shown.size == (2 * 5 * 8, 3 * 8)
    rgb = torch.cat(list(torch.einsum("rc,bchw->brhw", matrix, latents) + offset[:, None, None]), dim=-1)[None]
    wanted = F.interpolate(rgb, scale_factor=8.0, mode="bilinear").clamp(-1, 1)
    assert (from_pil(shown) - wanted).abs().max() <= 2 * 2 / 255


def test_values_that_are_not_finite_are_shown() -> None:
    preview = LatentPreview(lambda z: [Image.new("RGB", (128, 128), "grey")] * len(z), 4, 8)
    assert preview.picture(torch.full((1, 4, 2, 2), torch.nan)).size == (16, 16)


def _fail(latents: Tensor) -> list[Image.Image]:
    raise AssertionError("decoded")


def test_the_matrix_is_fitted_once_and_stored(tmp_path: Path) -> None:
    def decode(z: Tensor) -> list[Image.Image]:
        return to_pil(F.interpolate(z[:, :3] * 0.2, scale_factor=8, mode="nearest"))

    path, latents = (
        tmp_path / "previews" / "m.json",
        torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(1)),
    )
    shown = LatentPreview(decode, 4, 8, path).picture(latents)
    assert LatentPreview(_fail, 4, 8, path).picture(latents).tobytes() == shown.tobytes()
    for damaged in ("", "[[1, 2, 3]]", "{}", json.dumps([[float("nan")] * 3] * 5), "[" * 100_000):
        path.write_text(damaged)
        assert LatentPreview(decode, 4, 8, path).picture(latents).tobytes() == shown.tobytes()
    assert LatentPreview(_fail, 4, 8, path).picture(latents).tobytes() == shown.tobytes()  # it was written anew
    (tmp_path / "file").touch()
    assert LatentPreview(decode, 4, 8, tmp_path / "file" / "m.json").picture(latents).tobytes() == shown.tobytes()


def test_a_matrix_is_stored_by_the_files_of_the_vae() -> None:
    folder = {"unet/a.safetensors": "1", "vae/config.json": "2", "vae/a.safetensors": "3"}
    assert matrix_path(folder, None) == matrix_path(folder | {"unet/a.safetensors": "4"}, None)
    paths = {
        matrix_path(folder, None),
        matrix_path(folder, {"b.safetensors": "5"}),
        matrix_path({"m.safetensors": "1"}, None),
    }
    assert len(paths | {matrix_path(folder | {"vae/a.safetensors": "6"}, None)}) == 4


def test_a_pipeline_stores_the_matrix_of_its_vae_unless_it_was_edited(
    sd1_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    pipe = mezzotint.load(sd1_folder, device="cpu")
    shown = pipe.preview().picture(latents).tobytes()
    [stored] = (tmp_path / "mezzotint" / "previews").iterdir()
    again = mezzotint.load(sd1_folder, device="cpu")
    monkeypatch.setattr(again, "decode", _fail)
    assert again.preview().picture(latents).tobytes() == shown
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.mul_(2)
    assert pipe.preview().picture(latents).tobytes() != shown
    assert [*stored.parent.iterdir()] == [stored]
