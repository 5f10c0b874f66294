"""Text through a small byte-level tokenizer, so that characters are spread over tokens."""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from select_n_core.engine.text import TextCodec, TextStream
from select_n_core.errors import ModelNotFoundError, RequestError, UnsupportedModelError

CORPUS = [
    "the quick brown fox jumps over the lazy dog, the end",
    "naïve café über 日本語 日本 🎉🎉",
]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant may speak') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tokenizer(directory: Path, chat_template: str | None = TEMPLATE) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return directory


def byte_fallback_codec() -> TextCodec:
    """As SentencePiece models decode: unknown characters are runs of byte tokens."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {"▁a": 256, "b": 257, "<unk>": 258}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer), {})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def codec(directory: Path) -> TextCodec:
    return TextCodec.load(directory)


def raw(codec: TextCodec, data: bytes) -> tuple[int, ...]:
    """One token per byte, which need not form characters."""
    names = bytes_to_unicode()
    return tuple(codec.backend.token_to_id(names[byte]) for byte in data)


def read(stream: TextStream, tokens: Iterable[int], sizes: Sequence[int] = ()) -> str:
    """Everything `stream` shows, given tokens in chunks of these sizes, then one by one."""
    tokens, text = list(tokens), ""
    for size in sizes:
        text += stream.push(tokens[:size])
        del tokens[:size]
    for token in tokens:
        text += stream.push([token])
    return text + stream.finish()


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the stop string that is completed first, the longer one of two."""
    for end in range(1, len(text) + 1):
        starts = [end - len(word) for word in stop if text[:end].endswith(word)]
        if starts:
            return text[: min(starts)]
    return text


texts = st.text("ab é日🎉\ufffd", max_size=30) | st.text(max_size=30)
words = st.lists(st.text("ab é日🎉", min_size=1, max_size=4), max_size=3)
chunks = st.lists(st.integers(0, 7), max_size=10)


@given(texts, words, chunks, texts)
@settings(max_examples=300, deadline=None)
@example("abcd", ["abcd", "bc"], [], "")
@example("xabx", ["b", "ab"], [4], "")
@example("aab", ["ab"], [], "日")
@example("日本", [], [], "\ufffd")
def test_the_stream_shows_the_text_up_to_the_first_stop_string(
    codec: TextCodec, text: str, stop: list[str], sizes: list[int], prompt: str
) -> None:
    stream = TextStream(codec, codec.encode(prompt), stop)

    shown = read(stream, codec.encode(text), sizes)

    assert shown == cut(text, stop)
    assert stream.stopped == any(word in text for word in stop)


@given(st.lists(st.integers(2, 299), max_size=30), chunks, texts)
@settings(max_examples=200, deadline=None)
def test_tokens_that_form_no_text_read_as_the_whole_does(
    codec: TextCodec, tokens: list[int], sizes: list[int], prompt: str
) -> None:
    context = codec.encode(prompt)

    shown = read(TextStream(codec, context), tokens, sizes)

    assert codec.decode(context) + shown == codec.decode([*context, *tokens])


def test_text_is_shown_as_soon_as_it_is_certain(codec: TextCodec) -> None:
    stream = TextStream(codec, codec.encode("hi"), ["abc"])

    shown = [stream.push(raw(codec, bytes([byte]))) for byte in "xabyé".encode()]

    assert shown == ["x", "", "", "aby", "", "é"]
    assert stream.finish() == ""


def test_a_stop_string_ends_the_text_for_good(codec: TextCodec) -> None:
    stream = TextStream(codec, codec.encode("hi"), ["STOP"])

    assert stream.push(codec.encode("one STOP two")) == "one "
    assert stream.stopped
    assert stream.push(codec.encode("three")) == ""
    assert stream.finish() == ""


def test_a_stop_string_in_the_prompt_does_not_count(codec: TextCodec) -> None:
    assert read(TextStream(codec, codec.encode("a ST"), ["STOP"]), codec.encode("OP b")) == "OP b"


def test_held_back_text_is_flushed_at_the_end(codec: TextCodec) -> None:
    stream = TextStream(codec, codec.encode("hi"), ["STOP"])

    assert stream.push(codec.encode("one STO")) == "one "
    assert stream.finish() == "STO"
    assert not stream.stopped


def test_unfinished_bytes_become_a_replacement_character(codec: TextCodec) -> None:
    stream = TextStream(codec, codec.encode("hi"))

    assert stream.push(raw(codec, b"x" + "🎉".encode()[:3])) == "x"
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("ending", ["日".encode()[:1], "日".encode()[:2]])
def test_a_prompt_that_ends_inside_a_character_is_not_shown(
    codec: TextCodec, ending: bytes
) -> None:
    stream = TextStream(codec, (*codec.encode("secret"), *raw(codec, ending)))

    assert stream.push(raw(codec, "日".encode()[len(ending) :] + b"!")) == "日!"


def test_special_tokens_are_not_shown(codec: TextCodec) -> None:
    assert read(TextStream(codec, codec.encode("hi")), codec.encode("a<|im_end|>b")) == "ab"


