"""Linear maps as sparse codes in small dictionaries, which train together, and are stored and exported packed."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from pydantic import ValidationError
from torch import nn

import compress
import export
from benchmarks.digits import Digits, read_digits
from compress.checkpoint import load, save
from compress.compare import forward
from compress.errors import DataError, Unsuitable
from compress.inspection import inspect
from compress.layers.coded import CodedLinear, PackedCodes, unpacked_copy
from compress.layers.quantized import QuantizedLinear
from compress.model import Model
from compress.passes.base import Context
from compress.passes.coding import Form, budget, forms, start, two_sided
from compress.passes.distill import Distill
from compress.passes.factorize import Factorize
from compress.passes.factorize_sparse import FactorizeSparse
from compress.passes.metric import Metric
from compress.passes.plain_maps import plain_maps
from compress.passes.quantize import Quantize
from compress.passes.smooth import Smooth
from compress.passes.taught import EVERYTHING
from compress.pipeline import Outcome, run, state_bytes
from compress.scope import Scope
from compress.testing import check_pass
from export.graph import export_graph
from export.runners import OnnxRunner
from tests.numerics.test_sparse_coding import planted
from tests.zoo import fresh

QUICK: dict[str, Any] = {
    "steps": 16,
    "keep": 0.6,
    "shares": "uniform",
    "loss": "hidden",
    "learning_rate": 2e-4,
}


def taught(model: Model) -> Context:
    """Batches that differ from the example, with the model as its own teacher."""
    torch.manual_seed(0)
    shape = model.example["input_ids"].shape
    batches = [{**model.example, "input_ids": torch.randint(3, 60, shape)} for _ in range(4)]
    return Context(training=batches, calibration=batches, teacher=model)


def coded_layers(module: nn.Module) -> dict[str, CodedLinear]:
    return {path: part for path, part in module.named_modules() if isinstance(part, CodedLinear)}


def unweighted(weight: torch.Tensor) -> Metric:
    return two_sided(Metric(None, None), weight)


@pytest.fixture(scope="module")
def made() -> tuple[Model, Outcome]:
    """A small BERT, and what the pass makes of it."""
    model = fresh("bert")
    return model, run(model, [FactorizeSparse(**QUICK)], taught(model))


def test_it_keeps_the_contract_of_passes():
    outcome = check_pass(FactorizeSparse(**QUICK), fresh("llama"), taught(fresh("llama")))
    assert outcome.steps[0].changes[-1].what == "trained on hidden, codes straight through"


def test_each_map_takes_its_share_of_bytes_and_no_more(made):
    model, outcome = made
    for path, layer in coded_layers(outcome.model.module).items():
        dense = model.module.get_submodule(path)
        bias = dense.bias.nbytes
        stored = sum(one.nbytes for one in layer.state_dict().values()) - bias
        assert 0.5 * dense.weight.nbytes < stored <= 0.6 * dense.weight.nbytes
        assert isinstance(layer.codes, PackedCodes)
        assert ((layer.codes.matrix() != 0).sum(1) <= layer.codes.values.shape[1]).all()
        assert layer.weight.shape == dense.weight.shape
    before, after = outcome.steps[0].bytes_before, outcome.steps[0].bytes_after
    assert (before, after) == (state_bytes(model.module), state_bytes(outcome.model.module))
    assert after < 0.7 * before


def test_one_budget_is_spent_where_it_counts():
    """Of two maps the one whose outputs count more keeps more, and both together keep their share."""
    torch.manual_seed(0)
    weights = {"light": torch.randn(64, 48), "heavy": 10 * torch.randn(64, 48)}
    kept = budget(weights, lambda path: unweighted(weights[path]), False, 0.5)
    assert kept["light"] < 0.3 < 0.7 < kept["heavy"]
    assert sum(kept.values()) <= 2 * 0.5
    assert all(forms(weights[path], one) for path, one in kept.items() if one < 1)


def test_a_budget_is_kept():
    model = fresh("bert")
    outcome = run(model, [FactorizeSparse(**QUICK | {"shares": "budget"})], taught(model))
    layers = coded_layers(outcome.model.module)
    dense = {path: one for path, one in linears(model).items() if path in layers}
    stored = sum(one.nbytes for layer in layers.values() for one in layer.state_dict().values())
    stored -= sum(layer.bias.nbytes for layer in layers.values())
    total = sum(one.nbytes for one in linears(model).values())
    assert stored + total - sum(one.nbytes for one in dense.values()) <= 0.6 * total


def linears(model: Model) -> dict[str, torch.Tensor]:
    weights, _ = plain_maps(model, EVERYTHING, False)
    return {one.path: model.module.get_submodule(one.path).weight for one in weights}


def test_bytes_and_macs_are_counted_as_they_are_stored_and_run(made):
    model, outcome = made
    tree = inspect(outcome.model)
    assert tree.bytes == sum(
        one.nbytes for one in (*outcome.model.module.parameters(), *outcome.model.module.buffers())
    )
    told = {change.target: change.after for change in outcome.steps[0].changes}
    for path, layer in coded_layers(outcome.model.module).items():
        rows, atoms = layer.codes.matrix().shape
        side = min(layer.weight.shape)
        macs, dense = outcome.model.graph.macs[path], model.graph.macs[path]
        assert macs * rows * side == dense * (atoms * (rows + side) if layer.apart else rows * side)
        assert f"{100 * macs / dense:.0f} % of the multiply-accumulates" in told[path]
    assert outcome.model.graph.macs[""] < model.graph.macs[""]


def test_a_product_of_codes_and_dictionary_costs_nothing_at_each_call():
    model = fresh("llama")
    settings = FactorizeSparse(**QUICK | {"keep": 0.95}, atoms=1.0, scope=Scope(include=("*.up_proj",)))
    outcome = run(model, [settings], taught(model))
    assert not any(layer.apart for layer in coded_layers(outcome.model.module).values())
    assert outcome.model.graph.macs[""] == model.graph.macs[""]


def test_a_checkpoint_holds_the_packed_form(made, tmp_path):
    model, outcome = made
    save(outcome.model, tmp_path / "model")
    back = load(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 1.1 * state_bytes(outcome.model.module)
    for name, value in forward(outcome.model.module, model.example).items():
        assert torch.equal(forward(back.module, model.example)[name], value)


def test_the_form_that_trains_and_the_packed_one_agree_in_float64():
    from compress.passes.coding import coded, settle

    model = fresh("llama")
    paths = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    module = model.module.double()
    weights = {path: module.get_submodule(path).weight.detach() for path in paths}
    starts = {path: start(one, forms(one, 0.6)[-1], unweighted(one), 0) for path, one in weights.items()}
    layers = coded(module, starts)
    wanted = forward(module, model.example)["logits"]
    settle(module, layers.values())
    assert len(coded_layers(module)) == 3
    torch.testing.assert_close(forward(module, model.example)["logits"], wanted, rtol=1e-9, atol=1e-9)


def exported(model: Model, folder: Path) -> tuple[onnx.ModelProto, int]:
    """The graph, and the bytes of all files of it."""
    export.Onnx(runtime="cpu").write(model, folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if "onnx" in file.name)
    return onnx.load(folder / "model.onnx"), size


def ops(graph: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph.node)


def test_an_onnx_file_holds_the_packed_form_and_a_session_unpacks_it_once(made, tmp_path):
    model, outcome = made
    graph, _ = exported(outcome.model, tmp_path / "packed")
    layers = coded_layers(outcome.model.module)
    assert ops(graph)["BitwiseAnd"] == ops(graph)["CumSum"] == len(layers)
    held = sum(len(one.raw_data) for one in graph.graph.initializer)
    assert held <= 1.02 * state_bytes(outcome.model.module)
    found = OnnxRunner(tmp_path / "packed", threads=1)(**model.example).last_hidden_state
    wanted = forward(outcome.model.module, model.example)["last_hidden_state"]
    torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=1e-4, atol=1e-4)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        tmp_path / "packed" / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    opened = ops(onnx.load(tmp_path / "opened.onnx", load_external_data=False))
    assert not {"BitwiseAnd", "CumSum"} & set(opened)
    assert opened["MatMul"] + opened["Gemm"] + opened["FusedGemm"] <= sum(
        2 if one.apart else 1 for one in layers.values()
    )


def test_the_file_is_smaller(tmp_path):
    """Of a model with weights to speak of: the operators that unpack take some 3 kB a map."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=512
    )
    example = {"input_ids": torch.randint(3, 60, (2, 7))}
    model = Model(BertModel(config).eval(), example, "feature-extraction")
    outcome = run(model, [FactorizeSparse(steps=4, keep=0.5, loss="hidden")], taught(model))
    _, before = exported(model, tmp_path / "dense")
    _, after = exported(outcome.model, tmp_path / "packed")
    assert after < 0.7 * before


