"""The table of a causal language model: a short run of it gives true figures."""

import gzip
import math
from pathlib import Path

import pytest
import torch

from benchmarks import decoding, language
from compress.errors import UsageError
from compress.recipe import shipped_recipes
from tests import tiny


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number, name in enumerate((language.TRAINING, *language.TEXTS.values())):
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write("\n".join(tiny.sentences(400 + number)))
    return tmp_path


def saved(folder: Path) -> Path:
    model = tiny.llama(max_position_embeddings=512, num_hidden_layers=3)
    model.processor.model_max_length = 512
    model.module.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


def test_the_rows_name_shipped_recipes() -> None:
    named = {settings["recipe"] for settings in language.PASSES.values() if "recipe" in settings}
    assert named == {"causal-lm-fewer-layers", "causal-lm-low-rank"}
    assert named < set(shipped_recipes())


def test_a_short_run_of_two_rows(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = {"passes": [{"use": "drop_layers", "remove": 1, "protect": 0}]}
    monkeypatch.setattr(language, "PASSES", {"float32": {"passes": []}, "dropped": dropped})
    monkeypatch.setattr(language, "SHAPES", (language.Shape(1, 4, 0), language.Shape(2, 1, 7)))
    monkeypatch.setattr(language, "VERSIONS", ("torch",))
    monkeypatch.setattr(decoding, "WINDOW", 32)
    model = saved(tmp_path / "model")
    table = language.run(data, model, tmp_path / "cache", rounds=1, calls=1, threads=1)
    whole, dropped = table.rows
    assert table.shapes == ("1 x 4", "2 x 1 after 7")
    assert whole.speedup["2 x 1 after 7"].median == 1
    assert whole.bytes > dropped.bytes
    body = {"hidden": 32, "wide": 64, "words": tiny.BODY["vocab_size"]}
    block = 4 * body["hidden"] ** 2 + 3 * body["hidden"] * body["wide"]
    saved_macs = 1e6 * (whole.figures[language.MACS] - dropped.figures[language.MACS])
    assert saved_macs == pytest.approx(block + 2 * 512 * body["hidden"], rel=0.01)
    assert whole.figures["lm_dev: added"] == 0
    assert whole.figures["lm_dev: log-perplexity"] == pytest.approx(math.log(body["words"]), rel=0.05)
    assert 0 < abs(dropped.figures["wikitext2: added"]) < 0.1
    assert (whole.figures[language.MINUTES], dropped.figures[language.MINUTES] > 0) == (0, True)


def test_log_perplexity_is_that_of_the_model(tmp_path: Path) -> None:
    import export

    model = tiny.llama()
    export.Onnx(runtime="cpu").write(model, tmp_path)
    tokens = torch.randint(5, tiny.BODY["vocab_size"], (5, 16))
    expected = model.module(input_ids=tokens, labels=tokens).loss.item()
    assert decoding.log_perplexity(tmp_path, tokens, threads=1) == pytest.approx(expected, rel=1e-5)


def test_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a language model"):
        language.run(tmp_path, None, tmp_path, rounds=1, calls=1, threads=1)
