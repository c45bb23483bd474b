"""Hub ids against a tiny hub on the loopback: only what is needed, the cache before the network, errors."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from ip_adapters import VISION, tensors, write_adapters
from safetensors.torch import load, save

from controls import WEIGHTS, write_control, write_t2i
from mezzotint.errors import CheckpointError
from mezzotint.model_options import ModelOptions
from mezzotint.weights import ip_adapter_files, open_model
from mezzotint.weights.checkpoint import scan_model
from mezzotint.weights.control_files import ControlFiles, scan_control
from mezzotint.weights.hub import BUNDLED, locate, needed, resource, split_id
from mezzotint.weights.ip_adapter_files import scan_encoder, scan_ip_adapter
from mezzotint.weights.lora_files import choose_files
from mezzotint.weights.t2i_files import T2IFiles
from mezzotint.weights.vision_files import KnownEncoder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny-model"


class Hub(ThreadingHTTPServer):
    """A model repository, as much of the hub's interface as huggingface_hub asks for; `downloads` are files sent."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.downloads: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/models/gated/model" or path.startswith("/api/models/gated/model/"):
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            self.send(200, json.dumps(rows).encode(), {}, body)
        elif path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
            siblings = [{"rfilename": name} for name in self.server.files]
            info = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.send(200, json.dumps(info).encode(), {}, body)
        elif path.startswith(f"/{NAME}/resolve/") and (name := path.split("/", 5)[5]) in self.server.files:
            content = self.server.files[name]
            if body:
                self.server.downloads.append(name)
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.send(200, content, headers, body)
        else:
            self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    root = tiny_model.folder
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    half = {name.replace(".safetensors", ".fp16.safetensors"): b"x" for name in files if name.endswith(".safetensors")}
    files |= half | {
        "model.ckpt": b"x",
        "unet/diffusion_pytorch_model.bin": b"x",
        "README.md": b"x",
        "unet/x.onnx": b"x",
    }
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_model_is_downloaded_once_and_only_what_it_needs(hub: Hub, tiny_model: Any, capfd: Any) -> None:
    parts = open_model(NAME)
    assert torch.equal(parts.unet.conv_in.weight, tiny_model.unet.conv_in.weight)
    weights = sorted(name for name in hub.downloads if not name.endswith((".json", ".txt")))
    assert weights == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert "mezzotint.json" in hub.downloads
    assert "README.md" not in hub.downloads
    assert "%|" in capfd.readouterr().err  # progress was shown
    count = len(hub.downloads)
    hub.shutdown()
    hub.server_close()
    assert torch.equal(open_model(NAME).unet.conv_in.weight, parts.unet.conv_in.weight)  # cached: no network needed
    assert len(hub.downloads) == count


def test_an_incomplete_cache_is_completed(hub: Hub, tmp_path: Path) -> None:
    parts = open_model(NAME)
    (parts.source / "vae/diffusion_pytorch_model.safetensors").unlink()
    hub.downloads.clear()
    open_model(NAME)
    assert hub.downloads in ([], ["vae/diffusion_pytorch_model.safetensors"])  # the blob may still be in the cache


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="neither a local path nor a model on the hub"):
        open_model("someone/else")
    with pytest.raises(CheckpointError, match="requires accepting a licence"):
        open_model("gated/model")
    del hub.files["model_index.json"]
    with pytest.raises(CheckpointError, match="has no model_index"):
        open_model(NAME)


