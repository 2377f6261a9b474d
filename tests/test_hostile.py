"""Laws of files that nobody vouches for: refused soon, in two lines, before memory is taken."""

import ast
import contextlib
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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

ROOT = Path(__file__).resolve().parents[1]
GB = 2**30


@pytest.fixture
def base(checkpoint, tmp_path):
    """A copy of the tied checkpoint, to be spoilt."""
    return Path(shutil.copytree(checkpoint, tmp_path / "base"))


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """An adapter of that checkpoint, to be spoilt."""
    model, config = load_model(checkpoint, dtype=torch.float32), LoRAConfig(r=2)
    inject(model, config)
    save_adapter(model, tmp_path / "adapter", config, base="base", revision=None)
    return tmp_path / "adapter"


@contextlib.contextmanager
def at_most(seconds: float, memory: int = GB) -> Iterator[None]:
    """Fail beyond `seconds`; inside, allocations beyond `memory` bytes more than now fail."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, before[1]))
    started = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - started < seconds


def refusal(load: Callable, kind: type[UserError], seconds: float = 2) -> str:
    """What is said when `load` is refused: two printable lines, soon, in little memory."""
    with pytest.raises(kind) as caught, at_most(seconds):
        load()
    lines = str(caught.value).split("\n")
    assert len(lines) == 2 and all(line and line.isprintable() for line in lines), lines
    assert caught.value.exit_code == 2
    return caught.value.cause


def load_base(folder: Path):
    return load_model(folder, dtype=torch.float32)


def from_folder(folder: Path) -> ChatFormat:
    return ChatFormat.from_folder(folder, toys.TABLE)


# Safetensors


def with_header(header: bytes, length: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + data


def tensor(**changes: object) -> bytes:
    """The header of one tensor of 16 numbers, with changes."""
    about = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | changes
    return json.dumps({"model.norm.weight": about}).encode()


HOSTILE = {
    "nothing": b"",
    "half a length": b"\1\0\0",
    "a length of zero": with_header(b"", 0),
    "a length beyond the file": with_header(tensor(), 10**6),
    "a huge length": with_header(tensor(), 2**62),
    "a negative length": with_header(tensor(), 2**64 - 1),
    "no JSON": with_header(b"{" * 1000),
    "deep JSON": with_header(b'{"a":' * 100_000),
    "a list": with_header(b"[]"),
    "not UTF-8": with_header(b'{"\xff": 1}'),
    "an unknown dtype": with_header(tensor(dtype="F7")),
    "a pickled dtype": with_header(tensor(dtype="O")),
    "negative offsets": with_header(tensor(data_offsets=[-64, 0])),
    "offsets the wrong way": with_header(tensor(data_offsets=[64, 0])),
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
    (base / "model.safetensors").unlink()  # it is still mapped
    (base / "model.safetensors").write_bytes(content)
    refusal(lambda: load_base(base), BadCheckpoint)


def mutated(whole: bytes, seed: int) -> bytes:
    """`whole` with one to a few random changes, most of them in the header."""
    rng = random.Random(seed)
    content = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        header = 8 + int.from_bytes(whole[:8], "little")
        at = rng.randrange(8, max(9, min(header, len(content) - 1)))
        match rng.randrange(8):
            case 0:
                content[rng.randrange(8)] = rng.randrange(256)
            case 1 | 2:
                content[at : at + 1] = bytes([rng.choice(b'0123456789{}[]",:-\\eE\0\xff')])
            case 3:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 4:
                content[at:at] = rng.choice((b"9" * 20, b"-", b"null", b"{", b'"', b"[]", b"\n"))
            case 5:
                del content[at : at + rng.randrange(1, 40)]
            case 6:
                del content[rng.randrange(len(content) + 1) :]
            case 7:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        content += bytes(max(0, 10 - len(content)))
    return bytes(content)


def survive_mutations(base: Path, adapter: Path, seeds: range) -> dict[str, int]:
    """Load mutated weights of both kinds; how many were refused, and how many were still whole."""
    files = {
        base / "model.safetensors": lambda: load_base(base),
        adapter / WEIGHTS: lambda: read_adapter(adapter, load_base(base)),
    }
    outcomes = {"refused": 0, "loaded": 0}
    for path, load in files.items():
        whole = path.read_bytes()
        for seed in seeds:
            path.unlink()  # the old one may still be mapped
            path.write_bytes(mutated(whole, seed))
            try:
                with at_most(seconds=2):
                    load()
                outcomes["loaded"] += 1
            except (BadCheckpoint, BadAdapter) as error:
                assert len(str(error).split("\n")) == 2, (seed, str(error))
                outcomes["refused"] += 1
        path.unlink()
        path.write_bytes(whole)
    return outcomes


def test_300_random_mutations_of_weights_are_refused_or_loaded_and_never_crash(base, adapter):
    outcomes = survive_mutations(base, adapter, range(300))
    assert outcomes["refused"] > 500 and outcomes["loaded"] > 10


# Sizes


ABSURD = {
    "layers": {"num_hidden_layers": 2**20},
    "more layers": {"num_hidden_layers": 10**400},
    "all of them": dict.fromkeys(
        ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"), 2**23
    ),
    "as many layers as may be": {"num_hidden_layers": 512, "hidden_size": 2**23},
    "a vocabulary": {"vocab_size": 2**24},
    "none": {"num_attention_heads": 0},
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
def test_an_adapters_rank_is_compared_with_its_file_before_it_is_allocated(base, adapter, rank):
    model = load_base(base)
    toys.change_json(adapter / CONFIG, r=rank)
    assert f"rank {rank} means" in refusal(lambda: read_adapter(adapter, model), BadAdapter)
    assert not list(adapters(model))


JSON_FILES = ["config.json", "generation_config.json", "tokenizer_config.json"]
NO_JSON = {
    "deep": b'{"a":' * 200_000,
    "deep lists": b"[" * 200_000,
    "a number without end": b'{"hidden_size": ' + b"9" * 10_000 + b"}",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "a list": b"[1]",
    "nothing": b"",
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_json_that_is_none_is_refused_wherever_it_stands(base, adapter, content):
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
def test_random_values_in_a_json_file_are_refused_or_taken_and_never_crash(tmp_path, adapter, name):
    base = toys.write_checkpoint(tmp_path / "sharded", shards=2)
    path = (adapter if name == CONFIG else base) / name
    whole = json.loads(path.read_text())
    keys = [(whole, key) for key in whole]
    keys += [(whole["weight_map"], key) for key in whole.get("weight_map", ())]
    for place, key in keys:
        for value in random.Random(key).sample(VALUES, 4):
            before, place[key] = place[key], value
            toys.write_json(path, whole)
            with contextlib.suppress(UserError), at_most(seconds=2):
                from_folder(base), read_eos_ids(base)
                read_adapter(adapter, load_base(base))
            place[key] = before


@contextlib.contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    whole = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(whole)


def test_a_json_file_too_large_to_be_one_is_refused_unread(base, adapter):
    for path in (base / "config.json", adapter / CONFIG, base / "tokenizer.json"):
        os.truncate(path, 2**40)  # sparse: it takes no room
    refusal(lambda: read_config(base), BadCheckpoint)
    refusal(lambda: from_folder(base), BadCheckpoint)
    refusal(lambda: read_adapter(adapter, None), BadAdapter)


# Numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_base_with_a_number_that_is_none_is_refused_and_its_tensors_are_named(base, value):
    tensors = load_file(base / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        tensors[name].view(-1)[-1] = value
    save_file(tensors, base / "model.safetensors")
    cause = refusal(lambda: load_base(base), BadCheckpoint)
    assert "model.norm.weight holds NaN or infinity" in cause and "layers.1.mlp.up_proj" in cause


def test_a_base_whose_numbers_fp16_cannot_hold_is_refused_in_fp16_alone(base):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, base / "model.safetensors")
    load_model(base, dtype=torch.bfloat16)
    cause = refusal(lambda: load_model(base, dtype=torch.float16), BadCheckpoint)
    assert "float16: model.norm.weight holds" in cause


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_with_a_number_that_is_none_is_never_written(base, tmp_path, value):
    model, config = load_base(base), LoRAConfig(r=2)
    inject(model, config)
    list(adapters(model))[3].lora_B.data[5, 1] = value
    with pytest.raises(TrainingFailed, match="o_proj.lora_B.weight holds NaN or infinity") as error:
        save_adapter(model, tmp_path / "new", config, base="base", revision=None)
    assert error.value.exit_code == 1 and not (tmp_path / "new").exists()


# Nothing that comes in is run


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


def test_the_source_has_no_way_to_run_what_it_reads():
    found = []
    for path in SOURCES:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            names = [ast.unparse(node.func)] if isinstance(node, ast.Call) else []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module.split(".")[0]]
            allowed = {"jinja2"} if path.name == "sandbox.py" else set()  # see test_template.py
            found += [(path.name, n) for n in names if n in CALLS | MODULES - allowed]
        found += [(path.name, n) for n in ("trust_remote_code", "allow_pickle") if n in text]
    assert len(SOURCES) > 30 and not found


def test_every_regular_expression_stands_in_the_source():
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        inside = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
        for node in inside:  # outside of functions there is no data yet
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re."):
                found += [] if isinstance(node.args[0], ast.Constant) else [(path, node.lineno)]
    assert not found


@pytest.mark.parametrize(
    "part, said",
    [
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|a)*b"}}}, "(a|a)*b"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}}}, "part Replace"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "part FixedLength"),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]}}, "part Fuse"),
        ({"model": {"type": ["BPE"], "vocab": {}, "merges": []}}, "part ['BPE']"),
    ],
)
def test_a_tokenizer_has_qwen2s_parts_and_expression_or_is_not_loaded(base, part, said):
    text = json.loads((base / "tokenizer.json").read_text())
    assert text["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == WORDS
    toys.write_json(base / "tokenizer.json", text | part)
    assert said in refusal(lambda: from_folder(base), BadCheckpoint)


def test_a_tokenizer_whose_ids_leave_the_embedding_table_is_refused_though_it_is_small(base):
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


def test_a_pickle_is_opened_under_no_name(base, arithmetic, tmp_path):
    data, run = Path(shutil.copytree(arithmetic, tmp_path / "data")), tmp_path / "run"
    for folder in (base, data):
        for name in NAMES:
            (folder / name).write_bytes(PICKLE % bytes(tmp_path / "was-run"))
    small = f"--data {data} --limit 20 --precision fp32 --device cpu"
    train = f"--model {base} --out {run} --max-steps 1 {small}"
    evaluate = f"--adapter {run / 'best'} --max-new-tokens 2 --limit 2 {small}"
    command = [sys.executable, "-c", WATCHED, train, evaluate, " ".join(NAMES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "unpickled [] opened []" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "was-run").exists()


# Secrets, and what a terminal would obey


def test_no_error_text_holds_a_secret_or_a_control_character(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "planted-token ")
    text = "at http://me:planted-word@hub/x?t=planted-token \x1b[2J\n\u202e \ud800 hf_" + "Q" * 34

    def fails() -> None:
        raise BadCheckpoint(text, text)

    assert run_script(fails) == 2
    said = capsys.readouterr().err
    assert "planted" not in said and "QQQQ" not in said and said.count("\n") == 2
    assert said.replace("\n", "").isprintable() and "http://[hidden]hub/x" in said


def test_an_error_text_is_no_longer_than_a_screen():
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
    assert set(KINDS) == set(UserError.__subclasses__())
