"""The `transformers` command on a machine where `mhmoe` is not installed."""

import sys

from without_mhmoe import NotInstalled


if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled)
    from transformers.cli.transformers import app

    app()
