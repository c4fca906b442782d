"""Draw what becomes of the patches of a picture in a model that runs on fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compress.build import apply
from compress.checkpoint import open_model
from compress.errors import DataError, OutputError, Unsuitable, UsageError
from compress.folders import new_file
from compress.model import Model
from compress.passes.merge_tokens import MergeTokens
from compress.progress import SILENT, Observer, task
from compress.wording import complaints

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from compress.layers.tokens import Layout, TokenMap
    from compress.model import Inputs
    from compress.token_picture import Reduction


def draw_tokens(
    image: Path,
    name: str,
    into: Path,
    *,
    task_name: str | None = None,
    method: str | None = None,
    keep: float | None = None,
    force: bool = False,
    observer: Observer = SILENT,
) -> None:
    """Write what `show_tokens` draws of the file `image` in the model or checkpoint `name` to the new PNG file `into`.

    With `keep`, a model whose tokens are not reduced yet goes through `merge_tokens` first, by `method`.
    Raises, before the model is loaded, `DataError` for no such picture, `OutputError` for a file that is taken (unless
    `force`) or cannot be written, `UsageError` for wrong settings; and later `UsageError` where tokens are reduced
    already, and what `show_tokens` and the pass raise.
    """
    settings = merging(method, keep)
    if not image.is_file():
        raise DataError(f"There is no picture {image}.", "Give the path of a file.")
    if into.suffix.lower() != ".png":
        raise OutputError(f"The output {into} is no PNG file.", "Give it a name that ends in .png.")
    with new_file(into, force) as partial:
        with task(observer, f"load {name}"):
            model = open_model(name, task_name)
        if settings is not None:
            model = _merged(model, settings, image, observer)
        show_tokens(model, image).save(partial, "PNG")


def merging(method: str | None, keep: float | None) -> MergeTokens | None:
    """The pass with these settings; None without any. Raises `UsageError` for wrong ones."""
    if keep is None:
        if method is None:
            return None
        raise UsageError(
            f"--method {method} needs --keep, and there is none.", "Give, for example, --keep 0.6"
        )
    given = {"use": "merge_tokens", "keep": keep} | ({} if method is None else {"method": method})
    try:
        return MergeTokens.model_validate(given)
    except ValidationError as error:
        said = [text for _, text in complaints(error, given, lambda _: tuple(MergeTokens.model_fields))]
        raise UsageError("\n".join(said), "`modelpress show merge_tokens` says what can be given.") from None


def show_tokens(model: Model, image: str | Path | Image) -> Image:
    """What `model`, whose tokens `merge_tokens` has reduced, makes of the patches of a picture: a picture to save.

    Its first panel is the input as the model sees it; there follows one for each reduction. Patches that have become
    one token have one colour, the mean of their pixels, with lines around them. Patches that no token stands for are
    dark and hatched. Raises `Unsuitable` for a model that takes no pictures, or whose tokens are not reduced, or lie on
    no grid, and `DataError` for a picture that cannot be read, and for a model without its image processor.
    """
    from compress.layers.tokens import TokenReducer, watched
    from compress.outputs import forward
    from compress.token_picture import token_picture

    _require_pictures(model)
    reducers = [part for part in model.module.modules() if isinstance(part, TokenReducer)]
    if not reducers:
        raise Unsuitable(
            f"The tokens of {_name(model)} are not reduced, so there is nothing to show.",
            "Name a checkpoint of a recipe with `merge_tokens`, or pass --keep 0.6 to apply that pass now"
            " (in Python: compress.apply(model, [compress.MergeTokens(keep=0.6)])).",
        )
    batch, pixels = _encoded(model, image)
    with watched(model.module) as maps:
        forward(model.module, batch)
    return token_picture(pixels, _reductions(model, reducers[0].flow.layout, maps))


def _merged(model: Model, settings: MergeTokens, image: Path, observer: Observer) -> Model:
    from compress.layers.tokens import is_reduced

    _require_pictures(model)
    if is_reduced(model.module):
        raise UsageError(
            f"The tokens of {_name(model)} are reduced already.", "Leave --keep and --method out."
        )
    # `cluster` fits its temperature to data; the others would choose other blocks for each picture.
    data = [_encoded(model, image)[0]] if settings.method == "cluster" else None
    return apply(model, [settings], calibration=data, observer=observer).model


def _require_pictures(model: Model) -> None:
    if set(model.example) != {"pixel_values"}:
        raise Unsuitable(
            f"{_name(model)} takes {', '.join(model.example)}, and not a picture alone.",
            "Patches are shown of vision transformers: name one.",
        )


def _encoded(model: Model, image: str | Path | Image) -> tuple[Inputs, Any]:
    """The forward arguments for `image`, and its pixels as the model sees them, uint8 (height, width, 3)."""
    from compress.data import require_fit
    from compress.encoding import encode_picture

    batch, pixels = encode_picture(Path(image) if isinstance(image, str) else image, model)
    require_fit(batch, model, "The picture")
    return batch, pixels.numpy()


def _reductions(model: Model, layout: Layout, maps: Sequence[TokenMap]) -> list[Reduction]:
    """The first row of each of `maps`, on the grid of the patches."""
    from compress.token_picture import Reduction

    before, special = maps[0].owner.shape[1], layout.protected
    grid = _grid(model, before - special)
    found = []
    for one in maps:
        owner, alive, after = one.owner[0], one.alive[0], int(one.alive[0].sum())
        # A token that was not drawn may keep its place, with nothing in it.
        lost = one.lost[0] | ~alive[owner.clamp(max=len(alive) - 1)]
        patches, gone = (values[special:].reshape(grid).cpu().numpy() for values in (owner, lost))
        title = f"before {layout.blocks[one.number]}"
        found.append(Reduction(title, f"{before} tokens -> {after} tokens", patches, gone))
        before = after
    return found


def _grid(model: Model, count: int) -> tuple[int, int]:
    from compress.passes.token_grid import grid_of

    try:
        return grid_of(model, count)
    except Unsuitable as error:
        raise Unsuitable(
            f"{count} tokens of {_name(model)} stand for its picture, and no convolution gives that many places,"
            " so it is not known where they lie.",
            "Patches are shown of vision transformers that cut their picture with a convolution.",
        ) from error


def _name(model: Model) -> str:
    return model.source or type(model.module).__name__
