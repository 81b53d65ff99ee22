"""The smallest model of any class of transformers: its default configuration with every size cut down.

Sizes are known by the names that configurations give them. What fits no rule stands in `OWN`, by the type of model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

WIDTH, HEADS, LAYERS, HIDDEN, VOCABULARY = 32, 4, 2, 48, 97

NAMES: tuple[tuple[int, str], ...] = (
    (WIDTH, """
        hidden_size d_model n_embd dim embed_dim embedding_dim encoder_hidden_size decoder_hidden_size
        encoder_hidden_dim projection_dim output_dim out_hidden_size text_hidden_size projector_hidden_size
        encoder_dim decoder_dim text_embed_dim word_embed_proj_dim feature_size_out fusion_hidden_size
        mask_feature_size feature_size decoder_hidden_dim emb_dim lru_width xvector_output_dim conv_dim_out
        state_dim attention_hidden_size num_attention_channels codevector_dim proj_codevector_dim output_hidden_size
        n_embed model_dim image_hidden_size rnn_hidden_size upsample_hidden_size projection_size pooler_hidden_size
        d_embed query_dim text_dim vision_dim adapter_dim encoder_embed_dim decoder_embed_dim neck_hidden_size
        pooler_output_size"""),
    (HIDDEN, """
        intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dim_feedforward n_inner mlp_dim hidden_dim
        ffn_hidden_size encoder_intermediate_size decoder_intermediate_size dim_ff d_inner feedforward_dim fc_dim
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size expert_ffn_dim intermediate_size_mlp block_ff_dim attention_ffn_dim
        linear_units text_intermediate_dim decoder_mlp_dim alignment_intermediate_size projection_intermediate_size
        projection_hidden_dim projection_intermediate_dim dff speech_encoder_intermediate_size t2u_encoder_ffn_dim
        t2u_decoder_ffn_dim"""),
    (LAYERS, """
        num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers decoder_num_layers num_block_records
        num_blocks_per_stack decoder_n_layers encoder_n_layers num_mask_decoder_layers vision_num_hidden_layers
        text_num_hidden_layers t2u_encoder_layers t2u_decoder_layers speech_encoder_layers num_feature_layers depth
        decoder_depth encoder_depth num_vision_layers num_text_layers num_speech_encoder_layers num_fusion_layers
        cross_num_hidden_layers num_perceiver_layers num_transformer_layers resampler_depth"""),
    (HEADS, """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        encoder_num_attention_heads decoder_num_attention_heads num_query_heads t2u_encoder_attention_heads
        t2u_decoder_attention_heads speech_encoder_attention_heads fusion_num_attention_heads resampler_n_heads
        num_self_attention_heads nheads perceiver_num_heads resampler_num_heads swa_num_attention_heads
        index_n_heads linear_num_heads"""),
    (2, """
        num_key_value_heads n_head_kv num_kv_heads encoder_num_key_value_heads decoder_num_key_value_heads
        num_experts_per_tok moe_topk moe_top_k top_k_experts linear_num_key_heads num_conv_pos_embedding_groups
        num_key_value_heads_global n_group num_feat_extract_layers swa_num_key_value_heads o_groups"""),
    (1, """
        topk_group first_k_dense_replace num_dense_layers moe_layer_start_index num_nextn_predict_layers
        n_shared_experts"""),
    (4, """
        num_experts n_routed_experts num_local_experts moe_num_experts linear_num_value_heads num_routed_experts
        num_conv_pos_embeddings mamba_d_conv"""),
    (8, """
        head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim d_kv kv_channels attention_head_dim global_head_dim
        linear_key_head_dim linear_value_head_dim mamba_d_state mamba_d_head state_size patch_size index_head_dim
        key_value_channels attention_key_size query_pre_attn_scalar num_queries rotary_dim swa_head_dim
        mamba_chunk_size ssm_state_size mamba_n_heads mamba_num_heads mamba_head_dim linear_head_dim"""),
    (16, """
        kv_lora_rank q_lora_rank o_lora_rank qk_head_dim classifier_proj_size num_codevectors_per_group
        embedding_size"""),
    (40, """
        max_position_embeddings n_positions sliding_window max_2d_position_embeddings max_sequence_length seq_length
        attention_window_size chunk_attention_size sliding_window_size rel_extent"""),
    (VOCABULARY, """
        vocab_size text_vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size encoder_vocab_size
        vocab_size_per_layer_input"""),
    (64, "image_size mamba_d_ssm"),
)  # fmt: skip
"""Sizes, and the names that configurations give them."""

SIZES = {name: size for size, names in NAMES for name in names.split()}

LISTS: dict[str, Any] = {
    "hidden_sizes": lambda i: 16 * 2**i,
    "depths": lambda i: 1,
    "conv_dim": lambda i: 8,
    "tdnn_dim": lambda i: 16,
}
"""Lists of sizes, one for every stage."""

WAVEFORMS = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
STAGED_HEADS = {"num_attention_heads": [1, 2, 4, 8]}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "head_dim": 8}
RESNET = {"use_timm_backbone": False, "backbone": None, "backbone_config": {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage4"]}}  # fmt: skip
FORECAST = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}
SWIN = {"num_heads": [2, 4, 8, 8], "depths": [1, 1, 1, 1], "embed_dim": 16, "window_size": 2}
PAGE = {"coordinate_size": 6, "shape_size": 4, "input_size": 64}
GRID_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
DPT = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 16, 16]}
UPER = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "auxiliary_channels": 16}

OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "sew",
         "sew-d", "speecht5"),
        WAVEFORMS,
    ),
    "wav2vec2-conformer": {**WAVEFORMS, "vocab_size": VOCABULARY},
    **dict.fromkeys(("pvt", "pvt_v2", "glpn"), STAGED_HEADS),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral"), ROPE),
    **dict.fromkeys(("detr", "conditional_detr", "deformable_detr", "dab-detr", "table-transformer"), RESNET),
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), FORECAST),
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin"), SWIN),
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm4v_moe_text", "glm_image_text", "glm_ocr_text"),
        GRID_ROPE,
    ),
    **dict.fromkeys(("layoutlmv2", "layoutlmv3"), PAGE),
    **dict.fromkeys(("beit", "data2vec-vision"), UPER),
    "bit": {"num_groups": 4},
    "dpt": DPT,
    **dict.fromkeys(("eomt", "eomt_dinov3"), {"num_blocks": 1}),
    "levit": {"patch_size": 16},  # its four convolutions' steps
    "lilt": {"hidden_size": 48},
    "zamba2": {"attention_hidden_size": 64},
    "swin2sr": {"num_heads": [2, 2], "depths": [1, 1], "embed_dim": 16},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 2},
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "mluke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "perceiver": {"num_latents": 8, "d_latents": 32, "d_model": 48, "num_self_attends_per_block": 2,
                  "num_self_attention_heads": 4, "num_cross_attention_heads": 4},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [4, 16], "attn_layers": ["local", "lsh"]},
    "squeezebert": {"embedding_size": 32},
}  # fmt: skip
"""What else a type of model needs."""

LARGEST = 30e6
"""More parameters than this are not small."""


def smallest(config_class: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    """A small configuration of a class."""
    return config_class(**{**small(config_class()), **more})


def small(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a small configuration like one with default sizes; those of its parts are nested."""
    settings: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = {**small(value), "model_type": value.model_type}
            if getattr(value, "out_features", None) and "depths" in settings[name]:  # which stages a backbone puts out
                settings[name].setdefault("out_features", value.out_features)
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            settings[name] = min(SIZES[name], value) if value > 0 else value
        elif name == "image_size" and isinstance(value, (list, tuple)):
            settings[name] = [SIZES[name]] * len(value)
        elif name in LISTS and isinstance(value, (list, tuple)):
            settings[name] = [LISTS[name](i) for i in range(len(value))]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
            settings[name] = VOCABULARY - 1 - sum(key in settings for key in list(settings) if "_token_" in key) % 9
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:  # latent attention has no groups
        settings["num_key_value_heads"] = settings.get("num_attention_heads", HEADS)
    rotary = getattr(config, "rope_parameters", None)
    if isinstance(rotary, dict) and "mrope_section" in rotary:
        settings["rope_parameters"] = {**rotary, "mrope_section": [2, 1, 1]}
    layers = next((settings[name] for name in ("num_hidden_layers", "n_layer") if name in settings), LAYERS)
    for name, value in vars(config).items():
        if name.endswith(("layer_types", "layers_block_type")) and isinstance(value, (list, tuple)) and layers:
            kinds = list(dict.fromkeys(value))  # one layer of every kind
            settings[name] = [*kinds, *value][: max(layers, len(kinds))]
            settings |= {key: len(settings[name]) for key in ("num_hidden_layers", "n_layer") if key in settings}
    if getattr(config, "pad_token_id", 0) is None:  # classifiers of sequences ask for it
        settings["pad_token_id"] = 0
    return {**settings, **copy.deepcopy(OWN.get(config.model_type, {}))}


def smallest_model(model_class: type[PreTrainedModel], config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A small model of a class in eval mode, seeded.

    Raises:
        ValueError: it would have more parameters than `LARGEST`; or what the class raises.
    """
    config = smallest(model_class.config_class) if config is None else config
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"the smallest config that is known has {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval()
