"""LoRA files in every convention that diffusers loads: the same file in both, the same picture.

Each file changes the attention of the UNet and of the text encoders, by names that this file spells out for itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pictures import Pair, apart, fields, ours, theirs

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

RANK, ALPHA = 3, 1.5
Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> (down, up)

# the original names of the tiny SDXL's blocks: one resnet a level, attention in the second
BLOCKS = {
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
}


def factors(pair: Pair) -> Factors:
    """Random ones, large enough to be seen, for every projection of attention."""
    torch.manual_seed(11)
    wanted = re.compile(r"(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)$")
    made = {}
    for network, module in pair.ours._model.adapters.networks.items():
        for name, layer in module.named_modules():
            if wanted.search(name):
                outputs, inputs = layer.weight.shape
                made[f"{network}.{name}"] = torch.randn(RANK, inputs) * 0.3, torch.randn(outputs, RANK) * 0.3
    return made


def kohya(made: Factors, two: bool, blocks: dict[str, str] | None = None) -> dict[str, Tensor]:
    networks = {"unet": "lora_unet", "text_encoder": "lora_te1" if two else "lora_te", "text_encoder_2": "lora_te2"}
    file = {}
    for name, (down, up) in made.items():
        network, _, path = name.partition(".")
        for module, block in (blocks or {}).items():
            path = block + path.removeprefix(module) if path.startswith(module) else path
        stem = f"{networks[network]}_{path.replace('.', '_')}"
        file |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}
    return file


def peft(made: Factors) -> dict[str, Tensor]:
    return {
        f"{n}.{side}.weight": t for n, pair in made.items() for side, t in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def of_2023(made: Factors) -> dict[str, Tensor]:
    file = {}
    for name, (down, up) in made.items():
        middle = "lora" if name.startswith("unet.") else "lora_linear_layer"
        file |= {f"{name}.{middle}.down.weight": down, f"{name}.{middle}.up.weight": up}
    return file


def processors(made: Factors) -> dict[str, Tensor]:
    file = {}
    for name, (down, up) in made.items():
        stem = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1_lora", name)
        stem = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1_lora", stem)
        file |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return file


def metadata(pair: Pair) -> dict[str, str]:
    config = {}
    for network in pair.ours._model.adapters.networks:
        names = (
            ["to_q", "to_k", "to_v", "to_out.0"] if network == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
        )
        config |= {
            f"{network}.r": RANK,
            f"{network}.lora_alpha": 1.5,
            f"{network}.alpha_pattern": {names[0]: 2},
            f"{network}.target_modules": names,
            f"{network}.use_rslora": True,
        }
    return {"lora_adapter_metadata": json.dumps(config), "format": "pt"}


CASES = [
    ("sd1", "kohya"),
    ("sd2", "peft"),
    ("sdxl", "kohya"),
    ("sdxl", "peft with its configuration"),
    ("sdxl", "kohya, original names"),
    ("sd1", "of 2023"),
    ("sdxl", "of 2023"),
    ("sd1", "processors"),
    *(
        pytest.param(family, kind, marks=pytest.mark.slow)  # the same names with other networks
        for family, kind in (
            ("sd1", "peft"),
            ("sd1", "peft with its configuration"),
            ("sd2", "kohya"),
            ("sd2", "peft with its configuration"),
            ("sdxl", "peft"),
        )
    ),
]


def written(path: Path, pair: Pair, family: str, kind: str) -> Path:
    made, extra = factors(pair), None
    match kind:
        case "kohya":
            file = kohya(made, family == "sdxl")
        case "kohya, original names":
            file = kohya(made, True, BLOCKS)
        case "of 2023":
            file = of_2023(made)
        case "processors":
            file = processors(made)
        case _:
            file, extra = peft(made), metadata(pair) if "configuration" in kind else None
    save_file({key: tensor.contiguous() for key, tensor in file.items()}, path, extra)
    return path


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_their_picture_with_the_same_file(pairs: dict[str, Pair], tmp_path: Path, family: str, kind: str) -> None:
    """And unlike the picture without it."""
    pair = pairs[family]
    path = written(tmp_path / "a.safetensors", pair, family, kind)
    covered = pair.ours._model.adapters.read(str(path)).coverage
    assert not covered.unmatched and {*factors(pair)} <= {*covered.matched}
    request: dict[str, Any] = fields(sampler="euler", steps=3)
    plain = ours(pair, request)
    pair.theirs.load_lora_weights(path, adapter_name="one")
    try:
        for scale in (1.0, 0.4) if kind == "kohya" else (0.6,):
            pair.theirs.set_adapters("one", scale)
            drawn = ours(pair, request | {"loras": ((str(path), scale),)})
            latents, greatest, mean = apart(drawn, theirs(pair, request))
            assert latents < 1e-4 and greatest <= 1 and mean < 0.01
            assert apart(drawn, plain)[0] > 0.05
    finally:
        pair.theirs.unload_lora_weights()
    assert torch.equal(ours(pair, request).latents, plain.latents)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_dora_with_plain_lora(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """Where diffusers' picture is another, each side's weights are computed by hand (docs/lora.md).

    A file with DoRA in some layers: diffusers has it in all, at the rows' own lengths where the file has none. A file
    of DoRA and a plain one: peft's sum hangs on their order, ours does not.
    """
    pair = pairs["sd1"]
    made = {name: two for name, two in factors(pair).items() if name.startswith("unet.")}
    network = pair.ours._model.adapters.networks["unet"]
    own = {name: network.get_submodule(name.removeprefix("unet.")).weight.detach().clone() for name in made}
    moved = {name: own[name] + up @ down for name, (down, up) in made.items()}
    lengths = {name: own[name].norm(dim=1) * (torch.rand(len(own[name])) + 0.5) for name in made if "to_q" in name}
    q, k = next(name for name in made if name in lengths), next(name for name in made if name not in lengths)
    files = {
        "dora": {key: tensor for key, tensor in peft(made).items() if "to_q" in key},
        "plain": {key: torch.randn_like(tensor) * 0.3 for key, tensor in peft(made).items()},
        "both": peft(made),
    }
    for kind in ("dora", "both"):
        files[kind] |= {f"{name}.lora_magnitude_vector": length for name, length in lengths.items()}
    paths = {kind: str(tmp_path / f"{kind}.safetensors") for kind in files}
    for kind, file in files.items():
        save_file({key: tensor.contiguous() for key, tensor in file.items()}, paths[kind])

    def ours_of(*kinds: str) -> dict[str, Tensor]:
        pair.ours.merge([(paths[kind], 1.0) for kind in kinds])
        found = {name: network.get_submodule(name.removeprefix("unet.")).weight.detach().clone() for name in (q, k)}
        pair.ours.unmerge()
        return found

    def theirs_of(*kinds: str) -> dict[str, Tensor]:
        for kind in kinds:  # with low_cpu_mem_usage the lengths that the file has not are left without memory
            pair.theirs.load_lora_weights(paths[kind], adapter_name=kind, low_cpu_mem_usage=False)
        pair.theirs.set_adapters([*kinds], [1.0] * len(kinds))
        found = {}
        for name in (q, k):
            layer = pair.theirs.unet.get_submodule(name.removeprefix("unet."))
            with torch.no_grad():
                found[name] = (layer(torch.eye(own[name].shape[1])) - layer(torch.zeros(1, own[name].shape[1]))).t()
        pair.theirs.unload_lora_weights()
        return found

    def rows(name: str, length: Tensor) -> Tensor:
        return length[:, None] / moved[name].norm(dim=1, keepdim=True)

    def assert_close(found: dict[str, Tensor], at_q: Tensor, at_k: Tensor) -> None:
        torch.testing.assert_close(found[q], at_q, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[k], at_k, atol=1e-5, rtol=1e-5)

    dora = rows(q, lengths[q]) * moved[q]
    assert_close(ours_of("both"), dora, moved[k])
    assert_close(theirs_of("both"), dora, rows(k, own[k].norm(dim=1)) * moved[k])
    plain = {name: files["plain"][f"{name}.lora_B.weight"] @ files["plain"][f"{name}.lora_A.weight"] for name in (q, k)}
    for kinds in (("dora", "plain"), ("plain", "dora")):
        assert_close(ours_of(*kinds), dora + plain[q], own[k] + plain[k])
    assert_close(theirs_of("dora", "plain"), dora + plain[q], own[k] + plain[k])
    assert_close(theirs_of("plain", "dora"), dora + rows(q, lengths[q]) * plain[q], own[k] + plain[k])
