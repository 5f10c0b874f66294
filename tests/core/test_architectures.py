"""Every supported architecture: a streamed, paged, batched model has transformers' tokens."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from parity import (
    CPU,
    Answer,
    answers_of,
    answers_of_transformers,
    assert_same,
    placed,
    random_prompts,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from select_n_core.errors import StreamingError, UnsupportedModelError
from select_n_core.kv.attention import PagedAttention
from select_n_core.links.emulated import EmulatedLink
from select_n_core.models.lazy import hollow_model
from select_n_core.models.load import (
    ARCHITECTURES,
    LoadedModel,
    check_architecture,
    load_model,
    take_apart,
)
from select_n_core.models.seam import AttentionTraits
from select_n_core.packed import PackedWeight

torch.set_num_threads(1)

EMBEDDING = "model.embed_tokens.weight"
VOCAB = 128
NEW_TOKENS = 12
PROMPTS = random_prompts([20, 1, 9, 14], VOCAB)
NO_KERNELS = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
WINDOW = 8  # shorter than the prompts, so that a forgotten window changes the answer

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# Sizes of whole blocks, which a weight must have to be packed.
PACKED_SHAPE = dict.fromkeys(
    (
        "hidden_size",
        "intermediate_size",
        "intermediate_size_mlp",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "ffn_dim",
        "word_embed_proj_dim",
    ),
    128,
)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Case:
    """A small configuration and what its attention must have asked for.

    Attributes:
        config: beside SHAPE. without: names of SHAPE that this architecture does not know.
        windows, chunks: over all layers, None among them where a layer sees everything.
        softcap, sinks: whether the attention has them. unequal_kv: k_dim != v_dim.
        tied: whether the output embedding is the input's.
    """

    config: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    windows: frozenset[int | None] = frozenset({None})
    chunks: frozenset[int | None] = frozenset({None})
    softcap: bool = False
    sinks: bool = False
    unequal_kv: bool = False
    tied: bool = False


SLIDING = frozenset({WINDOW})
SOME_SLIDING = frozenset({WINDOW, None})

CASES = {
    "cohere": Case({"use_qk_norm": True, "logit_scale": 0.5}, tied=True),
    "deepseek_v3": Case(
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "num_mtp_layers": 0,
        },
        unequal_kv=True,
    ),
    "exaone4": Case({"sliding_window": WINDOW, "layer_types": MIXED}, windows=SOME_SLIDING),
    "gemma": Case({"head_dim": 16, "num_key_value_heads": 1}, tied=True),
    "gemma2": Case(
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 30.0,
            "layer_types": MIXED,
        },
        windows=SOME_SLIDING,
        softcap=True,
        tied=True,
    ),
    "gemma3_text": Case(
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
        windows=SOME_SLIDING,
        tied=True,
    ),
    "glm4": Case({"head_dim": 16, "attention_bias": True}),
    "gpt2": Case(
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, "n_inner": 48}
        | {"scale_attn_by_inverse_layer_idx": True},
        without=(
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ),
        tied=True,
    ),
    "gpt_neox": Case({"use_parallel_residual": True}, without=("num_key_value_heads",)),
    "gpt_oss": Case(
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
        },
        windows=SOME_SLIDING,
        sinks=True,
    ),
    "granite": Case(
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        }
    ),
    "llama": Case(
        {
            "head_dim": 16,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        }
    ),
    "llama4_text": Case(
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "moe_layers": [1, 2],
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": WINDOW,
            "floor_scale": 4,
            "attn_scale": 0.3,
        },
        chunks=SOME_SLIDING,
    ),
    "mistral": Case({"sliding_window": WINDOW, "head_dim": 16}, windows=SLIDING),
    "mixtral": Case(
        {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        windows=SLIDING,
    ),
    "olmo2": Case(),
    "opt": Case(
        {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        without=("intermediate_size", "num_key_value_heads"),
        tied=True,
    ),
    "phi": Case({"qk_layernorm": True}),
    "phi3": Case({"sliding_window": WINDOW}, windows=SLIDING),
    "qwen2": Case(
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        windows=SOME_SLIDING,
    ),
    "qwen2_moe": Case(
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        windows=SOME_SLIDING,
    ),
    "qwen3": Case(
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
        windows=SOME_SLIDING,
    ),
    "qwen3_moe": Case(
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
        },
        windows=SLIDING,
    ),
    "smollm3": Case(
        {
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
        },
        windows=SOME_SLIDING,
        tied=True,
    ),
    "starcoder2": Case({"sliding_window": WINDOW}, windows=SLIDING, tied=True),
}


def build(name: str, **more: Any) -> Any:
    """A tiny model of `name` in float32 whose every parameter matters to the answer."""
    case = CASES[name]
    shape = {key: value for key, value in SHAPE.items() if key not in case.without}
    shape |= {"tie_word_embeddings": case.tied} | case.config | more
    config = AutoConfig.for_model(name, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomise(module)
    return module


@torch.no_grad()
def randomise(module: Any) -> None:
    """Clear decisions: matrices of gain 1.5, norms near one, and no bias or sink left at zero."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
        elif "ln_" in name or ("norm" in name and name.endswith("weight")):
            parameter.normal_(1.0, 0.2)
        else:
            parameter.normal_(0.0, 0.3)
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.3)


