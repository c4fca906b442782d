"""Recipes: what is read, what is refused and where, and what the schema says."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import jsonschema
import pytest
import yaml
from pydantic import Field, ValidationError

import compress.catalog
from compress.data import Source
from compress.errors import DataError, ModelpressError, RecipeError, UsageError
from compress.passes.base import Pass
from compress.recipe import (
    ModelSpec,
    Recipe,
    available,
    find,
    load_recipe,
    require_complete,
    schema,
    shipped_recipes,
)
from compress.scope import Scope


class Blur(Pass):
    """Blurs weights."""

    effect: ClassVar = "lossy"
    needs: ClassVar = "calibration"

    use: Literal["blur"] = "blur"
    strength: float | Literal["auto"] = 0.5
    steps: int = Field(default=3, ge=1)
    kind: Literal["box", "gauss"] = "box"
    names: tuple[str, ...] = ()

    def apply(self, model, context):
        raise NotImplementedError

    def restore(self, module, record):
        return module


class Fold(Pass):
    """Folds weights."""

    effect: ClassVar = "exact"
    needs: ClassVar = "nothing"

    use: Literal["fold"] = "fold"

    def apply(self, model, context):
        raise NotImplementedError

    def restore(self, module, record):
        return module


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Two passes of a third party, installed beside the built-in ones."""
    real = compress.catalog.entry_points
    mine = {"blur": Blur, "fold": Fold}

    def entry_points(group, name=None):
        ours = [
            SimpleNamespace(name=key, load=lambda cls=cls: cls)
            for key, cls in mine.items()
            if group == "compress.passes" and name in (None, key)
        ]
        return [*ours, *real(group=group, **({"name": name} if name else {}))]

    monkeypatch.setattr(compress.catalog, "entry_points", entry_points)


HEAD = "summary: a test\nmodel: {name: some/model, task: feature-extraction}\n"


@pytest.fixture
def written(tmp_path):
    def write(body, head=HEAD):
        path = tmp_path / "my.yaml"
        path.write_text(head + body, encoding="utf-8")
        return path

    return write


