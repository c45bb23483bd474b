"""The bundled model's card says which files it is about."""

import hashlib
import re

from mezzotint.weights.hub import BUNDLED


def test_the_card_has_the_weights_of_the_folder() -> None:
    card = (BUNDLED / "README.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| `(\S+\.safetensors)` \| `([0-9a-f]{64})` \|$", card, re.MULTILINE))
    files = {path.relative_to(BUNDLED).as_posix(): path for path in BUNDLED.rglob("*.safetensors")}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