REFUSED_NAMES = ["falcon", "bloom", "stablelm", "gptj", "mpt", "mamba", "gemma3n_text", "t5"]


@pytest.fixture(scope="module")
def link():
    link = EmulatedLink(bytes_per_s=200e9)
    yield link
    link.close()


class Seen:
    """What the model's attention layers asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.traits: list[AttentionTraits] = []
        self.dims: set[tuple[int, int]] = set()
        attend = PagedAttention.attend

        def spy(
            attention: PagedAttention,
            layer: int,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            traits: AttentionTraits,
        ) -> Tensor:
            self.traits.append(traits)
            self.dims.add((k.shape[2], v.shape[2]))
            return attend(attention, layer, q, k, v, traits)

        monkeypatch.setattr(PagedAttention, "attend", spy)


def test_every_supported_architecture_has_a_case():
    assert set(CASES) == ARCHITECTURES


@pytest.mark.parametrize("name", sorted(CASES))
def test_tokens_are_those_of_transformers_resident_and_at_every_k(name, link, monkeypatch):
    case, module, seen = CASES[name], build(name), Seen(monkeypatch)
    expected = answers_of_transformers(module, PROMPTS, NEW_TOKENS)
    assert min(answer.margin() for answer in expected) > 2e-4, "a near-tie: choose another seed"
    model = take_apart(module)
    units = len(model.units)
    for k, slots in [(0, 1)] + [(k, d) for k in range(1, units + 1) for d in (1, 2)]:
        with placed(model, link, CPU, k=k, slots=slots) as executor:
            answers = answers_of(executor, PROMPTS, NEW_TOKENS, chunk=7)
        assert_same(answers, expected, atol=1e-4)

    assert {traits.window for traits in seen.traits} == case.windows
    assert {traits.chunk for traits in seen.traits} == case.chunks
    assert any(traits.softcap is not None for traits in seen.traits) == case.softcap
    assert any(traits.sinks is not None for traits in seen.traits) == case.sinks
    assert all(k_dim != v_dim for k_dim, v_dim in seen.dims) == case.unequal_kv
    assert (module.get_output_embeddings().weight is module.get_input_embeddings().weight) == (
        case.tied
    )


@pytest.mark.parametrize("name", sorted(CASES))
def test_half_layers_stream_into_the_same_tokens(name, link):
    module = build(name)
    expected = answers_of_transformers(module, PROMPTS[:2], NEW_TOKENS)
    model = take_apart(module, "half")
    halves = len(model.units)
    assert halves == 2 * len(model.layers) == 2 * len(model.kv)
    for k, slots in [(0, 1), (1, 1), (3, 2), (halves - 1, 3), (halves, 1), (halves, 2)]:
        with placed(model, link, CPU, k=k, slots=slots, poison=True) as executor:
            assert_same(answers_of(executor, PROMPTS[:2], NEW_TOKENS, 7), expected, atol=1e-4)


@pytest.mark.skipif(NO_KERNELS, reason="this processor has no bfloat16 kernels")
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"gpt2"}))  # it has no linear layers
def test_packed_weights_change_no_bit(name, link, monkeypatch):
    known = SHAPE | CASES[name].config
    shape = {key: size for key, size in PACKED_SHAPE.items() if key in known}

    def answers(k: int) -> tuple[list[Answer], bool]:
        """With k units streamed; and whether any weight was packed."""
        model = take_apart(build(name, **shape).to(torch.bfloat16))
        with placed(model, link, CPU, k=k) as executor:
            held = [tensor for unit in model.units for tensor in unit.tensors()]
            packed = any(isinstance(tensor, PackedWeight) for tensor in held)
            return answers_of(executor, PROMPTS, 4, chunk=7), packed

    found, packed = answers(k=1)
    assert packed
    monkeypatch.setattr("select_n_core.units.layout_of", lambda shape, dtype: None)
    expected, packed = answers(k=0)
    assert not packed
    assert_same(found, expected, atol=0)


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_halves_of_a_layer_are_its_attention_and_the_rest(name):
    model, whole = take_apart(build(name), "half"), take_apart(build(name))
    assert model.static.nbytes == whole.static.nbytes
    for index, layer in enumerate(whole.units):
        first, second = model.units[2 * index : 2 * index + 2]
        assert first.nbytes + second.nbytes == layer.nbytes
        assert min(first.nbytes, second.nbytes) > layer.nbytes / 10
        inside = [type(m).__name__ for m in model.runs[2 * index].modules]
        assert "Attention" in "".join(inside)
        assert not any("MLP" in each or "Experts" in each for each in inside)


class TestLayersThatCannotBeCut:
    def refusal(self, module: Any) -> str:
        take_apart(module)  # whole layers are fine
        with pytest.raises(UnsupportedModelError, match="write `units: layer`") as caught:
            take_apart(module, "half")
        assert caught.value.field == "units"
        return str(caught.value)

    def test_a_tensor_of_the_layer_itself(self):
        module = build("llama")
        module.model.layers[1].scale = torch.nn.Parameter(torch.ones(3))
        assert "'llama': its layer 1 cannot be cut" in self.refusal(module)
        assert "holds 'scale' itself" in self.refusal(module)

    def test_a_tensor_in_a_module_that_is_never_called(self):
        module = build("llama")
        module.model.layers[2].spare = torch.nn.Linear(2, 2, bias=False)
        assert "layer 2 cannot be cut into halves, because it holds 'weight' in a Linear" in (
            self.refusal(module)
        )

    def test_a_module_that_is_called_in_both_halves(self):
        module = build("llama")
        for layer in module.model.layers:
            layer.post_attention_layernorm = layer.input_layernorm
        assert "more than once" in self.refusal(module)

    def test_a_tensor_that_is_used_in_both_halves(self):
        module = build("llama")
        layer = module.model.layers[0]
        layer.post_attention_layernorm.weight = layer.input_layernorm.weight
        assert "layer 0 cannot be cut into halves, because it uses one tensor in both halves" in (
            self.refusal(module)
        )


# Loading.


def filled(model: LoadedModel) -> list[Tensor]:
    """The bytes of every unit and of the static tensors, as placing fills them."""
    buffers = []
    for unit in [*model.units, model.static]:
        buffers.append(torch.zeros(unit.nbytes, dtype=torch.uint8))
        unit.fill(buffers[-1])
    return buffers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_checkpoint_is_read_into_the_bytes_that_transformers_loads(
    name, dtype, tmp_path, monkeypatch, caplog
):
    module = build(name)
    module.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = filled(take_apart(whole))
    model = load_model(tmp_path, dtype)
    assert "read whole" not in caplog.text
    held = [tensor.numel() for unit in [*model.units, model.static] for tensor in unit.tensors()]
    assert not any(held)
    for _ in range(2):
        assert all(map(torch.equal, filled(model), expected))
    assert (model.max_context, model.vocab_size) == (96, VOCAB)
    assert model.dtype == getattr(torch, dtype)
    types = [t.dtype for unit in model.units for t in unit.tensors()]
    assert types == [t.dtype for unit in take_apart(whole).units for t in unit.tensors()]
    model.release_source()
    with pytest.raises(StreamingError, match="source was released"):
        filled(model)


class TestCheckpointsThatAreOdd:
    """Of a Llama with tied embeddings, whose saved tensors a test changes."""

    @pytest.fixture
    def saved(self, tmp_path):
        module = build("llama", tie_word_embeddings=True)
        module.save_pretrained(tmp_path)
        return tmp_path

    def change(self, directory, **tensors: Tensor | None) -> None:
        path = directory / "model.safetensors"
        content = load_file(path) | {key.replace("__", "."): t for key, t in tensors.items()}
        kept = {key: tensor for key, tensor in content.items() if tensor is not None}
        save_file(kept, path, metadata={"format": "pt"})

    def check(self, directory) -> None:
        """What is loaded is what transformers loads."""
        whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        expected = filled(take_apart(whole))
        assert all(map(torch.equal, filled(load_model(directory, "float32")), expected))

    def test_tied_embeddings_that_were_saved_twice_are_placed_once(self, saved, caplog):
        once = load_model(saved, "float32").static.nbytes
        self.change(saved, lm_head__weight=load_file(saved / "model.safetensors")[EMBEDDING])
        assert load_model(saved, "float32").static.nbytes == once
        self.check(saved)
        assert "read whole" not in caplog.text

    def test_tied_embeddings_that_differ_are_read_whole_and_said_so(self, saved, caplog):
        once = load_model(saved, "float32").static.nbytes
        self.change(saved, lm_head__weight=torch.ones(VOCAB, 32))
        assert load_model(saved, "float32").static.nbytes > once
        assert "should be tied but differ" in caplog.text
        assert "read whole before they are placed" in caplog.text
        self.check(saved)

    def test_tensors_that_nobody_needs_do_no_harm(self, saved, caplog):
        self.change(saved, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
        self.check(saved)
        assert "read whole" not in caplog.text

    def test_a_tensor_that_is_missing_is_named(self, saved):
        self.change(saved, model__layers__1__mlp__up_proj__weight=None)
        with pytest.raises(UnsupportedModelError, match=r"lack 1 tensors .*layers\.1\.mlp\.up"):
            load_model(saved, "float32")

    def test_a_tensor_of_another_shape_is_named(self, saved):
        self.change(saved, model__layers__1__mlp__up_proj__weight=torch.ones(32, 48))
        with pytest.raises(UnsupportedModelError, match=r"up_proj.* shape \[32, 48\].* \[48, 32\]"):
            load_model(saved, "float32")

    def test_a_checkpoint_is_not_needed_any_more_once_it_is_placed(self, saved, link):
        model = load_model(saved, "float32")
        with placed(model, link, CPU, k=1) as executor:
            model.release_source()
            (saved / "model.safetensors").unlink()
            assert answers_of(executor, PROMPTS[:1], 3)


def test_a_model_of_zeros_takes_no_memory_and_has_real_frequencies():
    module = hollow_model(build("llama").config, torch.bfloat16)
    assert not any(parameter.any() for parameter in module.parameters())
    assert len({parameter.data_ptr() for parameter in module.parameters()}) == 1
    assert torch.equal(module.model.rotary_emb.inv_freq, build("llama").model.rotary_emb.inv_freq)


@pytest.mark.parametrize("units", ["layer", "half"])
@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3", "opt", "gpt_oss"])
def test_a_saved_checkpoint_loads_into_the_same_tokens(name, units, link, tmp_path):
    module = build(name)
    module.save_pretrained(tmp_path)
    expected = answers_of_transformers(module, PROMPTS, NEW_TOKENS)
    model = load_model(tmp_path, "float32", units)
    with placed(model, link, CPU, k=2) as executor:
        model.release_source()
        assert_same(answers_of(executor, PROMPTS, NEW_TOKENS, chunk=7), expected, atol=1e-4)


# What is refused, and why.


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_an_architecture_without_a_case_is_refused_by_name(name):
    with pytest.raises(UnsupportedModelError, match=f"model type '{name}' is not supported") as e:
        check_architecture(AutoConfig.for_model(name))
    assert "qwen3_moe" in str(e.value)
    assert e.value.field == "source"


def config_of(name: str, **more: Any) -> Any:
    return AutoConfig.for_model(name, **(SHAPE | more))


def test_dynamic_rope_is_refused_because_rows_of_a_batch_would_disturb_each_other():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    with pytest.raises(UnsupportedModelError, match=r"'llama' with rope_type 'dynamic'.*longest"):
        check_architecture(config_of("llama", rope_parameters=rope))


def test_longrope_is_refused():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 48,
    }
    with pytest.raises(UnsupportedModelError, match="'phi3' with rope_type 'longrope'"):
        check_architecture(config_of("phi3", rope_parameters=rope))


def test_a_refused_rope_of_one_layer_type_is_enough():
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
    }
    with pytest.raises(UnsupportedModelError, match="'gemma3_text' with rope_type 'dynamic'"):
        check_architecture(config_of("gemma3_text", rope_parameters=rope))


def test_a_quantised_checkpoint_is_refused():
    config = config_of("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="'llama' is quantised; give the unquantised"):
        check_architecture(config)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text"])
def test_a_model_that_looks_ahead_is_refused(name):
    config = config_of(name, use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModelError, match=f"'{name}' with use_bidirectional_attention"):
        check_architecture(config)


def test_a_model_that_runs_a_layer_twice_is_refused():
    module = build("llama")
    module.model.layers[1] = module.model.layers[0]
    with pytest.raises(UnsupportedModelError, match=r"'llama': .* not each called exactly once"):
        take_apart(module)


def test_a_model_with_attention_of_its_own_is_refused():
    module = build("llama")
    own = module.model.layers[1].self_attn
    own.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedModelError, match=r"'llama': .* attention seam"):
        take_apart(module)


def test_a_prepared_model_does_not_run_without_a_step():
    model = take_apart(build("llama"))
    with pytest.raises(StreamingError, match="without a step context"):
        model.module(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
