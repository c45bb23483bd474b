"""What single files say of their schedule, in which order it counts, and how it is overruled."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.errors import CheckpointError, RequestError
from mezzotint.model_options import ModelOptions, parse_config
from mezzotint.weights.model_files import ModelFiles
from mezzotint.weights.single import plan_file

UNET = "model.diffusion_model."
BIAS = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
SD1 = {f"{UNET}input_blocks.0.0.weight": (320, 4, 1, 1), f"{UNET}x.attn2.to_k.weight": (2, 768)}
SD2 = SD1 | {f"{UNET}x.attn2.to_k.weight": (2, 1024), "cond_stage_model.model.ln_final.weight": (4,)}
SDXL = {f"{UNET}label_emb.0.0.weight": (2, 2), "conditioner.embedders.0.transformer.x": (1,)}
LDM = """model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"  # as in SD 2.1
    linear_start: 0.00085
"""
SGM = """model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    denoiser_config:
      params:
        scaling_config:
          target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling
"""


def plan(
    path: Path,
    names: dict[str, tuple[int, ...]],
    metadata: dict[str, str] | None = None,
    tensors: dict[str, Tensor] | None = None,
    **options: Any,
) -> ModelFiles:
    weights = {name: torch.zeros(shape) for name, shape in names.items()} | (tensors or {})
    save_file(weights, path / "a.safetensors", metadata=metadata)
    return plan_file(path / "a.safetensors", ModelOptions(**options))


@pytest.mark.parametrize("key", ["modelspec.prediction_type", "modelspec.predict_key"])
@pytest.mark.parametrize(
    ("said", "prediction"),
    [
        *(
            (said, "v_prediction")
            for said in ("v", "V_Prediction", "v-prediction", "vpred", "v_pred", " V Pred", "velocity")
        ),
        *((said, "epsilon") for said in ("epsilon", "eps", "eps_pred", "Noise-Prediction", "epsilon")),
        *((said, "sample") for said in ("sample", "x0", "x_0-prediction")),
    ],
)
def test_metadata(key: str, said: str, prediction: str, tmp_path: Path) -> None:
    found = plan(tmp_path, SD1, {key: said}, {"v_pred": torch.zeros(0)} if prediction == "epsilon" else None)
    assert found.scheduler_config["prediction_type"] == prediction  # before marker tensors
    assert (found.notices, found.prediction_source) == ([], key)


@pytest.mark.parametrize("said", ["flow", "prediction", "v2", "e", "1", "\x1b[2J" * 99])
def test_what_is_not_understood_is_a_notice(said: str, tmp_path: Path) -> None:
    found = plan(tmp_path, SD1, {"modelspec.prediction_type": said}, {"v_pred": torch.zeros(0)})
    assert found.scheduler_config["prediction_type"] == "v_prediction" and found.prediction_source == "v_pred"
    (notice,) = found.notices
    assert "modelspec.prediction_type" in notice and said[:5] in eval(notice.partition(" is ")[2].partition(",")[0])
    assert "is v_prediction, v_pred: give prediction" in notice and len(notice) < 500
    assert plan(tmp_path, SD1, {"modelspec.prediction_type": said}, prediction="epsilon").notices == []
    assert plan(tmp_path, SD1, {"modelspec.prediction_type": " "}).notices == []


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        (LDM, "v_prediction"),
        (LDM.replace("\n", "\r\n"), "v_prediction"),
        (LDM.replace('"v"', "'eps'"), "epsilon"),
        (LDM.replace('"v"', "x0"), "sample"),
        (SGM, "v_prediction"),
        (LDM.replace("    param", "    # param"), None),
        (LDM.replace('"v"', "velvet"), None),
        (SGM.replace("VScaling", "VScalingWithEDMcNoise"), None),
        ("\0\xff: [" + " " * 100_000, None),
        ("\xef\xbb\xbfparameterization: v\n", "v_prediction"),
        ("parameterization: 'v_prediction'\n", "v_prediction"),
        ("parameterization:" + " " * 100_000, None),
    ],
)
def test_a_yaml_file_beside_it(text: str, prediction: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(text.encode("latin-1"))
    found = plan(tmp_path, SD1)
    assert found.scheduler_config["prediction_type"] == (prediction or "epsilon")
    assert (tmp_path / "a.yaml" in found.files) == bool(prediction)  # the picture's record has its hash
    assert found.prediction_source == ("a.yaml" if prediction else "as usual in this family")
    unread = next((word for word in ("velvet", "VScalingWithEDMcNoise") if word in text), "")
    assert [unread in notice and "a.yaml has" in notice for notice in found.notices] == [True] * bool(unread)
    assert plan(tmp_path, SD1, {"modelspec.prediction_type": "epsilon"}).files == [tmp_path / "a.safetensors"]
    assert plan(tmp_path, SD1, prediction="epsilon").scheduler_config["prediction_type"] == "epsilon"


def test_a_yaml_file_that_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(CheckpointError, match=r"a\.yaml cannot be read"):
        plan(tmp_path, SD1)
    (tmp_path / "a.yaml").unlink()
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=r"a\.yaml cannot be read"):
        plan(tmp_path, SD1)


@pytest.mark.parametrize(
    ("std", "channels", "prediction"),
    [
        (0.0901, 4, "v_prediction"),
        (0.0899, 4, "epsilon"),
        (0.2, 9, "epsilon"),
        (None, 4, "epsilon"),
    ],
)
def test_sd2_is_told_apart_as_in_comfyui(std: float | None, channels: int, prediction: str, tmp_path: Path) -> None:
    """The population's standard deviation: of these two numbers the sample's is sqrt(2) times that."""
    bias = {} if std is None else {BIAS: torch.tensor([1.0 + std, 1.0 - std])}
    if std is not None:
        assert torch.std(bias[BIAS], unbiased=False).item() == pytest.approx(std, rel=1e-4)
    names = SD2 | {f"{UNET}input_blocks.0.0.weight": (320, channels, 1, 1)}
    found = plan(tmp_path, names, None, bias)
    assert found.scheduler_config["prediction_type"] == prediction
    [notice] = found.notices
    assert found.prediction_source == "a guess"
    assert "a.safetensors does not say" in notice and f"{prediction} is assumed" in notice and "--prediction" in notice
    for said in ({"metadata": {"modelspec.prediction_type": "v"}}, {"prediction": "v_prediction"}):
        given = plan(tmp_path, names, tensors=bias, **said)  # type: ignore[arg-type]
        assert (given.scheduler_config["prediction_type"], given.notices) == ("v_prediction", [])


PLAYGROUND = {
    "edm_mean": torch.tensor([-1.6, 1.1, 0.2, 0.5]).view(1, 4, 1, 1),
    "edm_std": torch.tensor([8.0, 6.0, 4.0, 5.5]).view(1, 4, 1, 1),
}
COSXL = {"edm_vpred.sigma_max": torch.tensor(90.0), "edm_vpred.sigma_min": torch.tensor(0.01)}


def test_edm_files(tmp_path: Path) -> None:
    found = plan(tmp_path, SDXL, None, PLAYGROUND)
    schedule = {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon", "sigma_data": 0.5}
    assert found.scheduler_config.items() >= (schedule | {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}).items()
    assert found.latents["scaling_factor"] == 0.5
    assert found.latents["latents_std"] == (8.0, 6.0, 4.0, 5.5)
    assert found.latents["latents_mean"] == pytest.approx((-1.6, 1.1, 0.2, 0.5))
    found = plan(tmp_path, SDXL, None, COSXL)
    schedule = {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_data": 1.0}
    assert found.scheduler_config.items() >= (schedule | {"sigma_max": 90.0}).items()
    assert found.scheduler_config["sigma_min"] == pytest.approx(0.01)
    assert found.latents == {"scaling_factor": 0.13025}
    assert found.passed_over == []


@pytest.mark.parametrize(
    "tensors",
    [
        PLAYGROUND | {"edm_std": torch.zeros(4)},
        PLAYGROUND | {"edm_std": torch.ones(3)},
        PLAYGROUND | {"edm_mean": torch.zeros(0)},
        PLAYGROUND | {"edm_mean": torch.zeros(65)},
        COSXL | {"edm_vpred.sigma_max": torch.tensor(math.nan)},
        COSXL | {"edm_vpred.sigma_min": torch.tensor(0.0)},
        COSXL | {"edm_vpred.sigma_min": torch.tensor(91.0)},
    ],
)
def test_markers_that_are_no_numbers(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.safetensors: edm_"):
        plan(tmp_path, SDXL, None, tensors)


def test_the_scheduler_can_be_overruled(tmp_path: Path) -> None:
    config = parse_config(["scheduler.rescale_betas_zero_snr=false", "scheduler._class_name=DDIMScheduler"])
    marked = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    assert plan(tmp_path, SDXL, None, marked).scheduler_config["rescale_betas_zero_snr"] is True
    found = plan(tmp_path, SDXL, None, marked, config=config)
    assert found.scheduler_config["rescale_betas_zero_snr"] is False
    assert found.scheduler_config["_class_name"] == "DDIMScheduler"


@pytest.mark.parametrize("text", ["unet", "unet.x", "unet=3", ".x=3", "transformer.x=3", "unet.=3"])
def test_a_config_that_is_none(text: str) -> None:
    with pytest.raises(RequestError, match=r"it must be PART\.FIELD=VALUE"):
        parse_config([text])
