"""lm-eval's models that answer for a model of ours."""

import importlib.metadata
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from mhmoe.errors import UserError


if TYPE_CHECKING:  # which takes seconds to import
    from lm_eval.api.model import TemplateLM

Backend = Literal["hf", "vllm"]


def lm_class(backend: Backend) -> "type[TemplateLM]":
    """
    lm-eval's `hf` with statistics of the routing, or its own `vllm`.

    Raises:
        UserError: vLLM is not installed.
    """
    if backend == "hf":
        from .lm_eval_model import MHMoELM

        return MHMoELM
    try:
        import vllm
    except ModuleNotFoundError as error:
        raise UserError(f"--backend vllm needs {error.name}; install vLLM, or leave --backend out") from error
    with _package_named("vllm", f"{vllm.__version__}+cpu"):  # the build for CPUs, where "vllm" is not the name
        from lm_eval.models.vllm_causallms import VLLM
    return VLLM


def stored_dtype(model_args: dict[str, Any]) -> dict[str, str]:
    """The dtype that the weights have, as lm-eval's `hf` takes it; vLLM alone would make 16 bits of float32."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_args["pretrained"], revision=model_args.get("revision"))
    return {"dtype": str(config.dtype).removeprefix("torch.")} if config.dtype else {}


@contextmanager
def _package_named(package: str, version: str) -> Generator[None]:
    """Within it a `package` that is not installed under this name has a version, which lm-eval asks for."""
    metadata: Any = importlib.metadata
    installed = metadata.version

    def version_of(name: str) -> str:
        try:
            return installed(name)
        except importlib.metadata.PackageNotFoundError:
            if name != package:
                raise
            return version

    metadata.version = version_of
    try:
        yield
    finally:
        metadata.version = installed
