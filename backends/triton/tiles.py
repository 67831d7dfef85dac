"""
How the Triton kernels cut their work, by the rows that an expert has on average.

Chosen from what compiling for sm_80 and sm_90 shows (registers, shared memory, tensor cores) and by arithmetic
intensity, not by measurement. Many rows: the kernels with an epilogue (`first`, `inner`) have few steps, so that two
programs of 8 warps must fit on a multiprocessor of sm_90, one computing while the other loads or writes; the others
have many steps, for which large blocks pay: 85 FLOPs for each byte that is read, instead of 64 and 43.
"""

from typing import NamedTuple

import torch


FULL, MANY = 64, 512  # rows of an expert on average from which on its blocks have 64 and 128 rows
ROOM = 160 * 1024  # bytes of shared memory in a GPU for blocks of 128 rows


class Tile(NamedTuple):
    """Rows and columns of a program's block, the depth of a step, its warps, and the steps that are under way."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self, columns: int) -> dict[str, int]:
        """What a launch wants, for an output that has so many columns in all."""
        width = min(self.columns, max(16, 1 << (columns - 1).bit_length()))
        return {
            "ROWS": self.rows,
            "COLUMNS": width,
            "DEPTH": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Tiles(NamedTuple):
    """Of the kernels `first_product`, `scattered_product`, `inner_gradient` and `weight_gradient`."""

    first: Tile
    scattered: Tile
    inner: Tile
    weights: Tile


TILES_16_BIT = {
    MANY: Tiles(Tile(128, 64, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(128, 64, 64, 8, 3), Tile(128, 256, 64, 8, 5)),
    FULL: Tiles(Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3)),
    0: Tiles(Tile(16, 32, 128, 4, 4), Tile(16, 32, 128, 4, 4), Tile(16, 32, 128, 4, 4), Tile(64, 128, 32, 4, 3)),
}
TILES = {
    FULL: Tiles(Tile(64, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 8, 3)),
    0: Tiles(Tile(16, 32, 64, 4, 3), Tile(16, 32, 64, 4, 3), Tile(16, 32, 64, 4, 3), Tile(64, 64, 32, 8, 3)),
}


def tiles_for(rows: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    tiles = TILES_16_BIT if dtype.itemsize == 2 else TILES
    return next(
        choice
        for average, choice in tiles.items()
        if rows >= average * num_experts and (average < MANY or _roomy(device))
    )


def _roomy(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    # ROCm, which has less room, does not state it
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= ROOM