def test_half_precision_is_stored_and_exported_as_such(made, tmp_path):
    model, outcome = made
    half = replace(outcome.model, module=copy.deepcopy(outcome.model.module).half())
    # Without the proof, whose bound is that of float32.
    export_graph(half, opset=23, scheme="asymmetric").save_pretrained(tmp_path)
    graph = onnx.load(tmp_path / "model.onnx")
    assert sum(len(one.raw_data) for one in graph.graph.initializer) <= 1.05 * state_bytes(half.module)
    found = OnnxRunner(tmp_path, threads=1)(**model.example).last_hidden_state
    wanted = forward(outcome.model.module, model.example)["last_hidden_state"]
    torch.testing.assert_close(torch.as_tensor(found).float(), wanted, rtol=0.02, atol=0.02)


def test_what_cannot_unpack_gets_plain_maps(made):
    model, outcome = made
    plain = unpacked_copy(outcome.model.module)
    assert not coded_layers(plain)
    assert coded_layers(outcome.model.module)
    wanted = forward(outcome.model.module, model.example)["last_hidden_state"]
    torch.testing.assert_close(forward(plain, model.example)["last_hidden_state"], wanted)
    assert unpacked_copy(model.module) is model.module


def test_other_passes_take_the_dictionaries_and_leave_the_codes(made):
    model, outcome = made
    context = replace(taught(model), teacher=outcome.model)
    for passes in ([Quantize()], [Factorize(keep=0.9, multiple=1)], [Distill(steps=8)]):
        after = run(outcome.model, passes, replace(context, teacher=model))
        forward(after.model.module, model.example)
        if passes[0].use in ("quantize", "factorize"):
            skipped = {skip.target: skip.why for skip in after.steps[-1].skips}
            assert "sparse codes" in skipped["encoder.layer.0.intermediate.dense.codes"]
    quantized = run(outcome.model, [Quantize()], context).model
    dictionaries = [layer.dictionary for layer in coded_layers(quantized.module).values() if layer.apart]
    assert dictionaries
    assert all(isinstance(one, QuantizedLinear) for one in dictionaries)
    for name, value in forward(unpacked_copy(quantized.module), model.example).items():
        torch.testing.assert_close(value, forward(quantized.module, model.example)[name])


