"""The model card of an adapter or a merged model: `README.md`, with the Hub's YAML front matter.

Format: huggingface.co/docs/hub/model-cards. The Hub refuses a `base_model` that is not one of its
ids, so the field is left out for a base from a local folder. Its path is not written either: it is
of no use to others and may be private.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.custom import is_hub_id
from errors import UserError
from files import read_json, write_file
from lora.config import LoRAConfig
from lora.peft_format import CONFIG, read_adapter_config
from run.folder import Run, adapter_sha256
from terminal import percent, printable
from typed import fits

DATASETS = {  # of the built-in tasks
    "gsm8k": "openai/gsm8k", "gsm8k-socratic": "openai/gsm8k", "arc-easy": "allenai/ai2_arc",
    "arc-challenge": "allenai/ai2_arc", "mmlu": "cais/mmlu", "hellaswag": "Rowan/hellaswag",
}  # fmt: skip
# Bases with Apache-2.0 weights; of the others, the licence is left to the person who publishes.
APACHE = (
    *(f"Qwen/Qwen2-{size}" for size in ("0.5B", "1.5B", "7B")),
    *(f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "7B", "14B", "32B")),
    "Qwen/Qwen3-",
)
VLLM_RANK = 16  # vLLM's default --max-lora-rank
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those it accepts


def readers(lora: LoRAConfig) -> str:
    """One line: which programs compute with the adapter exactly as it was trained.

    llama.cpp divides alpha by the rank of each tensor, and knows neither rsLoRA nor DoRA.
    """
    programs, others, rank = ["PEFT", "transformers"], [], vllm_rank(lora)
    flag = f" (--max-lora-rank {rank})" if rank and rank > VLLM_RANK else ""
    llama_cpp = not (lora.dora or lora.alphas or lora.rslora)
    for name, reads in ((f"vLLM{flag}", rank), ("llama.cpp", llama_cpp)):
        (programs if reads else others).append(name)
    line = ", ".join(programs)
    if others:
        how = "merge it with run.export" if lora.dora else "use run.export --portable"
        line += f"; for {' and '.join(others)}, {how}"
    return line


def vllm_rank(lora: LoRAConfig) -> int | None:
    """The least --max-lora-rank with which vLLM computes the adapter as it is; None if it cannot.

    It takes alpha / r (or alpha / sqrt(r)) from the settings, and ignores patterns and DoRA.
    """
    if lora.dora or lora.ranks or lora.alphas:
        return None
    return next((rank for rank in VLLM_RANKS if rank >= lora.r), None)


def adapter_card(
    base: str, lora: LoRAConfig, run: Run, progress: Mapping[str, Any], adapter: Path
) -> str:
    """The card of the adapter in the folder `adapter`, trained by `run` on the base `base`.

    `progress` holds `best_step`, `best_loss`, `validation_count`; {} for an adapter without a run.
    """
    name, there = _names(base)
    vllm = ""
    if rank := vllm_rank(lora):
        vllm = f"""
With vLLM:

    vllm serve {there} --enable-lora --max-lora-rank {rank} --lora-modules tuned=FOLDER
"""
    return f"""{_front_matter(base, run, "peft")}
# LoRA adapter for {name}

{_training(lora, run, progress)}
{_results(run, adapter)}
With PEFT and transformers{_local_note(base)}:

    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("{there}")
    model = PeftModel.from_pretrained(model, "FOLDER")
{vllm}
Which programs compute with it exactly as it was trained: {readers(lora)}.

To publish it: `hf upload OWNER/NAME FOLDER`. {_licence_note(base)}
"""


def merged_card(
    base: str, lora: LoRAConfig, run: Run, progress: Mapping[str, Any], adapter: Path
) -> str:
    """The card of the checkpoint that the adapter was merged into."""
    return f"""{_front_matter(base, run, "transformers")}
# {_names(base)[0]}, fine-tuned

{_training(lora, run, progress)} The adapter is merged into the weights.
{_results(run, adapter)}
With transformers: `AutoModelForCausalLM.from_pretrained("FOLDER")`. With vLLM: `vllm serve FOLDER`.

