"""`python -m benchmarks.norm_free`: a vision transformer without layer norms, by `progressive_batch_norm`.

`train` teaches the model in the folder `--model` on the training pictures in `--data`, flipped and shifted, and writes
the checkpoint `--made`, with weights in float16. With `--keep-norms` the model as it is gets the same training, to
compare with. It needs torch and transformers alone, so that it runs where there is a GPU and nothing else;
`accelerate launch --multi_gpu -m benchmarks.norm_free train ...` shares each step between GPUs.

`measure` exports the checkpoint and the model it came from with `export.Onnx(runtime="cpu")`, both also with
`quantize`, and the model it came from as the exporter of transformers writes it. It prints for each what the graph
holds, top-1 on the test pictures by ONNX Runtime, and speed, timed in alternating rounds, one process each, as a
Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

TRAINING, TEST = "cifar10_train_jpeg.npz", "cifar10_test_jpeg.npz"
MADE = Path(__file__).parent / "checkpoints" / "norm_free"


def main() -> int:
    arguments = _parse()
    if arguments.verb == "train":
        from benchmarks.norm_free_train import train

        train(arguments)
    else:
        from benchmarks.norm_free_measure import measure

        print(measure(arguments))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.norm_free", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    train, measure = (verbs.add_parser(name) for name in ("train", "measure"))
    for one in (train, measure):
        one.add_argument("--data", type=Path, required=True, help=f"folder with {TRAINING} and {TEST}")
        one.add_argument("--model", type=Path, required=True, help="folder of the vision transformer")
    train.add_argument("--made", type=Path, required=True, help="folder of the checkpoint to write")
    measure.add_argument("--made", type=Path, default=MADE, help="folder of a checkpoint; ours by default")
    train.add_argument("--steps", type=int, default=2000)
    train.add_argument("--batch", type=int, default=512, help="pictures a step, of each process")
    train.add_argument("--task", type=float, default=0.5, help="what the classes count beside the teacher")
    train.add_argument("--learning-rate", type=float, default=5e-4)
    train.add_argument("--keep-norms", action="store_true", help="train the model as it is, to compare with")
    train.add_argument("--precision", choices=("float32", "bfloat16", "auto"), default="auto")
    train.add_argument("--device", default="cpu")
    measure.add_argument("--rounds", type=int, default=5, help="alternating rounds over all variants")
    measure.add_argument("--calls", type=int, default=10, help="timed calls a process")
    measure.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
