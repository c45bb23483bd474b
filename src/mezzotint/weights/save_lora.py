"""Write LoRA files with the names that peft and diffusers use; `pipe.load_lora_weights` of diffusers reads them.

unet.mid_block.resnets.0.conv1.lora_A.weight    down, (rank, inputs) or (rank, inputs, kh, kw)
unet.mid_block.resnets.0.conv1.lora_B.weight    up, (outputs, rank) or (outputs, rank, 1, 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.weights.save_tensors import write_tensors

LoraPairs = Mapping[str, tuple[Tensor, Tensor]]  # layer of a network -> (down, up)


def save_lora(
    path: str | Path,
    networks: Mapping[str, LoraPairs],
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a LoRA as a .safetensors file, whole or not at all.

    Args:
        path: The file to write. Missing parent folders are made.
        networks: For each network ("unet", "text_encoder", "text_encoder_2") its pairs by layer.
        dtype: The dtype of the tensors in the file.
        metadata: Strings for the header. Without "lora_adapter_metadata", alpha equals the rank.

    Returns:
        The path.

    Raises:
        WriteError: If the file cannot be written.
    """
    tensors = {}
    for network, pairs in networks.items():
        for layer, (down, up) in pairs.items():
            tensors[f"{network}.{layer}.lora_A.weight"] = down.detach().to("cpu", dtype).contiguous()
            tensors[f"{network}.{layer}.lora_B.weight"] = up.detach().to("cpu", dtype).contiguous()
    return write_tensors(Path(path), tensors, metadata)
