"""LoRA files read for a model: what they are called, what does not fit, and what a pipeline draws with them.

Against diffusers, file by file: tests/parity/test_adapters.py. The arithmetic: tests/models/test_adapting.py.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mezzotint
from mezzotint import CheckpointError, Pipeline, Request, RequestError
from mezzotint.again import again, read_source
from mezzotint.cli.fields import lora_of
from mezzotint.cli.show import inspect
from mezzotint.images.io import save
from mezzotint.records.record import read
from mezzotint.weights import hub, lora_files
from mezzotint.weights.files import TensorFile
from mezzotint.weights.lora import Adapters, Scale, coverage, read_adapter
from mezzotint.weights.lora_keys import layer_names, split_key

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # 16 x 16
CONV = "down_blocks.0.resnets.0.conv1"  # 16 x 16 x 3 x 3
NORM = "down_blocks.0.resnets.0.norm1"
K_PROJ = "text_model.encoder.layers.1.self_attn.k_proj"  # 16 x 16
PROMPT = "a lemon on a blue background"


def r(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.5


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> str:
    save_file(tensors, path, metadata or None)
    return str(path)


def pair(stem: str, down: str = "lora_A.weight", up: str = "lora_B.weight", rank: int = 2) -> dict[str, Tensor]:
    return {f"{stem}.{down}": r(rank, 16), f"{stem}.{up}": r(16, rank)}


@pytest.fixture
def adapters(sd1: Pipeline) -> Adapters:
    return Adapters(sd1.unet, sd1.text_encoders)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A change of one layer of the UNet and one of the text encoder."""
    torch.manual_seed(1)
    return write(tmp_path / "style.safetensors", pair(f"unet.{TO_Q}") | pair(f"text_encoder.{K_PROJ}"))


def flat(path: str) -> str:
    return path.replace(".", "_")


NAMES = {  # in a file -> layer
    f"unet.{TO_Q}": f"unet.{TO_Q}",
    TO_Q: f"unet.{TO_Q}",
    f"base_model.model.{TO_Q}": f"unet.{TO_Q}",
    f"lora_unet_{flat(TO_Q)}": f"unet.{TO_Q}",
    f"lycoris_{flat(TO_Q)}": f"unet.{TO_Q}",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": f"unet.{TO_Q}",
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": f"unet.{TO_Q}",
    "lora_unet_input_blocks_1_0_in_layers_2": f"unet.{CONV}",
    "lora_unet_input_blocks_0_0": "unet.conv_in",
    "lora_unet_out_2": "unet.conv_out",
    "lora_unet_time_embed_2": "unet.time_embedding.linear_2",
    "lora_unet_input_blocks_2_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_middle_block_0_emb_layers_1": "unet.mid_block.resnets.0.time_emb_proj",
    "lora_unet_output_blocks_1_1_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_output_blocks_3_0_skip_connection": "unet.up_blocks.1.resnets.1.conv_shortcut",
    f"lora_te_{flat(K_PROJ)}": f"text_encoder.{K_PROJ}",
    f"lora_te1_{flat(K_PROJ)}": f"text_encoder.{K_PROJ}",
    f"text_encoder.{K_PROJ}": f"text_encoder.{K_PROJ}",
    f"text_encoder.{K_PROJ.removeprefix('text_model.')}": f"text_encoder.{K_PROJ}",
    f"text_encoder.{K_PROJ.replace('k_proj', 'to_k_lora')}": f"text_encoder.{K_PROJ}",
}
NAMES |= {  # ComfyUI's, and those of its own checkpoints
    f"{prefix}{path}": f"text_encoder.{K_PROJ}"
    for path in (K_PROJ, K_PROJ.removeprefix("text_model."))
    for prefix in ("text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "clip_l.transformer.", "clip_l.")
}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_layer(adapters: Adapters, name: str) -> None:
    assert layer_names(adapters.networks)[name] == NAMES[name]


def test_names_of_sdxl(sdxl: Pipeline) -> None:
    table = layer_names(sdxl._model.adapters.networks)
    assert table[f"lora_te2_{flat(K_PROJ)}"] == f"text_encoder_2.{K_PROJ}"
    assert table["lora_te2_text_projection"] == "text_encoder_2.text_projection"
    for prefix in ("text_encoders.clip_g.transformer.", "text_encoders.clip_g.", "clip_g.transformer.", "clip_g."):
        for path in (K_PROJ, K_PROJ.removeprefix("text_model.")):
            assert table[prefix + path] == f"text_encoder_2.{K_PROJ}"
            assert table[prefix.replace("clip_g", "clip_l") + path] == f"text_encoder.{K_PROJ}"
    assert table["lora_unet_label_emb_0_2"] == "unet.add_embedding.linear_2"


@pytest.mark.parametrize(
    ("key", "role"),
    {
        "a.b.lora_A.default.weight": "down",
        "a.b.lora_B": "up",
        "a.b.lora_A.weight": "down",
        "a.b.lora_B.other": "up",
        "a.b.lora_B.default.bias": "up_bias",
        "a.b.lora_linear_layer.up.weight": "up",
        "a.b.lora.down.weight": "down",
        "a.b.lora_magnitude_vector.default.weight": "magnitude",
        "a.b.w_norm": "diff",
        "a.b.lokr_w2_b": "k_w2_b",
    }.items(),
)
def test_every_ending(key: str, role: str) -> None:
    assert split_key(key) == ("a.b", role)


def delta(adapters: Adapters, path: str, layer: str, weight: Tensor) -> Tensor:
    change = adapters.read(path).changes[layer].weight
    assert change is not None
    return change.delta(weight)


def test_alpha_is_over_the_rank(adapters: Adapters, tmp_path: Path) -> None:
    """The file's tensor, or peft's configuration (patterns first, rslora divides by the root), or 1."""
    stem, tensors = f"unet.{TO_Q}", pair(f"unet.{TO_Q}", rank=4)
    weight, full = torch.zeros(16, 16), tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]

    def factor(name: str, alpha: float | None = None, **config: object) -> float:
        extra = {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})} if config else {}
        path = write(tmp_path / name, tensors | extra, **metadata)
        found = delta(adapters, path, stem, weight)
        scale = float((found * full).sum() / full.square().sum())
        torch.testing.assert_close(found, scale * full)
        return round(scale, 5)

    assert factor("none") == 1
    assert factor("alpha", 2.0) == 0.5
    assert factor("config", lora_alpha=8) == 2
    assert factor("rslora", lora_alpha=8, use_rslora=True) == 4
    assert factor("pattern", lora_alpha=8, alpha_pattern={"attn1.to_q": 12, "to_k": 100}) == 3
    assert factor("both", 2.0, lora_alpha=8) == 0.5
    folder = tmp_path / "peft"
    folder.mkdir()
    write(folder / "adapter_model.safetensors", {f"base_model.model.{k[5:]}": t for k, t in tensors.items()})
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "r": 4}))
    torch.testing.assert_close(delta(adapters, str(folder), stem, weight), 0.5 * full)


