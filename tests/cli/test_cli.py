"""The command line: what it asks of the pipeline, what it writes and says, and how it answers wrong input."""

from __future__ import annotations

import json
import multiprocessing
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import mezzotint
from mezzotint import cli
from mezzotint.cli import terminal
from mezzotint.images.io import read_metadata
from mezzotint.memory import system
from mezzotint.records.record import describe
from mezzotint.request import Request
from mezzotint.result import Result

COMMANDS = [
    "generate",
    "shell",
    "plan",
    "again",
    "upscale",
    "info",
    "explain",
    "tokens",
    "inspect",
    "samplers",
    "models",
    "env",
    "bulk",
    "grid",
    "report",
]
OWN = {"width": 16, "height": 8, "steps": 3, "guidance_scale": 7.5, "sampler": "euler", "seed": 40, "batch": 1}


class FakePipeline:
    """Draws yellow pictures; `pause` seconds a step."""

    notices = ()
    device, unet = torch.device("cpu"), torch.nn.Identity()
    remarks: tuple[str, ...] = ()  # on each request

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.requests: list[Request] = []

    def plan(self, request: Request) -> SimpleNamespace:
        changes = {name: value for name, value in OWN.items() if getattr(request, name) is None}
        return SimpleNamespace(request=request.replace(**changes), notices=self.remarks)

    def generate(
        self,
        plan: SimpleNamespace,
        *,
        on_step: Callable[[int, int], None],
        on_image: Callable[[int, Image.Image], None],
    ) -> Result:
        request: Request = plan.request
        self.requests.append(request)
        assert request.seed is not None and request.steps is not None
        seeds, images, total = [request.seed + k for k in range(request.count)], [], request.count * request.steps
        for k, seed in enumerate(seeds):
            for step in range(request.steps):
                time.sleep(self.pause)
                on_step(k * request.steps + step + 1, total)
            images.append(Image.new("RGB", (16, 8), "yellow"))
            images[-1].info.update(describe(request, seed, {"name": "fake"}))
            on_image(k, images[-1])
        return Result(images, None, seeds, request, {"total": 0.0})  # type: ignore[arg-type]


Run = Callable[..., Any]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    pipe = FakePipeline()
    monkeypatch.setattr(mezzotint, "load", lambda path=None, device=None, dtype=None: pipe, raising=False)
    return pipe


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is a mistake: the request is wrong before it."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mezzotint, "load", load, raising=False)


# ---- what is drawn and written ---------------------------------------------------------------------------------------


def test_one_picture(run: Run, pipe: FakePipeline) -> None:
    ran = run("generate", "a lemon", "--out", "lemon.png")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "Wrote lemon.png (16x8, 3 steps, seed 40)\n"
    record = json.loads(read_metadata("lemon.png")["mezzotint"])
    assert Request.model_validate(record["request"]) == pipe.requests[0]
    assert os.listdir() == ["lemon.png"]


