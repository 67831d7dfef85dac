"""The command `vllm`, which asks for the version of a package "vllm"; its build for CPUs has another name."""

import importlib.metadata

import vllm


version = importlib.metadata.version
importlib.metadata.version = lambda name: f"{vllm.__version__}+cpu" if name == "vllm" else version(name)

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
