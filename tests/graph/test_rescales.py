"""Batch norms and layer scales: what writes what they read, and what reads what they make."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.graph import Neighbour, Rescale, trace
from tests.normed import build


def only(module: nn.Module, *shape: int) -> Rescale:
    """The one rescale of a module that takes one tensor."""
    (found,) = trace(module.eval(), {"input": torch.randn(*shape)}).rescales
    return found


class Between(nn.Module):
    """A convolution, `between`, and a batch norm, whose output meets `after`."""

    def __init__(self, between=lambda x: x, after=lambda x, read: x, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4) if norm is None else norm
        self.between, self.after = between, after

    def forward(self, input: Tensor) -> Tensor:
        read = self.between(self.conv(input))
        return self.after(self.norm(read), read)


def test_every_batch_norm_of_a_resnet_follows_its_convolution():
    found = build("resnet").graph.rescales
    assert len(found) == 25
    assert all(one.writer == Neighbour(one.path.replace("normalization", "convolution")) for one in found)


def test_a_batch_norm_before_a_convolution():
    module = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.ReLU())
    reason = "it reads relu of `0`"
    assert only(module, 2, 4, 5, 5) == Rescale("1", (1, 4, 1, 1), None, (Neighbour("2"),), reason)


@pytest.mark.parametrize(
    ("reader", "zeros"),
    [
        (nn.Conv2d(4, 6, 3), False),
        (nn.Conv2d(4, 6, 3, padding=1), True),
        (nn.Conv2d(4, 6, 3, padding="same"), True),
        (nn.Conv2d(4, 6, 3, padding="valid"), False),
        (nn.Conv2d(4, 6, 1, padding="same"), False),
        (nn.ConvTranspose2d(4, 6, 1), False),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), True),
        (nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3)), True),
    ],
    ids=["no padding", "padding", "same", "valid", "one tap", "transposed", "gaps", "a padding before"],
)
def test_zeros_that_a_reader_sees(reader, zeros):
    module = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), reader)
    path = "2.1" if isinstance(reader, nn.Sequential) else "2"
    assert only(module, 2, 4, 6, 6).readers == (Neighbour(path, zeros),)


@pytest.mark.parametrize(
    ("between", "writer", "why"),
    [
        (nn.Identity(), Neighbour("conv"), ""),
        (nn.ZeroPad2d(1), Neighbour("conv", zeros=True), ""),
        (lambda x: x.transpose(2, 3).mean(2, keepdim=True), Neighbour("conv"), ""),
        (lambda x: x.roll(1, 2), Neighbour("conv"), ""),
        (lambda x: x.transpose(1, 2), None, "its features are not those of `conv`"),
        (lambda x: x.flip(1), None, "its features are not those of `conv`"),
        (lambda x: x.relu(), None, "it reads relu"),
        (lambda x: x + x.sigmoid(), None, "it reads add"),
    ],
    ids=["nothing", "padding", "a mean", "a roll", "other features", "reversed", "activation", "a sum"],
)
def test_what_may_stand_between(between, writer, why):
    found = only(Between(between), 2, 3, 4, 4)
    assert (found.writer, found.no_writer) == (writer, why)


def test_what_else_reads_is_told():
    found = only(Between(after=lambda x, read: x + read), 2, 3, 5, 5)
    assert (found.no_writer, found.no_readers) == ("add reads its input too", "add reads it")
    assert only(Between(), 2, 3, 5, 5).no_readers == "the output of the model reads it"
    written = Between(between=lambda x: x.mul_(2), after=lambda x, read: x)
    assert only(written, 2, 3, 5, 5).no_writer == "it reads mul"


def test_statistics_of_each_batch():
    found = only(Between(norm=nn.BatchNorm2d(4, track_running_stats=False)), 2, 3, 5, 5)
    assert (found.path, found.writer) == ("norm", None)
    assert found.no_writer == "it takes its statistics from each batch"


def test_modules_that_run_twice():
    class Twice(nn.Module):
        def __init__(self, norms: int, convs: int) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(norms))
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(convs))

        def forward(self, input: Tensor) -> Tensor:
            first = self.norms[0](self.convs[0](input)).relu()
            return self.norms[-1](self.convs[-1](first)).relu()

    assert only(Twice(1, 2), 2, 3, 4, 4).no_writer == "it runs 2 times"
    shared = trace(Twice(2, 1).eval(), {"input": torch.randn(2, 3, 4, 4)}).rescales
    assert {one.no_writer for one in shared} == {"`convs.0` runs 2 times"}


def test_a_weight_that_is_used_elsewhere():
    class Reused(Between):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.conv.weight.sum()

    assert only(Reused(), 2, 3, 4, 4).no_writer == "the weight of `conv` is used elsewhere too"


def test_a_module_that_does_more():
    class WithActivation(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    found = only(Between(norm=WithActivation(4)), 2, 3, 4, 4)
    assert (found.path, found.no_writer) == ("norm", "its module does more than this")


class Frozen(nn.Module):
    """A batch norm written out, from buffers."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean", "variance"):
            self.register_buffer(name, torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (one.view(1, -1, 1, 1) for one in self.buffers())
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def test_a_frozen_norm_that_is_written_out():
    found = only(Between(norm=Frozen()), 2, 3, 5, 5)
    assert (found.path, found.writer, found.probe) == ("norm", Neighbour("conv"), (1, 4, 1, 1))


class Block(nn.Module):
    """A residual branch with a vector of its own."""

    def __init__(self, scale: Tensor, form=lambda scale: scale) -> None:
        super().__init__()
        self.map, self.drop = nn.Linear(6, 6), nn.Dropout(0.1)
        self.gamma, self.form = nn.Parameter(scale), form

    def forward(self, input: Tensor) -> Tensor:
        return input + self.drop(self.form(self.gamma) * self.map(input))


def test_a_layer_scale_inside_a_block():
    found = only(Block(torch.rand(6)), 2, 5, 6)
    assert (found.path, found.parameter, found.name) == ("", "gamma", "gamma")
    assert found.writer == Neighbour("map")
    assert only(Block(torch.rand(1, 1, 6)), 2, 5, 6).writer == Neighbour("map")


def test_vectors_that_stay():
    class Reused(Block):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.gamma

    assert only(Reused(torch.rand(6)), 2, 5, 6).no_writer == "`gamma` is used elsewhere too"
    sized = Block(torch.rand(6), lambda scale: scale.view(1, 6))
    assert only(sized, 2, 5, 6).no_writer == "`gamma` is reshaped to its full size"


def test_a_vector_that_is_no_layer_scale():
    class Gate(Block):
        def forward(self, input: Tensor) -> Tensor:
            return self.gamma * input.relu()

    assert trace(Gate(torch.rand(6)), {"input": torch.randn(2, 5, 6)}).rescales == ()


def test_a_weight_of_a_norm_is_no_layer_scale():
    assert build("llama").graph.rescales == ()
    assert build("gemma3").graph.rescales == ()


def test_a_linear_map_over_flattened_tokens():
    found = {one.path: one for one in build("levit").graph.rescales}
    path = "levit.encoder.stages.0.layers.0.module.queries_keys_values"
    assert found[f"{path}.batch_norm"].writer == Neighbour(f"{path}.linear")
    last = found["classifier.batch_norm"]
    assert last.no_writer == "batch_norm of `classifier_distill.batch_norm` reads its input too"
    assert last.readers == (Neighbour("classifier.linear"),)


def test_norms_in_a_row_name_each_other():
    module = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.ReLU())
    first, second = trace(module.eval(), {"input": torch.randn(2, 4, 5, 5)}).rescales
    assert (first.writer, first.readers) == (None, (Neighbour("2"),))
    assert (second.writer, second.readers) == (Neighbour("1"), (Neighbour("3"),))