def refused(path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return caught.value.fact


def test_reads_every_part(written, tmp_path):
    recipe = load_recipe(
        written(
            """\
data:
  calibration: {text: texts/cal.txt, samples: 12}
  heldout: {csv: /data/held.csv.gz, column: body}
  evaluation: {tsv: sts.tsv, columns: [a, b], label: score, metric: spearman}
passes:
  - {use: fold}
  - {use: blur, strength: auto, scope: {include: ["encoder.*"], exclude: ["*.0"]}}
measure: {shape: {batch: 4}, rounds: 5}
accept: {max_drop: 0.5, min_cosine: 0.99}
"""
        )
    )
    assert recipe.passes == (
        Fold(),
        Blur(strength="auto", scope=Scope(include=("encoder.*",), exclude=("*.0",))),
    )
    assert recipe.data.calibration == Source(text=tmp_path / "texts/cal.txt", samples=12)
    assert recipe.data.heldout is not None
    assert recipe.data.heldout.path == Path("/data/held.csv.gz")
    assert recipe.data.evaluation is not None
    assert recipe.data.evaluation.path == tmp_path / "sts.tsv"
    assert recipe.measure.shape == {"batch": 4}
    assert (recipe.accept.max_drop, recipe.accept.min_speedup, recipe.accept.min_cosine) == (0.5, None, 0.99)


def test_survives_a_round_trip_through_json(written):
    recipe = load_recipe(written("passes: [{use: blur, kind: gauss}, {use: fold}]\n"))
    text = json.dumps(recipe.model_dump(mode="json"))
    assert '"kind": "gauss"' in text
    assert Recipe.model_validate(json.loads(text)) == recipe


def test_a_recipe_is_frozen(written):
    recipe = load_recipe(written("passes: [{use: fold}]\n"))
    with pytest.raises(ValidationError):
        recipe.summary = "another"


def test_a_model_name_that_begins_with_a_dot_is_relative_to_the_recipe(written, tmp_path):
    head = "summary: s\nmodel: {name: ./models/mine, task: fill-mask}\n"
    assert load_recipe(written("passes: [{use: fold}]\n", head)).model.name == str(tmp_path / "models/mine")


def test_shows_all_errors_with_line_column_and_remedy(written):
    path = written(
        """\
data:
  calibration: {text: cal.txt, samples: many, colour: 3}
passes:
  - {use: blur, stregnth: 0.5, steps: 0}
  - {use: fodl}
  - use: blur
    scope: {inlcude: ["a"]}
    kind: gaus
"""
    )
    fact = refused(path)
    for line in (
        f"{path}:4:32: `data.calibration.samples` must be a whole number, not 'many'.",
        f"{path}:4:47: `data.calibration.colour` is not a known key.",
        f"{path}:6:17: `passes[0].stregnth` is not a known key. Did you mean `strength`?"
        " Known here: use, scope, allow_empty, strength, steps, kind, names.",
        f"{path}:6:32: `passes[0].steps` must be at least 1, not 0.",
        f"{path}:7:5: `passes[1]`: There is no pass `fodl`. Did you mean `fold`?",
        f"{path}:9:13: `passes[2].scope.inlcude` is not a known key. Did you mean `include`?",
        f"{path}:10:5: `passes[2].kind` must be 'box' or 'gauss', not 'gaus'. Did you mean `gauss`?",
    ):
        assert line in fact
    assert "  6 |   - {use: blur, stregnth: 0.5, steps: 0}\n                      ^" in fact
    assert "pydantic" not in fact
    positions = [line.split(":")[1:3] for line in fact.splitlines() if line.startswith(str(path))]
    assert positions == sorted(positions, key=lambda pair: (int(pair[0]), int(pair[1])))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pases: [{use: fold}]\n", "3:1: `pases` is not a known key. Did you mean `passes`?"),
        ("passes: [{strength: 1}]\n", "3:10: `passes[0]`: `use` is missing: which one of `blur`, `"),
        ("passes: {use: fold}\n", "3:1: `passes` must be a list, not {'use': 'fold'}."),
        (
            "passes: [{use: blur, names: [8.6]}]\n",
            '`passes[0].names[0]` must be text, not the number 8.6: write it in quotes, "8.6".',
        ),
        ("passes: [{use: blur, strength: much}]\n", "`passes[0].strength` must be a number, not 'much'."),
        ("passes: [{use: fold, allow_empty: 3}]\n", "`passes[0].allow_empty` must be true or false, not 3."),
        ("passes: [fold]\n", "`passes[0]` must be a mapping of keys, not 'fold'."),
        ("{}\n", "this is not YAML"),
        ("accept: {}\n", "the recipe: there is nothing to do: give `passes`, `export`, or both."),
        ("passes: [{use: fold}]\naccept: {max_drop: 1}\n", "`accept.max_drop` needs `data.evaluation`"),
        ("passes: [{use: fold}]\naccept: {min_speedup: 2}\n", "`accept.min_speedup` needs an `export`"),
        ("passes: [{use: fold}]\nmeasure: {shape: {lenght: 3}}\n", "not `lenght: 3`"),
        (
            "passes: [{use: fold}]\ndata: {calibration: {samples: 3}}\n",
            "`data.calibration`: give exactly one of `text`",
        ),
        ("passes: [{use: fold}]\ndata: {calibration: {csv: a.csv}}\n", "`csv` needs `column`"),
        ("passes: [{use: fold}]\ndata: {calibration: {text: a, column: b}}\n", "`text` has no columns."),
        (
            "passes: [{use: fold}]\ndata: {calibration: {csv: a.csv, column: b, label: c}}\n",
            "`data.calibration`: `label` has no effect here: only training and evaluation read labels.",
        ),
        (
            "passes: [{use: fold}]\ndata: {heldout: {csv: a.csv, column: b, label: c}}\n",
            "`data.heldout`: `label` has no effect here",
        ),
        (
            "passes: [{use: distill}]\ndata: {training: {csv: a.csv, column: b, label: c}}\n",
            "`data.training.label` has no effect: no pass learns labels. Set `task` of one that trains.",
        ),
        ("passes: [{use: fold}]\ndata: {training: {text: a, label: b}}\n", "`text` has no columns."),
        (
            "passes: [{use: fold}]\ndata: {training: {images: a, label: b}}\n",
            "`images` has no columns. The class of a picture is the name of its subfolder.",
        ),
        (
            "passes: [{use: fold}]\ndata: {evaluation: {text: a, metric: spearman}}\n",
            "`spearman` needs a table",
        ),
    ],
)
def test_says_what_is_wrong(written, body, message):
    assert message in refused(written(body))


