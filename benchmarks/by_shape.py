"""Whether a base of a published size trains on this machine: `train.py`, without the weights.

    python benchmarks/by_shape.py --size Qwen2.5-7B --tokenizer FOLDER --options "--data gsm8k
        --max-steps 3 --base-precision nf4 --checkpoint-activations"

The base is a checkpoint of zeros in a sparse file, which occupies no disk. The run is a real one,
from its estimate, or refusal, to its adapter, and neither memory nor refusals depend on values. Its
losses mean nothing, and its folder is deleted.
"""

import json
import shlex
import shutil
import struct
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from benchmarks.common import trust_if_counting
from benchmarks.memory import SIZES
from errors import run_script
from model.checkpoint import find_checkpoint
from model.qwen2 import Qwen2, Qwen2Config
from run.device import peak_memory_gb, pick_device
from run.options import option, parse


@dataclass(frozen=True)
class ShapeConfig:
    size: str = option("Qwen2.5-7B", "size of the base", choices=tuple(SIZES))
    tokenizer: str = option("Qwen/Qwen2-0.5B-Instruct", "base whose tokenizer it has", path="any")
    options: str = option("", "options of train.py, as one text; not --model and --out")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of the run, after the peak of its memory."""
    config = parse(ShapeConfig, argv, "train.py on a base of zeros that has a published size.")
    trust_if_counting()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / config.size
        shutil.copytree(find_checkpoint(config.tokenizer).folder, folder,
                        ignore=shutil.ignore_patterns("*.safetensors*"))  # fmt: skip
        write_zeros(SIZES[config.size], folder)
        own = ["--model", str(folder), "--out", f"{place}/run"]
        code = train.main([*shlex.split(config.options), *own])
    print(f"peak memory {peak_memory_gb(pick_device('auto')):.2f} GB")
    return code


def write_zeros(sizes: Qwen2Config, folder: Path) -> None:
    """Give `folder`, which has the other files of a checkpoint, a bf16 base of these sizes."""
    with torch.device("meta"):
        tensors = Qwen2(sizes).to(torch.bfloat16).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)  # what was never written reads as zeros
    path = folder / "config.json"
    same = {name: value for name, value in asdict(sizes).items() if value is not None}
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | same), "utf-8")


if __name__ == "__main__":
    sys.exit(run_script(main))
