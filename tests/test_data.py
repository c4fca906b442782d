"""Data: what is read from files, how it fits the model, and what is said when it does not."""

import gzip
import importlib.util
import json

import pytest
import torch
from pydantic import ValidationError

from compress.data import Source, as_batches, batches, spread
from compress.errors import DataError, MissingPackage
from compress.model import Model
from tests import tiny


@pytest.fixture(scope="module")
def bert():
    return tiny.bert()


@pytest.fixture(scope="module")
def llama():
    return tiny.llama()


@pytest.fixture(scope="module")
def vit():
    return tiny.vit()


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n\n".join(tiny.sentences(20)) + "\n")
    return path


def refused(act):
    with pytest.raises(DataError) as caught:
        act()
    return caught.value


def same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


def test_text_is_tokenized_padded_and_repeatable(bert, lines):
    made = batches(Source(text=lines, samples=10, batch_size=4), bert)
    first, again = list(made), list(made)
    assert (len(made), made.samples, made.asked) == (3, 10, 10)
    assert same(first, again)
    assert [len(batch["input_ids"]) for batch in first] == [4, 4, 2]
    assert set(first[0]) == set(bert.example) == {"input_ids", "attention_mask", "token_type_ids"}
    texts = tiny.sentences(20)[::2]
    first_four = [texts[number] for number in (0, 3, 6, 9)]
    assert bert.processor.decode(first[0]["input_ids"][1], skip_special_tokens=True) == first_four[1]
    assert first[0]["attention_mask"].sum(1).tolist() == [len(text.split()) + 2 for text in first_four]
    assert bert.module(**first[0]).last_hidden_state.shape[:2] == first[0]["input_ids"].shape


def test_every_batch_has_examples_from_all_over(bert, tmp_path):
    """A file sorted by topic: steps that see one topic each undo each other."""
    path = tmp_path / "sorted.txt"
    path.write_text("the cat sat\n" * 6 + "it was a blue house\n" * 6)
    for batch in batches(Source(text=path, batch_size=4), bert):
        assert len(set(batch["attention_mask"].sum(1).tolist())) == 2


def test_fewer_samples_than_asked_are_fine(bert, lines):
    made = batches(Source(text=lines, samples=500), bert)
    assert (made.samples, made.asked) == (20, 500)


def test_long_texts_are_cut(bert, lines):
    made = batches(Source(text=lines, max_length=5), bert)
    assert max(batch["input_ids"].shape[1] for batch in made) == 5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables(bert, tmp_path, kind, packed):
    rows = [("cat, dog", 'a "red" cat'), ("it was", "a blue house")]
    if kind == "jsonl":
        text = "\n".join(json.dumps({"one": one, "two": two}) for one, two in rows)
    elif kind == "tsv":
        text = "one\ttwo\n" + "\n".join("\t".join(row) for row in rows)
    else:
        text = 'one,two\n"cat, dog","a ""red"" cat"\nit was,a blue house\n'
    path = tmp_path / (f"t.{kind}.gz" if packed else f"t.{kind}")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    source = Source(**{kind: path, "column": "two"})
    (batch,) = batches(source, bert)
    wanted = bert.processor([two for _, two in rows], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], wanted["input_ids"])
    (paired,) = batches(Source(**{kind: path, "columns": ("one", "two")}), bert)
    assert paired["token_type_ids"].max() == 1
    assert paired["input_ids"].shape[1] > batch["input_ids"].shape[1]


