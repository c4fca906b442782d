"""The answers that the graph gives: values that name modules by their paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Runs = tuple[tuple[int, int], ...]
"""Half-open runs (start, stop) of output features, in order."""


@dataclass(frozen=True)
class Projection:
    """A linear map inside the model: the module at `path`, and which of its output features.

    `rows` is one run over all features for a plain projection, a part of them for a fused one (GPT-2's third, Phi-3's
    unequal part), and one run a head where heads are interleaved (GPT-NeoX).
    """

    path: str
    rows: Runs

    @property
    def features(self) -> int:
        """Number of output features."""
        return sum(stop - start for start, stop in self.rows)


@dataclass(frozen=True)
class Attention:
    """One attention. `path` is the deepest module that contains the whole of it.

    `output` is None where no linear map reads the heads' mixture directly. `key` and `value` are None where they are
    not linear maps of the module (an additive attention, a convolution in between). `cross` is True where the keys
    come from another sequence than the queries. `causal` is read from the op or from its mask.
    """

    path: str
    query: Projection | None
    key: Projection | None
    value: Projection | None
    output: Projection | None
    heads: int
    kv_heads: int
    head_size: int
    causal: bool
    cross: bool
    positions: Literal["none", "rotary", "relative"]
    """How positions enter inside the attention; learned absolute positions enter at the embeddings."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Of rotary positions, the features of a head that are rotated together, as numbers among its rows of `query` and
    of `key`. Maps of a head's features that act on each pair as a complex number commute with the rotation."""
    bend: str = ""
    """Why the scores are no bilinear function, up to the rotation, of what `query` and `key` make; "" if they are."""


@dataclass(frozen=True)
class Mlp:
    """A feed-forward part: `down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))` when gated.

    `activation` is named by what it computes: gelu, gelu_tanh, quick_gelu, relu, silu, sigmoid, ... `up` and `gate`
    may be parts of one fused module. `depthwise` names convolutions between `up` and `down` that map each hidden
    feature alone (as in SegFormer): whatever removes a hidden feature must remove it there too.
    """

    path: str
    up: Projection
    gate: Projection | None
    down: Projection
    activation: str
    depthwise: tuple[str, ...] = ()


@dataclass(frozen=True)
class Norm:
    """A norm, and who reads its output.

    `readers` are the weighted modules (linear, conv) that read the normalized tensor directly, through nothing but
    reshaping, transposing, slicing, padding, rolling, casting and dropout. `residual` is True where anything else
    reads it too (an addition, a pooling, the model's output), so that a scale cannot be moved from the norm to its
    readers. Input feature i of a reader is feature i of the norm, at every run of the reader; a module that reads
    other tensors too is none, and counts as something else.
    """

    path: str
    kind: Literal["layer", "rms", "batch", "group"]
    readers: tuple[str, ...]
    residual: bool


@dataclass(frozen=True)
class Stack:
    """A run of structurally equal blocks, each reading the one before it; `path` is their container."""

    path: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Neighbour:
    """What lies beside a `Rescale` with nothing but moves and means over places in between.

    `path` is that of a weighted module (a linear map or a convolution, transposed ones too) that runs once, or the
    `name` of another rescale. With `zeros`, zeros that are no features stand beside them (padding): a shift cannot
    pass these.
    """

    path: str
    zeros: bool = False


@dataclass(frozen=True)
class Rescale:
    """A step that multiplies each feature by a constant and adds another: a fixed batch norm, or a layer scale.

    The module at `path` does it and nothing else; where that module does more, `parameter` is the vector of it that is
    multiplied by and not used elsewhere. `probe` is the shape of an input with one place, as (1, features, 1, 1).
    `writer` makes what the step reads, for it alone. `readers` read what it makes, feature by feature, and nothing else
    does. Where there is none of either, `no_writer` or `no_readers` say why.
    """

    path: str
    probe: tuple[int, ...]
    writer: Neighbour | None = None
    readers: tuple[Neighbour, ...] = ()
    no_writer: str = ""
    no_readers: str = ""
    parameter: str = ""

    @property
    def name(self) -> str:
        """What neighbours call it."""
        return f"{self.path}.{self.parameter}".strip(".")


@dataclass(frozen=True)
class ScoreScale:
    """A number by which one attention multiplies its scores or its queries, in an op of its own.

    The module at `path` multiplies by `factor`, or divides by its inverse; it holds that number as `attribute`, and
    uses it nowhere else. `query` is the map of the queries. Between it and the scores there is only what commutes with
    a factor, so that its rows can take the factor on; where they cannot, `query` is None, and `why` says why.
    """

    path: str
    attribute: str
    factor: float
    query: Projection | None
    why: str = ""


@dataclass(frozen=True)
class Tie:
    """Parameter names that share one tensor."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Weight:
    """A module with a weight that multiplies its input, and that does nothing else (a look-up may also scale), so that
    another module can stand in for it.

    `reads` identifies the tensor that it reads after looking through reshapes and casts: modules with the same `reads`
    read the same values and share one activation range. The tensors of a module that runs several times are joined by
    "|". `macs` are multiply-accumulates of all its runs for the example. `role` is "body", or "head" where its output
    is a model output (through nothing but cheap ops) over a vocabulary or classes, or "embedding" for a look-up.
    """

    path: str
    kind: Literal["linear", "conv", "embedding"]
    role: Literal["body", "head", "embedding"]
    reads: str
    macs: int


@dataclass(frozen=True)
class Graph:
    """All answers for one model, computed once from one trace."""

    weights: tuple[Weight, ...]
    stacks: tuple[Stack, ...]
    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    norms: tuple[Norm, ...]
    rescales: tuple[Rescale, ...]
    """In the order of execution."""
    score_scales: tuple[ScoreScale, ...]
    ties: tuple[Tie, ...]
    residual_writers: tuple[str, ...]
    """Weighted modules whose output is added to the residual stream."""
    macs: dict[str, int]
    """Multiply-accumulates of every module path for the example, children included; "" is the whole model."""

    def within(self, path: str) -> Graph:
        """The answers about what lies inside the module at `path`. Ties stay whole, and so do all paths."""

        def inside(one: str) -> bool:
            return one == path or one.startswith(f"{path}.")

        return Graph(
            weights=tuple(one for one in self.weights if inside(one.path)),
            stacks=tuple(one for one in self.stacks if inside(one.path)),
            attentions=tuple(one for one in self.attentions if inside(one.path)),
            mlps=tuple(one for one in self.mlps if inside(one.path)),
            norms=tuple(one for one in self.norms if inside(one.path)),
            rescales=tuple(one for one in self.rescales if inside(one.path)),
            score_scales=tuple(one for one in self.score_scales if inside(one.path)),
            ties=self.ties,
            residual_writers=tuple(one for one in self.residual_writers if inside(one)),
            macs={one: number for one, number in self.macs.items() if inside(one)},
        )

    def weight(self, path: str) -> Weight | None:
        """The weighted module at `path`, or None."""
        return next((weight for weight in self.weights if weight.path == path), None)

    def sharers(self, name: str) -> list[str]:
        """The other names of the parameter `name`."""
        return [other for tie in self.ties if name in tie.names for other in tie.names if other != name]
