"""The memory of a training step for every published size of Qwen2 and Qwen3, as a table.

    python benchmarks/sizes.py                      # the table of docs/scaling.md

Each figure is the estimate of `run/memory.py` for a GPU from 2020 or newer. Only shapes are built,
so neither a checkpoint nor a GPU is needed.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import LORA
from errors import run_script
from model.qwen2 import Qwen2, Qwen2Config
from run.memory import MemoryModel
from run.options import option, parse

UNTIED = {"tie_word_embeddings": False}
SIZES = {  # Qwen2 has those of Qwen2.5, except 3B, 14B and 32B
    "Qwen2.5-0.5B": Qwen2Config(896, 4864, 24, 14, 2, 151936),
    "Qwen2.5-1.5B": Qwen2Config(1536, 8960, 28, 12, 2, 151936),
    "Qwen2.5-3B": Qwen2Config(2048, 11008, 36, 16, 2, 151936),
    "Qwen2.5-7B": Qwen2Config(3584, 18944, 28, 28, 4, 152064, **UNTIED),
    "Qwen2.5-14B": Qwen2Config(5120, 13824, 48, 40, 8, 152064, **UNTIED),
    "Qwen2.5-32B": Qwen2Config(5120, 27648, 64, 40, 8, 152064, **UNTIED),
    "Qwen2.5-72B": Qwen2Config(8192, 29568, 80, 64, 8, 152064, **UNTIED),
    "Qwen3-0.6B": Qwen2Config(1024, 3072, 28, 16, 8, 151936, head_dim=128),
    "Qwen3-1.7B": Qwen2Config(2048, 6144, 28, 16, 8, 151936, head_dim=128),
    "Qwen3-4B": Qwen2Config(2560, 9728, 36, 32, 8, 151936, head_dim=128),
    "Qwen3-8B": Qwen2Config(4096, 12288, 36, 32, 8, 151936, head_dim=128, **UNTIED),
    "Qwen3-14B": Qwen2Config(5120, 17408, 40, 40, 8, 151936, head_dim=128, **UNTIED),
    "Qwen3-32B": Qwen2Config(5120, 25600, 64, 64, 8, 151936, head_dim=128, **UNTIED),
}
# The largest micro-batch of GSM8K with the default options: tokens, and the supervised ones.
WHOLE, QUARTER = (4376, 2822), (1569, 1135)  # QUARTER: with --batch-size 4 --grad-accum 4
FLAGS = (  # column -> micro-batch, how the base is held, whether layers are recomputed
    ("default options", WHOLE, None, False),
    ("`--batch-size 4 --grad-accum 4`", QUARTER, None, False),
    ("`--checkpoint-activations`", WHOLE, None, True),
    ("`--base-precision nf4`", WHOLE, "nf4", False),
    ("all of these", QUARTER, "nf4", True),
)


@dataclass(frozen=True)
class SizesConfig:
    """The options."""

    names: tuple[str, ...] = option(tuple(SIZES), "sizes of the base")


def main(argv: list[str] | None = None) -> None:
    """Print the table, in GB."""
    config = parse(SizesConfig, argv, "The memory of a training step for every published size.")
    print(table(config.names))


def table(names: Iterable[str] = SIZES) -> str:
    """A table in Markdown: for each size, the GB of a step with each column's flags."""
    lines = [("base", *(column for column, *_ in FLAGS)), ("---",) * (len(FLAGS) + 1)]
    for name in names:
        with torch.device("meta"):
            network = Qwen2(SIZES[name])
        cells = [name]
        for _, micro_batch, held, recompute in FLAGS:
            memory = MemoryModel(network, LORA, torch.bfloat16, torch.device("cuda"), held)
            cells.append(f"{memory.of_a_step(*micro_batch, recompute=recompute).gb:.1f}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    sys.exit(run_script(main))