def test_a_causal_model_gets_windows_of_one_text(llama, lines):
    made = batches(Source(text=lines, max_length=16, batch_size=3), llama)
    tokens = llama.processor(lines.read_text(), add_special_tokens=False)["input_ids"]
    wanted = [tuple(tokens[at : at + 16]) for at in range(0, len(tokens) // 16 * 16, 16)]
    read = [tuple(row) for batch in made for row in batch["input_ids"].tolist()]
    assert sorted(read) == sorted(wanted)
    assert all((batch["attention_mask"] == 1).all() for batch in made)


def test_a_text_shorter_than_one_window_is_one_window(llama, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("the cat sat on the mat")
    (only,) = batches(Source(text=path, max_length=100), llama)
    assert only["input_ids"].shape == (1, 6)
    path.write_text("cat")
    assert (
        refused(lambda: batches(Source(text=path), llama)).fact
        == "The text has 1 tokens; a window needs at least 2."
    )


def test_an_encoder_decoder_also_gets_what_its_decoder_reads(lines):
    model = tiny.t5()
    batch = next(iter(batches(Source(text=lines), model)))
    assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert (batch["decoder_input_ids"][:, 0] == 0).all()
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])


def test_pictures(vit, tmp_path):
    tiny.pictures(tmp_path / "p", ("a", "b"), each=3)
    (tmp_path / "p" / "notes.txt").write_text("not a picture")
    made = batches(Source(images=tmp_path / "p", batch_size=4), vit)
    assert [batch["pixel_values"].shape for batch in made] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    assert same(list(made), list(made))


def test_samples_are_spread_over_all():
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread([1, 2], None) == [1, 2]
    assert spread([1, 2], 5) == [1, 2]


def test_says_what_is_wrong_with_a_file(bert, tmp_path):
    missing = refused(lambda: batches(Source(text=tmp_path / "no.txt"), bert))
    assert missing.fact == f"{tmp_path / 'no.txt'} does not exist."
    assert "relative to the recipe file" in missing.remedy
    assert refused(lambda: batches(Source(text=tmp_path), bert)).fact == f"{tmp_path} is a folder."
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    assert refused(lambda: batches(Source(text=empty), bert)).fact == f"{empty} is empty."
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"ab\xff")
    assert (
        "is not UTF-8 text: invalid start byte at byte 2."
        in refused(lambda: batches(Source(text=binary), bert)).fact
    )
    unpacked = tmp_path / "plain.txt.gz"
    unpacked.write_text("not packed")
    assert "cannot be read: Not a gzipped file" in refused(lambda: batches(Source(text=unpacked), bert)).fact
    whole = gzip.compress(b"words " * 1000)
    unpacked.write_bytes(whole[: len(whole) // 2])
    assert f"{unpacked} cannot be read" in refused(lambda: batches(Source(text=unpacked), bert)).fact


def test_says_what_is_wrong_with_a_table(bert, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\na cat,1\na dog,0\n")
    wrong = refused(lambda: batches(Source(csv=path, column="sentence"), bert))
    assert wrong.fact == f"{path} has no column `sentence`."
    assert wrong.remedy == "The columns are `text`, `label`."
    path.write_text("text,label\n")
    assert refused(lambda: batches(Source(csv=path, column="text"), bert)).fact == f"{path} is empty."
    path.write_text("text,label\na cat\n")
    assert "Row 2 of" in refused(lambda: batches(Source(csv=path, column="text"), bert)).fact
    assert (
        "has 1 columns, and its header has 2."
        in refused(lambda: batches(Source(csv=path, column="text"), bert)).fact
    )
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    assert (
        f"Line 2 of {path} is not JSON"
        in refused(lambda: batches(Source(jsonl=path, column="text"), bert)).fact
    )
    path.write_text('{"text": "a"}\n{"txt": "b"}\n')
    assert (
        f"Row 2 of {path} has no column `text`."
        == refused(lambda: batches(Source(jsonl=path, column="text"), bert)).fact
    )
    path.write_text("[1]\n")
    assert (
        f"Line 1 of {path} is no JSON object."
        == refused(lambda: batches(Source(jsonl=path, column="text"), bert)).fact
    )


def test_says_what_does_not_fit_the_model(bert, llama, vit, lines, tmp_path):
    long = refused(lambda: batches(Source(text=lines, max_length=512), bert))
    assert long.fact == "The data asks for 512 tokens a sample, and BertModel takes at most 130."
    assert long.remedy == "Set `max_length: 130` or less."
    assert "takes at most 130" in refused(lambda: batches(Source(text=lines, max_length=131), llama)).fact
    bare = Model(bert.module, bert.example, bert.task)
    assert (
        refused(lambda: batches(Source(text=lines), bare)).fact
        == "The data is text, and BertModel has no tokenizer."
    )
    pictures = tiny.pictures(tmp_path / "p")
    assert "takes input_ids, attention_mask" in refused(lambda: batches(Source(images=pictures), bert)).fact
    blind = Model(vit.module, vit.example, vit.task)
    assert "has no image processor" in refused(lambda: batches(Source(images=pictures), blind)).fact
    larger = tiny.vit(processor_size=48)
    wrong = refused(lambda: batches(Source(images=pictures), larger))
    assert wrong.fact == (
        "The images data has `pixel_values` of shape 4x3x48x48, and the model takes 2x3x32x32."
    )
    with_pixels = Model(bert.module, {**bert.example, **vit.example}, bert.task, processor=bert.processor)
    towers = refused(lambda: batches(Source(text=lines), with_pixels))
    assert (
        "and the model takes `attention_mask`, `input_ids`, `pixel_values`, `token_type_ids`." in towers.fact
    )


def test_says_what_is_wrong_with_pictures(vit, tmp_path):
    assert (
        refused(lambda: batches(Source(images=tmp_path / "no"), vit)).fact
        == f"There is no folder {tmp_path / 'no'}."
    )
    assert (
        refused(lambda: batches(Source(images=tmp_path), vit)).fact == f"There are no pictures in {tmp_path}."
    )
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert (
        f"{tmp_path / 'broken.png'} cannot be read as a picture"
        in refused(lambda: batches(Source(images=tmp_path), vit)).fact
    )


def test_a_tokenizer_without_padding_asks_for_batches_of_one(lines):
    model = tiny.bert()
    model.processor.pad_token = None
    assert refused(lambda: batches(Source(text=lines), model)).remedy == "Set `batch_size: 1` for this data."
    assert len(batches(Source(text=lines, batch_size=1), model)) == 20


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_a_dataset_without_the_package_names_the_command(bert):
    with pytest.raises(MissingPackage) as caught:
        batches(Source(dataset="imdb", column="text"), bert)
    assert (
        caught.value.fact == "The data names the dataset imdb, and the package `datasets` is not installed."
    )
    assert caught.value.remedy == "pip install datasets"


def test_a_source_has_one_origin():
    with pytest.raises(ValidationError, match="give exactly one of"):
        Source.model_validate({"text": "a", "csv": "b"})
    with pytest.raises(ValidationError, match="`tsv` needs `column`"):
        Source.model_validate({"tsv": "a"})


def test_batches_from_python_are_checked(bert, vit):
    given = [dict(bert.example), {name: tensor[:1, :5] for name, tensor in bert.example.items()}]
    made = as_batches(iter(given), bert)
    assert same(list(made), given)
    assert same(list(made), given)
    assert (len(made), made.samples) == (2, 3)
    assert refused(lambda: as_batches([], bert)).fact == "There is no batch in the data."
    wrong = refused(lambda: as_batches([dict(bert.example), {"input_ids": bert.example["input_ids"]}], bert))
    assert wrong.fact == (
        "Batch 1 of the data gives the arguments `input_ids`,"
        " and the model takes `attention_mask`, `input_ids`, `token_type_ids`."
    )
    flat = {name: tensor[0] for name, tensor in bert.example.items()}
    assert "of shape 16, and the model takes 2x16." in refused(lambda: as_batches([flat], bert)).fact
    pixels = vit.example["pixel_values"].clone()
    pixels[0, 0, 0, 0] = float("nan")
    assert refused(lambda: as_batches([{"pixel_values": pixels}], vit)).fact == (
        "Batch 0 of the data has values in `pixel_values` that are not finite."
    )