def test_bytes_that_spoil_the_bytes_before_them_do_not_end_the_stream() -> None:
    codec = byte_fallback_codec()
    party = list("🎉".encode())
    stream = TextStream(codec, [256])

    shown = [stream.push([token]) for token in [*party, *party[:2], 257, 256, *party]]

    assert shown == ["", "", "", "🎉", "", "", "\ufffd\ufffdb", " a", "", "", "", "🎉"]
    stream.push(party[:3])
    assert stream.finish() == "\ufffd\ufffd\ufffd"


def test_a_leading_space_survives_when_the_decoder_strips_the_first_one() -> None:
    codec = byte_fallback_codec()

    assert codec.decode([256, 256]) == "a a"
    assert read(TextStream(codec, [257]), [256, 256]) == " a a"
    assert codec.token_text(256) == " a"


def test_an_empty_stop_string_is_refused(codec: TextCodec) -> None:
    with pytest.raises(RequestError, match="stop") as caught:
        TextStream(codec, (5,), ["", "x"])
    assert caught.value.field == "stop"


@given(st.text(max_size=50))
@settings(deadline=None)
def test_any_text_survives_the_round_trip(codec: TextCodec, text: str) -> None:
    assert codec.decode(codec.encode(text)) == text


def test_a_lone_surrogate_is_refused_in_prompts_and_messages(codec: TextCodec) -> None:
    with pytest.raises(RequestError, match="prompt is not valid Unicode"):
        codec.encode("half \ud83d")
    with pytest.raises(RequestError, match="messages is not valid Unicode"):
        codec.chat([{"role": "user", "content": "half \ud83d"}])


def test_a_chat_ends_where_the_assistant_begins(codec: TextCodec) -> None:
    ids = codec.chat(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a café"}]
    )

    assert codec.backend.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\na café<|im_end|>"
        "<|im_start|>assistant\n"
    )
    assert ids[0] == codec.backend.token_to_id("<|im_start|>")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "system", "content": "x"}, "only user and assistant may speak"),
        ({"role": "user"}, "no attribute 'content'"),
        ({"role": "user", "content": ["x"]}, "can only concatenate str"),
    ],
)
def test_what_the_template_refuses_is_the_requests_fault(
    codec: TextCodec, message: dict, reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        codec.chat([message])
    assert caught.value.field == "messages"


def test_a_model_without_a_chat_template_points_to_completions(tmp_path: Path) -> None:
    codec = TextCodec.load(save_tokenizer(tmp_path, chat_template=None))

    with pytest.raises(RequestError, match="/v1/completions"):
        codec.chat([{"role": "user", "content": "hi"}])


def test_single_tokens_read_as_in_the_middle_of_a_text(codec: TextCodec) -> None:
    assert [codec.token_text(token) for token in codec.encode(" the")] == [" the"]
    assert codec.token_text(codec.eos_token_ids[0]) == "<|im_end|>"
    assert codec.token_text(raw(codec, "日".encode())[0]) == "\ufffd"
    assert codec.token_text(codec.vocab_size + 5) == ""


def test_the_vocabulary_counts_special_tokens(codec: TextCodec) -> None:
    assert codec.vocab_size == 300 == codec.backend.get_vocab_size(with_added_tokens=True)


def with_generation_config(directory: Path, content: str) -> TextCodec:
    save_tokenizer(directory)
    (directory / "generation_config.json").write_text(content)
    return TextCodec.load(directory)


def test_generation_config_adds_stops_and_sampling_defaults(tmp_path: Path) -> None:
    config = {
        "eos_token_id": [7, 1],
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "min_p": 0.3,
    }

    codec = with_generation_config(tmp_path, json.dumps(config))

    assert codec.eos_token_ids == (codec.backend.token_to_id("<|im_end|>"), 7)
    assert codec.sampling_defaults == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
    }


@pytest.mark.parametrize(
    ("content", "defaults"),
    [
        ("{broken", {}),
        ("[1]", {}),
        ('{"temperature": 9, "top_k": -1, "top_p": 0.5}', {"top_p": 0.5}),
        ('{"temperature": "warm", "top_k": Infinity, "top_p": null}', {}),
    ],
)
def test_a_broken_generation_config_is_ignored_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, defaults: dict
) -> None:
    codec = with_generation_config(tmp_path, content)

    assert codec.sampling_defaults == defaults
    assert codec.eos_token_ids == (1,)
    assert "ignored" in caplog.text


def test_no_generation_config_is_no_complaint(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    codec = TextCodec.load(directory)

    assert codec.sampling_defaults == {}
    assert codec.eos_token_ids == (1,)
    assert not [record for record in caplog.records if record.name.startswith("select_n")]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        TextCodec.load(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [None, "{broken", '{"version": "1.0", "model": 3}'])
def test_a_directory_without_a_usable_tokenizer_is_refused(
    tmp_path: Path, content: str | None
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)

    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json") as caught:
        TextCodec.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_importing_the_module_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, select_n_core.engine.text\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
