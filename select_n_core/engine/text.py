"""Text in, token ids out, and back: a model's tokenizer, chat template and generation defaults.

`TextCodec` is shared by all requests; a `TextStream` turns one request's tokens into text as they
come. This module reaches transformers only when a tokenizer is loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream

from select_n_core.engine.messages import SamplingParams
from select_n_core.errors import ModelNotFoundError, RequestError, UnsupportedModelError

logger = logging.getLogger(__name__)

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_DEFAULTS = {"temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float}


class TextCodec:
    """The tokenizer of one model directory; `load` makes one.

    Attributes:
        backend: the `tokenizers.Tokenizer` underneath.
        eos_token_ids: the tokens that end a text, the tokenizer's own first.
        sampling_defaults: what generation_config.json says of temperature, top_p, top_k and
            repetition_penalty.
        vocab_size: tokens known to the tokenizer; a model's logits may be wider.
    """

    def __init__(self, tokenizer: Any, generation_config: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.vocab_size: int = len(tokenizer)
        self.eos_token_ids = _eos_token_ids(tokenizer.eos_token_id, generation_config)
        self.sampling_defaults = _sampling_defaults(generation_config)

    @classmethod
    def load(cls, directory: Path) -> TextCodec:
        """Load from a local directory: no download, none of the model's own code.

        Raises:
            ModelNotFoundError: there is no such directory.
            UnsupportedModelError: it holds no tokenizer that the tokenizers library can run.
        """
        if not directory.is_dir():
            raise ModelNotFoundError(f"there is no model directory {directory}", field="source")
        from transformers import AutoTokenizer  # takes seconds and brings torch

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the tokenizers binding raises no narrower kind
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UnsupportedModelError(
                f"{directory} has no usable tokenizer, add the model's tokenizer.json: {reason}"
            ) from error
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                f"{directory}: {type(tokenizer).__name__} cannot stream text, "
                "add the model's tokenizer.json"
            )
        return cls(tokenizer, _read_json_object(directory / "generation_config.json"))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt, with the special tokens the model expects around it.

        Raises:
            RequestError: the text is not valid Unicode (a lone surrogate).
        """
        return self._encode(text, field="prompt", add_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Token ids of a conversation up to where the assistant's next answer begins.

        Raises:
            RequestError: the model has no chat template, or its template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise RequestError(
                "this model has no chat template; send a prompt to /v1/completions instead",
                field="messages",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError, ValueError) as error:
            # The template is a program over the client's messages: whatever it stumbles over,
            # such as a list where it adds strings, lies in them.
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error
        return self._encode(text, field="messages", add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; bytes that form no character are U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text

    def token_text(self, token: int) -> str:
        """One token as it reads in the middle of a text, special ones by their name."""
        alone: str = self.backend.decode([token], skip_special_tokens=False)
        # Some decoders drop a space at the start of a text; the second of two is not at the start.
        twice: str = self.backend.decode([token, token], skip_special_tokens=False)
        return twice[len(alone) :] if twice.startswith(alone) else alone

    def _encode(self, text: str, *, field: str, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{field} is not valid Unicode: {error.reason}", field=field
            ) from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))


class TextStream:
    """One request's output text, as far as it is certain, while its tokens come in.

    The text ends before the first stop string: the one completed first, and of two completed by
    the same character the longer. Text that may be the beginning of a stop string is held back
    until it is clear that it is not; so are bytes that do not form a character yet.

    Args:
        codec: of the request's model.
        prompt: its token ids, the context the output's text is read in; never shown.
        stop: stop strings, never shown.

    Attributes:
        stopped: a stop string was met; all later text is "".

    Raises:
        RequestError: a stop string is empty.
    """

    def __init__(self, codec: TextCodec, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise RequestError("stop must not contain an empty string", field="stop")
        self.stopped = False
        self._detokenizer = _Detokenizer(codec, prompt)
        self._stop = tuple(stop)
        self._held = ""

    def push(self, tokens: Iterable[int]) -> str:
        """Take in the next tokens; returns the text that may be shown now."""
        text = ""
        for token in tokens:
            if self.stopped:
                break
            text += self._release(self._detokenizer.push(token))
        return text

    def finish(self) -> str:
        """The text held back so far, once no more tokens come; unfinished bytes are U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._detokenizer.finish())
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, new: str) -> str:
        """Add text; returns what of it and of the held text is certain."""
        text = self._held + new
        matches = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if matches:
            self.stopped = True
            self._held = ""
            return text[: min(matches)[1]]
        certain = len(text) - self._open(text)
        self._held = text[certain:]
        return text[:certain]

    def _open(self, text: str) -> int:
        """Length of the longest end of `text` with which some stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


class _Detokenizer:
    """Incremental decoding; each character is returned as soon as all its bytes are there.

    DecodeStream does the work. Two things it cannot do are done by reading its window again: a
    prompt that ends inside a character (DecodeStream would return the prompt), and bytes that
    change how the bytes before them read (it raises).
    """

    def __init__(self, codec: TextCodec, prompt: Sequence[int]) -> None:
        self._codec = codec
        self._window = list(prompt)  # the tokens behind the last text returned
        self._pending: list[int] = []  # those after it
        self._prompt_is_open = codec.decode(prompt).endswith(_REPLACEMENT)
        self._stream = DecodeStream(ids=self._window, skip_special_tokens=True)

    def push(self, token: int) -> str:
        self._pending.append(token)
        try:
            text = self._stream.step(self._codec.backend, token)
        except Exception as error:  # the binding raises no narrower kind
            if "Invalid prefix" not in str(error):
                raise
            text = self._read_pending()
            self._stream = DecodeStream(ids=self._pending, skip_special_tokens=True)
        if text is None:
            return ""
        if self._prompt_is_open:
            self._prompt_is_open = False
            text = self._read_pending()
        self._window, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        text = self._read_pending()
        self._window, self._pending = self._pending, []
        return text

    def _read_pending(self) -> str:
        """The text that the pending tokens add to the window's."""
        before = self._codec.decode(self._window)
        after = self._codec.decode([*self._window, *self._pending])
        for known in (before, before.rstrip(_REPLACEMENT)):
            if after.startswith(known):
                return after[len(known) :]
        return self._codec.decode(self._pending)


def _eos_token_ids(
    tokenizer_id: int | None, generation_config: Mapping[str, Any]
) -> tuple[int, ...]:
    configured = generation_config.get("eos_token_id")
    ids = [tokenizer_id, *(configured if isinstance(configured, list) else [configured])]
    return tuple(dict.fromkeys(token for token in ids if type(token) is int))


def _sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, float]:
    """The defaults that a request may take over; one out of range is left out, with a warning."""
    defaults: dict[str, float] = {}
    for name, kind in _DEFAULTS.items():
        value = generation_config.get(name)
        if value is None:
            continue
        try:
            number = kind(value)
            SamplingParams(max_tokens=1, **{name: number})
        except (TypeError, ValueError, OverflowError) as error:
            logger.warning("generation_config.json: %s is ignored: %s", name, error)
        else:
            defaults[name] = number
    return defaults


def _read_json_object(path: Path) -> dict[str, Any]:
    """The object in `path`; {} when there is no such file, with a warning when it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return {}
    if not isinstance(content, dict):
        logger.warning("%s is ignored: it is not a JSON object", path)
        return {}
    return content
