"""The VAE layer by layer, each layer in strips of rows: the same pixels and latents from less memory.

Run whole, the largest layer keeps its input, the normalized input and its output in memory. In strips, the mean and
variance of a group norm are computed in a first pass over the layer's input. Norm, SiLU and convolution then compute
one strip of rows at a time, from these rows and their neighbours, and a residual is added in place. Memory holds a
layer's input, its output and a few strips. The result is exact up to the order of float sums, about 1e-6 of the range
in float32.

The pictures of a batch are processed one by one, without gradients. `seamless` applies as in the whole VAE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.models.attention import attention
from mezzotint.models.convolution import conv2d, joined, pad
from mezzotint.models.vae import VAE, Downsample, MidBlock, Posterior, ResnetBlock, SpatialAttention, Upsample

STRIP = (
    2**21
)  # elements of a strip where it is widest: 8 MiB in float32, little compared with a layer of a large picture
T = TypeVar("T")
Moments = Callable[[nn.GroupNorm, Tensor], tuple[Tensor, Tensor]]  # norm, its input -> mean, variance (groups,)
Part = Callable[[Tensor], Tensor]  # rows -> rows, elementwise


@torch.no_grad()
def decode_in_strips(vae: VAE, z: Tensor, strip: int = STRIP) -> Tensor:
    """Decode z (B, 4, h, w) to pixels (B, 3, 8h, 8w) as `vae.decode` does, in strips of about `strip` elements."""
    return torch.cat([decode_one(Strips(strip), vae, one) for one in torch.split(z, 1)])


@torch.no_grad()
def encode_in_strips(vae: VAE, pixels: Tensor, strip: int = STRIP) -> Posterior:
    """Encode pixels (B, 3, H, W) in [-1, 1] as `vae.encode` does."""
    return Posterior.from_moments(torch.cat([encode_one(Strips(strip), vae, one) for one in torch.split(pixels, 1)]))


def decode_one(strips: Strips, vae: VAE, z: Tensor) -> Tensor:
    """Decode one picture's latents (1, 4, h, w)."""
    decoder = vae.decoder
    x = strips.convolve(decoder.conv_in, vae.post_quant_conv(z))
    for layer in decoder.layers():
        x = strips.layer(layer, x)
    return strips.convolve(decoder.conv_out, x, strips.activation(decoder.conv_norm_out, x))


def encode_one(strips: Strips, vae: VAE, pixels: Tensor) -> Tensor:
    """Encode one picture (1, 3, H, W) to the moments of its posterior (1, 8, h, w)."""
    encoder = vae.encoder
    x = strips.convolve(encoder.conv_in, pixels)
    for layer in encoder.layers():
        x = strips.layer(layer, x)
    moments = strips.convolve(encoder.conv_out, x, strips.activation(encoder.conv_norm_out, x))
    return vae.quant_conv(moments)  # type: ignore[no-any-return]