def test_every_field_reaches_the_request(run: Run, pipe: FakePipeline) -> None:
    options = (
        "--negative dark --size 104x72 --steps 2 --guidance 3.5 --sampler ddim --spacing karras --seed 7 --count 2 "
        "--batch 2 --clip-skip 1 --eta 0.5 --guidance-rescale 0.7 --guidance-interval 0.3:5 --original-size 801x1000 "
        "--crop 3x0 --target-size 1024x512 --guidance-method apg --guidance-steps 0:0.8 --apg-eta 0.1 "
        "--apg-momentum -0.75 --apg-norm-threshold 7.5 --cfg-zero-init-steps 2 --perp-neg-scale 1.5 --mimic-scale 5 "
        "--threshold-percentile 0.95 --syntax comfy --emphasis no_norm --embedding a.pt --embedding owner/b "
        "--lora c.safetensors:0.8 --lora d.safetensors --lora-folder e "
        "--wildcards cards --choices keep --noise philox --image a.png --mask b.png --strength 0.6 --fix-steps "
        "--resize-mode crop --mask-blur 4 --invert-mask --differential --masked-content fill --only-masked 32 "
        "--outpaint right=64,top=8 --hires 2 --hires-upscale pixels --hires-steps 9 --hires-strength 0.5 --seamless x "
        "--variation-seed 3 --variation-strength 0.2 --seed-size 64x72 --safety blur "
        "--discard-penultimate-sigma --control f.pth:image=g.png,scale=0.8,end=0.6 --control owner/net "
        "--ip-adapter a.bin:image=b.png,image=c.png,scale=0.6,encoder=enc --ip-adapter d.pt:embeds=e,mask=m.png "
        "--region left=a --region-base 0.3 --pag-scale 3 --pag-layers mid,up_blocks.0 --pag-adaptive-scale 0.005 "
        "--freeu 1.5,1.6,0.9,0.2 --tile 64 "
        "--refiner r.safetensors --refiner-at 0.75 --aesthetic-score 6.5 --negative-aesthetic-score 2"
    )
    assert run("generate", "a lemon", *options.split()).code == 0
    assert pipe.requests == [
        Request(
            prompt="a lemon",
            negative_prompt="dark",
            prompt_syntax="comfy",
            emphasis="no_norm",
            embeddings=("a.pt", "owner/b"),
            loras=(("c.safetensors", 0.8), ("d.safetensors", 1.0)),
            lora_folder="e",
            wildcards="cards",
            choices="keep",
            width=104,
            height=72,
            steps=2,
            guidance_scale=3.5,
            sampler="ddim",
            spacing="karras",
            seed=7,
            count=2,
            batch=2,
            clip_skip=1,
            eta=0.5,
            guidance_rescale=0.7,
            guidance_interval=(0.3, 5.0),
            guidance_method="apg",
            guidance_steps=(0.0, 0.8),
            apg_eta=0.1,
            apg_momentum=-0.75,
            apg_norm_threshold=7.5,
            cfg_zero_init_steps=2,
            perp_neg_scale=1.5,
            mimic_scale=5.0,
            threshold_percentile=0.95,
            original_size=(1000, 801),
            crop=(0, 3),
            target_size=(512, 1024),
            refiner="r.safetensors",
            refiner_at=0.75,
            aesthetic_score=6.5,
            negative_aesthetic_score=2.0,
            discard_penultimate_sigma=True,
            noise="philox",
            tile=64,
            image="a.png",
            mask="b.png",
            strength=0.6,
            fix_steps=True,
            resize_mode="crop",
            mask_blur=4.0,
            invert_mask=True,
            differential=True,
            masked_content="fill",
            only_masked=32,
            outpaint=(0, 8, 64, 0),
            hires=2.0,
            hires_upscale="pixels",
            hires_steps=9,
            hires_strength=0.5,
            seamless="x",
            variation_seed=3,
            variation_strength=0.2,
            seed_size=(64, 72),
            safety="blur",
            control=({"file": "f.pth", "image": "g.png", "scale": 0.8, "end": 0.6}, "owner/net"),
            ip_adapter=(
                {"file": "a.bin", "image": ["b.png", "c.png"], "scale": 0.6, "encoder": "enc"},
                {"file": "d.pt", "embeds": "e", "mask": "m.png"},
            ),
            pag_scale=3.0,
            regions=[{"prompt": "a", "box": (0.0, 0.0, 0.5, 1.0)}],
            region_base=0.3,
            pag_layers=("mid", "up_blocks.0"),
            pag_adaptive_scale=0.005,
            freeu=(1.5, 1.6, 0.9, 0.2),
        )
    ]
    assert {name for name, value in pipe.requests[0] if value is None} == {"sigmas", "timesteps"}