def test_what_must_be_trained_is_shown_where_it_stands(written):
    path = written("passes:\n  - {use: fold}\n  - {use: expand_depth}\n  - {use: quantize}\n")
    assert (
        f"{path}:5:5: `passes[1]`: The pass `expand_depth` gives blocks that were not trained, or not at this depth, "
        "and no pass that trains comes after it. Put one after it, such as `distill`, or set `unhealed: true`"
    ) in refused(path)
    for passes in ("{use: expand_depth, unhealed: true}", "{use: expand_depth}, {use: distill}"):
        assert load_recipe(written(f"passes: [{passes}]\n")).passes


def test_a_missing_key_is_placed_at_its_parent(written):
    path = written("passes: [{use: fold}]\n", "summary: s\nmodel:\n  name: x\n")
    assert f"{path}:2:1: `model.task` is missing.\n  2 | model:\n" in refused(path)


def test_a_repeated_key_is_an_error(written):
    path = written("passes: [{use: fold}]\npasses: [{use: blur}]\n")
    assert (
        f"{path}:4:1: the key `passes` stands here for the second time; the first is in line 3."
        in refused(path)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("summary: [a\n", ":2:1: this is not YAML: while parsing a flow sequence"),
        ("summary: a\n  model: b\n", ":2:8: this is not YAML: mapping values are not allowed here."),
        ("", "a recipe is a mapping of keys, and this file holds nothing."),
        ("- a\n", "this file holds a list."),
        ("a: &x [*x]\n", "is not a known key"),
        ("summary: !!python/object:os.system {}\n", "this is not YAML: could not determine a constructor"),
    ],
)
def test_says_where_the_syntax_is_wrong(written, text, message):
    assert message in refused(written("", head=text))


def test_an_anchor_is_read_but_not_expanded_without_end(written):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    fact = refused(written(bomb))
    assert "`i` is not a known key." in fact


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "minilm-int.yaml")
    assert "no shipped recipe of that name. Did you mean `minilm-int8`?" in caught.value.fact
    assert "bert-int8-cpu" in caught.value.remedy
    with pytest.raises(RecipeError, match="is a folder, not a recipe"):
        load_recipe(tmp_path)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"summary: \xff\xfe")
    with pytest.raises(RecipeError, match="is not UTF-8 text: invalid start byte at byte 9"):
        load_recipe(path)


def test_finds_by_entry_point_only():
    assert find("compress.passes", "blur") is Blur
    assert {"blur", "fold", "quantize", "smooth"} <= set(available("compress.passes"))
    assert available("compress.targets") == ("onnx", "tensorrt")
    with pytest.raises(RecipeError) as caught:
        find("compress.targets", "onxx")
    assert caught.value.fact == "There is no target `onxx`. Did you mean `onnx`?"
    assert caught.value.remedy == "Installed: onnx, tensorrt. `modelpress list targets` describes them."


def test_a_declared_pass_that_cannot_be_imported_names_its_package(monkeypatch):
    def fail():
        raise ImportError("No module named 'blurlib'")

    broken = SimpleNamespace(
        name="bad", value="blur:Bad", load=fail, dist=SimpleNamespace(name="blur-passes")
    )
    monkeypatch.setattr(compress.catalog, "entry_points", lambda group, name=None: [broken])
    with pytest.raises(ModelpressError) as caught:
        find("compress.passes", "bad")
    assert "The package blur-passes declares `bad` as blur:Bad" in caught.value.fact
    assert "blurlib" in caught.value.fact