def test_offline_and_not_cached(hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(CheckpointError, match="not in the cache and could not be downloaded"):
        open_model(NAME)


@pytest.mark.parametrize("place", ["", "vae/"])
def test_a_vae_from_the_hub(place: str, hub: Hub, tiny_model: Any) -> None:
    """Of a repository that is one, or of a whole model's, and nothing else of it."""
    vae = {name.removeprefix("vae/"): content for name, content in hub.files.items() if name.startswith("vae/")}
    hub.files = {place + name: content for name, content in vae.items()} | {"README.md": b"x", "unet/config.json": b"x"}
    parts = open_model(tiny_model.folder, vae=NAME)
    assert torch.equal(parts.vae.decoder.conv_out.weight, tiny_model.vae.decoder.conv_out.weight)
    assert sorted(hub.downloads) == [f"{place}config.json", f"{place}diffusion_pytorch_model.safetensors"]
    assert list(parts.given_hashes["vae"]) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_given_vae_spares_the_models_own(hub: Hub, tiny_model: Any, tmp_path: Path) -> None:
    """Its config is read all the same: it says what the UNet's latents are. The next load without one completes it."""
    weights = "vae/diffusion_pytorch_model.safetensors"
    own = tmp_path / "vae"
    own.mkdir()
    for name in ("vae/config.json", weights):
        (tmp_path / name).write_bytes(hub.files[name])
    for _ in range(2):  # downloaded, then cached
        parts = open_model(NAME, vae=own)
    assert torch.equal(parts.vae.decoder.conv_out.weight, tiny_model.vae.decoder.conv_out.weight)
    assert "vae/config.json" in hub.downloads and weights not in hub.downloads
    open_model(NAME)
    assert hub.downloads.count(weights) == 1


def test_a_sharded_vae_from_the_hub(hub: Hub, tiny_model: Any) -> None:
    """A snapshot that lacks a shard is completed; a repository that lacks one is an error."""
    config, tensors = hub.files["vae/config.json"], load(hub.files["vae/diffusion_pytorch_model.safetensors"])
    stem, names = "diffusion_pytorch_model", sorted(tensors)
    shards = {f"{stem}-0000{k + 1}-of-00002.safetensors": names[k::2] for k in range(2)}
    index = {"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    hub.files = {"config.json": config, f"{stem}.safetensors.index.json": json.dumps(index).encode()}
    hub.files |= {shard: save({name: tensors[name] for name in inside}) for shard, inside in shards.items()}
    for _ in range(2):
        parts = open_model(tiny_model.folder, vae=NAME)
        assert torch.equal(parts.vae.decoder.conv_out.weight, tiny_model.vae.decoder.conv_out.weight)
        lost = parts.given_files["vae"][-1]
        lost.resolve().unlink()
        lost.unlink()
    assert sorted(hub.downloads) == sorted([*hub.files, lost.name])
    del hub.files[lost.name]
    with pytest.raises(CheckpointError, match="needs 2 shards, and 1 are there"):
        open_model(tiny_model.folder, vae=NAME)


def test_a_safety_checker_is_downloaded_once_it_is_wanted(hub: Hub) -> None:
    index = json.loads(hub.files["model_index.json"]) | {"safety_checker": ["x", "StableDiffusionSafetyChecker"]}
    checker = {"safety_checker/config.json": b"{}", "safety_checker/model.safetensors": b"x"}
    hub.files |= checker | {
        "model_index.json": json.dumps(index).encode(),
        "feature_extractor/preprocessor_config.json": b"{ }",
    }
    for off in (None, False, hub.url):
        locate(NAME, ModelOptions(safety_checker=off))
    assert not {*checker, "feature_extractor/preprocessor_config.json"} & {*hub.downloads}
    for _ in range(2):
        locate(NAME)
    assert all(hub.downloads.count(name) == 1 for name in (*checker, "feature_extractor/preprocessor_config.json"))


def test_without_a_network_the_cached_model_is_used_unchecked(hub: Hub) -> None:
    index = json.loads(hub.files["model_index.json"]) | {"safety_checker": ["x", "StableDiffusionSafetyChecker"]}
    hub.files["model_index.json"] = json.dumps(index).encode()
    found = locate(NAME, ModelOptions(safety_checker=None))
    hub.shutdown()
    hub.server_close()
    assert locate(NAME) == found and "safety_checker is missing" in scan_model(NAME).unchecked


def test_a_hub_without_a_vae(hub: Hub, tiny_model: Any) -> None:
    hub.files = {"README.md": b"x", "model.ckpt": b"x"}
    with pytest.raises(CheckpointError, match="someone/tiny-model has no VAE"):
        open_model(tiny_model.folder, vae=NAME)


def test_names_and_answers_that_are_none_of_a_hub(hub: Hub, tmp_path: Path) -> None:
    """Of a listing only known names are downloaded, whatever else it has; a name that no hub has is a sentence."""
    odd = ["tokenizer/../../../x.json", "tokenizer//x.json", "/x.json", "tokenizer/\x1b[2J.json", "tokenizer/1.json"]
    hub.files |= dict.fromkeys(odd, b"{}")
    open_model(NAME)
    assert not {*odd} & {*hub.downloads} and not [*tmp_path.glob("x.json")]
    for name in ("someone/model.git", f"someone/{'x' * 200}"):
        with pytest.raises(CheckpointError, match=r"could not be downloaded: Repo"):
            locate(name)
        with pytest.raises(CheckpointError, match=r"could not be downloaded: Repo"):
            open_model(BUNDLED, vae=name)


def test_needed_picks_one_format_and_variant() -> None:
    listing = [
        "model_index.json",
        "README.md",
        "v1.safetensors",
        "safety_checker/config.json",
        "safety_checker/pytorch_model.bin",
        "safety_checker/model.safetensors",
        "feature_extractor/preprocessor_config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
    ]
    common = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "unet/config.json"]
    common += ["safety_checker/config.json", "safety_checker/model.safetensors"]
    common += ["feature_extractor/preprocessor_config.json"]
    vae = ["vae/config.json", "vae/diffusion_pytorch_model.bin"]
    unet = "unet/diffusion_pytorch_model"
    plain = [
        f"{unet}-00001-of-00002.safetensors",
        f"{unet}-00002-of-00002.safetensors",
        f"{unet}.safetensors.index.json",
    ]
    half = [f"{unet}.fp16-00001-of-00001.safetensors", f"{unet}.safetensors.index.fp16.json"]
    assert needed(listing, ModelOptions()) == sorted(common + plain + vae)
    assert needed(listing, ModelOptions(variant="fp16")) == sorted(common + half + vae)
    unchecked = [name for name in common if not name.startswith(("safety_checker", "feature_extractor"))]
    assert needed(listing, ModelOptions(safety_checker=None)) == sorted(unchecked + plain + vae)


def test_a_missing_local_path_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any) -> None:
        raise AssertionError("a path reached for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    for name in ("models/a.safetensors", Path("someone/model"), "./someone/model", "/someone/model"):
        with pytest.raises(CheckpointError, match="does not exist"):
            open_model(name)


def test_the_bundled_models_name_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("emoji") == locate(Path("emoji")) == BUNDLED
    assert (BUNDLED / "model_index.json").is_file()
    Path("emoji").mkdir()
    assert locate("emoji") == Path("emoji")  # what the user has made there comes first


# ---- files and folders inside of a repository ------------------------------------------------------------------------


def folder_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_ip_adapter_and_its_encoder_inside_a_repository(
    hub: Hub, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the layout of h94/IP-Adapter: only the named file, and the encoder that it needs, once; then no network."""
    unet = tiny_model.unet.config
    write_adapters(tmp_path / "h94", unet, "plain", "full")
    hub.files = folder_files(tmp_path / "h94") | {
        "sdxl_models/image_encoder/model.safetensors": b"x",
        "README.md": b"x",
    }
    known = KnownEncoder("tiny", "models/image_encoder", VISION)
    monkeypatch.setattr(ip_adapter_files, "KNOWN", (known,))
    with pytest.raises(CheckpointError, match=rf"{NAME}/models has 2 files \(full.safetensors, plain.safetensors\)"):
        scan_ip_adapter(f"{NAME}/models", unet)
    with pytest.raises(CheckpointError, match="give the adapter's file, such as h94/IP-Adapter/models"):
        scan_ip_adapter(NAME, unet)
    for repository in ("h94/IP-Adapter", NAME):  # beside the adapter, or where h94's repository has it
        monkeypatch.setattr(ip_adapter_files, "HUB", repository)
        adapter = scan_ip_adapter(f"{NAME}/models/plain.safetensors", unet)
        encoder = scan_encoder(None, adapter)
        encoders = [f"models/image_encoder/{name}" for name in ("config.json", "model.safetensors")]
        assert sorted(hub.downloads) == [*encoders, "models/plain.safetensors"]
    local = scan_ip_adapter(str(tmp_path / "h94" / "models" / "full.safetensors"), unet)
    assert scan_encoder(f"{NAME}/models/image_encoder", local).digest == encoder.digest
    with pytest.raises(CheckpointError, match=r"has no file or folder models/other.bin"):
        scan_ip_adapter(f"{NAME}/models/other.bin", unet)
    count = len(hub.downloads)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert scan_encoder(None, scan_ip_adapter(f"{NAME}/models/plain.safetensors", unet)).digest == encoder.digest
    with pytest.raises(CheckpointError, match="is not in the cache, and HF_HUB_OFFLINE is set"):
        scan_ip_adapter(f"{NAME}/models/full.safetensors", unet)
    assert len(hub.downloads) == count


def test_an_encoder_that_the_repository_lacks(hub: Hub, tiny_model: Any) -> None:
    hub.files = {"a.safetensors": save(tensors(tiny_model.unet.config))}
    with pytest.raises(CheckpointError, match=rf"needs its .*: {NAME} on the hub has no file or folder image_"):
        scan_encoder(None, scan_ip_adapter(NAME, tiny_model.unet.config))


def test_networks_inside_a_repository(hub: Hub, tiny_model: Any, tmp_path: Path) -> None:
    """Folders of a ControlNet and a T2I-Adapter, a ControlNet's file with its config, a LoRA's; nothing beside them."""
    unet = tiny_model.unet.config
    write_control(tmp_path / "nets" / "canny" / WEIGHTS, unet)
    write_t2i(tmp_path / "nets" / "t2i" / WEIGHTS, unet)
    lora = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 2)}
    hub.files = folder_files(tmp_path / "nets") | {"loras/b/hat.safetensors": save(lora), "loras/b/x.safetensors": b"x"}
    with pytest.raises(CheckpointError, match="2 files that could be the LoRA"):
        resource(f"{NAME}/loras/b", "LoRA", partial(choose_files, f"{NAME}/loras/b"))
    assert isinstance(scan_control(f"{NAME}/canny", unet), ControlFiles)
    assert isinstance(scan_control(f"{NAME}/t2i", unet), T2IFiles)
    assert scan_control(f"{NAME}/canny/{WEIGHTS}", unet).layout == "single file"
    place = resource(f"{NAME}/loras/b/hat.safetensors", "LoRA", partial(choose_files, NAME))
    assert load(place.read_bytes()).keys() == lora.keys()
    described = [f"{folder}/{name}" for folder in ("canny", "t2i") for name in ("config.json", WEIGHTS)]
    assert sorted(hub.downloads) == sorted([*described, "loras/b/hat.safetensors"])


def test_paths_below_a_folder_of_this_machine_are_no_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loras").mkdir()
    for name in (
        "loras/sdxl/hat.safetensors",
        "a/b/../c",
        "a/b//c",
        "./a/b/c",
        "/a/b/c",
        "a.bin",
        "a/b.bin",
        "a/b/c\n",
    ):
        assert split_id(name) is None
        with pytest.raises(CheckpointError, match="does not exist"):
            resource(name, "LoRA", list)
    assert split_id("a/b/c d/e.bin") == ("a/b", "c d/e.bin")
    assert split_id("a/b") == ("a/b", "")
