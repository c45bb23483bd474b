"""From one dialect to another: a plan is said again in the other grammar, and what that cannot say is a sentence."""

from __future__ import annotations

from mezzotint.prompt import a1111, comfy, compel
from mezzotint.prompt.pieces import Clause, Network, PromptPlan, Span, Variant, decimal

_NAMES = {"a1111": "A1111", "comfy": "ComfyUI", "compel": "Compel", "plain": "plain text"}


def converted(plan: PromptPlan, target: str) -> tuple[str, list[str]]:
    """The text in the target dialect, and what was lost."""
    name = _NAMES[target]
    lost: list[str] = []
    parts = []
    for part in plan.parts:
        starts = [0, *(variant.until for variant in part.variants)]
        variant = max(zip(part.variants, starts, strict=False), key=lambda pair: pair[0].until - pair[1])[0]
        if len(part.variants) > 1:
            kept = variant.text.strip()
            lost.append(f"{name} cannot change the text while it draws; kept is {kept!r}, which holds longest")
        parts.append((part.weight, variant))
    if len(parts) > 1 and target != "a1111":
        lost.append(f"{name} has no AND, which adds up predictions; here its parts follow each other")
    elif len(parts) == 1 and parts[0][0] != 1.0 and target != "a1111":
        lost.append(f"{name} cannot weigh a whole prompt; its weight {parts[0][0]:g} is left out")
    networks = [_network(network, target, lost) for network in plan.networks]
    if target == "compel":
        return _for_compel(parts, networks, lost), lost
    texts = [_said(variant, target, lost) for _, variant in parts]
    if target == "a1111" and any(weight != 1.0 for weight, _ in parts):
        texts = [f"{text} :{decimal(weight)}" for text, (weight, _) in zip(texts, parts, strict=True)]
    return "".join([(" AND " if target == "a1111" else ", ").join(texts), *networks]), lost


def _network(network: Network, target: str, lost: list[str]) -> str:
    if target == "a1111":
        options = [f"{key}={value}" for key, value in network.options.items()]
        return f"<{':'.join([network.kind, network.name, *network.args, *options])}>"
    if target == "compel" and network.kind == "lora" and compel.is_name(network.name):
        if network.options or len(network.args) > 1:
            lost.append(f"Compel has one weight for a lora; the others of {network.name!r} are left out")
        return f" withLora({', '.join([network.name, *network.args[:1]])})"
    lost.append(
        f"{_NAMES[target]} cannot ask for the {network.kind} {network.name!r} in a prompt; name it beside the prompt"
    )
    return ""


def _for_compel(parts: list[tuple[float, Variant]], networks: list[str], lost: list[str]) -> str:
    """One text, or several as `.and()` or `.blend()`, behind which nothing is read: the networks go with the first."""
    clauses = [(clause, weight) for weight, variant in parts for clause in _clauses(variant)]
    texts = [compel.write(_pairs(clause, "compel", lost)) for clause, _ in clauses]
    texts[0] += "".join(networks)
    if len(texts) == 1:
        return texts[0]
    weights = [clause.weight * weight for clause, weight in clauses]
    return compel.several(texts, weights if set(weights) != {1.0} else [], parts[0][1].join)


def _clauses(variant: Variant) -> list[Clause]:
    """The clauses, also of BREAK, which ends one."""
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


def _said(variant: Variant, target: str, lost: list[str]) -> str:
    """One text of A1111, ComfyUI or plain words. A1111 says Compel's `.and()` as BREAK."""
    name, clauses = _NAMES[target], _clauses(variant)
    texts = [_written(_pairs(clause, target, lost), target) for clause in clauses]
    if len(texts) == 1:
        return texts[0]
    if variant.join != "concat":
        lost.append(f"{name} has no .blend(); here its texts follow each other")
        return ", ".join(texts)
    if any(clause.weight != 1.0 for clause in clauses):
        lost.append(f"{name} cannot weigh the texts of .and(); their weights are left out")
    if target == "a1111":
        return " BREAK ".join(texts)
    lost.append(f"{name} cannot end a chunk in the text; what stood around BREAK or .and() is one text here")
    return ", ".join(texts)


def _pairs(clause: Clause, target: str, lost: list[str]) -> list[tuple[str, float]]:
    """The (text, weight) pairs as the target can hold them: neighbours of one weight joined, none below its least."""
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
            if weight != 1.0 and text and not compel.fits_brackets(text) and not _spaced(text):
                lost.append(f"Compel cannot weigh {text!r} for the characters in it; it had {weight:g}")
                weight = 1.0
            if not text:
                continue
        if pairs and pairs[-1][1] == weight:
            pairs[-1] = (pairs[-1][0] + (" " if target == "compel" else "") + text, weight)
        else:
            pairs.append((text, weight))
    return pairs or [("", 1.0)]


def _spaced(text: str) -> bool:
    """Whether a text fits Compel's brackets once its commas and full stops stand alone, which changes no token."""
    return compel.fits_brackets(" ".join(text.replace(",", " , ").replace(".", " . ").split()))


def _written(pairs: list[tuple[str, float]], target: str) -> str:
    if target == "a1111":
        return a1111.write(pairs)
    if target == "comfy":
        return comfy.write(pairs)
    return "".join(text for text, _ in pairs)