To publish it: `hf upload OWNER/NAME FOLDER`. {_licence_note(base)}
"""


def refresh_card(run: Run) -> None:
    """Write the card of `run.best` again, with the results of evaluations since then."""
    if not (run.best / CONFIG).exists():  # another adapter of the run was evaluated
        return
    lora, base, _ = read_adapter_config(run.best)
    base = base or run.config.get("base_folder")
    if isinstance(base, str):
        progress = run.progress() | {"validation_count": run.validation_count()}
        card = adapter_card(base, lora, run, progress, run.best)
        write_file(run.best / "README.md", card.encode())


def _on_hub(base: str) -> bool:
    return is_hub_id(base) and not Path(base).exists()


def _names(base: str) -> tuple[str, str]:
    """What to call the base in a sentence, and in code."""
    return (base, base) if _on_hub(base) else (Path(base).name, "BASE")


def _local_note(base: str) -> str:
    return "" if _on_hub(base) else ", where BASE is the folder of the base model"


def _sources(run: Run) -> list[str]:
    """The sources of a run, as its options name them; earlier versions had a single text."""
    data = run.options.get("data")
    if isinstance(data, list):
        return [source for source in data if isinstance(source, str)]
    return [data] if isinstance(data, str) else []


def _without_folder(data: str) -> str:
    """A source, or the description of a task, without the folder of a local file."""
    return data if is_hub_id(data.partition(" ")[0]) else data.rpartition("/")[2]


def _front_matter(base: str, run: Run, library: str) -> str:
    on_hub = _on_hub(base)
    # A source may have a weight: gsm8k:2.
    sources = [source.partition(":")[0] for source in _sources(run)]
    names = [DATASETS.get(name, name) for name in sources]
    # Hub ids, without the folder of owner/name/folder
    datasets = dict.fromkeys("/".join(n.split("/")[:2]) for n in names if is_hub_id(n))
    fields = {
        "base_model": base if on_hub else None,
        "base_model_relation": ("adapter" if library == "peft" else "finetune") if on_hub else None,
        "datasets": f"[{', '.join(datasets)}]" if datasets else None,
        "library_name": library,
        "license": "apache-2.0" if base.startswith(APACHE) else None,
        "pipeline_tag": "text-generation",
        "tags": "[lora]",
    }
    lines = [f"{name}: {value}" for name, value in fields.items() if value]
    return "\n".join(["---", *lines, "---"])


def _training(lora: LoRAConfig, run: Run, progress: Mapping[str, Any]) -> str:
    data = printable(", ".join(map(_without_folder, _sources(run))))
    text = f"Trained on {data or 'data that is not recorded here'}: {lora}."
    if kind := run.identity.get("base_precision"):
        text += f" The layers of the base were held in {kind}."
    if fits(progress.get("best_loss"), float) and fits(progress.get("best_step"), int):
        text += f" Best at step {progress['best_step']}, with a validation loss of"
        text += f" {progress['best_loss']:.4f} nats per supervised token"
        count = progress.get("validation_count")
        text += f", the best of {count} validations so far." if count else "."
    return text


def _results(run: Run, adapter: Path) -> str:
    """One line for each evaluation of exactly this adapter, against its base."""
    digest, lines = adapter_sha256(adapter), []
    for path in sorted((run.folder / "evaluation").glob("*/result.json")):
        try:
            result = read_json(path, UserError, "")
            settings, models, n = result["settings"], result["models"], result["problems"]
            if settings["adapter_sha256"] != digest or "in_words" not in result:
                continue
            base, tuned = (sum(models[name]["outcomes"]) / n for name in ("base", "tuned"))
            lines.append(
                f"- {printable(_without_folder(settings['data']))}: {percent(base)} of {n:,}"
                f" problems before, {percent(tuned)} after ({result['in_words']})"
            )
        except (UserError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            continue  # the result of another version: the card does without it
    return "\n".join(
        ["", "Base against tuned, on the same problems:", "", *lines, ""] * bool(lines)
    )


def _licence_note(base: str) -> str:
    return "" if base.startswith(APACHE) else "Add the licence of the base to the first lines."
