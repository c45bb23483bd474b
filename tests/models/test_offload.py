"""Offloaded weights: a layer computes the same wherever and in whatever format its weight is stored."""

from __future__ import annotations

import copy
import math
import threading
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.models import offload
from mezzotint.models.convolution import Conv2d, seamless
from mezzotint.models.offload import (
    OffloadedLayer,
    OffloadedWeight,
    Prefetcher,
    StoredWeight,
    StreamedWeight,
    WeightSource,
    allocate_weight,
    can_offload,
    offload_weight,
    onload,
)
from mezzotint.models.prefetch import CudaPrefetcher

CPU = torch.device("cpu")


def random(*shape: int) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    return weight * torch.logspace(-3, 2, shape[0]).view(-1, *(1 for _ in shape[1:]))


def layers() -> list[tuple[nn.Module, Tensor]]:
    """One of each kind, with something to put in."""
    torch.manual_seed(0)
    convolution = Conv2d(6, 10, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return [
        (nn.Linear(12, 7), torch.randn(2, 5, 12)),
        (convolution, torch.randn(2, 6, 9, 7).contiguous(memory_format=torch.channels_last)),
        (nn.Embedding(11, 5), torch.tensor([[0, 10, 3], [3, 3, 1]])),
    ]


class Counted(WeightSource):
    """A source that logs when it is read and when it is prefetched."""

    def __init__(self, weight: Tensor, log: list[str], name: str) -> None:
        self.inner, self.log, self.name, self.shape = StoredWeight(weight), log, name, weight.shape

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.log.append(self.name)
        return self.inner.tensor(dtype, device).clone()

    def prefetch(self) -> None:
        self.log.append(f"prefetch {self.name}")


@pytest.mark.parametrize("kind", range(3))
def test_an_offloaded_layer_computes_the_same(kind: int) -> None:
    layer, x = layers()[kind]
    expected = layer(x)
    weight = layer.weight.detach().clone()
    offload_weight(layer, StoredWeight(weight), torch.float32, CPU)
    assert isinstance(layer, OffloadedLayer)
    assert "weight" not in dict(layer.named_parameters())
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.state_dict()["weight"], weight)


def test_an_offloaded_convolution_pads_circularly_too() -> None:
    layer, x = layers()[1]
    with seamless("x"):
        expected = layer(x)
        offload_weight(layer, StoredWeight(layer.weight.detach()), torch.float32, CPU)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_16_bits_are_rounded_once(storage: str) -> None:
    weight = random(8, 5)
    stored = StoredWeight.from_tensor(weight.clone(), storage)
    assert stored.data.dtype == getattr(torch, storage)
    assert torch.equal(stored.tensor(torch.float32, CPU), weight.to(stored.data.dtype).float())


@pytest.mark.parametrize("shape", [(64, 33), (64, 5, 3, 3)])
@pytest.mark.parametrize(("storage", "worst"), [("int8", 1 / 254), ("int8_dynamic", 1 / 254), ("float8", 2**-4)])
def test_8_bits_are_within_half_a_step_of_each_row(storage: str, worst: float, shape: tuple[int, ...]) -> None:
    """int8: half of a 127th of the row's largest; e4m3: 3 bits after the leading one, so 2^-4 of the number itself."""
    weight = random(*shape)
    weight[3] = 0.0
    stored = StoredWeight.from_tensor(weight.clone(), storage)
    assert stored.data.itemsize == 1
    made = stored.tensor(torch.float32, CPU)
    largest = weight.flatten(1).abs().amax(1).view(-1, *(1 for _ in shape[1:]))
    off = (made - weight).abs()
    allowed = worst * (largest if storage.startswith("int8") else weight.abs() + 2**-6 / 448 * largest)
    assert (off <= allowed * (1 + 1e-5)).all()
    assert (made[3] == 0.0).all()
    at = made.flatten(1).abs().amax(1)
    assert torch.allclose(at, largest.flatten(), rtol=1e-6)  # the largest of each row is kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    """A scale rounded to 8 bits itself would move a whole row."""
    stored = StoredWeight.from_tensor(random(64, 33), "int8")
    exact = stored.tensor(torch.float32, CPU)
    assert torch.equal(stored.tensor(dtype, CPU), exact.to(dtype))


