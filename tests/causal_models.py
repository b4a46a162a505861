"""Every causal model of the installed transformers, tiny and with random weights, for tests/test_causal_models.py.

A model's own default config is made small field by field, by the fields' names; what that does not fit stands in
SPECIAL.
"""

from __future__ import annotations

import os
import re

# Nothing here may ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

transformers.logging.set_verbosity_error()

VOCABULARY = 97
# In this order: the first pattern that a field's name matches gives its size.
_SIZES = [
    (re.compile(pattern), size)
    for pattern, size in (
        (r"(.*_)?vocab_size(_.*)?|ntoken|n_words", VOCABULARY),
        (r"(.*_)?(num_hidden_layers|n_layers?|num_layers|num_(en|de)coder_layers|encoder_layers|decoder_layers)", 2),
        (r"(.*_)?(num_key_value_heads|n_kv_heads?|num_kv_heads)", 2),
        (r"(.*_)?(num_attention_heads|n_heads?|num_heads|encoder_attention_heads|decoder_attention_heads)", 4),
        (r"index_n_heads|.*linear_num_(key|value)_heads", 2),
        (r"index_topk|.*num_experts_per_tok|moe_topk|moe_k|top_k_experts", 2),
        (r"q_lora_rank", 24),
        (r"kv_lora_rank", 16),
        (r"qk_rope_head_dim", 8),
        (r"qk_nope_head_dim|v_head_dim|qk_head_dim", 16),
        (r"(.*_)?head_dim|d_kv|attention_head_size", 16),
        (r"n_routed_experts|num_(local_|routed_)?experts|moe_num_experts|n_experts", 4),
        (r"n_group|topk_group|num_expert_groups?|n_shared_experts|num_shared_experts", 1),
        (r"(.*_)?(intermediate_(size|dim)|ffn_dim|n_inner|d_ff|d_inner|ffn_hidden_size|mlp_dim|ff_dim)(_mlp)?", 96),
        (r"(.*_)?(hidden_size|d_model|n_embd|emb_dim|embed_dim|dim_model|embedding_size|model_dim)", 64),
        (r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|block_size|target_length)", 128),
        (r"(.*_)?(pad|bos|eos|sep|cls|unk|decoder_start)_token_id", 1),
        (r"rotary_dim", 8),
        (r"attention_window|sliding_window(_size)?", 8),
    )
]  # fmt: skip
_LAYERS = ["full_attention", "sliding_attention"]
_NO_TOKENS = dict(bos_token_id=1, eos_token_id=1, pad_token_id=1)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL: dict[str, dict] = {
    "cohere_compass_text": dict(layer_types=_LAYERS, rope_parameters=dict.fromkeys(_LAYERS, _ROPE)),
    "bamba": dict(attn_layer_indices=[1]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "deepseek_v2": dict(num_experts_per_tok=2, first_k_dense_replace=1),
    "longcat_flash": dict(head_dim=8, qk_head_dim=24),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10000.0)),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1),
    "gemma3n_text": dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=_LAYERS * 2,
                         hidden_size_per_layer_input=16, vocab_size_per_layer_input=VOCABULARY,
                         activation_sparsity_pattern=[0.0] * 4),
    "gemma4_text": dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=_LAYERS[::-1] * 2),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=8),
    "kimi_linear": dict(num_experts_per_token=2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "hunyuan_v1_dense": dict(head_dim=16),
    "hunyuan_v1_moe": dict(head_dim=16),
    "mamba2": dict(num_heads=8, head_dim=16, n_groups=1, state_size=16),
    "ministral": dict(head_dim=16),
    "moshi": dict(audio_vocab_size=VOCABULARY),
    "nemotron": dict(head_dim=16, num_key_value_heads=2),
    "nemotron_h": dict(n_groups=1),
    "dots3_note_text": dict(swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=24, swa_head_dim=24,
                            swa_kv_lora_rank=16, swa_qk_nope_head_dim=16, swa_v_head_dim=16),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse"], num_hidden_layers=2,
                               index_block_size=2, index_topk_blocks=2, index_head_dim=16),
    "qwen4_exp_text": dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=4,
                           indexer_compress_ratio=2),
    "gemma4_unified_text": dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=_LAYERS[::-1] * 2),
    "reformer": dict(is_decoder=True, axial_pos_embds_dim=(16, 48), axial_pos_shape=(8, 16)),
    "zamba": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2, attention_hidden_size=128,
                  attention_head_dim=32),
    "zamba2": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2, attention_hidden_size=128,
                   attention_head_dim=32),
    "xmod": dict(default_language="en_XX"),
}  # fmt: skip
# What cannot be built so, and why; the text models of the composite ones are here by themselves.
CANNOT_BE_BUILT = {
    "blt": "its hash tables are 193 million parameters",
    "fuyu": "the language model in it keeps its own size",
    "gemma3": "the vision model in it keeps its own size",
    "gemma3n": "the vision model in it needs timm",
    "gemma4_assistant": "its default config is refused by its own check",
    "gemma4_unified_assistant": "its layers share the keys of another model",
    "got_ocr2": "the vision model in it keeps its own size",
    "moss_transcribe_diarize": "the audio model in it keeps its own size",
    "musicgen": "its config is that of the whole, and its model takes that of a part",
    "musicgen_melody": "its config is that of the whole, and its model takes that of a part",
}


def names() -> list[str]:
    """The model types, one for each class of model: of a model of several kinds of input, the text's."""
    return list({cls: kind for kind, cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}.values())


def small(config_class: type, kind: str | None = None) -> dict:
    """The fields with which a config's class makes a small config."""
    fields: dict[str, object] = {}
    stock = config_class()
    for name, part in (config_class.sub_configs or {}).items():
        held = getattr(stock, name, None)
        if held is not None and part is not transformers.AutoConfig:
            fields[name] = small(type(held))
    for name, value in vars(stock).items():
        if type(value) is not int:
            continue
        size = next((size for pattern, size in _SIZES if pattern.fullmatch(name)), None)
        if size is not None and (value > size or name.endswith("token_id")):
            fields[name] = size
    if "kv_lora_rank" in vars(stock):
        # Heads share no keys where these come out of one latent, and head_dim is that of the rotary part.
        fields["num_key_value_heads"] = fields.get("num_attention_heads", 4)
        fields.pop("head_dim", None)
    if hasattr(stock, "is_decoder"):
        fields["is_decoder"] = True
    for name in ("layer_types", "layers_block_type"):
        if len(set(vars(stock).get(name) or ())) > 1:  # one layer of each type
            fields[name] = list(dict.fromkeys(vars(stock)[name]))
            fields["num_hidden_layers"] = len(fields[name])
    return fields | SPECIAL.get(kind or "", {})


def build(kind: str, **changes) -> torch.nn.Module:
    torch.manual_seed(1)
    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind]
    config = config_class(**small(config_class, kind) | changes)
    with torch.device("meta"):
        count = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if count > 15_000_000:
        raise ValueError(f"{count / 1e6:.0f} million parameters are not tiny")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        # Biases and norms start as zeros and ones, which would hide that they were left out.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
