"""Tests of hostile files: refused in two lines, within seconds, before memory is allocated."""

import ast
import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import errors
from data.chat import WORDS, ChatFormat
from errors import BadAdapter, BadCheckpoint, HubError, TrainingFailed, UserError, run_script
from lora.inject import LoRAConfig, adapters, inject
from lora.peft_format import CONFIG, WEIGHTS, read_adapter, save_adapter
from model.checkpoint import read_config, read_eos_ids
from model.load import load_model
from tests import toys
from tests.hostile import limited, load_base, load_mutated, refusal

ROOT = Path(__file__).resolve().parents[1]


def from_folder(folder: Path) -> ChatFormat:
    return ChatFormat.from_folder(folder, toys.TABLE)


# Safetensors


def with_header(header: bytes, length: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + data


def tensor(**changes: object) -> bytes:
    """The header of one tensor of 16 values, with changes."""
    about = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | changes
    return json.dumps({"model.norm.weight": about}).encode()


HOSTILE = {
    "empty": b"",
    "half a length": b"\1\0\0",
    "a length of zero": with_header(b"", 0),
    "a length beyond the file": with_header(tensor(), 10**6),
    "a huge length": with_header(tensor(), 2**62),
    "a negative length": with_header(tensor(), 2**64 - 1),
    "not JSON": with_header(b"{" * 1000),
    "deep JSON": with_header(b'{"a":' * 100_000),
    "a list": with_header(b"[]"),
    "not UTF-8": with_header(b'{"\xff": 1}'),
    "an unknown dtype": with_header(tensor(dtype="F7")),
    "a pickled dtype": with_header(tensor(dtype="O")),
    "negative offsets": with_header(tensor(data_offsets=[-64, 0])),
    "offsets in reverse": with_header(tensor(data_offsets=[64, 0])),
    "offsets beyond the file": with_header(tensor(data_offsets=[0, 2**40], shape=[2**38])),
    "a shape that overflows": with_header(tensor(shape=[2**32, 2**32, 4])),
    "a negative shape": with_header(tensor(shape=[-16])),
    "a shape of another size": with_header(tensor(shape=[17])),
    "a deep shape": with_header(tensor(shape=[1] * 100_000 + [16])),
    "overlapping tensors": with_header(tensor()[:-1] + b", " + tensor().replace(b"m", b"n")[1:]),
    "a hole": with_header(tensor(), data=b"\0" * 128),
    "the same name twice": with_header(tensor()[:-1] + b", " + tensor()[1:]),
    "control characters in a name": with_header(tensor().replace(b"norm", rb"\u001b[2J\n")),
    "a pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0cos\nsystem\n(S'true'\ntR.",
    "a zip archive": b"PK\3\4" + bytes(100),
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tensor_file_is_refused_as_base_and_as_adapter(base, adapter, content):
    model = load_base(base)
    (adapter / WEIGHTS).write_bytes(content)
    refusal(lambda: read_adapter(adapter, model), BadAdapter)
    (base / "model.safetensors").unlink()  # the old file is still mapped
    (base / "model.safetensors").write_bytes(content)
    refusal(lambda: load_base(base), BadCheckpoint)


def test_300_random_mutations_of_weights_are_refused_or_loaded_without_a_crash(base, adapter):
    outcomes = load_mutated(base, adapter, range(300))
    assert outcomes["refused"] > 500 and outcomes["loaded"] > 10


# Sizes


ABSURD = {
    "layers": {"num_hidden_layers": 2**20},
    "more layers": {"num_hidden_layers": 10**400},
    "all of them": dict.fromkeys(
        ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"), 2**23
    ),
    "the most layers allowed": {"num_hidden_layers": 512, "hidden_size": 2**23},
    "a vocabulary": {"vocab_size": 2**24},
    "no heads": {"num_attention_heads": 0},
    "half a head": {"num_attention_heads": 64},
    "heads that do not divide": {"num_attention_heads": 3},
    "true": {"num_hidden_layers": True},
    "rotation": {"rope_theta": 10**400},
    "infinite rotation": {"rope_theta": math.inf},
    "no epsilon": {"rms_norm_eps": math.nan},
}


@pytest.mark.parametrize("changes", ABSURD.values(), ids=ABSURD)
def test_absurd_sizes_are_refused_before_anything_is_allocated(base, changes):
    toys.change_json(base / "config.json", **changes)
    refusal(lambda: load_base(base), BadCheckpoint)


@pytest.mark.parametrize("rank", [10**5, 2**40, 10**400])
def test_an_adapters_rank_is_checked_against_its_file_before_it_is_allocated(base, adapter, rank):
    model = load_base(base)
    toys.change_json(adapter / CONFIG, r=rank)
    cause = refusal(lambda: read_adapter(adapter, model), BadAdapter)
    assert f"lora_A.weight is (2, 64), not ({rank}, 64)" in cause
    assert not list(adapters(model))


JSON_FILES = ["config.json", "generation_config.json", "tokenizer_config.json"]
BAD_JSON = {
    "deep": b'{"a":' * 200_000,
    "deep lists": b"[" * 200_000,
    "a very long number": b'{"hidden_size": ' + b"9" * 10_000 + b"}",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "a list": b"[1]",
    "empty": b"",
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_malformed_json_is_refused_in_every_file(base, adapter, content):
    model = load_base(base)
    (adapter / CONFIG).write_bytes(content)
    refusal(lambda: read_adapter(adapter, model), BadAdapter)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with changed(base / name, content):
            refusal(lambda: from_folder(base), BadCheckpoint)
    (base / "config.json").write_bytes(content)
    refusal(lambda: load_base(base), BadCheckpoint)


VALUES = [None, -1, 0, 1, 2, 512, 2**63, 10**50, 1e308, True, "", "x", "../x", "\0.safetensors",
          "\ud800.safetensors", "a" * 300 + ".safetensors", [], {}, [None], [[]], ["q_proj"],
          {"a": 1}, {"rope_type": ["default"]}, {"type": {}}, "all-linear", -5.5]  # fmt: skip


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("name", [*JSON_FILES, CONFIG, INDEX])
def test_random_values_in_a_json_file_never_cause_a_crash(tmp_path, adapter, name):
    base = toys.write_checkpoint(tmp_path / "sharded", shards=2)
    path = (adapter if name == CONFIG else base) / name
    content = json.loads(path.read_text())
    keys = [(content, key) for key in content]
    keys += [(content["weight_map"], key) for key in content.get("weight_map", ())]
    for place, key in keys:
        for value in random.Random(key).sample(VALUES, 4):
            before, place[key] = place[key], value
            toys.write_json(path, content)
            with contextlib.suppress(UserError), limited(seconds=2):
                from_folder(base), read_eos_ids(base)
                read_adapter(adapter, load_base(base))
            place[key] = before


@contextlib.contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """Replace the content of a file inside the block."""
    intact = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(intact)


def test_a_file_of_a_terabyte_is_refused_unread(base, adapter):
    os.truncate(adapter / WEIGHTS, 2**40)
    refusal(lambda: read_adapter(adapter, None), BadAdapter)
    for path in (base / "config.json", adapter / CONFIG, base / "tokenizer.json"):
        os.truncate(path, 2**40)  # sparse: it takes no space on the disk
    refusal(lambda: read_config(base), BadCheckpoint)
    refusal(lambda: from_folder(base), BadCheckpoint)
    refusal(lambda: read_adapter(adapter, None), BadAdapter)


# NaN and infinity


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_base_with_nan_or_infinity_is_refused_and_the_tensors_are_named(base, value):
    tensors = load_file(base / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        tensors[name].view(-1)[-1] = value
    save_file(tensors, base / "model.safetensors")
    cause = refusal(lambda: load_base(base), BadCheckpoint)
    assert "model.norm.weight holds NaN or infinity" in cause and "layers.1.mlp.up_proj" in cause


def test_a_base_whose_values_overflow_fp16_is_refused_in_fp16_only(base):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, base / "model.safetensors")
    load_model(base, dtype=torch.bfloat16)
    cause = refusal(lambda: load_model(base, dtype=torch.float16), BadCheckpoint)
    assert "float16: model.norm.weight holds" in cause


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_with_nan_or_infinity_is_never_written(base, tmp_path, value):
    model, config = load_base(base), LoRAConfig(r=2)
    inject(model, config)
    list(adapters(model))[3].lora_B.data[5, 1] = value
    with pytest.raises(TrainingFailed, match="o_proj.lora_B.weight holds NaN or infinity") as error:
        save_adapter(model, tmp_path / "new", config, base="base", revision=None)
    assert error.value.exit_code == 1 and not (tmp_path / "new").exists()


# No input is executed


SOURCES = [
    path for path in sorted(ROOT.rglob("*.py"))
    if not any(part.startswith(".") or part in ("tests", "benchmarks", "build")
               for part in path.relative_to(ROOT).parts)
]  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "globals", "torch.load", "torch.hub.load",
         "torch.jit.load", "np.load", "numpy.load", "os.system", "os.popen", "os.execv",
         "Tokenizer.from_pretrained"}  # fmt: skip
MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "importlib",
           "runpy", "jinja2", "yaml", "transformers", "peft", "datasets"}  # fmt: skip
ALLOWED = {
    "sandbox.py": {"jinja2"},  # see test_template.py
    "cli.py": {"runpy"},  # the project's own scripts, by a constant table
    "identity.py": {"importlib"},  # importlib.metadata: the installed version
    "track.py": {"importlib"},  # one of the packages in a constant table
}


def test_the_source_calls_nothing_that_executes_what_it_reads():
    found = []
    for path in SOURCES:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            names = [ast.unparse(node.func)] if isinstance(node, ast.Call) else []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module.split(".")[0]]
            found += [
                (path.name, n)
                for n in names
                if n in CALLS | MODULES - ALLOWED.get(path.name, set())
            ]
        found += [(path.name, n) for n in ("trust_remote_code", "allow_pickle") if n in text]
    assert len(SOURCES) > 30 and not found