def test_smooth_scales_dictionaries_that_read_a_norm():
    model = fresh("llama")
    sparse = run(model, [FactorizeSparse(**QUICK)], taught(model)).model
    outcome = run(sparse, [Smooth()], taught(model))
    wanted = forward(sparse.module, model.example)["logits"]
    torch.testing.assert_close(
        forward(outcome.model.module, model.example)["logits"], wanted, rtol=1e-4, atol=1e-4
    )


def test_a_quantized_dictionary_exports(made, tmp_path):
    model, outcome = made
    quantized = run(outcome.model, [Quantize()], taught(model)).model
    exported(quantized, tmp_path / "onnx")
    found = OnnxRunner(tmp_path / "onnx", threads=1)(**model.example).last_hidden_state
    wanted = forward(outcome.model.module, model.example)["last_hidden_state"]
    assert torch.nn.functional.cosine_similarity(torch.as_tensor(found), wanted, dim=-1).min() > 0.98


def test_it_finds_a_union_of_subspaces_where_low_rank_does_not():
    """At equal bytes, by what the pass itself begins with."""
    weight = planted().float()
    form = Form(24, 4, 4 * (24 * 32 + 256 * 4) + 256 * 3)
    made = start(weight, form, unweighted(weight), 0)
    rank = form.bytes // (4 * (256 + 32))
    squares = torch.linalg.svdvals(weight).square()
    assert made.lost < 0.5 * float(squares[rank:].sum() / squares.sum())
    error = (weight - made.codes @ made.atoms).square().sum() / weight.square().sum()
    assert float(error) == pytest.approx(made.lost, rel=0.05)


