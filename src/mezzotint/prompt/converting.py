"""Converts a plan to the grammar of another dialect, and reports what that dialect cannot express."""

from __future__ import annotations

from mezzotint.prompt import a1111, comfy, compel
from mezzotint.prompt.pieces import Clause, Network, PromptPlan, Span, Variant, format_decimal

_DIALECT_NAMES = {"a1111": "A1111", "comfy": "ComfyUI", "compel": "Compel", "plain": "plain text"}


def convert_plan(plan: PromptPlan, target: str) -> tuple[str, list[str]]:
    """Return the text in the target dialect, and a sentence for each loss."""
    name = _DIALECT_NAMES[target]
    lost: list[str] = []
    parts = []
    for part in plan.parts:
        starts = [0, *(variant.until for variant in part.variants)]
        variant = max(zip(part.variants, starts, strict=False), key=lambda pair: pair[0].until - pair[1])[0]
        if len(part.variants) > 1:
            longest = variant.text.strip()
            lost.append(f"{name} cannot change the text during a run; {longest!r}, used for most steps, is kept")
        parts.append((part.weight, variant))
    if len(parts) > 1 and target != "a1111":
        lost.append(f"{name} has no AND, which adds predictions; its parts are joined to one text")
    elif len(parts) == 1 and parts[0][0] != 1.0 and target != "a1111":
        lost.append(f"{name} cannot weight a whole prompt; its weight {parts[0][0]:g} is left out")
    networks = [_convert_network(network, target, lost) for network in plan.networks]
    if target == "compel":
        return _convert_to_compel(parts, networks, lost), lost
    texts = [_convert_variant(variant, target, lost) for _, variant in parts]
    if target == "a1111" and any(weight != 1.0 for weight, _ in parts):
        texts = [f"{text} :{format_decimal(weight)}" for text, (weight, _) in zip(texts, parts, strict=True)]
    return "".join([(" AND " if target == "a1111" else ", ").join(texts), *networks]), lost


def _convert_network(network: Network, target: str, lost: list[str]) -> str:
    """Return a network in the target dialect."""
    if target == "a1111":
        options = [f"{key}={value}" for key, value in network.options.items()]
        return f"<{':'.join([network.kind, network.name, *network.args, *options])}>"
    if target == "compel" and network.kind in ("lora", "lyco") and compel.is_name(network.name):
        if network.options or len(network.args) > 1:
            lost.append(f"Compel has one weight per LoRA; the other options of {network.name!r} are left out")
        return f" withLora({', '.join([network.name, *network.args[:1]])})"
    lost.append(
        f"{_DIALECT_NAMES[target]} prompts cannot load networks; load the {network.kind} {network.name!r} separately"
    )
    return ""


def _convert_to_compel(parts: list[tuple[float, Variant]], networks: list[str], lost: list[str]) -> str:
    """Return one text, or several as `.and()` or `.blend()`; the first text holds the networks."""
    clauses = [(clause, weight) for weight, variant in parts for clause in _split_clauses(variant)]
    texts = [compel.write(_convert_spans(clause, "compel", lost)) for clause, _ in clauses]
    texts[0] += "".join(networks)
    if len(texts) == 1:
        return texts[0]
    weights = [clause.weight * weight for clause, weight in clauses]
    return compel.write_joined(texts, weights if set(weights) != {1.0} else [], parts[0][1].join)


def _split_clauses(variant: Variant) -> list[Clause]:
    """Return the clauses of a variant, split at BREAK."""
    clauses = []
    for clause in variant.clauses:
        spans: list[Span] = []
        for span in clause.spans:
            if span.is_break:
                clauses.append(Clause(tuple(spans), clause.weight))
                spans = []
            else:
                spans.append(span)
        clauses.append(Clause(tuple(spans), clause.weight))
    return clauses


def _convert_variant(variant: Variant, target: str, lost: list[str]) -> str:
    """Return a text for A1111, ComfyUI or plain. In A1111, Compel's `.and()` becomes BREAK."""
    name, clauses = _DIALECT_NAMES[target], _split_clauses(variant)
    texts = [_write(_convert_spans(clause, target, lost), target) for clause in clauses]
    if len(texts) == 1:
        return texts[0]
    if variant.join != "concat":
        lost.append(f"{name} has no .blend(); its texts are joined to one text")
        return ", ".join(texts)
    if any(clause.weight != 1.0 for clause in clauses):
        lost.append(f"{name} cannot weight the texts of .and(); their weights are left out")
    if target == "a1111":
        return " BREAK ".join(texts)
    lost.append(f"{name} cannot end a chunk in the text; the texts around BREAK or .and() are joined to one text")
    return ", ".join(texts)


def _convert_spans(clause: Clause, target: str, lost: list[str]) -> list[tuple[str, float]]:
    """Return the (text, weight) pairs that the target supports, with neighbors of one weight joined."""
    pairs: list[tuple[str, float]] = []
    for span in clause.spans:
        text, weight = span.text, float(f"{span.weight:.6g}")  # 1.43, not 1.4300000000000002
        if target == "plain" and weight != 1.0:
            lost.append(f"plain text has no weights; {text.strip()!r} had {weight:g}")
            weight = 1.0
        if target == "compel" and weight < 0:
            lost.append(f"Compel has no weights below 0; {text.strip()!r} had {weight:g} and gets 0")
            weight = 0.0
        if target == "compel":
            text = " ".join(text.split())
            if weight != 1.0 and text and not compel.fits_brackets(text) and not _fits_spaced(text):
                lost.append(f"Compel cannot weight {text!r} because of its characters; it had {weight:g}")
                weight = 1.0
            if not text:
                continue
        if pairs and pairs[-1][1] == weight:
            pairs[-1] = (pairs[-1][0] + (" " if target == "compel" else "") + text, weight)
        else:
            pairs.append((text, weight))
    return pairs or [("", 1.0)]


def _fits_spaced(text: str) -> bool:
    """Return whether a text fits Compel's brackets with spaces around its punctuation, which change no token."""
    return compel.fits_brackets(" ".join(text.replace(",", " , ").replace(".", " . ").split()))


def _write(pairs: list[tuple[str, float]], target: str) -> str:
    """Write the pairs in the target dialect."""
    if target == "a1111":
        return a1111.write(pairs)
    if target == "comfy":
        return comfy.write(pairs)
    return "".join(text for text, _ in pairs)
