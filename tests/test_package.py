"""The public face: names, the price of importing them, the console script, the version."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import mezzotint
from mezzotint.diffusion.solvers import Step
from mezzotint.models.unet import Condition

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
PUBLIC = {
    "BudgetError",
    "CheckpointError",
    "MezzotintError",
    "MissingExtraError",
    "Pipeline",
    "Placement",
    "Request",
    "RequestError",
    "Result",
    "TrainingError",
    "WriteError",
    "attention",
    "control",
    "diffusion",
    "embed_images",
    "image",
    "load",
    "plan",
    "prompt",
    "regions",
    "samplers",
    "upscale",
}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_all_is_exact() -> None:
    assert set(mezzotint.__all__) == PUBLIC
    assert mezzotint.__all__ == sorted(mezzotint.__all__)
    assert set(mezzotint._SOURCES) | set(mezzotint._MODULES) == PUBLIC, "each name has its module, and no other"


def test_every_error_class_is_public() -> None:
    errors = mezzotint.errors
    classes = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert classes <= PUBLIC
    assert all(issubclass(getattr(mezzotint, name), mezzotint.MezzotintError) for name in classes)


def test_dir_lists_the_public_names_before_they_are_imported() -> None:
    assert python("import mezzotint; print(set(mezzotint.__all__) <= set(dir(mezzotint)))") == "True"


def test_names_that_the_documentation_shows_in_a_fresh_process() -> None:
    """As attributes, before anything is imported, and as import paths; and all that without the oracles."""
    peers = {"diffusers", "transformers", "peft", "accelerate", "k_diffusion", "compel"}
    code = f"""
import sys, mezzotint
print(mezzotint.image.save.__name__, mezzotint.attention.__name__)
from mezzotint import attention, bulk
from mezzotint.explain import explain
from mezzotint.image import save_png
print(callable(explain), callable(save_png), bulk.__name__, attention.__name__)
assert mezzotint.diffusion.solvers.SOLVERS and mezzotint.diffusion.spacing.SPACINGS
import mezzotint.pipeline, mezzotint.train.loop, mezzotint.train.scratch.vae, mezzotint.train.scratch.diffusion
print(sorted({peers} & set(sys.modules)))
"""
    attributes, imports, loaded = python(code).splitlines()
    assert attributes == "save mezzotint.models.attention"
    assert imports == "True True mezzotint.bulk mezzotint.models.attention"
    assert loaded == "[]", "the whole engine is our own"


def test_a_step_and_a_condition_say_what_they_are() -> None:
    x = torch.zeros(1, 4, 2, 2)
    assert repr(Step(3, 1.23456, x, x)) == "Step(index=3, sigma=1.235, x: (1, 4, 2, 2) float32)"
    condition = Condition(torch.zeros(2, 77, 8), pooled=torch.zeros(2, 6))
    assert repr(condition) == "Condition(context: (2, 77, 8), pooled: (2, 6), float32 on cpu)"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_name_exists_and_is_documented(name: str) -> None:
    public = getattr(mezzotint, name)
    assert (inspect.getdoc(public) or "").strip()
    assert not isinstance(public, type) or public.__module__.startswith("mezzotint.")


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from mezzotint import *", names)
    assert set(names) - {"__builtins__"} == PUBLIC


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mezzotint' has no attribute 'nothing'"):
        mezzotint.nothing  # noqa: B018
    with pytest.raises(ImportError, match="nothing"):
        from mezzotint import nothing  # noqa: F401


@pytest.mark.parametrize(
    "code",
    [
        "import mezzotint",
        "from mezzotint import Request, RequestError; Request(prompt='a lemon', sampler='DPM++ 2M Karras')",
        "import mezzotint.samplers.names, mezzotint.config, mezzotint.request, mezzotint.errors",
    ],
)
def test_importing_costs_no_torch(code: str) -> None:
    heavy = {"torch", "numpy", "PIL", "scipy", "tokenizers", "huggingface_hub"}
    assert python(f"{code}; import sys; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_solvers_and_spacings_are_called_alike() -> None:
    for solver in mezzotint.diffusion.solvers.SOLVERS.values():
        assert list(inspect.signature(solver).parameters)[:4] == ["denoise", "x", "sigmas", "noise"]
    for spacing in mezzotint.diffusion.spacing.SPACINGS.values():
        assert list(inspect.signature(spacing).parameters)[:2] == ["schedule", "steps"]


def test_a_pipeline_has_the_names_that_others_are_written_against(sd1: mezzotint.Pipeline) -> None:
    for name in ("unet", "vae", "text_encoders", "tokenizers", "schedule"):
        assert getattr(sd1, name) is not None
    wanted = {
        "generate": ["request", "latents"],
        "stream": ["request"],
        "decode": ["latents"],
        "encode_image": ["image"],
        "encode": ["prompt", "request"],
        "resolve": ["request"],
    }
    for name, parameters in wanted.items():
        assert list(inspect.signature(getattr(sd1, name)).parameters)[: len(parameters)] == parameters
    assert list(inspect.signature(mezzotint.load).parameters)[:3] == ["path_or_id", "device", "dtype"]


def test_the_version_has_one_source() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", mezzotint.__version__)
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "mezzotint.__version__"}
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{mezzotint.__version__}] - " in changelog
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {mezzotint.__version__}\n" in cited


def test_the_console_script_points_to_a_function() -> None:
    assert PROJECT["scripts"] == {"mezzotint": "mezzotint.cli:main"}
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="mezzotint")
    assert script.value == "mezzotint.cli:main"
    assert callable(script.load())


def test_the_top_level_stays_small() -> None:
    """Each folder answers one question; a new module belongs to one of them."""
    assert len(list(Path(mezzotint.__file__).parent.glob("*.py"))) <= 16