def test_every_kind_of_change(adapters: Adapters, tmp_path: Path) -> None:
    """Each as its paper and program write it, alpha over its own rank."""
    torch.manual_seed(2)
    q, conv, norm = (f"lora_unet_{flat(name)}" for name in (TO_Q, CONV, NORM))
    weight, kernel = torch.randn(16, 16), torch.randn(16, 16, 3, 3)
    half, half_conv = ({f"{stem}.alpha": torch.tensor(1.0)} for stem in (q, conv))  # of the rank 2

    def made(name: str, tensors: dict[str, Tensor], layer: str, weight: Tensor) -> Tensor:
        return delta(adapters, write(tmp_path / name, tensors), f"unet.{layer}", weight)

    down, mid, up = r(2, 16, 1, 1), r(2, 2, 3, 3), r(16, 2, 1, 1)
    tucker = torch.einsum("oixx,ijkl,jcxx->ockl", up, mid, down)
    names = {f"{conv}.lora_down.weight": down, f"{conv}.lora_mid.weight": mid, f"{conv}.lora_up.weight": up}
    torch.testing.assert_close(made("locon", names | half_conv, CONV, kernel), tucker / 2)

    a, b, c, d = r(16, 2), r(2, 16), r(16, 2), r(2, 16)
    names = dict(zip([f"{q}.hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b")], (a, b, c, d), strict=True))
    torch.testing.assert_close(made("loha", names | half, TO_Q, weight), (a @ b) * (c @ d) / 2)

    w1, w2 = r(4, 8), r(4, 2)
    names = {f"{q}.lokr_w1": w1, f"{q}.lokr_w2": w2}
    torch.testing.assert_close(made("lokr", names | half, TO_Q, weight), torch.kron(w1, w2))  # whole: no rank, no alpha
    names = {f"{q}.lokr_w1": w1, f"{q}.lokr_w2_a": (e := r(4, 2)), f"{q}.lokr_w2_b": (g := r(2, 2))}
    torch.testing.assert_close(made("lokr2", names | half, TO_Q, weight), torch.kron(w1, e @ g) / 2)

    full = r(16, 16, 3, 3)
    torch.testing.assert_close(made("full", {f"{conv}.diff": full, f"{conv}.diff_b": r(16)}, CONV, kernel), full)
    n = r(16)
    path = write(tmp_path / "norm", {f"{norm}.w_norm": n, f"{norm}.b_norm": n + 1})
    change = adapters.read(path).changes[f"unet.{NORM}"]
    assert change.weight is not None and change.bias is not None
    assert torch.equal(change.weight.product(), n) and torch.equal(change.bias, n + 1)

    low = pair(q, "lora_down.weight", "lora_up.weight")
    moved = weight + low[f"{q}.lora_up.weight"] @ low[f"{q}.lora_down.weight"] / 2
    rows, columns = torch.rand(16, 1) + 1, torch.rand(1, 16) + 1
    for name, scale, axis in (("rows", rows, 1), ("columns", columns, 0)):
        found = made(name, low | half | {f"{q}.dora_scale": scale}, TO_Q, weight)
        torch.testing.assert_close(found, scale * moved / moved.norm(dim=axis, keepdim=True) - weight)


