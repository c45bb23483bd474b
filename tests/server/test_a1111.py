"""AUTOMATIC1111's dialect, by clients that others wrote and by the bodies that they send."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import webuiapi
from fastapi.testclient import TestClient
from PIL import Image

import mezzotint
from live import listening
from mezzotint.records.record import pixels_digest
from mezzotint.request import Request
from mezzotint.server import Settings, create_app
from mezzotint.server.a1111.body import Image2Image, Text2Image, find_sampler, translate
from mezzotint.server.a1111.options import Options
from mezzotint.server.errors import InvalidError
from stub_server import HOST, submit, wait_for

PROMPT = "a lemon on a blue background"
DEFAULTS = Options().model_dump()


def picture(size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    return Image.radial_gradient("L").resize(size).convert(mode)


def base64_of(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def image_of(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path) -> Iterator[int]:
    settings = Settings(data=tmp_path_factory.mktemp("a1111") / "data", models=(str(sd1_folder),), devices=("cpu",))
    with listening(create_app(settings)) as port:
        yield port


@pytest.fixture(scope="module")
def api(port: int) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(port=port, steps=3)


def requests_of(body: dict[str, Any], kind: type[Text2Image] = Text2Image, **options: Any) -> list[Request]:
    task = translate(kind.model_validate(body), DEFAULTS | {"sd_vae": None} | options, loads_networks=False)
    return [Request(**{name: value for name, value in one.items() if value is not None}) for one in task.requests]


# ---- webuiapi --------------------------------------------------------------------------------------------------------


def test_webuiapi_draws_the_bits_of_generate(api: webuiapi.WebUIApi, sd1: mezzotint.Pipeline) -> None:
    result = api.txt2img(prompt=PROMPT, negative_prompt="blurry", seed=7, n_iter=2, width=32, height=32, cfg_scale=5)
    request = Request(
        prompt=PROMPT,
        negative_prompt="blurry",
        seed=7,
        count=2,
        steps=3,
        guidance_scale=5.0,
        width=32,
        height=32,
        sampler="Euler a",
        noise="philox",
    )
    for drawn, expected in zip(result.images, sd1.generate(request).images, strict=True):
        assert pixels_digest(drawn) == pixels_digest(expected)
    assert isinstance(result.json["info"], str)
    assert result.info["all_seeds"] == [7, 8]
    assert result.info["all_prompts"] == [PROMPT, PROMPT]
    assert [text.split("\n")[0] for text in result.info["infotexts"]] == [PROMPT, PROMPT]
    assert "Seed: 8" in result.info["infotexts"][1] and "RNG: NV" in result.info["infotexts"][1]
    assert result.info["unsupported"] == []
    assert result.parameters["cfg_scale"] == 5


def test_webuiapi_starts_from_a_picture_with_a_mask(api: webuiapi.WebUIApi, sd1: mezzotint.Pipeline) -> None:
    mask = Image.new("L", (48, 40))
    mask.paste(255, (8, 8, 40, 32))
    options = {"prompt": PROMPT, "seed": 3, "width": 32, "height": 32, "sampler_name": "DPM++ 2M"}
    result = api.img2img(images=[picture((48, 40))], mask_image=mask, mask_blur=2, denoising_strength=0.6, **options)
    file = io.BytesIO()
    picture((48, 40)).save(file, "PNG")
    request = Request(
        prompt=PROMPT,
        seed=3,
        steps=3,
        guidance_scale=7.0,
        width=32,
        height=32,
        sampler="DPM++ 2M",
        noise="philox",
        image=file.getvalue(),
        mask=mask,
        mask_blur=2.0,
        strength=0.6,
        masked_content="fill",
        only_masked=0,
    )
    assert result.image.size == (48, 40)  # pasted back: the client's inpaint_full_res is true by default
    assert pixels_digest(result.image) == pixels_digest(sd1.generate(request).images[0])
    assert result.parameters["init_images"] is None


def test_webuiapi_reads_what_a_picture_was_drawn_with(api: webuiapi.WebUIApi) -> None:
    drawn = api.txt2img(prompt=PROMPT, seed=5, width=32, height=32)
    found = api.png_info(drawn.image)
    assert found.info == drawn.info["infotexts"][0]
    assert found.parameters["Prompt"] == PROMPT
    assert (found.parameters["Steps"], found.parameters["Size-1"], found.parameters["Sampler"]) == (
        "3",
        "32",
        "Euler a",
    )
    assert api.png_info(picture()).info == ""


def test_webuiapi_sets_options(api: webuiapi.WebUIApi) -> None:
    api.set_options({"CLIP_stop_at_last_layers": 2})
    try:
        assert api.get_options()["CLIP_stop_at_last_layers"] == 2
        assert "Clip skip: 2" in api.txt2img(prompt=PROMPT, width=32, height=32).info["infotexts"][0]
    finally:
        api.set_options({"CLIP_stop_at_last_layers": 1})
    assert api.util_get_current_model() == "tiny"
    assert api.util_get_model_names() == ["tiny"]
    assert api.set_options({"sd_model_checkpoint": "../tiny"})["detail"].startswith("sd_model_checkpoint is '../tiny'")


def test_webuiapi_lists_what_there_is(api: webuiapi.WebUIApi) -> None:
    assert {"Euler a", "DPM++ 2M", "DDIM", "UniPC"} <= set(api.util_get_sampler_names())
    assert {"automatic", "karras", "sgm_uniform"} <= set(api.util_get_scheduler_names())
    assert api.get_upscalers()[0]["name"] == "None"
    assert api.get_latent_upscale_modes() == [{"name": "Latent"}]
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_memory()["ram"]["used"] > 0
    assert api.get_cmd_flags()["api"] is True
    for empty in (api.get_sd_vae, api.get_loras, api.get_prompt_styles, api.get_hypernetworks, api.get_face_restorers):
        assert empty() == []
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.refresh_checkpoints() is None
    for name in [one["name"] for one in api.get_samplers()]:
        for alias in [name, name.lower(), next(one["aliases"][0] for one in api.get_samplers() if one["name"] == name)]:
            assert find_sampler(alias, "automatic")[0] in (name, "DPM++ 2M SDE")


def test_webuiapi_enlarges_a_picture(api: webuiapi.WebUIApi) -> None:
    image = picture((24, 16))
    larger = api.extra_single_image(image, upscaler_1="Lanczos", upscaling_resize=3).image
    assert larger.tobytes() == image.resize((72, 48), Image.Resampling.LANCZOS).tobytes()
    assert api.extra_single_image(image, upscaler_1="None").image.tobytes() == image.tobytes()
    options = {"upscaling_resize_w": 40, "upscaling_resize_h": 40, "upscaler_1": "Nearest"}
    cropped = api.extra_single_image(image, resize_mode=1, **options).image
    assert cropped.tobytes() == image.resize((60, 40), Image.Resampling.NEAREST).crop((10, 0, 50, 40)).tobytes()


def test_webuiapi_interrupts_and_skips(api: webuiapi.WebUIApi) -> None:
    api.util_wait_for_ready(0.01)
    assert api.interrupt() == {} and api.skip() is None  # nothing runs
    results: list[Any] = []
    body = {"prompt": PROMPT, "seed": 1, "width": 32, "height": 32, "n_iter": 3, "steps": 12}

    def draw_and(act: Any, picture: int) -> Any:
        thread = threading.Thread(target=lambda: results.append(api.txt2img(**body)))
        thread.start()
        while True:
            state = api.get_progress()["state"]
            if state["job_no"] >= picture and state["sampling_step"] > 0:
                break
            time.sleep(0.01)
        found = api.get_progress()
        act()
        thread.join()
        return found

    found = draw_and(api.skip, 0)
    assert 0 < found["progress"] <= 1 and found["state"]["job_count"] == 3 and found["state"]["sampling_steps"] == 12
    assert found["state"]["job"] == "Batch 1 out of 3"
    assert image_of(found["current_image"]).format == "JPEG"
    assert results[0].info["all_seeds"] == [2, 3]
    draw_and(api.interrupt, 1)
    assert results[1].info["all_seeds"] == [1]
    api.util_wait_for_ready(0.01)


def test_interrupt_leaves_jobs_of_another_api_alone(make_stub: Callable[..., TestClient]) -> None:
    client = make_stub(delay=0.02)
    id = submit(client, prompt="a", steps=10)
    while not client.get("/sdapi/v1/progress").json()["progress"]:
        time.sleep(0.005)
    assert client.post("/sdapi/v1/interrupt").json() == {}
    assert client.post("/sdapi/v1/skip").json() is None
    assert client.get("/sdapi/v1/progress").json()["state"]["job_count"] == 1
    assert wait_for(client, id)["state"] == "done"


# ---- bodies of other clients -----------------------------------------------------------------------------------------


@pytest.fixture
def client(port: int) -> Iterator[TestClient]:
    import httpx

    with httpx.Client(base_url=f"http://127.0.0.1:{port}/sdapi/v1", timeout=30) as client:
        yield client


def test_open_webui_posts_the_whole_options_back(client: TestClient) -> None:
    headers = {"authorization": ""}
    models = client.get("/sd-models", headers=headers).json()
    assert models[0]["title"] == models[0]["model_name"] == "tiny"
    options = client.get("/options", headers=headers).json()
    options["sd_model_checkpoint"] = models[0]["title"]
    assert client.post("/options", json=options, headers=headers).status_code == 200
    body = {"prompt": PROMPT, "batch_size": 1, "width": 32, "height": 32, "steps": 3, "negative_prompt": None}
    reply = client.post("/txt2img", json=body, headers=headers).json()
    assert image_of(reply["images"][0]).size == (32, 32)
    assert json.loads(reply["info"])["sampler_name"] == "Euler"  # where a body names none


def test_librechat_reads_raw_base64_and_the_text(client: TestClient) -> None:
    body = {"prompt": PROMPT, "negative_prompt": "blurry", "cfg_scale": 4.5, "steps": 3, "width": 32, "height": 32}
    reply = client.post("/txt2img", json=body | {"sampler_index": "DPM++ 2M Karras"}).json()
    assert not reply["images"][0].startswith("data:")
    text = json.loads(reply["info"])["infotexts"][0]
    assert "CFG scale: 4.5" in text and "Sampler: DPM++ 2M, Schedule type: Karras" in text


def test_silly_tavern_sends_its_own_keys_along(client: TestClient) -> None:
    for path in ("upscalers", "latent-upscale-modes", "sd-vae", "sd-modules", "samplers", "schedulers", "sd-models"):
        assert isinstance(client.get(f"/{path}").json(), list)
    body = {
        "url": "http://127.0.0.1:7860",
        "auth": "user:secret",
        "prompt": PROMPT,
        "negative_prompt": "blurry",
        "sampler_name": "euler a",
        "scheduler": "karras",
        "steps": "3",
        "cfg_scale": 7,
        "width": 32,
        "height": 32,
        "restore_faces": True,
        "enable_hr": False,
        "hr_upscaler": "None",
        "hr_scale": 2,
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "seed": None,
        "override_settings": {"CLIP_stop_at_last_layers": 2, "sd_vae": None},
        "override_settings_restore_afterwards": True,
        "clip_skip": 2,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
        "alwayson_scripts": {"ADetailer": {"args": [True]}},
    }
    reply = client.post("/txt2img", json=body).json()
    info = json.loads(reply["info"])
    assert info["unsupported"] == ["restore_faces: True", "alwayson_scripts: ADetailer"]
    assert "Schedule type: Karras" in info["infotexts"][0] and "Clip skip: 2" in info["infotexts"][0]
    assert "secret" not in json.dumps(reply["parameters"])


def test_gimp_plugins_start_from_a_layer(client: TestClient) -> None:
    layer = f"data:image/png;base64,{base64_of(picture(mode='RGBA'))}"
    body = {"init_images": [layer], "prompt": PROMPT, "denoising_strength": 0.5, "width": 32, "height": 32, "steps": 4}
    reply = client.post("/img2img", json=body | {"sampler_index": "DDIM", "batch_size": 2, "seed": 4}).json()
    assert json.loads(reply["info"])["all_seeds"] == [4, 5] and len(reply["images"]) == 2


# ---- what a body means -----------------------------------------------------------------------------------------------


def test_a_body_without_fields_has_that_programs_defaults() -> None:
    [request] = requests_of({"prompt": "a", "seed": 1})
    assert (request.steps, request.guidance_scale, request.width, request.height) == (50, 7.0, 512, 512)
    assert (request.sampler, request.noise, request.clip_skip) == ("Euler", "philox", 0)
    [request] = requests_of(
        {"prompt": "a", "init_images": [base64_of(picture())], "mask": base64_of(picture())}, Image2Image
    )
    assert (request.strength, request.mask_blur, request.masked_content, request.only_masked) == (0.75, 4, "fill", 0)


def test_seeds_follow_each_other_and_variations_share_one() -> None:
    requests = requests_of({"prompt": "a", "seed": 10, "batch_size": 2, "n_iter": 3})
    assert [(one.seed, one.count, one.batch) for one in requests] == [(10, 2, 2), (12, 2, 2), (14, 2, 2)]
    body = {"prompt": "a", "seed": 10, "subseed": 20, "subseed_strength": 0.3, "batch_size": 2, "n_iter": 2}
    varied = requests_of(body)
    assert [(one.seed, one.variation_seed) for one in varied] == [(10, 20), (10, 21), (10, 22), (10, 23)]
    assert {one.variation_strength for one in varied} == {0.3}
    assert requests_of({"prompt": "a"})[0].seed != requests_of({"prompt": "a"})[0].seed
    several = {"init_images": [base64_of(picture((32, 32))), base64_of(picture((40, 40)))], "seed": 1, "n_iter": 2}
    starts = requests_of(several, Image2Image)
    assert [one.seed for one in starts] == [1, 2, 3, 4]
    assert starts[0].image == starts[2].image != starts[1].image == starts[3].image


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            {"enable_hr": True, "denoising_strength": 0.4},
            {"hires": 2.0, "hires_strength": 0.4, "hires_upscale": "latent"},
        ),
        ({"enable_hr": True, "hr_scale": 1.5, "hr_second_pass_steps": 9}, {"hires": 1.5, "hires_steps": 9}),
        ({"enable_hr": True, "hr_upscaler": "Lanczos", "hr_resize_x": 768}, {"hires": 1.5, "hires_upscale": "pixels"}),
        ({"enable_hr": True, "hr_upscaler": "None"}, {"hires_upscale": "pixels"}),
        ({"hr_scale": 3.0, "denoising_strength": 0.5}, {"hires": None, "strength": None}),
        ({"width": 515, "height": 519}, {"width": 512, "height": 512}),
        ({"tiling": True}, {"seamless": "xy"}),
        ({"seed_resize_from_w": 256, "seed_resize_from_h": 384}, {"seed_size": (256, 384)}),
        ({"eta": 1.0, "sampler_name": "Euler"}, {"eta": None}),  # that sampler has none there
        ({"eta": 0.5, "sampler_name": "Euler a"}, {"eta": 0.5}),
        ({"sampler_name": "DDIM"}, {"eta": 0.0}),
        ({"sampler_name": "k_dpmpp_2m", "scheduler": "SGM Uniform"}, {"sampler": "DPM++ 2M SGM Uniform"}),
        ({"sampler_name": "dpm++ 2m sde", "scheduler": "sgm_uniform"}, {"sampler": "DPM++ 2M SDE SGM Uniform"}),
        ({"sampler_name": "DPM++ SDE Karras", "scheduler": "Uniform"}, {"sampler": "DPM++ SDE Karras"}),
        ({"sampler_index": "PLMS", "scheduler": "Karras"}, {"sampler": "PLMS"}),
    ],
)
def test_fields_mean_what_they_mean_there(body: dict[str, Any], expected: dict[str, Any]) -> None:
    [request] = requests_of({"prompt": "a", "seed": 1, **body})
    assert {name: getattr(request, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"inpaint_full_res": False, "inpainting_fill": 1}, {"only_masked": None, "masked_content": "original"}),
        ({"inpaint_full_res_padding": 32, "inpainting_fill": 2}, {"only_masked": 32, "masked_content": "noise"}),
        ({"inpainting_mask_invert": 1, "mask_blur": 0}, {"invert_mask": True, "mask_blur": 0.0}),
        ({"mask_blur_x": 6, "mask_blur_y": 6, "resize_mode": 2}, {"mask_blur": 6.0, "resize_mode": "fill"}),
        ({"resize_mode": 1, "denoising_strength": 0.2}, {"resize_mode": "crop", "strength": 0.2}),
    ],
)
def test_fields_of_a_mask_mean_what_they_mean_there(body: dict[str, Any], expected: dict[str, Any]) -> None:
    given = {"prompt": "a", "init_images": [base64_of(picture())], "mask": base64_of(picture()), **body}
    [request] = requests_of(given, Image2Image)
    assert {name: getattr(request, name) for name in expected} == expected


def test_options_change_what_a_body_means() -> None:
    [request] = requests_of({"prompt": "a"}, randn_source="CPU", emphasis="No norm", CLIP_stop_at_last_layers=3)
    assert (request.noise, request.emphasis, request.clip_skip) == ("seeded", "no_norm", 2)
    [request] = requests_of({"init_images": [base64_of(picture())]}, Image2Image, img2img_fix_steps=True)
    assert request.fix_steps is True


def test_what_is_not_supported_is_said() -> None:
    body = {"prompt": "<hypernet:x:1>", "styles": ["Anime"], "s_churn": 5, "hr_checkpoint_name": "xl", "s_noise": 1.0}
    body |= {"hr_prompt": "unused", "enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+", "eta": 2.0}
    task = translate(Text2Image.model_validate(body | {"sampler_name": "Euler a"}), DEFAULTS, loads_networks=False)
    said = " | ".join(task.notes)
    for word in (
        "styles: ['Anime']",
        "s_churn: 5",
        "hr_checkpoint_name: xl",
        "hr_prompt",
        "R-ESRGAN",
        "Eta: 2",
        "hypernet",
    ):
        assert word in said, word
    with pytest.raises(InvalidError, match="Script 'X/Y/Z plot' not found"):
        translate(Text2Image(script_name="X/Y/Z plot"), DEFAULTS, loads_networks=False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"refiner_checkpoint": "XL Refiner.safetensors [0123abcd]", "refiner_switch_at": 0.8}, ("xl refiner", 0.8)),
        ({"refiner_checkpoint": "xl refiner"}, ("xl refiner", 0.0)),  # there: from the first call, without a number
        ({"refiner_checkpoint": "xl refiner", "refiner_switch_at": None}, ("xl refiner", 0.0)),
        ({"refiner_checkpoint": "xl refiner", "refiner_switch_at": 1.5}, ("xl refiner", 1.0)),  # the share is below 1
        ({"refiner_checkpoint": "emoji", "refiner_switch_at": 0.8}, (None, None)),  # the model itself
        ({"refiner_checkpoint": "None", "refiner_switch_at": 0.8}, (None, None)),
        ({"refiner_switch_at": 0.8}, (None, None)),
    ],
)
def test_a_refiner_is_found_as_a_model_is(
    make_stub, tmp_path: Path, given: dict[str, Any], expected: tuple[str | None, float | None]
) -> None:
    (tmp_path / "xl refiner.safetensors").touch()
    client = make_stub(models=("emoji", str(tmp_path / "xl refiner.safetensors")))
    reply = client.post("/sdapi/v1/txt2img", json={"prompt": "a", "steps": 2, "width": 64, "height": 64, **given})
    assert reply.status_code == 200, reply.text
    info = json.loads(reply.json()["info"])
    assert info["unsupported"] == [] and info["unknown"] == []
    (job,) = client.app.state.service.store.jobs()
    assert (job.request.get("refiner"), job.request.get("refiner_at")) == expected
    text = f"Refiner: {expected[0]}, Refiner switch at: {expected[1]:g}" if expected[0] else "Refiner"
    assert (text in info["infotexts"][0]) is (expected[0] is not None)
    wrong = client.post("/sdapi/v1/txt2img", json={"prompt": "a", "refiner_checkpoint": "/etc/passwd"})
    assert wrong.status_code == 422 and "refiner_checkpoint" in wrong.text


# ---- hostile values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("txt2img", {"width": 0}, "width"),
        ("txt2img", {"width": 2**31}, "width"),
        ("txt2img", {"width": 8192, "height": 8192}, "width"),
        ("txt2img", {"steps": 2**63}, "steps"),
        ("txt2img", {"steps": -1}, "steps"),
        ("txt2img", {"steps": "many"}, "steps"),
        ("txt2img", {"cfg_scale": -1}, "cfg_scale"),
        ("txt2img", {"cfg_scale": "nan"}, "cfg_scale"),
        ("txt2img", {"seed": -2}, "seed"),
        ("txt2img", {"seed": 2**70}, "seed"),
        ("txt2img", {"n_iter": 99, "batch_size": 99}, "n_iter"),
        ("txt2img", {"batch_size": 0}, "batch_size"),
        ("txt2img", {"subseed_strength": 5}, "subseed_strength"),
        ("txt2img", {"prompt": "a" * 40_000}, "prompt"),
        ("txt2img", {"prompt": ["a"]}, "prompt"),
        ("txt2img", {"prompt": "\ud800"}, "prompt"),
        ("txt2img", {"sampler_name": "../../etc/passwd"}, "sampler_name"),
        ("txt2img", {"scheduler": "C:\\windows"}, "scheduler"),
        ("txt2img", {"enable_hr": True, "hr_scale": 64}, "hr_scale"),
        ("txt2img", {"enable_hr": True, "hr_resize_x": 640, "hr_resize_y": 1024}, "hr_resize_x"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "/etc/passwd"}}, "sd_model_checkpoint"),
        ("txt2img", {"override_settings": {"sd_vae": "../vae"}}, "sd_vae"),
        ("txt2img", {"override_settings": {"CLIP_stop_at_last_layers": "x"}}, "CLIP_stop_at_last_layers"),
        ("txt2img", {"override_settings": []}, "override_settings"),
        ("img2img", {}, "init_images"),
        ("img2img", {"init_images": ["not base64!"]}, "init_images"),
        ("img2img", {"init_images": ["file:///etc/passwd"]}, "init_images"),
        ("img2img", {"init_images": ["http://127.0.0.1/a.png"]}, "init_images"),
        ("img2img", {"init_images": ["00000000000000000000000000000000"]}, "init_images"),
        ("img2img", {"init_images": ["PHN2Zz48L3N2Zz4="]}, "init_images"),
        ("img2img", {"init_images": [base64_of(picture())], "mask": "AAAA"}, "mask"),
        ("img2img", {"init_images": [base64_of(picture())], "inpainting_fill": 9}, "inpainting_fill"),
        ("img2img", {"init_images": [base64_of(picture())], "denoising_strength": 2}, "denoising_strength"),
        ("png-info", {"image": "x"}, "image"),
        ("png-info", {}, "image"),
        ("extra-single-image", {"image": base64_of(picture()), "upscaler_1": "../x"}, "upscaler_1"),
        (
            "extra-single-image",
            {"image": base64_of(picture((256, 256))), "upscaler_1": "Lanczos", "upscaling_resize": 60},
            "pix",
        ),
        ("options", {"sd_model_checkpoint": "nothing"}, "sd_model_checkpoint"),
        ("options", {"randn_source": "dice"}, "randn_source"),
    ],
)
def test_wrong_values_are_refused_with_a_sentence(
    refusing: TestClient, path: str, body: dict[str, Any], word: str
) -> None:
    reply = refusing.post(f"/sdapi/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert 400 <= reply.status_code < 500, reply.text
    assert word in reply.json()["detail"], reply.text
    assert reply.json()["error"] == "InvalidError"


def test_bodies_that_are_not_json_are_refused(refusing: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    for content in ("{", "[]", '{"cfg_scale": NaN}', '{"x": Infinity}', "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"):
        reply = refusing.post("/sdapi/v1/txt2img", content=content, headers=headers)
        assert reply.status_code == 422 and reply.json()["detail"], content[:40]
    assert refusing.post("/sdapi/v1/txt2img", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415


def test_files_are_named_in_the_prompt_and_the_options(tmp_path: Path) -> None:
    from mezzotint.server.service import Service
    from stub_server import StubModels

    folders = {name: tmp_path / name for name in ("loras", "embeddings", "vaes")}
    for folder, name in zip(folders.values(), ("style", "cat-toy", "fine"), strict=True):
        folder.mkdir()
        (folder / f"{name}.safetensors").write_bytes(b"")
    settings = Settings(data=tmp_path / "data", **folders)
    service = Service(settings, StubModels(settings))
    with TestClient(create_app(settings, service), base_url=f"{HOST}/sdapi/v1/") as client:
        assert client.get("loras").json() == [{"name": "style", "alias": "style", "path": "style", "metadata": {}}]
        assert [*client.get("embeddings").json()["loaded"]] == ["cat-toy"]
        assert client.get("sd-vae").json() == [{"model_name": "fine", "filename": "fine"}]
        options = {"sd_vae": "fine.safetensors", "sd_model_checkpoint": "emoji.safetensors [0123456789]"}
        body = {"prompt": "a Cat-Toy, <lora:style:0.5>", "width": 64, "height": 64, "override_settings": options}
        reply = client.post("txt2img", json=body)
        assert json.loads(reply.json()["info"])["unsupported"] == []
        [job] = service.store.jobs()
        assert (job.request["embeddings"], job.vae, job.model) == (["cat-toy"], "fine.safetensors", "emoji")
        client.post("txt2img", json=body | {"prompt": "a cat-toyshop", "override_settings": {"sd_vae": "Automatic"}})
        assert "embeddings" not in service.store.jobs()[0].request and service.store.jobs()[0].vae is None
        said = client.post("txt2img", json=body | {"override_settings": {"img2img_color_correction": True}}).json()
        assert json.loads(said["info"])["unsupported"] == ["override_settings: img2img_color_correction"]
