"""The cards of the bundled model and its ControlNet say which files they are about."""

import hashlib
import re
from pathlib import Path

import pytest

from mezzotint.weights.hub import BUNDLED, BUNDLED_CONTROL


@pytest.mark.parametrize("folder", [BUNDLED, BUNDLED_CONTROL], ids=lambda folder: folder.name)
def test_the_card_has_the_weights_of_the_folder(folder: Path) -> None:
    card = (folder / "README.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| `(\S+\.safetensors)` \| `([0-9a-f]{64})` \|$", card, re.MULTILINE))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.safetensors")}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