def test_conv_in_of_4_channels_on_an_inpainting_unet(tmp_path: Path) -> None:
    """Of a 9-channel UNet only the latents' channels change; a change of 9 channels is taken whole."""
    unet = mezzotint.models.unet.UNet(mezzotint.config.UNetConfig(
        sample_size=8, in_channels=9, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2,
    ))  # fmt: skip
    adapters, weight = Adapters(unet, []), torch.zeros(8, 9, 3, 3)
    down, up, full, wide = r(2, 4, 3, 3), r(8, 2, 1, 1), r(8, 4, 3, 3), r(8, 9, 3, 3)
    a, b, c, d = r(8, 2), r(2, 36), r(8, 2), r(2, 36)
    hadamard = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (a, b, c, d), strict=True))
    kinds: dict[str, tuple[dict[str, Tensor], Tensor]] = {
        "lora": ({"lora_down.weight": down, "lora_up.weight": up}, torch.einsum("orxx,rikl->oikl", up, down)),
        "full": ({"diff": full}, full),
        "loha": (hadamard, ((a @ b) * (c @ d)).view(8, 4, 3, 3)),
        "wide": ({"diff": wide}, wide),
    }
    for name, (tensors, expected) in kinds.items():
        path = write(tmp_path / name, {f"lora_unet_conv_in.{key}": tensor for key, tensor in tensors.items()})
        made = delta(adapters, path, "unet.conv_in", weight)
        torch.testing.assert_close(made[:, : expected.shape[1]], expected)
        assert not made[:, expected.shape[1] :].any()
    for kind in ({"dora_scale": r(8, 1, 1, 1)}, {}):  # the norm of 9 channels is not that of 4
        tensors = kinds["lora"][0] | kind if kind else {"diff": r(8, 5, 3, 3)}
        with pytest.raises(CheckpointError, match=r"does not fit this model; unet\.conv_in, whose weight is \(8, 9"):
            adapters.read(write(tmp_path / "bad", {f"lora_unet_conv_in.{key}": t for key, t in tensors.items()}))


