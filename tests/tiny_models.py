"""Every causal language model of transformers, tiny and random, built from its default config."""

import dataclasses
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a config that names a file on the hub must not wait for it

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
GAIN = 1.5  # of random weights; with less, hiding a key would change some models' logits too little to be seen
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

LAYERS = 0  # stands for the number of layers, which depends on the model
MIXED_LAYERS = 4  # of models whose layers are of several kinds; the others have 2
# The size that a config's attribute gets, whatever its model. Windows of 8 are shorter than the sweep's prompts.
SIZES = {
    128: """max_position_embeddings n_positions n_ctx context_length max_source_positions max_target_positions
        original_max_position_embeddings""",
    100: """vocab_size vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size shape_vocab_size
        ngram_vocab_size_base encoder_hash_byte_group_vocab""",
    64: """hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width
        hidden_size_global input_embedding_size output_embedding_size""",
    32: """intermediate_size moe_intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner dff dim_ff d_inner
        shared_expert_intermediate_size moe_shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size
        dense_intermediate_size intermediate_size_mlp shared_intermediate_size router_hidden_size feed_forward_size
        hc_lowrank shared_experts_intermediate_size kv_lora_rank q_lora_rank o_lora_rank pronunciation_embed_dim
        shape_embed_dim ple_embed_dim""",
    16: """head_dim d_head dim_head swa_head_dim kv_channels attention_head_size v_head_dim qk_nope_head_dim
        index_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim mamba_d_state state_size
        ssm_state_size global_head_dim swa_v_head_dim d_rel""",
    8: """sliding_window sliding_window_size attention_chunk_size window_size attention_window_size local_attention
        time_step_rank mamba_dt_rank qk_rope_head_dim rotary_dim hidden_size_per_layer_input laurel_rank mamba_n_heads
        mamba_num_heads n_mamba_heads keep_window_size chunk_size mamba_chunk_size rel_extent index_topk adapter_rank
        loop_gate_rank gated_norm_rank""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads
        index_n_heads num_decoder_attention_heads num_encoder_attention_heads num_experts n_routed_experts
        num_local_experts moe_num_experts swa_num_attention_heads linear_num_value_heads index_block_size""",
    2: """num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk moe_k top_k_experts
        linear_num_key_heads o_groups num_query_groups index_topk_blocks zero_expert_num n_layers_per_attn_res_block""",
    1: "n_group topk_group",
    LAYERS: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers num_blocks""",
}
SIZE = {name: size for size, names in SIZES.items() for name in names.split()}
# What the sizes above do not settle: attributes that have to fit together, and kinds of layers that must occur.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "topk_method": "greedy"},
    "dots3_note_text": {
        "per_layer_config": {i: {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "head_dim": 32} for i in (1, 3)},
    },
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "max_window_layers": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def is_size(name: str, value: Any) -> bool:
    """Whether an attribute is set; where it is not, models derive these two from others that may not fit."""
    return isinstance(value, list) or (type(value) is int and value > 0) or name in ("head_dim", "num_key_value_heads")


def shrink(config: PreTrainedConfig, layers: int) -> dict[str, Any]:
    """Arguments that make this config's class tiny, those of its sub-configs included."""
    cls, small = type(config), {}
    names = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        value = vars(config).get(cls.attribute_map.get(name, name))
        if name in cls.sub_configs and isinstance(value, PreTrainedConfig):
            small[name] = shrink(value, layers)
        elif SIZE.get(name) == LAYERS:
            small[name] = layers
        elif name in SIZE and is_size(name, value):
            small[name] = SIZE[name]
        elif name.endswith("token_id") and value is not None:
            small[name] = TOKEN_IDS.get(name, 3)
        elif "dropout" in name and isinstance(value, float):
            small[name] = 0.0
        elif name == "is_decoder":
            small[name] = True
        elif name == "layer_types" and len(set(value or ())) > 1:
            small[name] = (list(dict.fromkeys(value)) * layers)[:layers]
    if "kv_lora_rank" in names:  # multi-head latent attention: a key for each head, rotated in its last part only
        small |= {"num_key_value_heads": SIZE["num_attention_heads"], "head_dim": SIZE["qk_rope_head_dim"]}
    small |= EXCEPTIONS.get(cls.model_type, {})
    return small | ({"num_hidden_layers": len(small["layer_types"])} if "layer_types" in small else {})


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The smallest config of this type in which each kind of layer occurs."""
    cls = CONFIG_MAPPING[model_type]
    config = cls()
    if not issubclass(cls, MODEL_FOR_CAUSAL_LM_MAPPING[cls].config_class):  # its text model alone has this class
        config = config.get_text_config(decoder=True)
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    return type(config)(**shrink(config, MIXED_LAYERS if len(kinds) > 1 else 2))


def state_alpha(config: PreTrainedConfig, alpha: float) -> None:
    """Sets entmax_alpha in a config and in those that it holds: attention layers read it from any of them."""
    config.entmax_alpha = alpha
    for name in config.sub_configs:
        if isinstance(sub_config := getattr(config, name, None), PreTrainedConfig):
            state_alpha(sub_config, alpha)


def build(model_type: str, implementation: str) -> nn.Module:
    """The tiny model in float32, with weights so large that every key matters."""
    config = tiny_config(model_type)
    state_alpha(config, 1.0)
    torch.manual_seed(0)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    model = cls._from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and not name.endswith("A_log"):
            nn.init.normal_(weight, std=GAIN * weight.shape[-1] ** -0.5)
    return model
