"""Commands that make of a checkpoint what others run: packed, and on the hub with a card."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.options import DEFAULT_RESULTS, Results, check_out, console, of_a_checkpoint, without_bars
from patch.errors import UserError, one_line
from patch.quantise.precisions import PRECISIONS

Checkpoint = Annotated[
    Path, typer.Argument(callback=of_a_checkpoint, help="A hybrid checkpoint, or for push also a packed one.")
]


def pack(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Where to write the packed checkpoint.")],
    dtype: Annotated[
        str | None, typer.Option(help="float8_e4m3fn or int8: quantise the weights, and activations as they come.")
    ] = None,
) -> None:
    """Write a hybrid checkpoint as a packed one, which transformers and vLLM load as it is."""
    from experiments.data.models import load_packable, processor_files
    from experiments.publish.card import base_of, licence_of, origin, public_origin, said_by
    from patch.checkpoint import load_masks
    from patch.structures import TILED
    from stoicc.format import SCALED
    from stoicc.linear import compile_model
    from stoicc.quantizer import save_packed

    without_bars()
    eight = {str(kind).removeprefix("torch."): kind for kind in SCALED}
    if dtype is not None and dtype not in eight:
        raise UserError(f"--dtype {dtype}: packed weights have {' or '.join(eight)}, or, without it, 16 bits")
    check_out(out, checkpoint)
    with said_by(checkpoint):
        about = origin(checkpoint)
        # The card of a local base model is not found again by the name alone that is kept of its path.
        told = {**public_origin(about), "licence": licence_of(base_of(about), offline=True)}
    if "packed" in about:
        raise UserError(f"{checkpoint}: packed already: pack the checkpoint that it was made of")
    if about["structure"] not in TILED:
        raise UserError(f"{checkpoint}: its structure is {about['structure']}, which has no tiles to pack")
    precision = PRECISIONS.get(about.get("precision", ""))
    if dtype and precision and (precision.grouped or precision.dtype != dtype):
        raise UserError(f"{checkpoint}: its weights are {precision.label} already, and packed so: leave out --dtype")
    model, tokenizer = load_packable(str(checkpoint))
    report = compile_model(model, load_masks(checkpoint), dtype=eight[dtype] if dtype else None)
    told["packed"] = ", ".join(sorted({spec.dtype for spec in report.packed}))
    save_packed(out, model, tokenizer, told, processor_files(str(checkpoint)))
    console.print(f"{report}: {out}", soft_wrap=True)


def push(
    checkpoint: Checkpoint,
    repo: Annotated[str, typer.Argument(help="The repository on the Hugging Face hub, organisation/name.")],
    out: Annotated[
        Path | None, typer.Option(help="Only write the folder that would be sent; so it is done offline.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="That of the base model, where its card does not say it.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that only you see, if it is new.")] = False,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Put a checkpoint on the hub, with a card that says what it is, what was measured of it and how it loads."""
    from huggingface_hub import constants

    from experiments.publish.card import CARD, base_of, card, check_whole, licence_of, measured_of, origin, said_by
    from patch.files import check_inside, new_directory

    name = _repository(repo)
    check_out(out, checkpoint)
    for file in sorted(checkpoint.rglob("*")):
        check_inside(file, checkpoint)
    offline = bool(constants.HF_HUB_OFFLINE)
    with said_by(checkpoint):
        about = origin(checkpoint)
        content = about["content"]
        licence = licence or about.get("licence") or licence_of(base_of(about), offline)
    check_whole(checkpoint)
    measured = measured_of(content, results)
    with said_by(checkpoint):
        text = card(checkpoint, about, repo, measured, licence)
    if out is None and offline:
        out = Path(name)
    if out is not None:
        with new_directory(out) as folder:
            shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
            (folder / CARD).write_text(text, encoding="utf-8")
        console.print(f"{out}: to be sent to {repo}, nothing was sent", soft_wrap=True)
    else:
        _send(checkpoint, repo, text, private)
        console.print(f"{repo}: sent", soft_wrap=True)
    if licence is None:
        console.print("warning: the base model's licence is not known: --licence names it", style="yellow")


def _repository(named: str) -> str:
    """The name of a repository ``organisation/name`` without the organisation."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(named)
    except HFValidationError as error:
        raise UserError(f"{named}: no repository can be named so: {one_line(error)}") from error
    organisation, _, name = named.partition("/")
    if not (organisation and name):
        raise UserError(f"{named}: a repository is named organisation/name")
    return name


def _send(checkpoint: Path, repo: str, text: str, private: bool) -> None:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from experiments.publish.card import CARD

    hub = HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_file(path_or_fileobj=text.encode(), path_in_repo=CARD, repo_id=repo)
        hub.upload_folder(folder_path=checkpoint, repo_id=repo, ignore_patterns=[CARD])
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"{repo}: the hub does not let you write there: `hf auth login` with a token that may write, or name a "
                "repository of yours"
            ) from error
        raise UserError(f"{repo}: the hub refused it: {one_line(error)}") from error
    except (OSError, httpx.TransportError) as error:
        raise UserError(f"{repo}: the hub cannot be reached ({one_line(error)}): --out writes the folder") from error