def test_rows_of_a_table_are_made_alone() -> None:
    weight = random(50, 8)
    ids = torch.tensor([[0, 49, 7], [7, 7, 1]])
    for storage in (None, "float16", "int8", "float8"):
        stored = StoredWeight.from_tensor(weight.clone(), storage)
        whole = F.embedding(ids, stored.tensor(torch.float32, CPU))
        assert torch.equal(stored.rows(ids, torch.float32, CPU), whole)


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("shape", [(3, 12), (2, 4, 12), (12,)])
def test_int8_dynamic_rounds_tokens_too(
    shape: tuple[int, ...], integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the sum over integers, in float64; and near to the product without any rounding. The same whether the
    processor multiplies integers or not.
    """
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: integers)
    torch.manual_seed(0)
    layer, weight, x = nn.Linear(12, 7), torch.randn(7, 12), torch.randn(shape)
    layer.weight.data = weight.clone()
    exact = layer(x)
    offload_weight(layer, StoredWeight.from_tensor(weight.clone(), "int8_dynamic"), torch.float32, CPU)
    row = weight.abs().amax(1, keepdim=True).double() / 127
    token = x.abs().amax(-1, keepdim=True).double() / 127
    expected = (x.double() / token).round() @ (weight.double() / row).round().T * token * row.T + layer.bias.double()
    assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert 0 < (layer(x) - exact).abs().max() < 0.05 * exact.abs().max()


def test_moving_and_converting_a_network() -> None:
    network = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 3))
    weight = random(7, 12)
    offload_weight(network[0], StoredWeight.from_tensor(weight.clone(), "float16"), torch.bfloat16, CPU)
    twin = copy.deepcopy(network).float()
    assert twin[0].weight.dtype == torch.float32 == twin[0].bias.dtype
    assert network[0].weight.dtype == torch.bfloat16
    assert twin[0].weight_source is network[0].weight_source, "what is kept is kept once"
    assert torch.equal(twin[0].weight, weight.half().float())


def test_only_large_weights_are_offloaded() -> None:
    assert can_offload(nn.Linear(256, 256), torch.empty(256, 256))
    assert not can_offload(nn.Linear(256, 255), torch.empty(255, 256))
    assert not can_offload(nn.LayerNorm(70_000), torch.empty(70_000))


def test_onload_loads_once_and_offloads_at_its_end() -> None:
    log: list[str] = []
    network = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 3))
    for layer, name in zip(network, "ab", strict=True):
        offload_weight(layer, OffloadedWeight(Counted(layer.weight.detach(), log, name)), torch.float32, CPU)
    x = torch.randn(4, 12)
    away = network(x)
    assert log == ["a", "b"], "outside onload it works, and reads each time"
    log.clear()
    with onload(network):
        assert log == ["a", "b"]
        with onload(network):  # another thread's
            assert torch.equal(network(x), away)
        assert torch.equal(network(x), away)
        assert log == ["a", "b"]
    log.clear()
    assert torch.equal(network(x), away)
    assert log == ["a", "b"]


def test_one_onload_may_end_while_another_begins() -> None:
    """As that of a run left behind, which the garbage collector finds in the middle of it: in the same thread."""
    log: list[str] = []
    layer = nn.Linear(12, 7)
    weight = layer.weight.detach().clone()
    offload_weight(layer, OffloadedWeight(Counted(weight, log, "a")), torch.float32, CPU)
    away, make = layer.weight_source.source, layer.weight_source.source.tensor  # type: ignore[union-attr, attr-defined]

    def interrupted(*arguments: object) -> Tensor:
        away.tensor = make  # type: ignore[assignment, method-assign]
        with onload(layer):
            pass
        return make(*arguments)  # type: ignore[no-any-return, arg-type]

    away.tensor = interrupted  # type: ignore[assignment, method-assign]
    found: list[bool] = []

    def work() -> None:
        with onload(layer):
            found.append(layer.weight_source._onloaded is not None and torch.equal(layer.weight, weight))  # type: ignore

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert found == [True]
    assert layer.weight_source._onloaded is None and layer.weight_source._users == 0  # type: ignore[union-attr, attr-defined]


def test_an_onload_that_fails_leaves_nothing_on_the_device() -> None:
    log: list[str] = []
    network = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 3))
    for layer, name in zip(network, "ab", strict=True):
        offload_weight(layer, OffloadedWeight(Counted(layer.weight.detach(), log, name)), torch.float32, CPU)
    with pytest.raises(KeyError), onload(network):
        raise KeyError("in the middle")
    network[1].weight_source.source.tensor = _broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="gone"), onload(network):
        pass
    assert all(layer.weight_source._onloaded is None and layer.weight_source._users == 0 for layer in network)


def _broken(*_: object) -> Tensor:
    raise OSError("gone")


@pytest.mark.parametrize("storage", ["int8", "float8", "float16", None])
def test_an_onloaded_weight_has_the_format_of_its_storage(storage: str | None) -> None:
    weight = random(7, 12)
    layer = nn.Linear(12, 7)
    offload_weight(layer, OffloadedWeight(Counted(weight, [], "w"), storage), torch.bfloat16, CPU)
    with onload(layer):
        kept = layer.weight_source._onloaded
        assert kept.data.dtype == StoredWeight.from_tensor(weight.bfloat16(), storage).data.dtype
        assert torch.equal(layer.weight, StoredWeight.from_tensor(weight.clone(), storage).tensor(torch.bfloat16, CPU))


def test_the_next_weight_is_prefetched_in_the_order_of_last_time() -> None:
    log: list[str] = []
    prefetcher = Prefetcher()
    network = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 3), nn.Linear(3, 5))
    for layer, name in zip(network, "abc", strict=True):
        offload_weight(layer, StreamedWeight(Counted(layer.weight.detach(), log, name), prefetcher), torch.float32, CPU)
    x = torch.randn(4, 12)
    expected = network(x)
    assert log == ["a", "b", "c"]
    log.clear()
    assert torch.equal(network(x), expected)
    assert log == ["a", "prefetch b", "b", "prefetch c", "c", "prefetch a"]


def test_threads_that_share_a_streamed_network() -> None:
    prefetcher = Prefetcher()
    network = nn.Sequential(*(nn.Linear(16, 16) for _ in range(20)))
    for layer in network:
        offload_weight(
            layer, StreamedWeight(StoredWeight(layer.weight.detach().clone()), prefetcher), torch.float32, CPU
        )
    inputs = torch.randn(4, 2, 16)
    expected = [network(x) for x in inputs]
    equal: list[bool] = []

    def work(k: int) -> None:
        equal.extend(torch.equal(network(inputs[k]), expected[k]) for _ in range(20))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 80


@pytest.mark.parametrize("shape", [(3, 5), (4, 6, 3, 3), (7,), (1024, 1100), (128, 600, 3, 3)])
def test_an_allocated_weight_is_a_tensor_like_any_other(shape: tuple[int, ...]) -> None:
    made = allocate_weight(torch.Size(shape), torch.float32)
    assert made.shape == shape
    assert made.is_contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)
    values = torch.randn(shape)
    assert torch.equal(made.copy_(values), values)
    if math.prod(shape) * 4 >= offload.HUGE_PAGE_BYTES:
        assert made.untyped_storage().nbytes() == math.prod(shape) * 4


class Way:
    """Stands for CUDA's streams and events: writes down in which order what waits for what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, ...]] = []
        names = iter(["arrived 0", "left 0", "arrived 1", "left 1"])
        way = self

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_event(self, event: Event) -> None:
                way.log.append((self.name, "waits for", event.name))

            def wait_stream(self, _: Stream) -> None:
                pass

            def synchronize(self) -> None:
                pass

        class Event:
            def __init__(self) -> None:
                self.name = next(names)

            def record(self, stream: Stream) -> None:
                way.log.append((stream.name, "reaches", self.name))

        monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("side"))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("layers"))
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())


