"""Every installed pass keeps the contract, on every kind of model that it serves."""

import pytest

from compress.passes.base import Context, Pass
from compress.recipe import available, find
from compress.testing import check_pass
from tests.zoo import build

CASES = {
    "factorize": ["bert", "gpt2", "llama", "vit", "t5"],
    "smooth": ["llama", "gpt2", "vit", "qwen3"],
    "quantize": ["bert", "gpt2", "llama", "vit", "resnet", "t5", "whisper"],
}


def test_every_installed_pass_has_a_case():
    assert set(CASES) == set(available("compress.passes"))


@pytest.mark.parametrize(
    ("name", "model"), [(name, model) for name, models in CASES.items() for model in models]
)
def test_the_contract(name, model):
    settings = find("compress.passes", name)()
    assert isinstance(settings, Pass)
    source = build(model)
    # Without calibration data a pass that needs it must decline in its own words.
    unsuitable = source if settings.needs == "calibration" else None
    outcome = check_pass(settings, source, Context(calibration=[source.example]), unsuitable)
    assert outcome.steps[0].changes
