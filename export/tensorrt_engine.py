"""Parse an ONNX file and build an engine from it: one path for both editions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import Unproved, Unsuitable, UsageError
from compress.target import TensorSpec
from export.tensorrt_edition import Edition, import_edition, offered_capabilities
from export.tensorrt_network import allow_decomposition

Shapes = Mapping[str, tuple[int, int, int]]
"""Smallest, usual and largest size of each dynamic dimension, by its name."""

Profile = Mapping[str, tuple[tuple[int, ...], ...]]
"""Smallest, usual and largest shape of each input that has a dynamic dimension."""


@dataclass(frozen=True)
class Parsed:
    """A network as TensorRT's parser understood it. Everything that it needs to stay alive is held here."""

    trt: Any
    network: Any
    builder: Any
    parser: Any
    log: Any


def parse(edition: Edition, onnx: Path) -> Parsed:
    """Parse an ONNX file into a strongly typed network.

    Raises `Unsuitable` with every error of the parser, and the ONNX node that each is about.
    """
    trt = import_edition(edition)
    log = new_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        lines = [
            f"{error.node_operator()} at {error.node_name() or error.node()}: {error.desc()}"
            for error in errors
        ]
        raise Unsuitable(
            f"TensorRT {trt.__version__} cannot read the exported graph: {'; '.join(lines)}.",
            "Leave out the part of the model that these nodes come from, or use the onnx target.",
        )
    allow_decomposition(trt, network)
    return Parsed(trt, network, builder, parser, log)


def new_log(trt: Any) -> Any:
    """A TensorRT logger that prints nothing and collects the texts of `errors` and `warnings`."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.strip())
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message.strip())

    return Log()


def dynamic_dimensions(inputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
    """The names of the dynamic dimensions, in the order in which the inputs show them."""
    return tuple(dict.fromkeys(size for spec in inputs for size in spec.shape if isinstance(size, str)))


def require_shapes(shapes: Shapes, dimensions: tuple[str, ...]) -> None:
    """Raise `UsageError` unless `shapes` names exactly `dimensions`."""
    unknown = [name for name in shapes if name not in dimensions]
    missing = [name for name in dimensions if name not in shapes]
    if unknown or missing:
        facts = [f"`{name}` is no dynamic dimension of this model" for name in unknown]
        facts += [f"the dynamic dimension `{name}` has no sizes" for name in missing]
        fact = "; ".join(facts)
        wanted = ", ".join(f"{name}: [min, opt, max]" for name in dimensions)
        raise UsageError(
            f"The shapes do not fit: {fact}.",
            f"Give shapes: {{{wanted}}}."
            if dimensions
            else "Leave shapes out: every dimension of this model is fixed.",
        )


def profile_of(inputs: tuple[TensorSpec, ...], shapes: Shapes) -> Profile:
    """The shapes of each input that has a dynamic dimension."""
    return {
        spec.name: tuple(
            tuple(size if isinstance(size, int) else shapes[size][at] for size in spec.shape)
            for at in range(3)
        )
        for spec in inputs
        if any(isinstance(size, str) for size in spec.shape)
    }


def build(parsed: Parsed, profile: Profile, capabilities: tuple[str, ...]) -> Any:
    """Build the engine, and give its bytes as a buffer.

    One engine serves all of `capabilities` (TensorRT-RTX finishes it on the GPU that loads it); without any,
    it is built for the GPU of this machine. Raises `Unproved` with what the builder logged if it builds none.
    """
    config = parsed.builder.create_builder_config()
    if profile:
        config.add_optimization_profile(_new_profile(parsed.builder, profile))
    if capabilities:
        offered = offered_capabilities(parsed.trt)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(offered[capability], index)
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        reasons = "; ".join(parsed.log.errors) or "it gave no reason"
        raise Unproved(
            f"TensorRT {parsed.trt.__version__} built no engine: {reasons}.",
            "Make the largest shapes smaller, export with another precision, or use the onnx target.",
        )
    return plan


def _new_profile(builder: Any, shapes: Profile) -> Any:
    profile = builder.create_optimization_profile()
    for name, sizes in shapes.items():
        profile.set_shape(name, *sizes)
    return profile
