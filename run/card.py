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
from files import read_json
from lora.config import LoRAConfig
from lora.peft_format import CONFIG, read_adapter_config
from run.folder import Run, adapter_sha256
from terminal import percent, printable

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

    vLLM takes alpha / r (or alpha / sqrt(r)) from the settings and ignores patterns; llama.cpp
    divides alpha by the rank of each tensor and knows no rsLoRA. Neither reads DoRA.
    """
    programs, others = ["PEFT", "transformers"], []
    rank = max([lora.r, *lora.ranks.values()])
    flag = next((f" (--max-lora-rank {r})" for r in VLLM_RANKS if r >= rank > VLLM_RANK), "")
    vllm = not (lora.dora or lora.ranks or lora.alphas) and rank <= VLLM_RANKS[-1]
    llama_cpp = not (lora.dora or lora.alphas or lora.rslora)
    for name, reads in ((f"vLLM{flag}", vllm), ("llama.cpp", llama_cpp)):
        (programs if reads else others).append(name)
    line = ", ".join(programs)
    if others:
        how = "merge it with run.export" if lora.dora else "use run.export --portable"
        line += f"; for {' and '.join(others)}, {how}"
    return line


def adapter_card(
    base: str, lora: LoRAConfig, run: Run, progress: Mapping[str, Any], adapter: Path
) -> str:
    """The card of the adapter in the folder `adapter`, trained by `run` on the base `base`.

    `progress` holds `best_step`, `best_loss`, `validation_count`; {} for an adapter without a run.
    """
    name, there = _names(base)
    max_rank = next((r for r in VLLM_RANKS if r >= lora.r), lora.r)
    vllm = (
        ""
        if lora.dora or lora.ranks or lora.alphas
        else f"""
With vLLM:

    vllm serve {there} --enable-lora --max-lora-rank {max_rank} --lora-modules tuned=FOLDER
"""
    )
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
    if base := base or run.config.get("base_folder"):
        progress = run.progress() | {"validation_count": run.validation_count()}
        card = adapter_card(base, lora, run, progress, run.best)
        (run.best / "README.md").write_text(card, "utf-8")


def _on_hub(base: str) -> bool:
    return is_hub_id(base) and not Path(base).exists()


def _names(base: str) -> tuple[str, str]:
    """What to call the base in a sentence, and in code."""
    return (base, base) if _on_hub(base) else (Path(base).name, "BASE")


def _local_note(base: str) -> str:
    return "" if _on_hub(base) else ", where BASE is the folder of the base model"


def _without_folder(data: str) -> str:
    """A source, or the description of a task, without the folder of a local file."""
    return data if is_hub_id(data.partition(" ")[0]) else data.rpartition("/")[2]


def _front_matter(base: str, run: Run, library: str) -> str:
    on_hub = _on_hub(base)
    # A source may have a weight: gsm8k:2.
    sources = [source.partition(":")[0] for source in run.options.get("data", [])]
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
    names = [_without_folder(name) for name in run.options.get("data", [])]
    data = printable(", ".join(names)) or "data that is not recorded here"
    text = f"Trained on {data}: {lora}."
    if kind := run.identity.get("base_precision"):
        text += f" The layers of the base were held in {kind}."
    if progress.get("best_loss") is not None:
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
        except (UserError, KeyError, TypeError, ValueError, ZeroDivisionError):
            continue  # the result of another version: the card does without it
    return "\n".join(
        ["", "Base against tuned, on the same problems:", "", *lines, ""] * bool(lines)
    )


def _licence_note(base: str) -> str:
    return "" if base.startswith(APACHE) else "Add the licence of the base to the first lines."
