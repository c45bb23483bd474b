"""What a result says of the model and the run: `Result.notices`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mezzotint
from conftest import SCHEDULER, SDXL, WIDTH, tiny_clip, tiny_unet, tiny_vae
from mezzotint import Request
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.weights import inspect_model, save_folder

REQUEST = Request(prompt="a lemon", width=32, height=32, steps=2, seed=1)


def test_epsilon_without_signal(sd1_folder: Path) -> None:
    zero_snr = {"scheduler": {"rescale_betas_zero_snr": True}}
    [notice] = mezzotint.load(sd1_folder, device="cpu", config=zero_snr).generate(REQUEST).notices
    assert "zero terminal SNR" in notice and "--prediction v_prediction" in notice
    right = mezzotint.load(sd1_folder, device="cpu", config=zero_snr, prediction="v_prediction")
    assert right.generate(REQUEST).notices == ()


def test_a_network_that_ran_in_float32(sd1_folder: Path) -> None:
    """Said of the result to which the picture belongs, though only its second batch overflowed."""
    pipe = mezzotint.load(sd1_folder, device="cpu", dtype="bfloat16")
    calls = []

    def overflow(_: Any, __: Any, output: Tensor) -> Tensor | None:
        calls.append(output.dtype)
        return output * torch.inf if calls == [torch.bfloat16] * 2 else None

    hook = pipe.vae.decoder.conv_out.register_forward_hook(overflow)
    first, second = pipe.generate([REQUEST.replace(count=2, batch=1), REQUEST.replace(seed=5)])
    hook.remove()
    [notice] = first.notices
    assert notice.startswith("the vae returned values that are not finite") and "float32" in notice
    assert second.notices == ()
    assert json.loads(first.images[1].info["mezzotint"])["float32"] == ["vae"]


@pytest.fixture
def xl_folder(tmp_path: Path) -> Path:
    """An SDXL-shaped folder."""
    with torch.random.fork_rng():
        tokenizer = Tokenizer.subset(["a lemon"])
        save_folder(
            tmp_path / "xl",
            unet=tiny_unet(3, cross_attention_dim=2 * WIDTH, **SDXL),
            vae=tiny_vae(4),
            text_encoder=tiny_clip(5, tokenizer),
            tokenizer=tokenizer,
            second=(tiny_clip(6, tokenizer, "CLIPTextModelWithProjection"), tokenizer),
            scheduler_config=SCHEDULER,
            dtype=torch.float32,
        )
    return tmp_path / "xl"


def test_sdxl_without_text_projection(xl_folder: Path) -> None:
    assert inspect_model(xl_folder).notices == []
    index = json.loads((xl_folder / "model_index.json").read_text())
    index["text_encoder_2"][1] = "CLIPTextModel"
    (xl_folder / "model_index.json").write_text(json.dumps(index))
    [notice] = inspect_model(xl_folder).notices
    assert "xl has no text_projection of the second text encoder" in notice
    assert mezzotint.load(xl_folder, device="cpu").generate(REQUEST).notices == (notice,)
