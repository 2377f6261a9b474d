"""Exports: every program that reads one computes what the adapter computes."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from errors import BadAdapter, BadCheckpoint, BadOption
from lora.config import LoRAConfig
from lora.inject import adapters
from lora.peft_format import CONFIG, WEIGHTS, save_adapter
from model.load import load_model
from run import card, export
from run.folder import Run, adapter_sha256
from tests import toys
from tests.adapter_helpers import adapted, logits, peft_logits, transformers_model

SETTINGS = {  # each is scaled wrongly by some program
    "rslora": {"rslora": True},
    "patterns": {"ranks": {"q_proj": 2, "v_proj": 6}, "alphas": {"k_proj": 3.0}},
    "both": {"rslora": True, "ranks": {"o_proj": 1}, "alphas": {"q_proj": 5.0}},
    "plain": {},
}


@pytest.fixture
def base(tmp_path) -> Path:
    return toys.write_checkpoint(tmp_path / "base", std=0.1)


def exported(model, base: Path, *flags: str, **settings) -> Path:
    """Save the adapters of `model` and export them; returns what was written."""
    here = base.parent
    config = LoRAConfig(r=4, alpha=8, dropout=0.0, **settings)
    save_adapter(model, here / "adapter", config, base=str(base), revision=None)
    out = here / ("out.gguf" if "--gguf" in flags else "out")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        export.main(["--adapter", str(here / "adapter"), "--out", str(out), *flags])
    assert "differ from the adapter's by at most" in said.getvalue()
    return out


@pytest.mark.parametrize("case", SETTINGS)
def test_peft_computes_our_logits_with_a_portable_adapter(base, case):
    from peft import PeftModel

    model = adapted(base, **SETTINGS[case])
    expected = logits(model)
    out = exported(model, base, "--portable", **SETTINGS[case])
    theirs = PeftModel.from_pretrained(transformers_model(base), out).eval()
    with torch.no_grad():
        torch.testing.assert_close(peft_logits(theirs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", SETTINGS)
def test_the_scaling_rules_of_vllm_and_llama_cpp_give_our_update_of_a_portable_adapter(base, case):
    model = adapted(base, **SETTINGS[case])
    ours = [layer.delta() for layer in adapters(model)]
    out = exported(model, base, "--portable", **SETTINGS[case])
    settings, tensors = json.loads((out / CONFIG).read_text()), load_file(out / WEIGHTS)
    r, alpha = settings["r"], settings["lora_alpha"]
    names = [name for name, m in load_model(base, dtype=torch.float32).named_modules()
             if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))]  # fmt: skip
    for name, delta in zip(names, ours, strict=True):
        key = f"base_model.model.{name}.lora_"
        A, B = tensors[key + "A.weight"], tensors[key + "B.weight"]
        assert A.shape[0] == r == B.shape[1]  # vLLM allocates max_lora_rank, and ignores patterns
        for scale in (alpha / r, alpha / A.shape[0]):  # vLLM's rule, llama.cpp's rule
            torch.testing.assert_close(scale * (B @ A), delta, atol=1e-5, rtol=1e-5)


def test_dora_is_not_portable_and_the_remedy_is_to_merge(base):
    with pytest.raises(BadOption, match="leave out --portable"):
        exported(adapted(base, dora=True), base, "--portable", dora=True)
    assert sorted(p.name for p in base.parent.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("settings, vllm, llama_cpp", [
    ({}, True, True), ({"rslora": True}, True, False), ({"ranks": {"q_proj": 2}}, False, True),
    ({"alphas": {"q_proj": 2}}, False, False), ({"dora": True}, False, False),
    ({"r": 64}, True, True),
])  # fmt: skip
def test_the_readers_named_are_those_whose_rule_gives_our_scale(settings, vllm, llama_cpp):
    as_it_is = card.readers(LoRAConfig(**settings)).partition(";")[0]
    assert ("vLLM" in as_it_is, "llama.cpp" in as_it_is) == (vllm, llama_cpp)
    assert ("--max-lora-rank 64" in as_it_is) == (settings.get("r") == 64)


def test_a_card_shows_vllms_command_with_a_rank_that_vllm_accepts_or_not_at_all(tmp_path):
    for rank, flag in ((1, 8), (16, 16), (100, 128), (512, 512), (513, None)):
        text = card.adapter_card("demo", LoRAConfig(r=rank), Run(tmp_path), {}, tmp_path)
        assert (f"--max-lora-rank {flag} --lora-modules" in text) == (flag is not None)
        as_it_is = card.readers(LoRAConfig(r=rank)).partition(";")[0]
        assert ("vllm serve" in text) == ("vLLM" in as_it_is) == (flag is not None)


@pytest.mark.parametrize("flags", [(), ("--portable",), ("--gguf",)])
def test_an_export_that_computes_something_else_fails_and_leaves_everything_as_it_was(
    base, monkeypatch, flags
):
    model = adapted(base)
    read = export.reload

    def damaged(*args):
        model = read(*args)
        model.model.layers[0].self_attn.v_proj.requires_grad_(False)
        next(iter(model.model.norm.parameters())).data *= -1
        return model

    monkeypatch.setattr(export, "reload", damaged)
    with pytest.raises(export.ExportFailed, match="model.norm.weight is not what was wr") as caught:
        exported(model, base, *flags)
    assert caught.value.exit_code == 1
    assert sorted(p.name for p in base.parent.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_merge_that_computes_something_else_fails(base, monkeypatch, dtype):
    model, merge = adapted(base), export.merge

    def wrong(model, dtype):
        first = next(iter(adapters(model)))
        first.scaling *= 0.75  # one of eight projections
        return merge(model, dtype)

    monkeypatch.setattr(export, "merge", wrong)
    with pytest.raises(export.ExportFailed, match="differ from the adapter's by at most"):
        exported(model, base, "--dtype", dtype)
    assert sorted(p.name for p in base.parent.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("flags", [(), ("--portable",), ("--gguf",), ("--dtype", "fp16")])
@pytest.mark.parametrize("std", [0.02, 0.3])
def test_rounding_alone_is_within_the_tolerance_also_for_a_bf16_base(tmp_path, flags, std):
    base = toys.write_checkpoint(tmp_path / "base", std=std, dtype=torch.bfloat16)
    exported(adapted(base, ranks={"q_proj": 3}), base, *flags, ranks={"q_proj": 3})  # scaling 8/3


def test_a_large_checkpoint_is_split_with_an_index_that_transformers_reads(base, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 60_000)
    model = adapted(base)
    expected = logits(model)
    out = exported(model, base, "--dtype", "fp32")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {path.name for path in out.glob("*.safetensors")}
    assert len(files) > 2 and set(index["weight_map"].values()) == files
    with torch.no_grad():
        theirs = peft_logits(transformers_model(out))
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype, name", [("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16")])
def test_a_gguf_file_holds_the_merged_tensors_and_the_tokenizer(tmp_path, dtype, name, tied):
    gguf = pytest.importorskip("gguf")
    base = toys.write_checkpoint(tmp_path / "base", tied=tied)
    merged = exported(adapted(base), base, "--dtype", dtype)
    reader = gguf.GGUFReader(exported(adapted(base), base, "--dtype", dtype, "--gguf"))
    found = {tensor.name: tensor for tensor in reader.tensors}
    ours = load_file(merged / "model.safetensors")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    names = {key: table.get_name(key, (".weight", ".bias")) for key in ours}
    assert set(names.values()) == found.keys() and ("output.weight" in found) != tied
    for key, tensor in ours.items():
        theirs = found[names[key]]
        kind = "F32" if tensor.dim() == 1 else name  # norms and biases
        assert theirs.tensor_type.name == kind
        assert list(reversed(theirs.shape)) == list(tensor.shape)
        stored = tensor.float() if kind == "F32" else tensor
        assert theirs.data.tobytes() == stored.contiguous().view(torch.uint8).numpy().tobytes()
    field = {key: value.contents() for key, value in reader.fields.items()}
    assert field["general.architecture"] == "qwen2" and field["tokenizer.ggml.pre"] == "qwen2"
    assert field["qwen2.attention.head_count_kv"] == 2
    tokens = field["tokenizer.ggml.tokens"]
    assert len(tokens) == toys.TABLE and tokens[toys.IM_END] == "<|im_end|>"
    assert tokens[toys.TOKENS] == f"[PAD{toys.TOKENS}]"  # a row without a token
    assert field["tokenizer.ggml.eos_token_id"] == toys.IM_END
    assert field["tokenizer.ggml.token_type"][toys.IM_START] == gguf.TokenType.CONTROL
    assert "im_start" in field["tokenizer.chat_template"]


def test_a_gguf_file_is_not_made_of_a_tokenizer_that_it_would_name_wrongly(base):
    model = adapted(base)
    text = (base / "tokenizer.json").read_text()
    (base / "tokenizer.json").write_text(text.replace('"NFC"', '"NFKC"'))
    with pytest.raises(BadCheckpoint, match="is not a Qwen2 tokenizer: part NFKC"):
        exported(model, base, "--gguf")
    assert sorted(p.name for p in base.parent.iterdir()) == ["adapter", "base"]
    exported(model, base)


# Model cards


def front_matter(text: str) -> dict:
    """The YAML between the first two lines of ---: the part that the Hub reads."""
    yaml = pytest.importorskip("yaml")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def a_run(folder: Path, data: list[str]) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    toys.write_json(folder / "config.json", {"options": {"data": data}, "identity": {}})
    return Run(folder)


def test_a_card_names_base_and_data_by_their_hub_ids_and_leaves_out_what_is_local(tmp_path):
    run = a_run(tmp_path / "run", ["gsm8k:2", "rows.jsonl", "arc-easy", "owner/name/folder"])
    progress = {"best_step": 3, "best_loss": 0.5}
    text = card.adapter_card("Qwen/Qwen2-0.5B-Instruct", LoRAConfig(), run, progress, run.best)
    assert front_matter(text) == {
        "base_model": "Qwen/Qwen2-0.5B-Instruct", "base_model_relation": "adapter",
        "datasets": ["openai/gsm8k", "allenai/ai2_arc", "owner/name"], "library_name": "peft",
        "license": "apache-2.0", "pipeline_tag": "text-generation", "tags": ["lora"],
    }  # fmt: skip
    for local in (str(tmp_path), "demo", "./base"):
        fields = front_matter(card.adapter_card(local, LoRAConfig(), run, progress, run.best))
        assert not fields.keys() & {"base_model", "base_model_relation", "license"}


@pytest.mark.parametrize("make", [card.adapter_card, card.merged_card])
def test_a_card_of_a_local_base_names_its_folder_but_no_path_and_says_what_to_fill_in(
    tmp_path, make
):
    local = tmp_path / "my-qwen"
    run = a_run(tmp_path / "run", [f"{tmp_path}/rows.jsonl", "gsm8k:2"])
    text = make(str(local), LoRAConfig(), run, {}, tmp_path)
    (title,) = [line for line in text.splitlines() if line.startswith("# ")]
    assert str(tmp_path) not in text and "my-qwen" in title
    assert "Trained on rows.jsonl, gsm8k:2: " in text
    if make is card.adapter_card:
        assert 'from_pretrained("BASE")' in text and "vllm serve BASE " in text
        assert "BASE is the folder of the base model" in text
    hub = make("Qwen/Qwen2-0.5B", LoRAConfig(), Run(tmp_path / "run"), {}, tmp_path)
    assert "BASE" not in hub


def test_the_card_of_a_local_base_gets_the_results_of_evaluations_too(base):
    run = a_run(base.parent / "run", ["gsm8k"])
    toys.change_json(run.folder / "config.json", base_folder=str(base))
    save_adapter(adapted(base), run.best, LoRAConfig(r=4, alpha=8), base=None, revision=None)
    a_result(run, data=f"{base.parent}/sums, test")
    card.refresh_card(run)
    text = (run.best / "README.md").read_text()
    assert (
        "- sums, test: 25.0 % of 4 problems before, 75.0 % after" in text
        and str(base.parent) not in text
    )


def a_result(run: Run, data: str = "GSM8K, test") -> None:
    """Write the result of an evaluation of the run's best adapter."""
    result = {"settings": {"adapter_sha256": adapter_sha256(run.best), "data": data},
              "problems": 4, "in_words": "+50.0 points, 95 % between +10 and +90: better",
              "models": {"base": {"outcomes": [True, False, False, False]},
                         "tuned": {"outcomes": [True, True, True, False]}}}  # fmt: skip
    (run.folder / "evaluation" / "test-1").mkdir(parents=True)
    toys.write_json(run.folder / "evaluation" / "test-1" / "result.json", result)


