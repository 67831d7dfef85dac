"""lm-eval's models that answer for a model of ours."""

import importlib.metadata
from typing import TYPE_CHECKING, Literal
from unittest.mock import patch

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
    version = importlib.metadata.version

    def version_of(name: str) -> str:
        try:
            return version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{vllm.__version__}+cpu"  # the build for CPUs, which is a package of another name

    with patch("importlib.metadata.version", version_of):  # which lm-eval's module keeps
        from lm_eval.models.vllm_causallms import VLLM
    return VLLM