def test_how_much_of_each_layer() -> None:
    scale = Scale(0.8, 0.5, (("unet.down_blocks", 0.5), ("unet.down_blocks.1", 0.0), ("text_encoder", 2.0)))
    assert scale.of("unet.mid_block.conv") == 0.8
    assert scale.of("unet.down_blocks.0.conv") == 0.4
    assert scale.of("unet.down_blocks.1.conv") == 0.0
    assert scale.of("unet.down_blocks.10.conv") == 0.4
    assert scale.of("text_encoder.text_model.x") == 1.0
    assert scale.of("text_encoder_2.text_model.x") == 0.5


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_coverage_names_what_matches_and_what_not(adapters: Adapters, tmp_path: Path) -> None:
    tensors = pair(f"unet.{TO_Q}") | pair("unet.nowhere") | {"odd": r(2)} | {f"unet.{CONV}.diff": r(16, 16)}
    tensors |= {"bundle_emb.thing.string_to_param.*": r(1, 16)}
    found = coverage(Path(write(tmp_path / "a.safetensors", tensors)), adapters.networks)
    assert found.matched == (f"unet.{TO_Q}",)
    assert set(found.unmatched) == {"unet.nowhere", "odd"}
    assert len(found.wrong) == 1 and found.wrong[0].startswith(f"unet.{CONV}, whose weight is (16, 16, 3, 3)")
    assert found.bundled == ("bundle_emb.thing.string_to_param.*",)
    assert "1 layers matched; 2 names match no layer" in str(found)


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (2, 8)}, {}, "it is for Flux"),
        ({f"unet.{TO_Q.replace('attn1.to_q', 'attn2.to_k')}.lora_A.weight": (2, 2048)}, {}, "it is for SDXL"),
        (
            {f"unet.{TO_Q.replace('attn1', 'attn2').replace('to_q', 'to_k')}.lora_A.weight": (2, 768)}
            | {f"unet.{TO_Q.replace('attn1', 'attn2').replace('to_q', 'to_k')}.lora_B.weight": (16, 2)},
            {},
            "does not fit this model: it is for SD 1; unet.down_blocks",
        ),
        ({"x.lora_A.weight": (2, 8)}, {"ss_base_model_version": "sd_v2_768_v"}, "it is for SD 2"),
        ({"weight": (2, 8)}, {}, "is not a LoRA for this model; its names match no layer: weight"),
        ({f"unet.{TO_Q}.lora_A.weight": (2, 16)}, {}, "up missing, with down present"),
        ({f"unet.{TO_Q}.lora_A.weight": (0, 16), f"unet.{TO_Q}.lora_B.weight": (16, 0)}, {}, "does not fit"),
        ({f"unet.{TO_Q}.lora_A.weight": (2, 16), f"unet.{TO_Q}.lora_B.weight": (16, 3)}, {}, "different ranks"),
        ({f"unet.{TO_Q}.lora_A.weight": (2, 8), f"unet.{TO_Q}.lora_B.weight": (32, 2)}, {}, "(2, 8), (32, 2)"),
        ({f"unet.{TO_Q}.alpha": ()}, {}, "is not a LoRA for this model"),
        ({f"unet.{TO_Q}.dora_scale": (16, 1)}, {}, "dora_scale alone do not make a change"),
        ({f"unet.{TO_Q}.hada_w1_a": (16, 2)}, {}, "w1_b and w2_a and w2_b missing, with w1_a present"),
        (
            {f"unet.{TO_Q}.lora_A.weight": (2, 16), f"lora_unet_{flat(TO_Q)}.lora_down.weight": (2, 16)},
            {},
            "which mean the same tensor",
        ),
    ],
)
def test_what_is_wrong_is_a_sentence(
    adapters: Adapters, tmp_path: Path, tensors: dict[str, tuple[int, ...]], metadata: dict[str, str], words: str
) -> None:
    path = write(tmp_path / "a.safetensors", {key: r(*shape) for key, shape in tensors.items()}, **metadata)
    with pytest.raises(CheckpointError) as error:
        read_adapter(Path(path), adapters.networks)
    assert words in str(error.value) and path in str(error.value)