def test_levels_of_ones_own(run: Run, pipe: FakePipeline) -> None:
    assert run("generate", "a lemon", "--sigmas", "14.6,3,0.5,0").code == 0
    assert run("generate", "a lemon", "--timesteps", "999,250,1.5").code == 0
    assert [(r.sigmas, r.timesteps) for r in pipe.requests] == [
        ((14.6, 3.0, 0.5, 0.0), None),
        (None, (999.0, 250.0, 1.5)),
    ]


def test_several_guidance_scales(run: Run, pipe: FakePipeline) -> None:
    assert run("generate", "a lemon", "--guidance", "9,3.5,1").code == 0
    assert pipe.requests[0].guidance_scale == (9.0, 3.5, 1.0)


def test_model_device_and_dtype_reach_load(run: Run, pipe: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(path: str | None = None, device: str | None = None, dtype: str | None = None) -> FakePipeline:
        loaded.append((path, device, dtype))
        return pipe

    monkeypatch.setattr(mezzotint, "load", load)
    run("generate", "x")
    run("generate", "x", "--model", "org/name", "--device", "cuda:1", "--dtype", "bfloat16")
    assert loaded == [(None, None, None), ("org/name", "cuda:1", "bfloat16")]


def test_several_pictures_are_numbered_and_overwrite_nothing(run: Run, pipe: FakePipeline) -> None:
    ran = run("generate", "a lemon", "--count", "2", "--out", "cat.png")
    assert ran.out == "Wrote 2 pictures, cat-0001.png to cat-0002.png (16x8, 3 steps, seed 40 to 41)\n"
    assert [json.loads(read_metadata(f"cat-000{k}.png")["mezzotint"])["seed"] for k in (1, 2)] == [40, 41]
    assert run("generate", "a lemon", "--count", "2", "--out", "cat.png").out.startswith(
        "Wrote 2 pictures, cat-0003.png to cat-0004.png"
    )


def test_without_out_the_seed_names_the_file_and_none_is_overwritten(run: Run, pipe: FakePipeline) -> None:
    assert run("generate", "a lemon").out.startswith("Wrote mezzotint-40.png (")
    assert run("generate", "a lemon").out.startswith("Wrote mezzotint-40-2.png (")
    Path("folder").mkdir()
    assert run("generate", "a lemon", "--out", "folder", "--count", "2").code == 0
    assert sorted(os.listdir("folder")) == ["mezzotint-40.png", "mezzotint-41.png"]


def test_a_file_that_is_named_is_overwritten(run: Run, pipe: FakePipeline) -> None:
    Path("lemon.png").write_text("old")
    assert run("generate", "a lemon", "--out", "lemon.png").code == 0
    assert read_metadata("lemon.png")


@pytest.mark.parametrize("arguments", [("-",), ("--prompt", "-")])
def test_the_prompt_from_standard_input(run: Run, pipe: FakePipeline, arguments: tuple[str, ...]) -> None:
    text = "ein Löwe\n柠檬 🍋 " + "🍋" * 90_000
    assert run("generate", *arguments, stdin=f"{text}\r\n".encode()).code == 0
    assert pipe.requests[0].prompt == text


def test_the_prompt_as_an_option(run: Run, pipe: FakePipeline) -> None:
    assert run("generate", "--prompt", "-5 degrees").code == 0
    assert pipe.requests[0].prompt == "-5 degrees"


def test_json(run: Run, pipe: FakePipeline) -> None:
    ran = run("generate", "柠檬", "--count", "2", "--json")
    record = json.loads(ran.out)
    assert record["images"] == [{"path": f"mezzotint-{k}.png", "seed": k, "flagged": None} for k in (40, 41)]
    assert Request.model_validate(record["request"]) == pipe.requests[0]
    assert ran.err == ""


# ---- wrong input: code 2, a sentence that names the field, nothing written, no model loaded --------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("x --size 100x128", "width is 100; it must be a multiple of 8"),
        ("x --size 128x", "size is '128x'; it must be WxH"),
        ("x --size 128x128x128", "size is "),
        ("x --steps 0", "steps is 0; it must be a whole number from 1 to 1000"),
        ("x --steps 10000", "steps is 10000; it must be a whole number from 1 to 1000"),
        ("x --steps many", "Invalid value for '--steps'"),
        ("x --guidance nan", "guidance_scale is nan; "),
        ("x --guidance 7,inf", "guidance_scale is (7.0, inf); "),
        ("x --guidance much", "guidance_scale is 'much'; it must be a number, or several separated by commas"),
        ("x --guidance-method pag", "guidance_method is 'pag'; it must be cfg, apg, cfg_zero or perp_neg"),
        ("x --guidance-steps 0.8:0.2", "guidance_steps is (0.8, 0.2); "),
        ("x --guidance-steps 10", "guidance_steps is '10'; it must be START:STOP"),
        ("x --threshold-percentile 0.9", "threshold_percentile is 0.9 without mimic_scale"),
        ("x --sampler eulr", "sampler is 'eulr'; did you mean "),
        ("x --spacing karas", "spacing is 'karas'; did you mean karras"),
        ("x --sigmas 1,2,0", "sigmas is (1.0, 2.0, 0.0); it must be 2 to 1001 falling noise levels"),
        ("x --sigmas high", "sigmas is 'high'; it must be falling noise levels separated by commas"),
        ("x --timesteps 9,nan", "timesteps is (9.0, nan); it must be "),
        ("x --sigmas 2,1,0 --steps 3", "steps is 3 and sigmas has 2 steps"),
        ("x --seed -2", "seed is -2; "),
        ("x --seed 18446744073709551615 --count 2", "at most 2**64 - 1"),
        ("x --count 0", "count is 0; "),
        ("x --guidance-interval 5:1", "guidance_interval is (5.0, 1.0); "),
        ("x --guidance-interval 5", "guidance_interval is '5'; it must be LOW:HIGH"),
        ("x --crop left", "crop is 'left'; "),
        ("x --image a.png --strength 1.5", "strength is 1.5; it must be a number from 0 to 1"),
        ("x --image a.png --strength -0.1", "strength is -0.1; "),
        ("x --image a.png --masked-content grey", "masked_content is 'grey'; it must be original, fill"),
        ("x --image a.png --outpaint 64", "outpaint is '64'; it must be sides and pixels, such as right=64"),
        ("x --image a.png --outpaint up=64", "outpaint is 'up=64'; it must be sides and pixels"),
        ("x --image a.png --outpaint right=60", "outpaint is (0, 0, 60, 0); it must be (left, top, right, bottom)"),
        ("x --image a.png --only-masked some", "Invalid value for '--only-masked'"),
        ("x --hires 1", "hires is 1.0; it must be a number above 1"),
        ("x --seamless z", "seamless is 'z'; it must be x, y or xy"),
        ("x --seed-size 64x", "seed_size is '64x'; it must be WxH"),
        ("x --out file/x.png", "'file/x.png', which cannot be written (Not a directory)"),
        ("x --out missing/x.png", "'missing/x.png', which cannot be written (No such file or directory)"),
        ("x --out missing", "it must be a file name ending in .png, .jpg, .jpeg, .webp, or a folder: one that exists"),
        ("x --out file/", "cannot be written (Not a directory)"),
        ("x --out {date}/{seed}.gif", "it must be a file name ending in .png"),
        ("x --out {sed}.png", "out has no field {sed}; the fields are {date}, {time}, {prompt}, {model}, "),
        ("x --out {seed.__class__}.png", "out has no field {seed.__class__}; "),
        ("x --out {}.png", "out has no field {}; "),
        ("x --out {seed!r}.png", "after {seed: only a length may follow, such as {prompt:40}"),
        ("x --out {prompt:>9}.png", "after {prompt: only a length may follow"),
        ("x --out {prompt:0}.png", "after {prompt: only a length may follow"),
        ("x --out {prompt:{seed}}.png", "after {prompt: only a length may follow"),
        ("x --out {seed.png", "which cannot be read (expected '}' before end of string)"),
        ("x --out seed}.png", "a brace that is part of the name is written {{ or }}"),
        ("x --out {date}/../../{seed}.png", "which is outside of '.'; it must stay in it"),
        ("x --preview p.gif", "preview is 'p.gif'; it must be a file name ending in .png"),
        ("x --preview {seed}.png", "preview is '{seed}.png'; it must be the name of a file"),
        ("x --preview missing/p.png", "preview is 'missing/p.png', which cannot be written"),
        ("x --width 512", "No such option: --width. Did you mean --size WxH?"),
        ("x --out x.gif", "out is 'x.gif'; it must be a file name ending in .png, .jpg"),
        (f"x --out {'x' * 300}.png", "File name too long"),
        (f"x --out {'x' * 250}.png --count 2", "File name too long"),
        ("", "the prompt is missing; give it as in: mezzotint generate"),
        ("x --prompt y", "the prompt is given twice, as PROMPT and with --prompt"),
        ("x --foo", "No such option: --foo"),
    ],
    ids=lambda text: text[:30],
)
def test_wrong_input_gets_a_sentence(run: Run, never: None, arguments: str, sentence: str) -> None:
    Path("file").write_text("")
    ran = run("generate", *arguments.split())
    assert (ran.code, ran.out) == (2, "")
    assert sentence in ran.err.splitlines()[-1]
    assert ran.err.splitlines()[-1].startswith("Error: ")
    assert os.listdir() == ["file"]


