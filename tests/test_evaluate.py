"""Scores: known values of each metric, one code for modules and for artifacts, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cosine_similarity, cross_entropy, one_hot

from compress.errors import DataError, Unproved
from compress.evaluate import Evaluation, Score, drop, evaluate, mean_pooled, rank_correlation
from tests import tiny


def correlation(first, second):
    return rank_correlation(torch.tensor(first), torch.tensor(second))


def test_rank_correlation_has_known_values():
    assert correlation([1.0, 2.0, 3.0], [10.0, 20.0, 300.0]) == pytest.approx(1)
    assert correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    # The worked example of Wikipedia's article on the coefficient: IQ against hours of television.
    intelligence = [106.0, 100.0, 86.0, 101.0, 99.0, 103.0, 97.0, 113.0, 112.0, 110.0]
    hours = [7.0, 27.0, 2.0, 50.0, 28.0, 29.0, 20.0, 12.0, 6.0, 17.0]
    assert correlation(intelligence, hours) == pytest.approx(-29 / 165)


def test_ties_get_the_mean_of_their_ranks():
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5 of 4.5 and 5.
    assert correlation([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_pooling_leaves_padding_out():
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    assert mean_pooled(states, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]
    assert mean_pooled(states, torch.tensor([[0, 0, 0]])).tolist() == [[0.0, 0.0]]


@pytest.fixture(scope="module")
def bert():
    return tiny.bert()


@pytest.fixture
def pairs(tmp_path):
    texts = tiny.sentences(40)
    rows = [(number % 6 / 2, texts[number], texts[number + 20]) for number in range(20)]
    path = tmp_path / "sts.tsv"
    path.write_text("score\tone\ttwo\n" + "".join(f"{score}\t{one}\t{two}\n" for score, one, two in rows))
    return path, rows


def test_spearman_is_that_of_single_sentences(bert, pairs):
    path, rows = pairs
    evaluation = Evaluation(tsv=path, columns=("one", "two"), label="score", metric="spearman", batch_size=7)
    score = evaluate(bert.module, evaluation, bert)

    def embedded(text):
        with torch.no_grad():
            return bert.module(**bert.processor(text, return_tensors="pt")).last_hidden_state.mean(1)

    cosines = [float(cosine_similarity(embedded(one), embedded(two))) for _, one, two in rows]
    assert score.metric == "spearman"
    assert score.samples == 20
    assert score.value == pytest.approx(100 * correlation(cosines, [row[0] for row in rows]), abs=1e-4)


def test_an_artifact_is_scored_by_the_same_code(bert, pairs):
    evaluation = Evaluation(tsv=pairs[0], columns=("one", "two"), label="score", metric="spearman")

    def artifact(**inputs):
        return {"last_hidden_state": bert.module(**inputs).last_hidden_state.numpy()}

    assert evaluate(artifact, evaluation, bert) == evaluate(bert.module, evaluation, bert)


def test_accuracy_of_texts_by_number_and_by_name(tmp_path):
    model = tiny.bert_classifier({0: "bad", 1: "good"})
    texts = tiny.sentences(10)

    def says_good_of_long_texts(input_ids, attention_mask, **rest):
        return SimpleNamespace(logits=one_hot((attention_mask.sum(1) > 8).long(), 2).float())

    labels = [len(text.split()) + 2 > 8 for text in texts]
    labels[0] = not labels[0]
    for name in (lambda label: str(int(label)), lambda label: ["bad", "good"][label]):
        path = tmp_path / "sst.tsv"
        path.write_text(
            "s\tl\n" + "".join(f"{t}\t{name(label)}\n" for t, label in zip(texts, labels, strict=True))
        )
        evaluation = Evaluation(tsv=path, column="s", label="l", metric="accuracy", batch_size=3)
        assert evaluate(says_good_of_long_texts, evaluation, model) == Score(
            "accuracy", pytest.approx(90), 10
        )
    path.write_text("s\tl\na cat\tfine\n")
    with pytest.raises(DataError) as caught:
        evaluate(model.module, Evaluation(tsv=path, column="s", label="l", metric="accuracy"), model)
    assert caught.value.fact == "The classes fine are not the model's: bad, good."


def test_accuracy_of_pictures_in_folders(tmp_path):
    model = tiny.vit()
    folder = tiny.pictures(tmp_path / "p", ("ant", "bee", "cat"), each=4)
    evaluation = Evaluation(images=folder, metric="accuracy", batch_size=5)

    def always_bee(pixel_values):
        return {"logits": torch.tensor([[0.0, 1.0, 0.0]]).expand(len(pixel_values), 3)}

    assert evaluate(always_bee, evaluation, model).value == pytest.approx(100 / 3)
    assert evaluate(always_bee, evaluation.model_copy(update={"samples": 6}), model).samples == 6


def test_perplexity_is_that_of_each_window(tmp_path):
    model = tiny.llama()
    path = tmp_path / "text.txt"
    path.write_text("\n".join(tiny.sentences(30)))
    score = evaluate(
        model.module, Evaluation(text=path, metric="perplexity", max_length=16, batch_size=4), model
    )
    tokens = torch.tensor(model.processor(path.read_text())["input_ids"])
    windows = tokens[: len(tokens) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        logits = model.module(input_ids=windows).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert score.value == pytest.approx(float(loss.exp()), rel=1e-4)
    assert score.samples == len(windows)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tmp_path):
    model = tiny.llama()
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat")

    def uniform(input_ids, attention_mask):
        return {"logits": torch.zeros(*input_ids.shape, 77)}

    assert evaluate(uniform, Evaluation(text=path, metric="perplexity"), model).value == pytest.approx(77)


def test_drop_is_positive_where_the_model_got_worse():
    assert drop("accuracy", 90.0, 89.5) == pytest.approx(0.5)
    assert drop("spearman", 86.0, 86.5) == pytest.approx(-0.5)
    assert drop("perplexity", 10.0, 10.5) == pytest.approx(5)


def test_what_is_refused(bert, pairs, tmp_path):
    evaluation = Evaluation(tsv=pairs[0], columns=("one", "two"), label="score", metric="spearman")
    with pytest.raises(DataError) as caught:
        evaluate(lambda **inputs: {"logits": torch.zeros(1)}, evaluation, bert)
    assert caught.value.fact == "The metric reads the output `last_hidden_state`, and the model gives logits."
    with pytest.raises(DataError, match=r"The column `one` of .* holds something that is no number"):
        evaluate(bert.module, evaluation.model_copy(update={"label": "one"}), bert)
    for states, message in (
        (math.nan, r"The output `last_hidden_state` has \d+ NaN"),
        (0.0, "The spearman of 20 samples is not a number: all scores or labels are equal"),
    ):
        with pytest.raises(Unproved, match=message):
            evaluate(
                lambda input_ids, value=states, **rest: {
                    "last_hidden_state": torch.full((*input_ids.shape, 4), value)
                },
                evaluation,
                bert,
            )
    for wrong, message in (
        ({"text": "a", "metric": "accuracy"}, "`accuracy` needs a table"),
        ({"tsv": "a", "column": "b", "metric": "accuracy"}, "`accuracy` needs `label`"),
        ({"tsv": "a", "column": "b", "metric": "perplexity"}, "`perplexity` needs `text`"),
    ):
        with pytest.raises(ValidationError, match=message):
            Evaluation.model_validate(wrong)