TO_K = f"lora_unet_{flat(TO_Q)}"
HUGE = {f"{TO_K}.lora_down.weight": torch.full((2, 16), 1e30), f"{TO_K}.lora_up.weight": torch.full((16, 2), 1e30)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        (HUGE, {}, "so large that their product is not finite"),
        ({f"{TO_K}.hada_{k}": torch.full((16, 16), 1e20) for k in ("w1_a", "w1_b", "w2_a", "w2_b")}, {}, "not finite"),
        ({f"{TO_K}.oft_blocks": torch.full((4, 4, 4), 1e30)}, {}, "its oft_blocks have 1e+30; they must be at most"),
        ({f"{TO_K}.lokr_{k}": torch.full((4, 4), 1e30) for k in ("w1", "w2")}, {}, "not finite"),
        (pair(TO_Q) | {f"{TO_Q}.alpha": torch.tensor(1e30)}, {}, "its alpha is 1e+30; it must be from -1e+06 to 1e+06"),
        (pair(TO_Q) | {f"{TO_Q}.alpha": torch.tensor(math.inf)}, {}, "not finite"),
        (pair(TO_Q) | {f"{TO_Q}.alpha": torch.ones(3)}, {}, "its alpha is a tensor of shape (3,); it must be a number"),
        (pair(TO_Q) | {f"{TO_Q}.alpha": torch.ones(0)}, {}, "its alpha is a tensor of shape (0,)"),
        (pair(TO_Q, rank=8193), {}, "its rank is 8193; it must be at most 8192"),
        ({f"{TO_Q}.hada_w1_a": r(16, 1), f"{TO_Q}.hada_w1_b": r(1, 16), f"{TO_Q}.hada_w2_a": r(16, 8193),
          f"{TO_Q}.hada_w2_b": r(8193, 16)}, {}, "its rank is 8193"),
        (pair(TO_Q), {"unet.lora_alpha": 10**400}, "the alpha lora_alpha is 10000"),
        (pair(TO_Q), {"unet.lora_alpha": math.nan}, "the alpha lora_alpha is nan; it must be a number"),
        (pair(TO_Q), {"unet.lora_alpha": "8"}, "the alpha lora_alpha is '8'"),
        (pair(TO_Q), {"unet.alpha_pattern": [1]}, "alpha_pattern is [1]; it must be a table of numbers"),
        (pair(TO_Q), {"unet.alpha_pattern": {"to_q": {}}}, "the alpha to_q is {}"),
        (pair(TO_Q), {"unet.use_rslora": "no"}, "use_rslora is 'no'; it must be true or false"),
        ({f"{TO_K}.weight": r(16), f"{TO_K}.on_input": torch.ones(2)}, {}, "on_input is a tensor of shape (2,)"),
        ({f"{TO_K}.oft_blocks": r(4, 4, 3)}, {}, "the last two must be equal"),
        ({f"{TO_K}.oft_blocks": r(4, 3, 3)}, {}, "has tensors of (4, 3, 3)"),
        ({f"{TO_K}.oft_blocks": r(9, 4, 4, 4)}, {}, "has tensors of (9, 4, 4, 4)"),
        ({f"{TO_K}.oft_blocks": r(4, 4, 4), f"{TO_K}.rescale": r(3)}, {}, "has tensors of (4, 4, 4), (3,)"),
        ({f"{TO_K}.a1.weight": r(16, 2), f"{TO_K}.b1.weight": r(16, 2)}, {}, "a2 and b2 missing"),
        ({f"base_model.model.{TO_Q}.oft_R.weight": r(4, 6)}, {}, "is OFT of peft (base_model.model"),
        ({f"{TO_K}.lambda_layer": r(1, 4)}, {}, "is T-LoRA"),
        ({f"{TO_Q}.weight": r(16, 16)}, {}, f"is not a LoRA for this model; its names match no layer: {TO_Q}.weight"),
    ],
)  # fmt: skip
def test_hostile_numbers_and_metadata_are_refused(
    adapters: Adapters, tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, object], words: str
) -> None:
    fields = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}
    path = write(tmp_path / "a.safetensors", tensors, **fields)
    with pytest.raises(CheckpointError) as error:
        read_adapter(Path(path), adapters.networks)
    assert words in str(error.value) and path in str(error.value)


def test_ranks_are_checked_before_a_tensor_is_read(
    adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors", pair(TO_Q, rank=8193) | pair("unet.mid_block.nowhere"))
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match="its rank is 8193"):
        read_adapter(Path(path), adapters.networks)


def test_the_first_version_of_glora_has_its_matrices_the_other_way_round(adapters: Adapters, tmp_path: Path) -> None:
    a1, a2, b1, b2 = r(16, 2), r(2, 16), r(16, 2), r(2, 16)
    weight = r(16, 16)
    for names in (("a1", "a2", "b1", "b2"), ("a2", "a1", "b2", "b1")):
        tensors = {f"{TO_K}.{k}.weight": t for k, t in zip(names, (a1, a2, b1, b2), strict=True)}
        path = write(tmp_path / "a.safetensors", tensors | {f"{TO_K}.alpha": torch.tensor(1.0)})
        expected = (weight @ a1 @ a2 + b1 @ b2) / 2
        torch.testing.assert_close(delta(adapters, path, f"unet.{TO_Q}", weight), expected)


