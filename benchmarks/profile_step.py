"""Say which operators take the CPU time: `python benchmarks/profile_step.py MODEL [--size 512] [--dtype float32]`.

It generates a picture in one thread and prints the CPU seconds of the operators of the second guided step and of the
second decoding, by kind. With MEZZOTINT_KERNELS=off in the environment, all operators are torch's.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mezzotint
from mezzotint.kernels import attention, convolution, linear
from mezzotint.memory import system

CONVOLUTIONS = "3x3 convolutions, stride 1"
LINEAR = "linear layers, 1x1 convolutions, GELU"
KERNELS = {  # the functions that call the kernels, and what they compute
    (convolution, "convolve"): CONVOLUTIONS,
    (linear, "multiply"): LINEAR,
    (linear, "geglu"): LINEAR,
    (attention, "attend"): "attention",
}
REST = "norms, SiLU, additions, copies"


def main() -> None:
    """Generate a picture, and print the CPU seconds of each kind of operator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    system.keep_freed()  # as the commands do
    pipe = mezzotint.load(options.model, device="cpu", dtype=options.dtype)
    request = mezzotint.Request(
        prompt="a lemon on a blue background", seed=7, steps=2, sampler="euler", width=options.size, height=options.size
    )
    steps = pipe.stream(request)
    latents = next(steps).x
    pipe.decode(latents)
    print_profile("guided step", lambda: next(steps))
    print_profile("VAE decode", lambda: pipe.decode(latents))


def print_profile(title: str, work: Callable[[], Any]) -> None:
    """Print the CPU seconds of the operators of some work, and of the work as a whole."""
    profile = Profile()
    began = time.thread_time()
    with profile:
        work()
    whole = time.thread_time() - began
    print(f"| {title} | CPU s | share | calls |\n|---|---|---|---|")
    for kind, seconds in sorted(profile.seconds.items()):
        print(f"| {kind} | {seconds:.2f} | {seconds / whole:.0%} | {profile.calls[kind]} |")
    print(f"| all operators | {sum(profile.seconds.values()):.2f} | | {sum(profile.calls.values())} |")
    print(f"| the thread's whole time | {whole:.2f} | | |\n")


class Profile(TorchDispatchMode):
    """While entered, adds up the CPU time of torch's operators and of the kernels, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._in_kernel = False  # whose own operators, such as the allocation of the result, are part of it

    def __enter__(self) -> Any:
        self._plain = {(module, name): getattr(module, name) for module, name in KERNELS}
        for (module, name), kind in KERNELS.items():
            setattr(module, name, self._timed(self._plain[module, name], kind))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for (module, name), function in self._plain.items():
            setattr(module, name, function)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # otherwise the first operator imports torch's compiler, which takes 2 s
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._in_kernel:
            return func(*args, **(kwargs or {}))
        return self._time(kind_of(func, args), func, *args, **(kwargs or {}))

    def _timed(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._in_kernel = True
            try:
                return self._time(kind, function, *args, **kwargs)
            finally:
                self._in_kernel = False

        return call

    def _time(self, kind: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        result = function(*args, **kwargs)
        self.seconds[kind] += time.thread_time() - began
        self.calls[kind] += 1
        return result


def kind_of(func: Any, args: Any) -> str:
    """Return what one of torch's operators computes."""
    name = func.overloadpacket.__name__
    if "conv" in name:
        weight, stride = args[1], args[3] if len(args) > 3 else (1, 1)
        if weight.shape[-1] == 1:
            return LINEAR
        return CONVOLUTIONS if weight.shape[-1] == 3 and set(stride) == {1} else "other convolutions"
    if "attention" in name:
        return "attention"
    return LINEAR if name in ("linear", "addmm", "mm", "bmm", "baddbmm", "gelu") else REST


if __name__ == "__main__":
    main()
