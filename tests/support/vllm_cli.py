"""The command `vllm`, which asks for the version of a package "vllm"; its builds for CPUs have other names."""

import importlib.metadata

import vllm
from vllm.entrypoints.cli.main import main


version = importlib.metadata.version
importlib.metadata.version = lambda name: vllm.__version__ if name == "vllm" else version(name)

if __name__ == "__main__":
    main()