def strip_rows(channels: int, width: int, strip: int = STRIP) -> int:
    """Return the rows in a strip of a layer, given the larger of its input and output channels; at least 2."""
    return max(strip // (channels * width) & ~1, 2)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class Strips:
    """Computes layers strip by strip. A method owns its input x, (1, C, h, w), and may overwrite it with its result.

    Attributes:
        strip: The approximate number of elements of a strip.
        moments: Computes the mean and variance of group norms; None computes them over all rows of the input.
    """

    strip: int = STRIP
    moments: Moments | None = None

    def each(self, pieces: Sequence[T]) -> Sequence[T]:
        """Return the strips or tiles to compute: all of them. The memory planner overrides this to compute a few."""
        return pieces

    def measure(self, norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each of the norm's groups over all rows of x (1, C, h, w), at least in float32.

        The moments of strips and channels are combined by Chan et al. 1983, eq. 2.1, which avoids cancellation.
        """
        each = x.shape[1] // norm.num_groups
        parts = self.each(torch.split(x, strip_rows(x.shape[1], x.shape[3], self.strip), dim=2))
        means, variances = [], []
        for rows in parts:
            values = rows.permute(0, 2, 3, 1).flatten(0, 2).to(_exact(x))  # (pixels, C)
            means.append(values.mean(0))
            variances.append((values - means[-1]).square_().mean(0))
        shares = torch.tensor([rows.shape[2] / x.shape[2] / each for rows in parts], dtype=_exact(x), device=x.device)
        m, v = (torch.stack(made).view(len(parts), -1, each) for made in (means, variances))  # (strips, groups, each)
        mean = torch.einsum("s,sgc->g", shares, m)
        return mean, torch.einsum("s,sgc->g", shares, v + (m - mean[:, None]).square())

    def activation(self, norm: nn.GroupNorm, x: Tensor, act: bool = True) -> Part:
        """Return a function of rows of x: their group norm, and SiLU if `act`."""
        mean, variance = (self.moments or self.measure)(norm, x)
        inverse = (variance + norm.eps).rsqrt()
        each = x.shape[1] // norm.num_groups
        scale = norm.weight * inverse.repeat_interleave(each)
        shift = norm.bias - mean.repeat_interleave(each) * scale

        def activate(rows: Tensor) -> Tensor:
            normed = torch.addcmul(shift[:, None, None], rows, scale[:, None, None]).to(x.dtype)
            return F.silu(normed, inplace=True) if act else normed

        return activate

    def layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Compute one of the layers between conv_in and conv_norm_out."""
        match layer:
            case ResnetBlock():
                return self.resnet(layer, x)
            case SpatialAttention():
                return self.attention(layer, x)
            case MidBlock():
                for part in (layer.resnets[0], *layer.attentions, layer.resnets[1]):
                    x = self.layer(part, x)
                return x
            case Upsample():
                return self.convolve(layer.conv, x, scale=2)
            case Downsample():
                return self.convolve(layer.conv, x)
        raise TypeError(f"{type(layer).__name__} is not a layer of the VAE")

    def convolve(self, conv: nn.Conv2d, x: Tensor, prepare: Part | None = None, scale: int = 1) -> Tensor:
        """Convolve x, prepared by `prepare` and upsampled by repeating each pixel `scale` times."""
        size = (1, conv.out_channels, *(scale * side // conv.stride[0] for side in x.shape[2:]))
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for rows, part in self._parts(conv, x, prepare, scale):
            out[:, :, rows] = part
        return out

    def resnet(self, block: ResnetBlock, x: Tensor) -> Tensor:
        """Run a residual block and write its result over x, or over the first convolution's output."""
        h = self.convolve(block.conv1, x, self.activation(block.norm1, x))
        parts = self._parts(block.conv2, h, self.activation(block.norm2, h))
        if isinstance(block.conv_shortcut, nn.Identity):
            for rows, part in parts:
                x[:, :, rows] += part
            return x
        for rows, part in parts:
            h[:, :, rows] = part.add_(block.conv_shortcut(x[:, :, rows]))
        return h

    def attention(self, layer: SpatialAttention, x: Tensor) -> Tensor:
        """Add self-attention to x strip by strip, with the keys and values of all positions in memory."""
        _, channels, height, width = x.shape
        norm = self.activation(layer.group_norm, x, act=False)
        step = strip_rows(channels, width, self.strip)
        strips = [slice(first, min(first + step, height)) for first in range(0, height, step)]
        k, v = x.new_empty(2, 1, 1, height * width, channels)
        for rows in self.each(strips):
            h, places = _positions(norm(x[:, :, rows])), slice(rows.start * width, rows.stop * width)
            k[:, :, places], v[:, :, places] = layer.to_k(h), layer.to_v(h)
        for rows in self.each(strips):
            h = layer.to_out[0](attention(layer.to_q(_positions(norm(x[:, :, rows]))), k, v))
            x[:, :, rows] += h.unflatten(2, (-1, width)).squeeze(1).permute(0, 3, 1, 2)
        return x

    def _parts(
        self, conv: nn.Conv2d, x: Tensor, prepare: Part | None, scale: int = 1
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the convolution's output strip by strip from the top, each with its rows.

        The input of the next strip is read before a strip is yielded, so that the caller may overwrite x.
        """
        weight, bias = conv.weight, conv.bias  # read once: an offloaded layer loads them at each access
        stride, kernel, before = conv.stride[0], conv.kernel_size[0], int(conv.padding[0])
        after = before or stride - 1  # Downsample pads one cell on the right and below
        height = scale * x.shape[2] // stride
        step = strip_rows(max(x.shape[1], conv.out_channels), scale * x.shape[3], self.strip)
        edges = (x[:, :, -1:].clone(), x[:, :, :1].clone()) if "y" in joined.get() else None
        inside = before == after and "x" not in joined.get()

        def read(first: int) -> Tensor:
            last = min(first + step, height) - 1
            h = _rows(x, first * stride - before, last * stride + kernel - before, prepare, scale, edges)
            return h if inside else pad(h, (before, after, 0, 0))

        h = read(0)
        for first in self.each(range(0, height, step)):
            part = conv2d(h, weight, bias, conv.stride, (0, before if inside else 0))
            if first + step < height:
                h = read(first + step)
            yield slice(first, min(first + step, height)), part


def _positions(x: Tensor) -> Tensor:
    """Reshape (1, C, h, w) to (1, 1, h*w, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)


def _rows(
    x: Tensor, first: int, last: int, prepare: Part | None, scale: int, edges: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Return rows first to last of x, prepared and upsampled; outside of x they are zeros, or `edges` if given."""
    top, bottom = first // scale, -(-last // scale)
    above, below = max(-top, 0), max(bottom - x.shape[2], 0)
    h = x[:, :, top + above : bottom - below]
    if edges and (above or below):
        h = torch.cat([*edges[:1] * above, h, *edges[1:] * below], dim=2)
    if prepare:
        h = prepare(h)
    if not edges and (above or below):
        h = F.pad(h, (0, 0, above, below))
    if scale > 1:
        h = F.interpolate(h, scale_factor=float(scale), mode="nearest").narrow(2, first - top * scale, last - first)
    return h
