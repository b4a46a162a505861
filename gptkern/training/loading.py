"""A model and its tokenizer from a folder of any kind: a run, one of its checkpoints, gptkern's or transformers' own.

    run           checkpoints/         the newest whole checkpoint; tokenizer.json lies beside
    checkpoint    checksums.json       torch.distributed.checkpoint's tensors, and about.json
    gptkern's     config.json with "model", model.safetensors                             bytes are its tokens
    GPT-2's       config.json of transformers, tokenizer.json, and the weights:
                  model.safetensors, or several files and model.safetensors.index.json, or model.byte-planes.safetensors

What a folder says is not trusted: no file is unpickled, none outside of the folder is named by one inside but the
folder of the model that a run's adapters are for, which is read in the same way, and sizes are held against those of
the files before memory is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gptkern.formatting import shown
from gptkern.models.gpt import BYTES, GPT, GPTConfig
from gptkern.training import adapting, gpt2_layout, lora, model_files
from gptkern.training.byte_planes import BytePlanes
from gptkern.training.checkpoint_reading import DTYPES, Checkpoint
from gptkern.training.checkpoints import Checkpoints
from gptkern.training.data.plain_files import is_plain
from gptkern.training.errors import UserError, reason
from gptkern.training.model_files import CONFIG, PARAMETERS
from gptkern.training.stopping import best_of
from gptkern.training.tensor_files import Header, SafetensorsFiles, Tensors, json_object, said

if TYPE_CHECKING:
    from gptkern.training.data.tokenizers import Tokenizer

INDEX = "model.safetensors.index.json"
PLANES = "model.byte-planes.safetensors"
TOKENIZER = "tokenizer.json"
CHECKPOINTS = "checkpoints"  # of a run's folder

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.ckpt.index", "flax_model.msgpack")
_MODEL = "model."  # what a checkpoint's names of the model's tensors begin with
_SMALL_TOKENIZER = 2**16  # bytes; that of bytes has a tenth


class Loaded(NamedTuple):
    """What a folder holds.

    Args:
        model: the stock GPT, in float32, in eval mode. tokenizer: None where the folder has none.
        about: "kind": "run", "checkpoint", "gptkern" or "gpt2"; "step" of the first two, and "folder", the checkpoint's
            own; "passed_over": a line for each newer checkpoint of the run that is damaged; "labels" of a model that
            has a head over them, `model.score`; "examples": {"kind", "labels"} of a run that was fine-tuned; "lora",
            true of a run whose adapters were merged into its base.
    """

    model: GPT
    tokenizer: Tokenizer | None
    about: dict[str, Any]


def load_model(
    folder: str | Path, device: torch.device | str = "cpu", option: str = "FOLDER", dropout: float | None = None
) -> Loaded:
    """The model of a folder.

    Args:
        option: what an error calls the folder. dropout: while it is trained on; None for the folder's own.

    Raises:
        UserError: the folder holds no such model, one that this GPT does not compute, that does not fit together or
            into memory, or a tokenizer that is not the model's. The message names the file and what it needs.
    """
    _, load = opened(folder, device, option, dropout)
    return load()


def opened(
    folder: str | Path,
    device: torch.device | str = "cpu",
    option: str = "FOLDER",
    dropout: float | None = None,
    alone: bool = False,
) -> tuple[GPTConfig, Callable[[], Loaded]]:
    """(its sizes, a function that loads it): load_model in two steps; the first takes no memory for weights.

    Args:
        alone: refuse a run of adapters, which is a model with another one's folder alone.
    """
    folder = Path(folder)
    name = f"{option} {shown(str(folder))}".lstrip()
    config, tensors, tokenizer, about = _checked(folder, name, dropout, alone)
    return config, lambda: Loaded(tensors(config, device).eval(), tokenizer, about)


def _checked(folder: Path, name: str, dropout: float | None, alone: bool = False):
    """As _found, once the tokenizer is seen to fit the model."""
    config, tensors, tokenizer, about = _found(folder, name, dropout)
    if alone and "lora" in about:
        raise UserError(f"{name} is a run of LoRA's adapters; it needs a model by itself: `gptkern export` writes it")
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{name}: its tokenizer has {tokenizer.vocab_size} tokens; the model needs one of at most "
            f"{config.vocab_size}"
        )
    return config, tensors, tokenizer, about


def reading(folder: str | Path, option: str = "FOLDER") -> tuple[GPTConfig, Tokenizer]:
    """(the sizes of a folder's model, its tokenizer), before any weight is read. Raises as `load_model`."""
    name = f"{option} {shown(str(folder))}"
    config, _, tokenizer, about = _checked(Path(folder), name, None)
    if tokenizer is None:
        raise _without_tokenizer(config, about, name)
    return config, tokenizer


def starting_model(
    folder: str | Path,
    tokenizer: Tokenizer,
    *,
    length: int | None = None,
    dropout: float | None = None,
    device: torch.device | str = "cpu",
    option: str = "--from",
) -> Loaded:
    """A model to train on, with data whose tokens are its own.

    Args:
        tokenizer: the data's. length: tokens of a row; None where that is not known yet. dropout: as load_model's.

    Raises:
        UserError: as load_model's; or the data's tokens are others than the model's, or a row is longer than its
            context.
    """
    _, load = starting(folder, tokenizer, length=length, dropout=dropout, device=device, option=option)
    return load()


def starting(
    folder: str | Path,
    tokenizer: Tokenizer,
    *,
    length: int | None = None,
    dropout: float | None = None,
    device: torch.device | str = "cpu",
    option: str = "--from",
    alone: bool = False,
) -> tuple[GPTConfig, Callable[[], Loaded]]:
    """(its sizes, a function that loads it): starting_model in two steps; the first takes no memory for weights.

    A head over labels is left away. `alone`: as of `opened`.
    """
    folder = Path(folder)
    name = f"{option} {shown(str(folder))}"
    config, tensors, own, about = _checked(folder, name, dropout, alone)
    if own is None:
        raise UserError(f"{name} has no {TOKENIZER}; it needs one, with which the data's tokens can be compared")
    if not same_tokens(own, tokenizer):
        raise UserError(
            f"{name} is a model of tokens by {own.name}, and the data are tokens by {tokenizer.name}; it "
            f"needs data of its own tokenizer{_how(folder, own)}"
        )
    if length is not None and length > config.context:
        raise UserError(f"{name} has a context of {config.context}; rows of {length} tokens do not fit into it")

    def load() -> Loaded:
        model = tensors(config, device).eval()
        adapting.strip_head(model)
        model_files.check_finite(model, name)
        return Loaded(model, own, about)

    return config, load


def _how(folder: str | Path, tokenizer: Tokenizer) -> str:
    file = Path(folder, TOKENIZER)
    how = "bytes" if tokenizer.kind == "bytes" else str(file) if file.is_file() else ""
    return f": `gptkern data --tokenizer {how}`" if how else ""


def same_tokens(model: Tokenizer, data: Tokenizer) -> bool:
    """Whether the data's ids mean to the model what they meant to whoever made them."""
    if model.kind == data.kind == "bytes":
        # The end of text is one token more, and the data may not have it.
        return data.vocab_size <= model.vocab_size
    return model.same_ids(data)


def with_tokenizer(loaded: Loaded, name: str) -> Tokenizer:
    """The tokenizer. Raises UserError where there is none; `name` is what it calls the folder."""
    if loaded.tokenizer is None:
        raise _without_tokenizer(loaded.model.config, loaded.about, name)
    return loaded.tokenizer


def _without_tokenizer(config: GPTConfig, about: dict[str, Any], name: str) -> UserError:
    if about["kind"] == "gptkern":
        tokens = config.vocab_size
        return UserError(
            f"{name} is a model of {tokens} tokens; it needs one of {BYTES} or {BYTES + 1}, which are bytes"
        )
    return UserError(
        f"{name} has no {TOKENIZER}; it needs one: AutoTokenizer.from_pretrained(…).save_pretrained(…) writes it"
    )


# --- Kinds of folders -------------------------------------------------------------------------------------------------


def _found(folder: Path, name: str, dropout: float | None):
    """(config, function of config and device that gives the model, tokenizer, about) of a folder."""
    try:
        is_folder, there = folder.is_dir(), folder.exists()
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {reason(error)}; it needs a folder with a model") from error
    if not is_folder:
        what = "it is a file" if there else "there is no such folder"
        hint = f"; did you mean {folder.parent}?" if there and _is_one(folder.parent) else ""
        needs = "it needs the folder of a run, of a checkpoint or of a model"
        raise UserError(f"{name} is no checkpoint: {what}; {needs}{hint}")
    if Checkpoint.is_one(folder):
        checkpoint = Checkpoint(folder)
        with _naming(name):
            checkpoint.verify()
        return _of_checkpoint(checkpoint, folder.parent.parent, name, dropout, {"kind": "checkpoint"})
    if (folder / CHECKPOINTS).is_dir():
        checkpoint, passed_over = Checkpoints(folder / CHECKPOINTS).newest()
        if checkpoint is None:
            why = f": {'; '.join(passed_over)}" if passed_over else "; its run has saved none yet"
            raise UserError(f"{name} holds no whole checkpoint{why}")
        checkpoint = _best(folder, checkpoint, passed_over)
        about = {"kind": "run", "passed_over": passed_over}
        return _of_checkpoint(checkpoint, folder, name, dropout, about)
    with model_files.refused(name):
        content = json_object(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if gpt2_layout.is_config(content):
        return _of_transformers(folder, content, name, dropout)
    return _of_gptkern(folder, name, dropout)


def _best(folder: Path, newest: Checkpoint, passed_over: list[str]) -> Checkpoint:
    """The checkpoint with the lowest held-out loss, of a run that kept it (`--patience`); else the newest."""
    best = best_of(newest)
    if best is None or best.step == newest.step:
        return newest
    found = Checkpoint(folder / CHECKPOINTS / f"step-{best.step:08}")
    try:
        found.verify()
    except UserError as error:
        passed_over.append(f"{error}: it is the best one, and the newest is taken")
        return newest
    return found


class _naming:
    """A UserError inside the block names the folder first."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if isinstance(error, UserError):
            raise UserError(f"{self.name}: {error}") from error


def _of_checkpoint(checkpoint: Checkpoint, run: Path, name: str, dropout, about: dict[str, Any]):
    from gptkern.training.data.tokenizers import load_tokenizer

    with _naming(name):
        said_of_it, names = checkpoint.about, checkpoint.names()
        with model_files.refused(str(checkpoint.folder)):
            for key in ("config", "tokenizer"):
                if not isinstance(said_of_it.get(key), dict):
                    raise ValueError(f"about.json: {key} is {said(said_of_it.get(key))}; it needs an object")
            config = model_files.sizes(said_of_it["config"], "about.json")
            labels = adapting.labels_of(said_of_it)
            examples = _examples_of(said_of_it)
        tokenizer = load_tokenizer(run, said_of_it["tokenizer"])
    dtypes = {dtype: written for written, dtype in DTYPES.items()}
    headers = {
        key.removeprefix(_MODEL): Header(dtypes[dtype], shape)
        for key, (dtype, shape) in names.items()
        if key.startswith(_MODEL)
    }

    head = headers.pop(adapting.HEAD_WEIGHT, None) if labels else None

    def model(config: GPTConfig, device) -> GPT:
        with _naming(name), model_files.refused(str(checkpoint.folder)):
            if "lora" in said_of_it:
                made = _merged(checkpoint, config, headers, said_of_it["lora"])
            else:
                blocks = (str(checkpoint.folder.name), "blocks.")
                made = model_files.unfilled(config, headers, model_files.own_places, blocks, device)
                checkpoint.read(dict(made.named_parameters()), _MODEL)
            if labels:
                if head is None or head.shape != (len(labels), config.width):
                    raise ValueError(f"{adapting.HEAD_WEIGHT} is no head of {len(labels)} labels")
                adapting.add_head(made, labels)
                checkpoint.read({adapting.HEAD_WEIGHT: made.score.weight}, _MODEL)
            return made.to(device)

    about |= {"step": checkpoint.step, "folder": checkpoint.folder}
    about |= examples | ({"labels": list(labels)} if labels else {}) | ({"lora": True} if "lora" in said_of_it else {})
    return _changed(config, dropout), model, tokenizer, about


def _examples_of(about: dict[str, Any]) -> dict[str, Any]:
    """What about.json says of the examples that a run was fine-tuned on. Raises ValueError where it is none."""
    told = about.get("examples")
    if told is None:
        return {}
    kind, labels = (told.get("kind"), told.get("labels")) if isinstance(told, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(labels, list) or not all(isinstance(each, str) for each in labels):
        raise ValueError(f"about.json: examples is {said(told)}; it needs an object with kind and labels")
    return {"examples": {"kind": kind, "labels": labels}}


def _merged(checkpoint: Checkpoint, config: GPTConfig, headers: dict[str, Header], said_of_it: Any) -> GPT:
    """The model that a run's adapters are for, with these merged into it."""
    if not isinstance(said_of_it, dict) or not isinstance(said_of_it.get("base"), str):
        raise ValueError(f"about.json: lora is {said(said_of_it)}; it needs an object with the folder of its base")
    alpha = said_of_it.get("alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"about.json: lora: alpha is {said(alpha)}; it needs a number")
    of, load = opened(said_of_it["base"], "cpu", "its base", config.dropout, alone=True)
    if of != config:
        raise ValueError(f"about.json: config is {config}; its base has {of}")
    made = load().model
    adapting.strip_head(made)
    adapting.check_base(made, said_of_it, str(checkpoint.folder))
    state = {key: torch.empty(header.shape) for key, header in headers.items()}
    checkpoint.read(state, _MODEL)
    layers = {key.rpartition(".")[0] for key in state}
    state |= {f"{layer}.lora_alpha": torch.tensor(float(alpha), dtype=torch.float64) for layer in layers}
    lora.load(made, state)
    lora.merge(made, reversible=False)
    return made


def _of_gptkern(folder: Path, name: str, dropout):
    from gptkern.training.data.tokenizers import bytes_tokenizer

    missing = [file for file in (CONFIG, PARAMETERS) if not (folder / file).is_file()]
    if missing:
        beside = _beside(folder)
        hint = f"; did you mean {beside}?" if beside else ""
        raise UserError(f"{name} is no checkpoint: {' and '.join(missing)} not found in it{hint}{_pickled(folder)}")
    with model_files.refused(name):
        config = model_files.config_of(json_object(folder / CONFIG))
    # Models of other vocabularies had no tokenizer beside them.
    tokenizer = (
        bytes_tokenizer(end_of_text=config.vocab_size > BYTES) if config.vocab_size in (BYTES, BYTES + 1) else None
    )

    def model(config: GPTConfig, device) -> GPT:
        with model_files.refused(name):
            tensors = SafetensorsFiles(folder, [PARAMETERS])
            return model_files.filled(config, tensors, model_files.own_places, (PARAMETERS, "blocks."), device)

    return _changed(config, dropout), model, tokenizer, {"kind": "gptkern"}


def _of_transformers(folder: Path, content: dict[str, Any], name: str, dropout):
    with model_files.refused(name):
        config = gpt2_layout.config_of(content)
    weights = [file for file in (PARAMETERS, INDEX, PLANES) if (folder / file).exists()]
    if not weights:
        raise UserError(f"{name} is no checkpoint: {PARAMETERS} not found in it{_pickled(folder)}")
    if len(weights) > 1:
        raise UserError(f"{name} holds {' and '.join(weights)}; it needs to have its weights once")
    tokenizer = _tokenizer_of(folder, name)
    with model_files.refused(name):
        labels = gpt2_layout.labels_of(content)

    def model(config: GPTConfig, device) -> GPT:
        with model_files.refused(name):
            tensors = _tensors(folder, weights[0])
            prefix = gpt2_layout.prefix_of(tensors.headers)
            head = tensors.headers.get(adapting.HEAD_WEIGHT) if labels else None
            made = model_files.filled(
                config,
                tensors,
                lambda config: gpt2_layout.places(config, prefix),
                (weights[0], f"{prefix}h."),
                device,
                lambda key: gpt2_layout.is_mask(key) or (head is not None and key == adapting.HEAD_WEIGHT),
            )
            if labels:
                if head is None or head.shape != (len(labels), config.width):
                    raise ValueError(f"{weights[0]}: {adapting.HEAD_WEIGHT} is no head of {len(labels)} labels")
                adapting.add_head(made, labels)
                with torch.no_grad():
                    made.score.weight.copy_(tensors.read(adapting.HEAD_WEIGHT))
            return made

    about = {"kind": "gpt2"} | ({"labels": list(labels)} if labels else {})
    return _changed(config, dropout), model, tokenizer, about


def _tensors(folder: Path, weights: str) -> Tensors:
    if weights == PLANES:
        return BytePlanes(folder / PLANES)
    if weights == PARAMETERS:
        return SafetensorsFiles(folder, [PARAMETERS])
    where = json_object(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{INDEX}: weight_map is {said(where)}; it needs an object, tensor -> file")
    for tensor, file in where.items():
        if not is_plain(file) or not file.endswith(".safetensors"):
            raise ValueError(
                f"{INDEX}: {shown(tensor)} is in {said(file)}; it needs the name of a safetensors file in the folder"
            )
    return SafetensorsFiles(folder, sorted(set(where.values())), where)


def _tokenizer_of(folder: Path, name: str) -> Tokenizer | None:
    from gptkern.training import bytes_file
    from gptkern.training.data.tokenizers import read_tokenizer

    path = folder / TOKENIZER
    if not path.exists():
        return None
    with model_files.refused(name):
        if path.stat().st_size <= _SMALL_TOKENIZER:
            of_bytes = bytes_file.recognised(json_object(path))
            if of_bytes is not None:
                return of_bytes
    with _naming(name):
        return read_tokenizer(path)


def _changed(config: GPTConfig, dropout: float | None) -> GPTConfig:
    return config if dropout is None else dataclasses.replace(config, dropout=dropout)


def _is_one(folder: Path) -> bool:
    return model_files.held(folder) or Checkpoint.is_one(folder) or (folder / CHECKPOINTS).is_dir()


def _beside(folder: Path) -> Path | None:
    """What was meant, of a folder that is none: the demo's checkpoint lies in a folder of its own."""
    near = [folder / "checkpoint", *([folder.parent] if folder.name == CHECKPOINTS else [])]
    return next((path for path in near if _is_one(path)), None)


def _pickled(folder: Path) -> str:
    pickles = [file for file in _PICKLES if (folder / file).exists()]
    if not pickles:
        return ""
    return (
        f"; {pickles[0]} is not read, since such a file can run code: AutoModelForCausalLM.from_pretrained(…)"
        ".save_pretrained(…) writes it as safetensors, where you trust it"
    )