def test_numbers_that_are_none_and_files_that_are_not(adapters: Adapters, tmp_path: Path) -> None:
    broken = pair(f"unet.{TO_Q}")
    broken[f"unet.{TO_Q}.lora_A.weight"][0, 0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        adapters.read(write(tmp_path / "a.safetensors", broken))
    with pytest.raises(CheckpointError, match=r"'nowhere\.safetensors' does not exist"):
        adapters.read("nowhere.safetensors")
    with pytest.raises(CheckpointError, match="folder with 0 LoRA files"):
        adapters.read(str(tmp_path / "empty") if (tmp_path / "empty").mkdir() is None else "")


def test_pytorchs_files_run_nothing(adapters: Adapters, tmp_path: Path) -> None:
    """.pt and .bin hold what .safetensors does; what is more than tensors is refused."""
    tensors = pair(f"unet.{TO_Q}")
    wanted = adapters.read(write(tmp_path / "a.safetensors", tensors)).changes[f"unet.{TO_Q}"].weight
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "a.pt", tmp_path / "folder" / "pytorch_lora_weights.bin"):
        torch.save(tensors, place)
        for name in {place, place if place.suffix == ".pt" else place.parent}:
            found = adapters.read(str(name)).changes[f"unet.{TO_Q}"].weight
            assert found is not None and wanted is not None and torch.equal(found.product(), wanted.product())
    torch.save(tensors | {"callback": Ran(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt holds Python code .* nothing in it was run"):
        adapters.read(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


class Ran:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_from_the_hub(adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that is no path: of the repository's files the LoRA and peft's configuration, asked for once."""
    listing, asked = ["README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.bin"], list[str]()
    tensors = pair(TO_Q)
    write(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 1}')

    def snapshot(name: str, choose: Callable[[list[str]], list[str]]) -> Path:
        asked.append(name)
        assert choose(listing) == ["adapter_model.safetensors", "adapter_config.json"]
        with pytest.raises(CheckpointError, match=r"2 files that could be the LoRA \(a\.safetensors, b\.safetensors\)"):
            choose(["b.safetensors", "a.safetensors", "c.bin"])
        with pytest.raises(CheckpointError, match=r"no \.safetensors"):
            choose(["README.md", "unet/a.safetensors"])
        return tmp_path

    monkeypatch.setattr(hub, "snapshot", snapshot)
    for _ in range(2):
        change = adapters.read("someone/style").changes[f"unet.{TO_Q}"].weight
        assert change is not None
        expected = tensors[f"{TO_Q}.lora_B.weight"] @ tensors[f"{TO_Q}.lora_A.weight"] / 2
        torch.testing.assert_close(change.product(), expected)
    assert asked == ["someone/style"]
    for name in ("./someone/style", "someone/style.safetensors", "a\0/b"):
        with pytest.raises(CheckpointError, match="does not exist"):
            adapters.read(name)


def test_inspect_lists_what_fits_a_model(sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = pair(f"unet.{TO_Q}") | pair("unet.nowhere") | {f"unet.{CONV}.diff": r(16, 16)}
    path = write(tmp_path / "a.safetensors", tensors)
    inspect(Path(path), str(sd1_folder))
    said = capsys.readouterr().out.splitlines()
    assert "1 layers matched: 1 in unet" in said[-3]
    assert said[-2].endswith("unet.nowhere") and f"unet.{CONV}, whose weight is (16, 16, 3, 3)" in said[-1]
    inspect(Path(path), str(sd1_folder), as_json=True)
    assert json.loads(capsys.readouterr().out)["coverage"]["matched"] == [f"unet.{TO_Q}"]


# ---- drawn -----------------------------------------------------------------------------------------------------------


def latents(pipe: Pipeline, **fields: object) -> Tensor:
    return pipe.generate(Request(**({"prompt": PROMPT, "seed": 3} | fields))).latents  # type: ignore[arg-type]


def test_merged_and_at_run_time_are_the_same_picture(sd1_folder: Path, file: str) -> None:
    """And afterwards the weights are what they were, bit for bit, the prompts' meaning too."""
    pipe = mezzotint.load(sd1_folder, device="cpu")
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    plain, run = latents(pipe), latents(pipe, loras=((file, 0.8, 0.6),))
    pipe.merge(((file, 0.8, 0.6),))
    merged = latents(pipe)
    torch.testing.assert_close(merged, run, atol=1e-4, rtol=1e-4)
    assert (merged - plain).abs().max() > 0.01
    record = read(pipe("a lemon", seed=1).info)
    assert record is not None and [*record.model.merged.values()] == [pipe._model.adapters.read(file).digest]
    pipe.merge([(file, 0.1)])  # in the place of the first
    assert not torch.equal(latents(pipe), merged)
    pipe.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    assert torch.equal(latents(pipe), plain)


def test_each_half_has_its_own_scale(sd1: Pipeline, file: str) -> None:
    plain = latents(sd1)
    assert torch.equal(latents(sd1, loras=((file, 0.0),)), plain)
    unet, text = latents(sd1, loras=((file, 1.0, 0.0),)), latents(sd1, loras=((file, 0.0, 1.0),))
    assert len({tuple(x.flatten().tolist()) for x in (plain, unet, text)}) == 3
    assert torch.equal(latents(sd1, loras=((file, 1.0, 1.0, {"text_encoder": 0.0}),)), unet)
    assert torch.equal(latents(sd1, loras=((file, 1.0, 1.0, {"unet.down_blocks": 0.0}),)), text)
    assert torch.equal(latents(sd1), plain)


def test_several_at_once_in_any_order(sd1: Pipeline, file: str, tmp_path: Path) -> None:
    other = write(tmp_path / "b.safetensors", pair(f"unet.{TO_Q}"))
    both = latents(sd1, loras=((file, 1.0), (other, -0.5)))
    torch.testing.assert_close(both, latents(sd1, loras=((other, -0.5), (file, 1.0))), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both, latents(sd1, loras=(file,)), atol=1e-3)


def test_two_threads_do_not_see_each_other(sd1: Pipeline, file: str, tmp_path: Path) -> None:
    other = write(tmp_path / "b.safetensors", pair(f"unet.{TO_Q}") | pair(f"text_encoder.{K_PROJ}"))
    wanted: list[tuple[object, ...]] = [((file, 1.0),), ((other, 1.0),), ()]
    expected = [latents(sd1, loras=loras) for loras in wanted]
    found = [torch.empty(0)] * len(wanted)

    def run(k: int) -> None:
        for _ in range(2):
            found[k] = latents(sd1, loras=wanted[k])

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, want) for x, want in zip(found, expected, strict=True))


def test_a_stream_looked_at_between_its_steps(sd1: Pipeline, file: str) -> None:
    """The changes are the step's own: what runs while a caller looks at one has none."""
    request = Request(prompt=PROMPT, seed=3, loras=((file, 1.0),))
    plain, wanted = latents(sd1), [step.x for step in sd1.stream(request)]
    for step, want in zip(sd1.stream(request), wanted, strict=True):
        assert torch.equal(latents(sd1), plain)
        assert torch.equal(step.x, want)


def test_named_in_the_prompt(sd1: Pipeline, file: str) -> None:
    """As A1111: <lora:name:text encoder's scale:UNet's>, only where the request says in which folder."""
    folder = str(Path(file).parent)
    prompts = {
        f"{PROMPT}<lora:style:0.5>": (file, 0.5),
        f"{PROMPT}<lora:Style>": (file, 1.0),
        f"{PROMPT}<lora:style:0.5:0.25>": (file, 0.25, 0.5),
        f"{PROMPT}<lora:style:te=0.5:unet=2>": (file, 2.0, 0.5),
        f"{PROMPT}<lyco:style:0.5>": (file, 0.5),
        f"{PROMPT}<lora:style:100>": (file, 100.0),  # the largest scale
    }
    for prompt, lora in prompts.items():
        assert torch.equal(latents(sd1, prompt=prompt, lora_folder=folder), latents(sd1, loras=(lora,))), prompt
        assert torch.equal(latents(sd1, prompt=prompt), latents(sd1))
    with pytest.raises(RequestError, match="names the LoRA 'stile', which is not in lora_folder; the nearest is style"):
        latents(sd1, prompt="<lora:stile:1>", lora_folder=folder)
    with pytest.raises(RequestError, match="an invalid scale; it must be a number from -100 to 100"):
        latents(sd1, prompt="<lora:style:much>", lora_folder=folder)
    with pytest.raises(RequestError, match="lora_folder is 'nowhere'; it must be an existing folder"):
        latents(sd1, prompt="<lora:style:1>", lora_folder="nowhere")


def test_named_by_its_training(sd1: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kohya's ss_output_name where no file has the name; each header is read once, as long as its file stays."""
    for name, output in (("style", "Trained"), ("other", "style"), ("a", "twice"), ("b", "twice")):
        write(tmp_path / f"{name}.safetensors", pair(TO_Q), ss_output_name=output, ss_tag_frequency='{"x": "}"}')
    write(tmp_path / "plain.safetensors", pair(TO_Q))
    (tmp_path / "broken.safetensors").write_bytes(b'\x20\0\0\0\0\0\0\0{"__metadata__":{"ss_output_name":[')
    (tmp_path / "short.safetensors").write_bytes(b"\0")
    opened, own_open = list[str](), lora_files.open_regular

    def counting(path: str) -> Any:
        opened.append(Path(path).name)
        return own_open(path)

    monkeypatch.setattr(lora_files, "open_regular", counting)

    def named(name: str) -> str:
        plan = sd1.plan(Request(prompt=f"a lemon<lora:{name}:1>", lora_folder=str(tmp_path)))
        ((path, _),) = plan.loras
        return Path(path).name

    assert named("style") == "style.safetensors" and not opened
    assert named("trained") == named("TRAINED") == "style.safetensors"
    assert sorted(opened) == sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RequestError, match=r"'twice', the ss_output_name of 2 files in lora_folder; .*: a, b$"):
        named("twice")
    opened.clear()
    write(tmp_path / "a.safetensors", pair(TO_Q), ss_output_name="another name")
    assert named("twice") == "b.safetensors" and opened == ["a.safetensors"]


def test_two_requests_with_other_loras_in_their_prompts_do_not_share_a_batch(sd1: Pipeline, file: str) -> None:
    folder = str(Path(file).parent)
    prompts = [f"{PROMPT}<lora:style:1>", f"{PROMPT}<lora:style:0.2>"]
    requests = [Request(prompt=prompt, seed=3, batch=2, lora_folder=folder) for prompt in prompts]
    for result, prompt in zip(sd1.generate(requests), prompts, strict=True):
        assert torch.equal(result.latents, latents(sd1, prompt=prompt, lora_folder=folder))


def test_embeddings_bundled_in_a_lora_are_read(sd1: Pipeline, tmp_path: Path) -> None:
    bundle = {"bundle_emb.thing.string_to_param.*": r(2, 16)}
    path = write(tmp_path / "a.safetensors", pair(f"unet.{TO_Q}") | bundle)
    own = write(tmp_path / "thing.safetensors", {"emb_params": bundle["bundle_emb.thing.string_to_param.*"]})
    alone = write(tmp_path / "b.safetensors", bundle)
    assert torch.equal(
        latents(sd1, prompt="a thing", loras=((alone, 1.0),)), latents(sd1, prompt="a thing", embeddings=own)
    )
    assert not torch.equal(latents(sd1, prompt="a thing", loras=((path, 1.0),)), latents(sd1, prompt="a thing"))


def test_the_record_has_its_hash_and_again_asks_for_the_file(sd1: Pipeline, file: str, tmp_path: Path) -> None:
    result = sd1.generate(Request(prompt=PROMPT, seed=3, loras=((file, 0.5),)))
    record = read(result.images[0].info)
    assert record is not None and record.model.loras == {Path(file).name: sd1._model.adapters.read(file).digest}
    save(result.images[0], tmp_path / "a.png")
    source = read_source(tmp_path / "a.png")
    with pytest.raises(
        RequestError, match=r"it was generated with the LoRAs .*style.safetensors; give their files with --lora"
    ):
        again(sd1, source)
    (drawn,) = again(sd1, source, loras=((file, 0.5),))
    assert drawn.tobytes() == result.images[0].tobytes()


def test_unmatched_keys_are_reported(sd1: Pipeline, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pair(f"unet.{TO_Q}") | pair("unet.nowhere"))
    result = sd1.generate(Request(prompt=PROMPT, seed=3, loras=(path,)))
    assert result.notices == (f"{path}: 1 layers matched; 1 names match no layer: unet.nowhere",)


def test_a_file_that_changes_is_read_again(sd1: Pipeline, file: str) -> None:
    before = latents(sd1, loras=((file, 1.0),))
    write(Path(file), pair(f"unet.{TO_Q}", rank=3) | pair(f"text_encoder.{K_PROJ}"))
    assert not torch.equal(latents(sd1, loras=((file, 1.0),)), before)


def test_with_held_weights(sd1_folder: Path, file: str) -> None:
    """Weights read from the file as each layer runs: the same picture."""
    pipe = mezzotint.load(sd1_folder, device="cpu", placement=mezzotint.memory.planner.Placement(weights="stream"))
    resident = mezzotint.load(sd1_folder, device="cpu")
    assert torch.equal(latents(pipe, loras=((file, 1.0),)), latents(resident, loras=((file, 1.0),)))


def test_words_of_the_command_line() -> None:
    assert lora_of("a.safetensors") == ("a.safetensors", 1.0)
    assert lora_of("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert lora_of("a:0.8:-0.5") == ("a", 0.8, -0.5)
    assert lora_of("C:/a.safetensors:2") == ("C:/a.safetensors", 2.0)


@pytest.mark.parametrize("loras", [((1, 2),), (("a", "b"),), (("a", 1000.0),), (("a",),), (("a", 1.0, 1.0, 1.0),), 5])
def test_invalid_loras_are_described(loras: object) -> None:
    with pytest.raises(RequestError, match=r"loras is .*; it must be a list of at most 100 LoRAs"):
        Request(prompt="", loras=loras)  # type: ignore[arg-type]


def test_a_request_with_loras_through_json() -> None:
    request = Request(prompt="", loras=[Path("a"), ("b", 0.5), ("c", 1, 2, {"unet.mid_block": 0.5})])  # type: ignore[list-item]
    assert request.loras == (("a", 1.0), ("b", 0.5), ("c", 1.0, 2.0, (("unet.mid_block", 0.5),)))
    assert Request.model_validate_json(request.model_dump_json()) == request
    assert hash(request) == hash(request.replace())