def test_copies_wait_for_layers_and_layers_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of events by which no buffer is written to before what is in it was taken, nor taken before it is
    there; after the first time through, each weight is on its way before its layer asks.
    """
    way = Way(monkeypatch)
    prefetcher = CudaPrefetcher(CPU)
    network = nn.Sequential(*(nn.Linear(size, size + 1) for size in (3, 4, 5, 6, 7)))
    for layer in network:
        stored = StoredWeight.from_tensor(layer.weight.detach().clone(), "int8")
        offload_weight(layer, StreamedWeight(stored.pin(CPU), prefetcher), torch.float32, CPU)
    resident = nn.Sequential(*(copy.copy(layer) for layer in network))
    for layer, streamed in zip(resident, network, strict=True):
        offload_weight(layer, streamed.weight_source.source, torch.float32, CPU)
    x = torch.randn(2, 3)
    expected = resident(x)
    for _ in range(4):
        assert torch.equal(network(x), expected)
    sent = [event for event in way.log if event[0] == "side" and event[1] == "reaches"]
    assert len(sent) == 4 * 5 + 1, "each weight once each time, and the next first one"
    waits = {"side": "left", "layers": "arrived"}
    for before, after in pairwise(way.log):
        if after[1] == "reaches":
            slot = after[2][-1]
            assert before == (after[0], "waits for", f"{waits[after[0]]} {slot}")
    last = [event for event in way.log if event[1] == "reaches"][-12:]
    assert [event[0] for event in last] == ["layers", "side"] * 6
    assert all(a[2][-1] != b[2][-1] for a, b in pairwise(last[::2])), "the two buffers in turn"
    assert all(a[2][-1] != b[2][-1] for a, b in zip(last[::2], last[1::2], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", [None, "int8", "float8", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_streamed_to_a_gpu(storage: str | None, dtype: torch.dtype) -> None:
    """The same as with the same weights there, though copies overtake layers; and hardly more than two are there."""
    cuda = torch.device("cuda")
    torch.manual_seed(0)
    weights = [torch.randn(1024, 1024) / 32 for _ in range(40)]
    resident, streamed = nn.Sequential(), nn.Sequential()
    way = CudaPrefetcher(cuda)
    for weight in weights:
        kept = StoredWeight.from_tensor(weight.to(dtype) if storage is None else weight.clone(), storage)
        for network, held_as in ((resident, kept.to(cuda)), (streamed, StreamedWeight(kept.pin(cuda), way))):
            layer = nn.Linear(1024, 1024, bias=False)
            offload_weight(layer, held_as, dtype, cuda)
            network.append(layer)
    x = torch.randn(64, 1024, device=cuda, dtype=dtype)
    expected = resident(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        assert torch.equal(streamed(x), expected)
    assert torch.cuda.max_memory_allocated() - before < 8 * weights[0].numel() * 4
