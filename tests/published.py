"""Where tests find GSM8K and Qwen2's tokenizer: next to the repository, or a sample in it.

The folder `../shared` holds them as published. Without it, as in a user's clone, the same laws hold
for `tests/samples/`, which has a few rows and the part of the tokenizer that they need.
"""

from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"
SAMPLES = Path(__file__).parent / "samples"
COMPLETE = (SHARED / "gsm8k").is_dir()  # else only the samples are there
GSM8K = (SHARED if COMPLETE else SAMPLES) / "gsm8k"
REAL_TOKENIZER = SHARED / "qwen2-tokenizer"
if not REAL_TOKENIZER.is_dir():
    REAL_TOKENIZER = SAMPLES / "qwen2-tokenizer"