def test_overrides_give_new_values(written, tmp_path):
    recipe = load_recipe(
        written("data: {calibration: {csv: a.csv, column: c, samples: 7}}\npasses: [{use: fold}]\n")
    )
    assert recipe.with_model("other").model == ModelSpec(name="other", task="feature-extraction")
    assert recipe.with_model(task="fill-mask").model == ModelSpec(name="some/model", task="fill-mask")
    assert recipe.model.name == "some/model"
    assert recipe.with_calibration(tmp_path).data.calibration == Source(images=tmp_path, samples=7)
    table = tmp_path / "b.tsv.gz"
    assert recipe.with_calibration(table).data.calibration == Source(tsv=table, column="c", samples=7)
    text = tmp_path / "b.txt"
    assert recipe.with_calibration(text).data.calibration == Source(text=text, samples=7)
    bare = load_recipe(written("passes: [{use: fold}]\n"))
    which = r"b.tsv.gz is a table, and nothing says which of its columns to take"
    for field, change in (("calibration", bare.with_calibration), ("training", bare.with_training)):
        with pytest.raises(DataError, match=which) as caught:
            change(table)
        assert f"`{field}: {{tsv: b.tsv.gz, column: NAME}}`" in caught.value.remedy


def test_says_what_is_missing_before_any_work(written, tmp_path):
    head = "summary: s\nmodel: {task: fill-mask}\n"
    with pytest.raises(UsageError, match="names no model") as caught:
        require_complete(load_recipe(written("passes: [{use: fold}]\n", head)))
    assert caught.value.remedy == "Give one: `--model FOLDER_OR_NAME`."
    with pytest.raises(DataError, match="The pass `blur` needs calibration data") as missing:
        require_complete(load_recipe(written("passes: [{use: blur}]\n")))
    assert "`--calibration PATH`" in missing.value.remedy
    with pytest.raises(DataError) as absent:
        require_complete(load_recipe(written("passes: [{use: blur}]\ndata: {calibration: {text: no.txt}}\n")))
    assert absent.value.fact == f"The calibration data is not there: {tmp_path / 'no.txt'} does not exist."
    (tmp_path / "no.txt").write_text("x")
    require_complete(load_recipe(written("passes: [{use: blur}]\ndata: {calibration: {text: no.txt}}\n")))


CLASSIFIER = "summary: s\nmodel: {name: m, task: text-classification}\npasses: [{use: distill, task: 1}]\n"


def test_labels_that_are_learnt_must_be_there_before_any_work(written, tmp_path):
    (tmp_path / "a.tsv").write_text("text\tclass\n")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError) as caught:
        require_complete(load_recipe(written("data: {training: {tsv: a.tsv, column: text}}\n", CLASSIFIER)))
    assert caught.value.fact == (
        "`task` counts the loss of labels, and the `tsv` training data names no `label`."
    )
    assert caught.value.remedy == "Add `label: COLUMN`, the column of the class, or leave out `task`."
    recipe = load_recipe(written("data: {training: {tsv: a.tsv, column: text, label: class}}\n", CLASSIFIER))
    require_complete(recipe)
    table = recipe.with_training(tmp_path / "a.tsv").data.training
    assert table is not None
    assert table.label == "class"
    with pytest.raises(DataError, match="and a `text` file has none"):
        require_complete(recipe.with_training(tmp_path / "a.txt"))
    require_complete(recipe.with_training(tmp_path).with_model(task="image-classification"))


def test_what_calibrates_in_the_place_of_training_data_has_no_labels(written):
    recipe = load_recipe(written("data: {training: {tsv: a.tsv, column: text, label: class}}\n", CLASSIFIER))
    calibration, training = recipe.data.source("calibration"), recipe.data.source("training")
    assert calibration is not None
    assert training is not None
    assert (calibration.label, training.label) == (None, "class")


def test_the_schema_covers_every_installed_pass_and_accepts_shipped_recipes():
    made = schema()
    names = {item["$ref"].rsplit("/", 1)[1] for item in made["properties"]["passes"]["items"]["anyOf"]}
    assert {find("compress.passes", name).__name__ for name in available("compress.passes")} == names
    assert made["$defs"]["Blur"]["additionalProperties"] is False
    assert made["$defs"]["Blur"]["required"] == ["use"]
    assert made["$defs"]["Blur"]["properties"]["use"]["const"] == "blur"
    check = jsonschema.Draft202012Validator(made)
    for name in shipped_recipes():
        text = (Path(__file__).parents[1] / "recipes" / f"{name}.yaml").read_text()
        check.validate(yaml.safe_load(text))
    wrong = {"summary": "s", "model": {"task": "t"}, "passes": [{"use": "blur", "stregnth": 1}]}
    assert not check.is_valid(wrong)