def test_a_card_reports_only_evaluations_of_exactly_this_adapter(base):
    model = adapted(base)
    run = a_run(base.parent / "run", ["gsm8k"])
    save_adapter(model, run.best, LoRAConfig(r=4, alpha=8), base=str(base), revision=None)
    a_result(run)
    card.refresh_card(run)
    line = "- GSM8K, test: 25.0 % of 4 problems before, 75.0 % after (+50.0 points, 95 % between"
    assert line in (run.best / "README.md").read_text()
    weights = run.best / WEIGHTS
    weights.write_bytes(weights.read_bytes() + b"x")
    assert line not in card.adapter_card("demo", LoRAConfig(), run, {}, run.best)


def test_a_card_leaves_out_what_a_file_of_the_run_does_not_hold_in_the_right_form(base):
    run = a_run(base.parent / "run", ["gsm8k"])
    save_adapter(adapted(base), run.best, LoRAConfig(r=4, alpha=8), base=str(base), revision=None)
    a_result(run)
    path = run.folder / "evaluation/test-1/result.json"
    whole = json.loads(path.read_text())
    assert "Base against tuned" in card.adapter_card("demo", LoRAConfig(), run, {}, run.best)
    huge = whole["models"] | {"tuned": {"outcomes": [10**400]}}
    for change in (
        {"settings": whole["settings"] | {"data": 5}},
        {"models": huge},
        {"problems": 0},
    ):
        toys.write_json(path, whole | change)
        assert "Base against tuned" not in card.adapter_card("x", LoRAConfig(), run, {}, run.best)
    for data, said in (("gsm8k", "gsm8k"), (["a.jsonl", 5], "a.jsonl"), (5, "data that is not")):
        toys.change_json(run.folder / "config.json", options={"data": data})
        for progress in ({"best_loss": "low", "best_step": 1}, {"best_loss": 0.5}):
            text = card.adapter_card("demo", LoRAConfig(), run, progress, run.best)
            assert f"Trained on {said}" in text and "Best at step" not in text


def test_an_adapter_that_is_not_as_it_was_written_is_not_exported(base):
    folder = base.parent / "adapter"
    config = LoRAConfig(r=4, alpha=8, dropout=0.0)
    save_adapter(adapted(base), folder, config, base=str(base), revision=None)
    (folder / "origin.json").write_text('{"adapter_sha256": ["another"]}')
    with pytest.raises(BadAdapter, match="is not as it was written"):
        export.main(["--adapter", str(folder), "--out", str(base.parent / "out")])
    assert not (base.parent / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_export_whose_logits_are_not_finite_is_not_kept(value):
    logits = torch.ones(2, 3)
    with pytest.raises(export.ExportFailed, match="more than rounding does"):
        export.compared(logits, logits + value, torch.float32)