def test_the_start_follows_the_metric():
    """Outputs and inputs that count more are met better, on whichever side the dictionary is."""
    torch.manual_seed(0)
    weight, heavy = torch.randn(64, 16), torch.ones(16)
    heavy[:4] = 100.0
    metric = Metric(heavy.sqrt().double().diag(), None)
    for turned in (False, True):
        one = weight.T if turned else weight
        form = forms(one, 0.5, 0.5)[0]
        plain = start(one, form, unweighted(one), 0)
        aware = start(one, form, two_sided(Metric(*reversed(metric)) if turned else metric, one), 0)
        errors = [(weight - made.codes @ made.atoms).square().sum(0)[:4].sum() for made in (plain, aware)]
        assert errors[1] < 0.2 * errors[0]


def test_forms_never_take_more_than_their_share():
    for shape in [(1536, 384), (384, 1536), (384, 384), (20, 48), (9, 5)]:
        weight = torch.empty(shape)
        for form in forms(weight, 0.5):
            assert form.bytes <= 0.5 * weight.nbytes
            assert 1 <= form.count <= form.atoms <= min(shape)
    assert [form.atoms for form in forms(torch.empty(384, 384), 0.5)] == [64, 96, 128, 160]
    assert forms(torch.empty(2, 2), 0.3) == []


@pytest.fixture(scope="module")
def digits() -> Digits:
    return read_digits()


def test_it_reads_digits_at_two_fifths_of_the_bytes(digits):
    """Trained in seconds, by the classes and the teacher, against low rank of as many bytes that trains as long."""
    training = [{**one, "labels": digits.model.module(**one).logits.argmax(-1)} for one in digits.batches]
    settings: dict[str, Any] = {"steps": 120, "learning_rate": 1e-3, "task": 0.5}
    sparse = compress.apply(digits.model, [FactorizeSparse(keep=0.25, **settings)], training=training).model
    thin = compress.apply(
        digits.model,
        [Factorize(keep=0.25, multiple=4), Distill(**settings)],
        calibration=digits.batches[:8],
        training=training,
    ).model
    assert state_bytes(sparse.module) <= 1.02 * state_bytes(thin.module)
    assert digits.accuracy(sparse) > digits.accuracy(digits.model) - 0.02
    assert digits.accuracy(sparse) > digits.accuracy(thin) - 0.02


def test_places_freeze_in_the_last_steps(monkeypatch):
    from compress.passes import coding

    seen = []
    monkeypatch.setattr(coding, "freeze", lambda layers: seen.append(len(list(layers))))
    model = fresh("bert")
    run(model, [FactorizeSparse(**QUICK | {"steps": 10, "freeze": 0.3})], taught(model))
    assert seen == 3 * [len(seen) and seen[0]]


def test_training_that_makes_it_worse_is_taken_back():
    model = fresh("bert")
    worse, untouched = (
        run(model, [FactorizeSparse(**QUICK | {"learning_rate": rate})], taught(model))
        for rate in (0.1, 1e-30)
    )
    assert [one.what for one in worse.steps[0].changes].count("sparsely factorized") == len(
        worse.steps[0].changes
    )
    assert "did not lower the loss" in worse.steps[0].skips[-1].why
    found, wanted = (one.model.module.state_dict() for one in (worse, untouched))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_it_declines_what_it_cannot_serve():
    model = fresh("bert")
    with pytest.raises(DataError, match="needs training data"):
        run(model, [FactorizeSparse()], Context())
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        FactorizeSparse(steps=0)
    quantized = run(model, [Quantize()], taught(model)).model
    with pytest.raises(Unsuitable, match="quantized already"):
        run(quantized, [FactorizeSparse()], taught(model))
    with pytest.raises(compress.ModelpressError, match="found nothing to do"):
        run(model, [FactorizeSparse(**QUICK | {"keep": 0.01})], taught(model))
    with pytest.raises(Unsuitable, match="`keep: 0.01` cannot be reached: the smallest ranks cost more"):
        run(model, [FactorizeSparse(**QUICK | {"keep": 0.01, "shares": "budget"})], taught(model))
    outcome = run(model, [FactorizeSparse(**QUICK | {"keep": 0.01}, allow_empty=True)], taught(model))
    why = {skip.target: skip.why for skip in outcome.steps[0].skips}["pooler.dense"]
    assert why == "stays dense: no codes and dictionary for 40x40 are smaller and worth their share"