def test_every_regular_expression_is_a_constant_of_the_source():
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        inside = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
        for node in inside:  # module level code has no data yet
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re."):
                found += [] if isinstance(node.args[0], ast.Constant) else [(path, node.lineno)]
    assert not found


@pytest.mark.parametrize(
    "part, cause",
    [
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|a)*b"}}}, "(a|a)*b"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}}}, "part Replace"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "part FixedLength"),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]}}, "part Fuse"),
        ({"model": {"type": ["BPE"], "vocab": {}, "merges": []}}, "part ['BPE']"),
    ],
)
def test_a_tokenizer_with_parts_or_expressions_that_qwen2_lacks_is_refused(base, part, cause):
    text = json.loads((base / "tokenizer.json").read_text())
    assert text["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == WORDS
    toys.write_json(base / "tokenizer.json", text | part)
    assert cause in refusal(lambda: from_folder(base), BadCheckpoint)


def test_a_tokenizer_with_an_id_outside_the_embedding_table_is_refused(base):
    text = json.loads((base / "tokenizer.json").read_text())
    text["model"]["vocab"]["a"] = 10**6
    toys.write_json(base / "tokenizer.json", text)
    assert "has a token 1000000" in refusal(lambda: from_folder(base), BadCheckpoint)


PICKLE = b"cposix\nsystem\n(S'touch %s'\ntR."
NAMES = ["pytorch_model.bin", "model.pkl", "model.pt", "tokenizer.model", "training_args.bin",
         "adapter_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "modeling_qwen2.py",
         "pytorch_model.bin.index.json", "special_tokens_map.json", "vocab.json"]  # fmt: skip
WATCHED = """
import sys
opened, unpickled = [], []
def watch(event, args):
    if event == "open" and isinstance(args[0], str): opened.append(args[0].rpartition("/")[2])
    if event == "pickle.find_class": unpickled.append(args)
import torch, pyarrow, matplotlib, train, evaluate
sys.addaudithook(watch)
train.main(sys.argv[1].split())
evaluate.main(sys.argv[2].split())
assert "config.json" in opened and "train.jsonl" in opened, opened
print("unpickled", unpickled, "opened", sorted(set(opened) & set(sys.argv[3].split())))
"""


def test_a_pickle_is_never_opened_whatever_its_name(base, arithmetic, tmp_path):
    data, run = Path(shutil.copytree(arithmetic, tmp_path / "data")), tmp_path / "run"
    for folder in (base, data):
        for name in NAMES:
            (folder / name).write_bytes(PICKLE % bytes(tmp_path / "executed"))
    small = f"--data {data} --limit 20 --precision fp32 --device cpu"
    train = f"--model {base} --out {run} --max-steps 1 {small}"
    evaluate = f"--adapter {run / 'best'} --max-new-tokens 2 --limit 2 {small}"
    command = [sys.executable, "-c", WATCHED, train, evaluate, " ".join(NAMES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "unpickled [] opened []" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "executed").exists()


# Secrets, and control characters


def test_no_error_message_contains_a_secret_or_a_control_character(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "planted-token ")
    text = "at http://me:planted-word@hub/x?t=planted-token \x1b[2J\n\u202e \ud800 hf_" + "Q" * 34

    def fails() -> None:
        raise BadCheckpoint(text, text)

    assert run_script(fails) == 2
    message = capsys.readouterr().err
    assert "planted" not in message and "QQQQ" not in message and message.count("\n") == 2
    assert message.replace("\n", "").isprintable() and "http://[hidden]hub/x" in message


def test_an_error_message_is_no_longer_than_a_screen():
    assert len(str(BadCheckpoint("x" * 10**6, "y" * 10**6))) < 4000


KINDS = {
    errors.BadOption: 2, BadCheckpoint: 2, BadAdapter: 2, errors.BadData: 2, HubError: 2,
    errors.BadRun: 2, TrainingFailed: 1,
}  # fmt: skip


@pytest.mark.parametrize("kind, code", KINDS.items())
def test_each_kind_of_error_is_printed_in_two_lines_with_its_exit_code(capsys, kind, code):
    def fails() -> None:
        raise kind("the cause", "the remedy")

    assert run_script(fails) == code
    assert capsys.readouterr().err == "error: the cause\n  the remedy\n"
    assert set(KINDS) == {k for k in UserError.__subclasses__() if k.__module__ == "errors"}
