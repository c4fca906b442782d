"""The public names are exactly these, sorted, and importing them loads no heavy package."""

import subprocess
import sys
from pathlib import Path

import compress
import export


def test_all_is_sorted_and_true():
    for package in (compress, export):
        assert list(package.__all__) == sorted(package.__all__)
        assert all(hasattr(package, name) for name in package.__all__)


def test_import_is_light():
    heavy = {"torch", "transformers", "onnx", "onnxruntime", "onnxscript", "tensorrt_rtx", "numpy"}
    script = f"import sys, compress, export; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_keyed_by_architecture():
    """No table of model classes, types or layer names: structure is discovered."""
    words = (
        "BertModel",
        "LlamaModel",
        "GPT2Model",
        "model_type",
        "q_proj",
        "query_key_value",
        "self_attn",
        "c_attn",
    )
    for package in (compress, export):
        for file in Path(str(package.__file__)).parent.rglob("*.py"):
            code = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
            found = [word for word in words if any(f'"{word}' in line for line in code)]
            assert not found, f"{file} names {found}"
