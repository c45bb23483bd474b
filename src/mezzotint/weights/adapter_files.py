"""Describe a LoRA file or textual inversion, for `mezzotint inspect`."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from mezzotint.errors import CheckpointError
from mezzotint.weights.embeddings import BUNDLED, IMAGE, read_embeddings
from mezzotint.weights.files import TensorFile
from mezzotint.weights.lora_files import OUTPUT_NAME
from mezzotint.weights.lora_keys import detect_family, other_kind, split_key
from mezzotint.weights.model_files import join_names

WORDS = re.compile(r"<.+>$|string_to_|emb_params$|clip_[lg]$|text_encoders_[01]$|bundle_emb\.")  # keys of embeddings
WIDTHS = ((768,), (1024,), (1280,))  # of CLIP text encoders; such a tensor alone may be named by any word

# role of a tensor -> the kind of change that has it; the first that a layer has is its kind
KINDS = {
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "mid": "LoCon",
    "down": "LoRA",
    "w1_a": "LoHa",
    "k_w1": "LoKr",
    "k_w1_a": "LoKr",
    "a1": "GLoRA",
    "oft_blocks": "OFT",
    "on_input": "(IA)^3",
    "diff": "full difference",
    "diff_b": "full difference",
}


def describe_adapter(path: Path, file: TensorFile | None) -> str | None:
    """Describe a LoRA file or textual inversion; return None for other files.

    Args:
        path: The file.
        file: The same, open; None for a picture.
    """
    if file is not None and (found := _describe_lora(file)):
        return found
    if file is not None and not all(WORDS.match(key) or shape[-1:] in WIDTHS for key, shape in file.shapes.items()):
        return None
    try:
        embeddings = read_embeddings(path)
    except CheckpointError:
        return None
    texts = []
    for embedding in embeddings:
        vectors = [tensor for _, tensor in sorted(embedding.vectors.items(), reverse=True)]  # clip_l first
        widths = " and ".join(str(tensor.shape[1]) for tensor in vectors)
        texts.append(f"{' or '.join(embedding.names)}, {len(vectors[0])} vectors of width {widths}")
    return f"a textual inversion{' in a picture' if path.suffix == IMAGE else ''}: {join_names(texts)}"


def _describe_lora(file: TensorFile) -> str | None:
    """Return the kinds of change, the model family and the name of the training, or None for other files."""
    for key in file.entries:
        if kind := other_kind(key):
            return f"{kind}, which is not supported"
    layers: defaultdict[str, set[str]] = defaultdict(set)
    for key in file.entries:
        if (split := split_key(key)) and not BUNDLED.fullmatch(key):
            layers[split[0]].add(split[1])
    counts: defaultdict[str, int] = defaultdict(int)
    for name, roles in layers.items():
        made = next((KINDS[role] for role in KINDS if role in roles), None)
        if made == "OFT" and len(file.entries[f"{name}.oft_blocks"].shape) == 4:
            made = "BOFT"
        if made:
            counts[made] += 1
    if not counts:
        return None
    text = f"a LoRA file, {', '.join(f'{kind} in {count} layers' for kind, count in sorted(counts.items()))}"
    family, trained = detect_family(file.shapes, file.metadata), file.metadata.get(OUTPUT_NAME)
    bundled = len({match[1] for match in map(BUNDLED.fullmatch, file.entries) if match})
    text += f", for {family}" if family else ""
    text += f", trained as {trained[:60]!r}" if trained else ""
    return text + (f", with {bundled} textual inversions" if bundled else "")
