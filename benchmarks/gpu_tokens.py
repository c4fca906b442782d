"""`python -m benchmarks.gpu_tokens`: token reduction in torch on a GPU, at the shape of DeiT-S, in float16.

Random weights, pictures of 224 x 224, batch 256, scaled-dot-product attention everywhere. Variants take turns; a time
is the median of a variant's rounds. Two ways to run: one captured CUDA graph, where no time is Python's, and
`torch.compile`, where small operations are fused as well. Writes JSON with all rounds.

`sizes unseen` has no term for the sizes of tokens in its attention, which is faster so (`proportional: false`).
`tome, published` is Token Merging as its paper says (sorted similarities, scatter_reduce), put at the same places with
the same counts of tokens and the same attention as ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compress
from benchmarks.cuda import captured, lines, rounds_of
from compress.layers.attention import use_attention
from compress.layers.tokens import TokenFlow, TokenReducer


class PublishedFlow(TokenFlow):
    """Token Merging by the operations of its paper: argmax, argsort, gather and scatter_reduce."""

    def reduce(self, hidden: Tensor, left: int, number: int) -> Tensor:
        del number
        assert self.keys is not None
        protected, goes = self.layout.protected, hidden.shape[1] - left
        size = hidden.new_ones(hidden.shape[:2])[..., None] if self.size is None else self.size[..., None]
        metric = torch.nn.functional.normalize(self.keys.mean(1), dim=-1)
        scores = metric[:, protected::2] @ metric[:, protected + 1 :: 2].transpose(1, 2)
        best, nearest = scores.max(-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        moved, kept = order[:, :goes], order[:, goes:]
        target = nearest[..., None].gather(1, moved)

        def merged(x: Tensor) -> Tensor:
            width = x.shape[-1]
            first, second = x[:, protected::2], x[:, protected + 1 :: 2]
            stays = first.gather(1, kept.expand(-1, -1, width))
            goes = first.gather(1, moved.expand(-1, -1, width))
            second = second.scatter_reduce(1, target.expand(-1, -1, width), goes, reduce="sum")
            return torch.cat([x[:, :protected], stays, second], 1)

        new = merged(size)
        self.size = new[..., 0]
        self.bias = self._bias(self.size, hidden.dtype)
        return merged(hidden * size) / new


def published(module: nn.Module) -> nn.Module:
    """`module`, reduced by the method `tome`, with the paper's operations in the reducers."""
    flow = next(part.flow for part in module.modules() if isinstance(part, TokenReducer))
    other = PublishedFlow(flow.how, flow.layout)
    for part in module.modules():
        if isinstance(part, TokenReducer):
            part.flow = other
        if hasattr(part, "token_flow"):
            part.token_flow = other
    return module


def variants(keep: float, at: tuple[int, ...], multiple: int) -> dict[str, nn.Module]:
    """The module of each variant, on the GPU in float16."""
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    torch.manual_seed(0)
    config = DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, image_size=224)
    module = DeiTForImageClassificationWithTeacher(config).eval()
    example = {"pixel_values": torch.randn(2, 3, 224, 224)}
    model = compress.Model(module, example, "image-classification")

    def reduced(**settings: Any) -> nn.Module:
        found = compress.apply(model, [compress.MergeTokens(**settings)])
        print(*(f"{one.target}: {one.after}" for one in found.steps[-1].changes), sep="\n")
        return found.model.module

    left = tuple(_left(compress.apply(model, [compress.MergeTokens(keep=keep, at=at, multiple=multiple)])))
    use_attention(module)
    found = {
        "uncompressed": module,
        "transform": reduced(left=left),
        "transform, sizes unseen": reduced(left=left, proportional=False),
        "tome": reduced(left=left, method="tome"),
        "tome, published": published(reduced(left=left, method="tome")),
    }
    return {name: one.half().cuda() for name, one in found.items()}


def _left(outcome: Any) -> list[int]:
    return outcome.steps[-1].record["left"]


def whole(module: nn.Module, pixels: Tensor) -> Callable[[], object]:
    """A call of `module` as one CUDA graph."""
    return captured(partial(module, pixel_values=pixels))


def compiled(module: nn.Module, pixels: Tensor) -> Callable[[], object]:
    """A call of `module`, compiled, as one CUDA graph."""
    return whole(torch.compile(module, dynamic=False), pixels)


WAYS = {"graph": whole, "compile": compiled}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tokens", description=__doc__)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--at", type=int, nargs="+", default=[1, 4, 7])
    parser.add_argument("--multiple", type=int, default=8)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("build/bench/gpu_tokens.json"))
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True  # else the patches' convolution, which all have, is a slow one
    pixels = torch.randn(arguments.batch, 3, 224, 224, device="cuda", dtype=torch.float16)
    modules = variants(arguments.keep, tuple(arguments.at), arguments.multiple)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    with torch.no_grad():
        for way in arguments.ways:
            calls = {name: WAYS[way](module, pixels) for name, module in modules.items()}
            found[way] = rounds_of(calls, arguments.rounds)
            print(f"\n{found['device']}, {way}: milliseconds, times as fast", *lines(found[way]), sep="\n")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
