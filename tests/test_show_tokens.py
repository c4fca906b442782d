"""Pictures of token reduction: colours, lines and lost patches, and the verb that draws them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image, ImageFont

import compress
from compress.checkpoint import save
from compress.cli import run
from compress.compare import forward
from compress.errors import DataError, Unsuitable
from compress.example import example_inputs
from compress.layers.tokens import watched
from compress.token_picture import (
    HATCH,
    LINE,
    LOST,
    MARGIN,
    PAPER,
    Panel,
    Reduction,
    borders,
    cell_size,
    cells,
    group_colours,
    sheet,
    token_picture,
)
from compress.token_picture import _shortened as shortened
from tests import tiny

GRID = 8
CELL = 32
"""A patch of 4x4 pixels is drawn eight times as large."""
METHODS = {
    "transform": {},
    "tome": {},
    "prune": {},
    "prune without fusing": {"method": "prune", "fuse": False},
    "sample": {},
    "sample with a mask": {"method": "sample", "keep": None, "mask": True},
    "cluster": {},
}


def vit(**changes):
    """A random ViT of four blocks on 8 x 8 patches of 4 x 4 pixels, with an image processor."""
    settings = {"image_size": 32, "patch_size": 4, "num_hidden_layers": 4, "num_labels": 3}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    module = tf.ViTForImageClassification(tf.ViTConfig(**settings, **sizes, **changes)).eval()
    processor = tf.ViTImageProcessor(size={"height": 32, "width": 32})
    return compress.Model(module, example_inputs(module), "image-classification", processor=processor)


def reduced(model, **settings):
    return compress.apply(model, [compress.MergeTokens(**{"keep": 0.6, **settings})]).model


def photo(size=(48, 40)):
    """A picture of smooth colours with some noise."""
    right, down = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    noise = 0.2 * np.random.default_rng(0).random((*right.shape, 3))
    return Image.fromarray(
        (200 * np.stack([right, down, 1 - right], 2) + 255 * noise).clip(0, 255).astype("uint8")
    )


def panels(picture, count, size):
    """The panels of a picture that has them in one row, (count, height, width, 3)."""
    pixels, top = np.asarray(picture), MARGIN + 2 * LINE
    lefts = [MARGIN + number * (size + MARGIN) for number in range(count)]
    return np.stack([pixels[top : top + size, left : left + size] for left in lefts])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved(vit(), tmp_path_factory.mktemp("model") / "vit")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(reduced(vit()), tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    photo().save(path)
    return path


def test_a_group_has_the_mean_colour_of_its_pixels():
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[:2, :2], pixels[2:, 4:], pixels[:2, 2:4] = 100, 200, 50
    found = group_colours(pixels, np.array([[7, 7, 3], [3, 9, 9]]))
    assert found[..., 0].tolist() == [[75, 75, 0], [0, 100, 100]]


def test_lines_are_where_groups_meet():
    found = borders(np.array([[1, 1, 2], [1, 3, 2]]))
    assert found.tolist() == [[False, False, True], [False, True, True]]


def test_lines_stand_out_from_their_own_patch():
    pixels = np.zeros((1, 4, 3), dtype=np.uint8)
    pixels[0, :, :] = np.array([255, 255, 10, 10])[:, None]
    one = Reduction("", "", np.array([[0, 1, 2, 2]]), np.zeros((1, 4), bool))
    row = cells(pixels, one, 8)[4, :, 0].tolist()
    assert row == [255] * 8 + [128] + [255] * 7 + [132] + [10] * 15


def test_lost_patches_are_dark_and_striped():
    pixels = np.full((2, 2, 3), 255, dtype=np.uint8)
    lost = np.array([[True, False], [True, False]])
    drawn = cells(pixels, Reduction("", "", np.array([[0, 0], [1, 0]]), lost), 12)
    assert {tuple(colour) for colour in drawn[:, :12].reshape(-1, 3).tolist()} == {LOST, HATCH}
    assert (drawn[:, 13:] == 255).all()
    assert (drawn[:, 12] == 128).all()


def test_patches_keep_their_size_or_a_multiple_of_it_where_that_fits():
    picture = {size: np.zeros((size, size, 3), dtype=np.uint8) for size in (64, 224, 384, 1024)}
    assert cell_size(picture[64], (16, 16)) == 16
    assert cell_size(picture[224], (14, 14)) == 16
    assert cell_size(picture[384], (24, 24)) == 10
    assert cell_size(picture[1024], (64, 64)) == 8


def test_pixels_that_no_patch_covers_are_left_out():
    pixels = np.full((16, 16, 3), 90, dtype=np.uint8)
    pixels[15:], pixels[:, 15:] = 255, 255
    one = Reduction("t", "n", np.arange(9).reshape(3, 3), np.zeros((3, 3), bool))
    shown = panels(token_picture(pixels, [one]), 2, 3 * 85)
    assert (shown[0] == 90).all()
    assert set(shown[1].ravel().tolist()) == {90, 172}


@pytest.mark.parametrize(("count", "across", "down"), [(2, 2, 1), (4, 4, 1), (5, 3, 2), (12, 4, 3)])
def test_panels_stand_in_rows(count, across, down):
    panel = Panel("title", "note", np.zeros((40, 60, 3), dtype=np.uint8))
    paper = sheet([panel] * count)
    assert paper.size == (across * (60 + MARGIN) + MARGIN, down * (40 + 2 * LINE + MARGIN) + MARGIN)
    assert (np.asarray(paper) == 0).all(2).sum() == count * 40 * 60
    assert paper.getpixel((0, 0)) == PAPER


def test_a_long_title_keeps_its_end():
    font = ImageFont.load_default(16)
    assert shortened("before layers.1", font, 256) == "before layers.1"
    short = shortened("before a.very.long.path.of.modules.in.modules.layers.11", font, 200)
    assert short.startswith("...")
    assert short.endswith("layers.11")
    assert 150 < font.getlength(short) <= 200


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_drawn_as_it_went(name):
    model = reduced(vit(), **{"method": name, **METHODS[name]})
    image = photo()
    given = model.processor(images=[image], return_tensors="pt")
    with watched(model.module) as maps:
        forward(model.module, given)
    first, *drawn = panels(compress.show_tokens(model, image), 1 + len(maps), GRID * CELL)
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(first, pixels.repeat(8, 0).repeat(8, 1))
    assert drawn
    for panel, one in zip(drawn, maps, strict=True):
        owner = one.owner[0, 1:].reshape(GRID, GRID)
        lost = (one.lost[0, 1:] | ~one.alive[0][one.owner[0, 1:].clamp(max=one.alive.shape[1] - 1)]).reshape(
            GRID, GRID
        )
        assert bool(lost.any()) == (name in ("prune without fusing", "sample", "sample with a mask"))
        assert_drawn(panel, pixels, np.where(lost, -1, owner))


def assert_drawn(panel, pixels, groups):
    """Assert that `panel` shows the patches of `pixels` in `groups` (rows, columns), of which -1 is lost."""
    tiles = panel.reshape(GRID, CELL, GRID, CELL, 3).swapaxes(1, 2)
    patches = pixels.reshape(GRID, 4, GRID, 4, 3).mean((1, 3))
    for group in np.unique(groups):
        inside = tiles[groups == group][:, 1:, 1:]
        if group == -1:
            assert inside.max() <= 70
        else:
            assert np.abs(inside - patches[groups == group].mean(0)).max() <= 0.51
    for edge, middle, differs in (
        (tiles[1:, :, 0, 1:], tiles[1:, :, 1, 1:], groups[1:] != groups[:-1]),
        (tiles[:, 1:, 1:, 0], tiles[:, 1:, 1:, 1], groups[:, 1:] != groups[:, :-1]),
    ):
        apart = np.abs(edge.astype(int) - middle).max((2, 3))
        kept = (groups[1:] if edge.shape[0] < GRID else groups[:, 1:]) != -1
        assert (apart[differs & kept] > 50).all()
        assert (apart[~differs & kept] == 0).all()


def test_titles_say_the_block_and_the_tokens(monkeypatch):
    seen = []
    monkeypatch.setattr("compress.token_picture.sheet", seen.extend)
    compress.show_tokens(reduced(vit(), keep=None, left=(65, 50, 50, 30)), photo())
    assert [(panel.title, panel.note) for panel in seen] == [
        ("input", "32x32 pixels, 8x8 patches"),
        ("before vit.layers.1", "65 tokens -> 50 tokens"),
        ("before vit.layers.3", "50 tokens -> 30 tokens"),
    ]
    seen.clear()
    compress.show_tokens(reduced(vit(), method="sample", keep=None, mask=True, at=(2,)), photo())
    before, after = (int(part.split()[0]) for part in seen[1].note.split("->"))
    assert before == 65 > after


def test_a_checkpoint_is_drawn(checkpoint, file, tmp_path, capsys):
    out = tmp_path / "new" / "tokens.png"
    assert run(["show-tokens", str(file), "--model", str(checkpoint), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"Written to {out}.\n"
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        wanted = compress.show_tokens(compress.load(checkpoint), str(file))
        assert np.array_equal(np.asarray(picture), np.asarray(wanted))
    assert [path.name for path in out.parent.iterdir()] == ["tokens.png"]


def test_a_checkpoint_that_was_quantized_later_is_drawn(tmp_path):
    model = vit()
    passes = [compress.MergeTokens(keep=0.6), compress.Quantize()]
    small = compress.apply(model, passes, calibration=[model.example]).model
    loaded = compress.load(save(small, tmp_path / "int8"))
    given = panels(compress.show_tokens(loaded, photo()), 2, GRID * CELL)
    wanted = panels(compress.show_tokens(reduced(vit()), photo()), 2, GRID * CELL)
    assert np.array_equal(given[0], wanted[0])
    assert given[1].std() > 10


@pytest.mark.parametrize("method", ["transform", "tome", "prune", "sample", "cluster"])
def test_a_plain_model_is_merged_first(method, folder, file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["show-tokens", str(file), "--model", str(folder), "--keep", "0.7", "--method", method]
    assert run([*arguments, "--task", "image-classification"]) == 0
    assert capsys.readouterr().out == "Written to build/photo-tokens.png.\n"
    count = 1 if method == "cluster" else 3
    with Image.open("build/photo-tokens.png") as picture:
        assert picture.width == (1 + count) * (GRID * CELL + MARGIN) + MARGIN
    assert run(arguments) == 2
    assert "The output build/photo-tokens.png exists.\nName another file, or pass --force" in (
        capsys.readouterr().err
    )
    assert run([*arguments, "--force"]) == 0


def test_an_output_that_is_no_new_png_file_is_refused(folder, file, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    arguments = ["show-tokens", str(file), "--model", str(folder), "--keep", "0.7", "--out"]
    for name, message in (
        ("tokens.jpg", "is no PNG file.\nGive it a name that ends in .png."),
        ("folder.png", "is a folder.\nName a file."),
        ("file/tokens.png", "cannot be written: "),
    ):
        assert run([*arguments, str(tmp_path / name)]) == 2
        shown = capsys.readouterr().err
        assert f"{tmp_path / name} {message}" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "tome"],
            "--method tome needs --keep, and there is none.\nGive, for example, --keep 0.6",
        ),
        (["--keep", "2"], "`keep` must be below 1.0, not 2.0."),
        (["--keep", "0.5", "--method", "tom"], "not 'tom'. Did you mean `tome`?"),
    ],
)
def test_wrong_settings_end_with_2(arguments, message, folder, file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["show-tokens", str(file), "--model", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_or_unreadable_picture_ends_with_2(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["show-tokens", "none.png", "--model", str(checkpoint)]) == 2
    assert "error: There is no picture none.png.\nGive the path of a file." in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no picture")
    assert run(["show-tokens", "text.png", "--model", str(checkpoint)]) == 2
    assert "error: text.png cannot be read as a picture: " in capsys.readouterr().err
    assert not (tmp_path / "build" / "text-tokens.png").exists()


def test_a_model_that_is_not_reduced_names_both_ways_out(folder, file, tmp_path, capsys):
    out = str(tmp_path / "tokens.png")
    assert run(["show-tokens", str(file), "--model", str(folder), "--out", out]) == 3
    shown = capsys.readouterr().err
    assert f"error: The tokens of {folder} are not reduced, so there is nothing to show.\n" in shown
    assert "Name a checkpoint of a recipe with `merge_tokens`, or pass --keep 0.6" in shown
    assert not list(tmp_path.iterdir())


def test_a_reduced_model_is_not_reduced_again(checkpoint, file, tmp_path, capsys):
    arguments = ["--keep", "0.5", "--out", str(tmp_path / "tokens.png")]
    assert run(["show-tokens", str(file), "--model", str(checkpoint), *arguments]) == 2
    shown = capsys.readouterr().err
    assert "are reduced already.\nLeave --keep and --method out." in shown


@pytest.mark.parametrize("keep", [[], ["--keep", "0.7"]])
def test_a_model_of_texts_ends_with_3(keep, file, tmp_path, capsys):
    texts = str(tiny.saved(tiny.bert(), tmp_path / "bert"))
    arguments = ["--model", texts, "--out", str(tmp_path / "tokens.png"), *keep]
    assert run(["show-tokens", str(file), *arguments]) == 3
    shown = capsys.readouterr().err
    assert (
        f"error: {texts} takes input_ids, attention_mask, token_type_ids, and not a picture alone." in shown
    )
    assert "name one." in shown


def test_a_model_without_its_processor_or_with_that_of_another_is_refused():
    model = reduced(vit())
    with pytest.raises(DataError, match="ViTForImageClassification has no image processor"):
        compress.show_tokens(replace(model, processor=None), photo())
    larger = tf.ViTImageProcessor(size={"height": 64, "width": 64})
    with pytest.raises(DataError, match="The picture has `pixel_values` of shape 1x3x64x64"):
        compress.show_tokens(replace(model, processor=larger), photo())


class Cut(torch.nn.Module):
    """Patches without a convolution."""

    def __init__(self, width):
        super().__init__()
        self.projection = torch.nn.Linear(48, width)

    def forward(self, pixel_values, interpolate_pos_encoding=False):
        return self.projection(torch.nn.functional.unfold(pixel_values, 4, stride=4).transpose(1, 2))


def test_a_model_without_a_grid_is_refused():
    model = vit()
    model.module.vit.embeddings.patch_embeddings = Cut(32)
    with pytest.raises(
        Unsuitable, match="64 tokens of ViTForImageClassification stand for its picture"
    ) as error:
        compress.show_tokens(reduced(model), photo())
    assert "vision transformers that cut their picture with a convolution" in error.value.remedy