@pytest.mark.parametrize(
    ("stdin", "sentence"),
    [
        (b"x" * 10_000_000, "prompt on standard input is longer than 400,002 bytes"),
        (b"x" * 100_001, "prompt is 100,001 characters long; it must be a text"),
        (b"\xff", "prompt on standard input is not UTF-8"),
    ],
    ids=["10 MB", "one too many", "not UTF-8"],
)
def test_a_wrong_prompt_on_standard_input(run: Run, never: None, stdin: bytes, sentence: str) -> None:
    ran = run("generate", "-", stdin=stdin)
    assert (ran.code, ran.out, os.listdir()) == (2, "", [])
    assert ran.err.startswith(f"Error: {sentence}")
    assert len(ran.err) < 300


def test_a_protected_file_is_not_overwritten(run: Run, never: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("lemon.png").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
    ran = run("generate", "x", "--out", "lemon.png")
    assert (ran.code, ran.out) == (2, "")
    assert "(the file is protected)" in ran.err


def test_what_should_not_happen_is_one_line_and_code_1(
    run: Run, pipe: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: Request) -> Request:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(pipe, "plan", fail)
    ran = run("generate", "x")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (
        "Error: this is a bug in mezzotint (ZeroDivisionError: two lines). "
        "Set MEZZOTINT_DEBUG=1 to see the traceback.\n"
    )
    monkeypatch.setenv("MEZZOTINT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main()


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def draw_a_thousand(folder: Path, stdout: int, stderr: int) -> None:
    """Run the command on these two descriptors, in a process of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts its children with it ignored
    os.chdir(folder)
    os.environ |= {"TERM": "xterm", "COLUMNS": "80"}
    for descriptor, given, name in ((1, stdout, "stdout"), (2, stderr, "stderr")):
        os.dup2(given, descriptor)
        setattr(sys, name, os.fdopen(descriptor, "w"))
    mezzotint.load = lambda *_, **__: FakePipeline(pause=0.05)  # type: ignore[assignment]
    sys.argv = ["mezzotint", "generate", "a lemon", "--count", "1000", "--out", "x.png"]
    cli.main()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # it needs none of its parent's threads
def test_ctrl_c_ends_within_a_step_and_keeps_finished_pictures(tmp_path: Path) -> None:
    """A real process on a real terminal, which shows the bar too."""
    ours, theirs = pty.openpty()
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=draw_a_thousand, args=(tmp_path, writer, theirs))
    process.start()
    os.close(theirs)
    os.close(writer)
    while not (tmp_path / "x-0001.png").exists() and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGINT)
    screen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # what a terminal answers when the other side has closed it
            break
        if not chunk:
            break
        screen += chunk
    os.close(ours)
    with os.fdopen(reader) as stdout:
        out = stdout.read()
    process.join()
    assert (process.exitcode, out) == (130, "")
    kept = sorted(os.listdir(tmp_path))
    assert 1 <= len(kept) < 1000
    assert kept == [f"x-{k + 1:04}.png" for k in range(len(kept))]
    assert all(read_metadata(tmp_path / name) for name in kept)
    assert b"drawing" in screen and b"/3000" in screen
    assert b"Stopped; " in screen and kept[-1].encode() in screen
    assert b"Traceback" not in screen


def test_the_second_ctrl_c_interrupts_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with terminal.stoppable() as stopped:
            assert not stopped()
            signal.raise_signal(signal.SIGINT)
            assert stopped()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_before_the_first_picture(run: Run, pipe: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(request: Request, **_: Any) -> Result:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe, "generate", interrupt)
    ran = run("generate", "x")
    assert (ran.code, ran.out, ran.err) == (130, "", "Stopped; no picture was finished\n")
    monkeypatch.setattr(pipe, "plan", interrupt)
    assert run("generate", "x").code == 130


# ---- the other commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run: Run, command: str) -> None:
    ran = run(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Example: mezzotint {command}" in ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads_as_a_person_writes(run: Run, command: str) -> None:
    """Types by their form, defaults in words, options in groups; no line too wide for a terminal."""
    out = run(command, "--help").out
    assert "<" not in out.replace("<lora:name:0.8>", "")
    assert "default: (" not in out and "; else" not in out
    assert max(len(line) for line in out.splitlines() if "Usage: " not in line) <= 80


def test_options_are_grouped(run: Run) -> None:
    out = run("generate", "--help").out
    groups = ["Arguments", "Prompt", "Model", "Sampling", "Guidance", "Picture to picture", "Hires", "SDXL", "Memory"]
    places = [out.index(f"\n{group}:\n") for group in [*groups, "Output", "Options"]]
    assert places == sorted(places)
    sampling = " ".join(out[places[3] : places[4]].split())
    assert "--count N Number of pictures. [default: 1]" in sampling and "--size WxH" in sampling
    assert "--lora PATH[:SCALE[:TEXT]]" in out


def test_help_lists_every_command(run: Run) -> None:
    out = run("--help").out
    assert all(f"\n  {command}  " in out for command in COMMANDS)
    assert "..." not in out.split("Commands:")[1]  # no line is cut short


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from mezzotint.cli import main
for command in [[], *([name] for name in {COMMANDS})]:
    sys.argv = ["mezzotint", *command, "--help"]
    try:
        main()
    except SystemExit:
        pass
print({{"torch", "numpy", "PIL", "rich", "huggingface_hub"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_python_m_answers_wrong_input_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mezzotint", "generate", "-"]
    done = subprocess.run(command, input="x" * 10_000_000, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, os.listdir(tmp_path)) == (2, "", [])
    assert done.stderr.startswith("Error: prompt on standard input is longer than")


def test_tokens_are_shown_with_their_weights_and_where_chunks_end(run: Run, tmp_path: Path) -> None:
    """Of the bundled model, whose window is its own."""
    ran = run("tokens", "a (lemon:1.3) [red|blue] AND whale :0.5", "--steps", "4")
    assert (ran.code, ran.err) == (0, "")
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["1.2", "lemon</w>", "1.3", "'lemon'"] in lines
    assert ["part", "2", "of", "2", "(AND),", "weight", "0.5"] in lines
    assert "steps 1 to 2, 4: a (lemon:1.3) red\n" in ran.out and "steps 3: a (lemon:1.3) blue\n" in ran.out
    assert "steps 1 to 11: a\n" in run("tokens", "[a:b:0.5]").out, "of the model's own 20"
    record = json.loads(run("tokens", "lemon " * 60, "--json").out)
    (chunks,) = record["parts"][0]["variants"][0]["clauses"][0]["encoders"]
    assert [len(chunk) for chunk in chunks[:-1]] == [record["window"]] * (len(chunks) - 1)
    assert sum(map(len, chunks)) == 60
    assert chunks[0][1] == {"token": "lemon</w>", "id": chunks[0][0]["id"], "weight": 1.0, "start": 6, "end": 11}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["()"], "has no words to encode"),
        (["(a:.)"], "weight '.'"),
        (["(a:1e308)", "--syntax", "comfy"], "weight 1e+308"),
        (["a", "--syntax", "perl"], "prompt_syntax is 'perl'; it must be a1111, comfy, compel or plain"),
        (["a", "--embedding", "nowhere.pt"], "'nowhere.pt' does not exist"),
        (["a embedding:cat", "--syntax", "comfy"], "uses embedding:cat; the available embeddings are none"),
        (["a", "--model", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_tokens_refuses_with_a_sentence(run: Run, arguments: list[str], sentence: str) -> None:
    ran = run("tokens", *arguments)
    assert (ran.code, ran.out) == (2, "") and sentence in ran.err and ran.err.count("\n") == 1


def test_samplers_come_from_the_table_and_fit_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mezzotint.samplers.names import FEW_STEPS, SPACINGS, TABLE

    monkeypatch.setenv("COLUMNS", "80")
    out = run("samplers").out
    assert max(map(len, out.splitlines())) <= 80
    entries = [" ".join(entry.split()) for entry in re.split(r"\n(?! )", out)]
    for row, entry in zip(TABLE, entries, strict=False):
        noise = ", noise" if row.stochastic else ""
        calls = "1 call" if row.calls == 1 else f"{row.calls} calls"
        theirs = {"diffusers": row.diffusers, "A1111": row.a1111, "ComfyUI": row.comfyui}
        names = "; ".join(f"{program} {name}" for program, name in theirs.items() if name)
        assert entry == f"{row.name} (order {row.order}, {calls}{noise}): {row.good_for} {names}".strip()
    for name, (base, _, steps, scale) in FEW_STEPS.items():
        assert f"\n  {name}: {base}, {steps} steps, guidance {scale:g}\n" in out
    assert f"spacings: {', '.join(SPACINGS)} An" in " ".join(out.split())
    record = json.loads(run("samplers", "--json").out)
    assert record["samplers"] == [row._asdict() for row in TABLE]
    assert set(record["few_steps"]) == set(FEW_STEPS)
    assert all(Request(prompt="", sampler=name) for name in record["names"])


def test_models_lists_the_bundled_one_and_the_hub_cache(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    snapshot = Path("hub/models--org--name/snapshots/abc")
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    other = Path("hub/models--org--text-only/snapshots/abc")
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan("hub"))
    ran = run("models")
    assert ran.code == 0
    assert "org/name  hub cache, " in ran.out
    assert "text-only" not in ran.out
    assert ran.out.splitlines()[-1].startswith("--model takes one of these names")
    rows = json.loads(run("models", "--json").out)
    assert {"name": "org/name", "source": "hub cache", "bytes": 2} in [
        {key: row[key] for key in ("name", "source", "bytes")} for row in rows
    ]
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan("no-such-folder"))
    assert run("models").code == 0


def test_env(run: Run) -> None:
    facts = json.loads(run("env", "--json").out)
    assert {"mezzotint", "torch", "python", "cuda"} <= set(facts)
    lines = run("env").out.splitlines()
    assert f"torch: {facts['torch']}" in lines
    assert facts["attention"]["sliced"] == "available"
    assert f"attention xformers: {facts['attention']['xformers']}" in lines


def test_commands_take_no_more_threads_than_cpus(run: Run, pipe: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    monkeypatch.setattr(system, "usable_cpus", lambda: 2)
    assert run("generate", "a lemon").code == 0 and torch.get_num_threads() == 2
    assert json.loads(run("env", "--json").out)["cpu"].endswith(", 2 threads")


def test_version(run: Run) -> None:
    assert run("--version").out.startswith("mezzotint ")


# ---- with a model ----------------------------------------------------------------------------------------------------


def test_an_unknown_model_gets_a_sentence(run: Run) -> None:
    ran = run("generate", "x", "--model", "no/such/model")
    assert (ran.code, ran.out, os.listdir()) == (2, "", [])
    assert ran.err.startswith("Error: ") and "no/such/model" in ran.err
    assert run("inspect", "no/such/model").code == 2


def test_the_bundled_model_draws(run: Run) -> None:
    ran = run("generate", "a lemon on a blue background", "--steps", "2", "--seed", "7", "--count", "2", "--json")
    assert (ran.code, ran.err) == (0, "")
    record = json.loads(ran.out)
    request = Request.model_validate(record["request"])
    assert None not in (request.width, request.height, request.guidance_scale, request.sampler)
    for k in range(2):
        found = json.loads(read_metadata(f"mezzotint-{7 + k}.png")["mezzotint"])
        assert (found["seed"], Request.model_validate(found["request"])) == (7 + k, request)


def test_pictures_from_pictures_with_the_bundled_model(run: Run) -> None:
    """Errors that need the model and the files are raised before drawing; a resized mask is a notice after it."""
    Image.new("RGB", (64, 64), "blue").save("blue.png")
    Image.new("L", (32, 32), "white").save("mask.png")
    Image.new("L", (64, 64), "black").save("black.png")
    Path("svg.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for arguments, sentence in (
        ("--mask mask.png", "mask is given, but there is no image to start from"),
        ("--strength 0.5", "strength is given, but there is no image"),
        ("--image none.png", "image is 'none.png', which is not there"),
        ("--image svg.png", "image is 'svg.png', which is an SVG"),
        ("--image blue.png --strength 0.01", "strength is 0.01, which leaves none of 20 steps"),
        ("--image blue.png --mask black.png", "mask is black everywhere"),
        ("--image blue.png --mask-blur 4", "mask_blur is given, but there is neither mask nor outpaint"),
    ):
        ran = run("generate", "a lemon", *arguments.split())
        assert (ran.code, ran.out) == (2, "") and ran.err.splitlines()[-1].startswith(f"Error: {sentence}")
    options = "--image blue.png --mask mask.png --strength 0.2 --steps 5 --seed 3 --out lemon.png"
    ran = run("generate", "a lemon", *options.split())
    assert (ran.code, ran.out) == (0, "Wrote lemon.png (64x64, 5 steps, seed 3)\n")
    assert ran.err == "the mask is 32x32 and the image 64x64; the mask was resized\n"


def test_inspect_the_bundled_model(run: Run) -> None:
    folder = str(Path(mezzotint.__file__).parent / "data" / "emoji")
    assert run("inspect", folder).code == 0
    assert json.loads(run("inspect", "emoji", "--json").out) == json.loads(run("inspect", folder, "--json").out)


def test_the_names_that_models_lists_are_models(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mezzotint.weights.hub import locate

    monkeypatch.setattr("huggingface_hub.scan_cache_dir", lambda: SimpleNamespace(repos=[]))
    (row,) = json.loads(run("models", "--json").out)
    assert row["name"] == "emoji" and locate(row["name"]) == Path(row["path"])
