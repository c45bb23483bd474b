"""Names of pictures: folders that are made, patterns, and that no name leaves its folder or replaces a file."""

from __future__ import annotations

import os
import tempfile
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mezzotint.cli import naming
from mezzotint.cli.naming import FIELDS, MAX_NAME, check_out, save_one
from mezzotint.errors import CONTROLS, RequestError
from mezzotint.records.record import describe
from mezzotint.request import Request

REQUEST = Request(
    prompt="a lemon", seed=7, count=2, steps=20, width=16, height=8, guidance_scale=(9.0, 3.5), sampler="euler_a"
)


def save(out: str | None, request: Request = REQUEST, k: int = 0, model: str = "emoji") -> str:
    """Save a picture as the commands do, and return its name."""
    check_out(out, request, naming.SUFFIXES)
    image = Image.new("RGB", (1, 1))
    image.info.update(describe(request, 7, {"name": model}))
    return str(save_one(image, out, request, k))


@pytest.mark.parametrize(
    ("out", "names"),
    [
        (None, ["mezzotint-7.png", "mezzotint-8.png", "mezzotint-7-2.png"]),
        ("new/folder/", ["new/folder/mezzotint-7.png", "new/folder/mezzotint-8.png", "new/folder/mezzotint-7-2.png"]),
        ("lemon.png", ["lemon-0001.png", "lemon-0002.png", "lemon-0003.png"]),
        ("{model}/{sampler}/", ["emoji/euler_a/mezzotint-7.png", "emoji/euler_a/mezzotint-8.png"]),
        ("{date}/{seed}-{prompt:4}.png", ["{today}/7-a le.png", "{today}/8-a le.png", "{today}/7-a le-2.png"]),
        ("of.{steps}.webp", ["of.20.webp"]),
        ("x{steps}.jpg", ["x20.jpg", "x20-2.jpg", "x20-3.jpg"]),
        ("{{{number:3}}} {guidance} {seed:2}.png", ["{001} 9,3.5 07.png", "{002} 9,3.5 08.png"]),
        ("{width}x{height} {time}.png", ["16x8 {clock}.png", "16x8 {clock}-2.png"]),
    ],
)  # fmt: skip
def test_names(out: str | None, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    day = datetime.now()
    monkeypatch.setattr(naming, "datetime", SimpleNamespace(now=lambda: day))
    expected = [name.replace("{today}", f"{day:%Y-%m-%d}").replace("{clock}", f"{day:%H%M%S}") for name in names]
    assert [save(out, k=k % 2) for k in range(len(names))] == expected
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*") if path.is_file()) == sorted(
        expected
    )


def test_a_folder_with_braces_that_exists_is_a_folder(tmp_path: Path) -> None:
    (folder := tmp_path / "{prompt}").mkdir()
    assert save(str(folder)) == f"{folder}/mezzotint-7.png"


def test_a_quoted_home_folder_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save("~/{seed}.png") == f"{tmp_path}/7.png"


def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a folder that is a link, nor a file; a link that is named literally is the user's."""
    monkeypatch.chdir(tmp_path)
    for name in ("other", "out", "out/euler"):
        (tmp_path / name).mkdir()
    (tmp_path / "out/a lemon").symlink_to(tmp_path / "other")
    (tmp_path / "out/7.png").symlink_to(tmp_path / "other/none.png")
    (tmp_path / "mine").symlink_to(tmp_path / "other")
    with pytest.raises(RequestError, match="out leads to 'out/a lemon', which is outside of 'out'; it must stay in it"):
        save("out/{prompt}/{seed}.png")
    assert save("out/{seed}.png") == "out/7-2.png" and os.listdir("other") == []
    assert save("mine/{seed}.png") == "mine/7.png"


PATTERNS = st.lists(
    st.one_of(
        st.sampled_from([f"{{{name}}}" for name in FIELDS]),
        st.sampled_from(["{prompt:1}", "{prompt:200}", "{model:3}", "{seed:12}", "/", "-", "_"]),
    ),
    min_size=1,
    max_size=8,
).map(lambda pieces: "/".join(filter(None, "".join([*pieces, "{seed}"]).split("/"))))
NASTY = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("./\\-: \n\0\x1b\u202e\u2028{}$~")),
    max_size=300,
)


@pytest.mark.parametrize(("prompt", "name"), [("-rf", "_rf"), ("--rf", "__rf"), (".rf", "_rf"), ("-.rf", "__rf")])
def test_no_name_is_an_option_or_hidden(
    prompt: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert save("{prompt}.png", REQUEST.replace(prompt=prompt)) == f"{name}.png"


@settings(max_examples=150, deadline=None)
@given(pattern=PATTERNS, prompt=NASTY, model=NASTY)
def test_no_value_breaks_a_name(pattern: str, prompt: str, model: str) -> None:
    """Whatever prompt and model are: one file, inside the folder, of the pattern's depth, and never a replaced one."""
    request = REQUEST.replace(prompt=prompt, count=1)
    out = pattern + ".png"
    with tempfile.TemporaryDirectory() as folder:
        (image := Image.new("RGB", (1, 1))).info["mezzotint"] = ""
        saved = []
        for _ in range(2):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(naming, "_model_name", lambda _: model)
                check_out(f"{folder}/{out}", request, naming.SUFFIXES)
                saved.append(save_one(image, f"{folder}/{out}", request, 0))
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        assert sorted(files) == sorted(saved) and len(files) == 2
        for path in saved:
            parts = path.relative_to(folder).parts
            assert len(parts) == len(out.split("/")) and path.resolve() == Path(folder).resolve().joinpath(*parts)
            for part, template in zip(parts, out.split("/"), strict=True):
                assert 0 < len(part.encode()) <= MAX_NAME
                assert not part.startswith(".") and not part.endswith((" ", "."))
                assert template.startswith("-") or not part.startswith("-")
                assert not {ord(c) for c in part} & {*CONTROLS, *map(ord, naming.RESERVED)}


@pytest.mark.parametrize(
    ("out", "name"),
    [("{prompt}.png", "é" * 98 + ".png"), ("{prompt:3}.png", "ééé.png"), ("{prompt}/x-{seed}.png", "é" * 100)],
)
def test_a_long_name_is_cut_between_characters(
    out: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = REQUEST.replace(prompt="é" * 200)
    assert save(out, long).split("/")[0] == name
    second = save(out, long)
    assert second != name and max(len(part.encode()) for part in second.split("/")) <= MAX_NAME


def test_commands_take_patterns(run: Any, sd1_folder: Path) -> None:
    """generate and again, also for several files; grid and explain name one file, literally."""
    model = ("--model", str(sd1_folder), "--steps", "1")
    ran = run("generate", "a ../lemon", *model, "--seed", "7", "-n", "2", "-o", "out/{prompt:5}/{number}.png")
    assert ran.code == 0 and sorted(map(str, Path("out").rglob("*.png"))) == ["out/a .._/1.png", "out/a .._/2.png"]
    files = [str(path) for path in sorted(Path("out").rglob("*.png"))]
    ran = run("again", *files, "--model", str(sd1_folder), "--out", "again/{seed}/")
    assert ran.code == 0, ran.err
    assert sorted(map(str, Path("again").rglob("*.png"))) == ["again/7/mezzotint-7.png", "again/8/mezzotint-8.png"]
