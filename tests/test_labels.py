"""Labels of files: which class of the model each example has, and what is said where it has none."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from compress.data import Source, batches, without_labels
from compress.errors import DataError
from compress.labels import labelled_batches
from tests import tiny

CLASSES = {0: "bad", 1: "good", 2: "mixed"}


@pytest.fixture(scope="module")
def bert():
    return tiny.bert_classifier(CLASSES)


@pytest.fixture
def table(tmp_path):
    """Writes a table of 20 texts and their classes, by the names that the function given has for them."""

    def write(name) -> Path:
        path = tmp_path / "train.tsv"
        rows = [f"{text}\t{name(length(text) % 3)}\n" for text in tiny.sentences(20)]
        path.write_text("sentence\tlabel\n" + "".join(rows))
        return path

    return write


def length(text: str) -> int:
    return len(text.split())


def source(path: Path, **settings) -> Source:
    return Source(tsv=path, column="sentence", label="label", **settings)


def refused(source, model):
    with pytest.raises(DataError) as caught:
        labelled_batches(source, model)
    return caught.value


@pytest.mark.parametrize("name", [str, CLASSES.__getitem__])
def test_each_text_keeps_its_class(bert, table, name):
    asked = source(table(name), samples=15, batch_size=4)
    made = labelled_batches(asked, bert)
    assert (len(made), made.samples, made.asked) == (4, 15, 15)
    for batch, plain, again in zip(made, batches(asked, bert), made, strict=True):
        assert set(batch) == {*bert.example, "labels"}
        assert batch["labels"].dtype == torch.int64
        assert batch["labels"].tolist() == ((batch["attention_mask"].sum(1) - 2) % 3).tolist()
        assert all(torch.equal(without_labels(batch)[key], plain[key]) for key in plain)
        assert all(torch.equal(batch[key], again[key]) for key in batch)


def test_the_model_gives_its_loss_for_them(bert, table):
    batch = next(iter(labelled_batches(source(table(str)), bert)))
    outputs = bert.module(**batch)
    assert torch.equal(outputs.loss, cross_entropy(outputs.logits, batch["labels"]))


def test_names_of_the_config_go_before_numbers(table):
    """Stars from 1 on are classes from 0 on, where the config says so."""
    model = tiny.bert_classifier({0: "1", 1: "2", 2: "3"})
    (batch,) = labelled_batches(source(table(lambda number: number + 1), batch_size=20), model)
    assert batch["labels"].tolist() == ((batch["attention_mask"].sum(1) - 2) % 3).tolist()


@pytest.mark.parametrize("names", [("0", "1", "2"), ("LABEL_0", "LABEL_1", "LABEL_2"), ("ant", "bee", "cat")])
def test_pictures_have_the_class_of_their_folder(tmp_path, names):
    model = tiny.vit()
    folder = tiny.pictures(tmp_path / "p", names, each=3)
    asked = Source(images=folder, batch_size=3)
    made = list(labelled_batches(asked, model))
    # Nine pictures in three batches: each has one of every class.
    assert [batch["labels"].tolist() for batch in made] == [[0, 1, 2]] * 3
    plain = list(batches(asked, model))
    assert all(
        torch.equal(one["pixel_values"], two["pixel_values"]) for one, two in zip(made, plain, strict=True)
    )


def test_a_causal_model_learns_the_words_of_its_text(tmp_path):
    model = tiny.llama()
    path = tmp_path / "text.txt"
    path.write_text("\n".join(tiny.sentences(20)))
    for batch in labelled_batches(Source(text=path, max_length=16), model):
        assert torch.equal(batch["labels"], batch["input_ids"])
        outputs = model.module(**batch)
        wanted = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        torch.testing.assert_close(outputs.loss, wanted)


def test_padding_is_no_word_to_learn(table):
    model = tiny.llama()
    asked = Source(tsv=table(str), column="sentence", batch_size=20)
    (batch,) = labelled_batches(asked, model)
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert torch.equal(batch["labels"] == -100, padding)
    assert torch.equal(batch["labels"][~padding], batch["input_ids"][~padding])


def test_classes_that_are_not_the_model_s(bert, table):
    found = refused(source(table(lambda number: "abc"[number])), bert)
    assert found.fact == "The classes a, b, c are not the model's: bad, good, mixed."
    assert found.remedy == "Write the classes as numbers, or as the model's config names them."
    found = refused(source(table(lambda number: number + 2)), bert)
    assert found.fact == "The data has the classes 3, 4, and the model has 3, numbered from 0."
    assert found.remedy.startswith("Number the classes from 0")
    found = refused(source(table(lambda number: number - 1)), bert)
    assert found.fact == "The classes -1, 0, 1 are not the model's: bad, good, mixed."
    missing = source(table(str)).model_copy(update={"label": "class"})
    assert refused(missing, bert).fact.endswith(" has no column `class`.")


def test_folders_that_are_not_the_model_s(tmp_path):
    found = refused(Source(images=tiny.pictures(tmp_path / "p", ("ant", "bee"))), tiny.vit())
    assert found.fact == "The pictures lie in 2 folders (ant, bee), and the model has 3 classes."
    assert found.remedy.startswith("Give one folder a class")
    found = refused(Source(images=tiny.pictures(tmp_path / "q")), tiny.vit())
    assert found.fact == "The pictures lie in 1 folders (q), and the model has 3 classes."


def test_models_that_learn_something_else(table):
    masked = tiny.bert()
    found = refused(source(table(str)), masked)
    assert found.fact == (
        "`task` counts the loss of labels, and files have them for text-classification, image-classification, "
        "text-generation, not for feature-extraction."
    )
    assert found.remedy.startswith("Leave out `task`")
    found = refused(source(table(str)), tiny.llama())
    assert found.fact == (
        "`label: label` has no effect: a model for text-generation learns the words of the text."
    )
    one = tiny.bert_classifier({0: "score"})
    found = refused(source(table(str)), one)
    assert found.fact == "The labels of files are one class an example, and the model is for regression."
    several = tiny.bert_classifier(CLASSES)
    several.module.config.problem_type = "multi_label_classification"
    assert "and the model is for multi_label_classification." in refused(source(table(str)), several).fact
