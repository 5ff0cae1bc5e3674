"""Tiny models of transformers with random weights: by name, a function that makes the model and its inputs."""

import torch
import transformers as hf

PYRAMID = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1] * 4, "layer_type": "basic"}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
# Of the hybrid encoder of RT-DETR and its successors.
HYBRID = {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [12, 16, 24],
    "encoder_ffn_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "num_queries": 7,
    "num_denoising": 0,
    **HEADS,
}
# Of Mask2Former and OneFormer.
SEGMENTER = {
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_queries": 7,
}
MODELS = {}


def image(height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model(make):
    MODELS[make.__name__] = make
    return make


@model
def deformable_detr():
    backbone = hf.ResNetConfig(**PYRAMID, out_features=["stage2", "stage3", "stage4"])
    config = hf.DeformableDetrConfig(
        backbone_config=backbone, d_model=32, num_queries=7, two_stage=True, two_stage_num_proposals=7,
        with_box_refine=True, **LAYERS, **HEADS,
    )  # fmt: skip
    return hf.DeformableDetrForObjectDetection(config), {"pixel_values": image(64, 96)}


def rt_detr_backbone():
    return hf.RTDetrResNetConfig(**PYRAMID, out_features=["stage2", "stage3", "stage4"])


@model
def rt_detr():
    config = hf.RTDetrConfig(backbone_config=rt_detr_backbone(), **HYBRID)
    return hf.RTDetrForObjectDetection(config), {"pixel_values": image(64, 64)}


@model
def rt_detr_v2(method="default"):
    config = hf.RTDetrV2Config(backbone_config=rt_detr_backbone(), decoder_method=method, **HYBRID)
    return hf.RTDetrV2ForObjectDetection(config), {"pixel_values": image(64, 64)}


@model
def rt_detr_v2_discrete():
    return rt_detr_v2("discrete")


def hgnet_backbone():
    return hf.HGNetV2Config(
        embedding_size=8, hidden_sizes=[16, 12, 16, 24], depths=[1] * 4, stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 12, 16], stage_mid_channels=[8] * 4, stage_out_channels=[16, 12, 16, 24],
        stage_num_blocks=[1] * 4, stage_numb_of_layers=[1] * 4, out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


@model
def d_fine():
    config = hf.DFineConfig(backbone_config=hgnet_backbone(), decoder_n_points=[3, 6, 3], **HYBRID)
    return hf.DFineForObjectDetection(config), {"pixel_values": image(64, 64)}


@model
def deimv2():
    config = hf.Deimv2Config(backbone_config=hgnet_backbone(), decoder_n_points=[3, 6, 3], **HYBRID)
    return hf.Deimv2ForObjectDetection(config), {"pixel_values": image(64, 64)}


@model
def mask2former():
    config = hf.Mask2FormerConfig(backbone_config=swin(), feature_size=32, mask_feature_size=32, **SEGMENTER)
    return hf.Mask2FormerForUniversalSegmentation(config), {"pixel_values": image(128, 160)}


def swin(first=1):
    return hf.SwinConfig(
        embed_dim=16, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
        out_features=[f"stage{stage}" for stage in range(first, 5)],
    )  # fmt: skip


@model
def lw_detr():
    backbone = hf.LwDetrViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, pretrain_image_size=64,
        patch_size=16, window_block_indices=[0], num_windows=4, out_indices=[1, 2],
    )  # fmt: skip
    config = hf.LwDetrConfig(
        backbone_config=backbone, projector_scale_factors=[1.0], d_model=32, decoder_ffn_dim=32, decoder_layers=2,
        decoder_self_attention_heads=4, decoder_cross_attention_heads=4, num_queries=7, group_detr=2,
        c2f_num_blocks=1,
    )  # fmt: skip
    return hf.LwDetrForObjectDetection(config), {"pixel_values": image(64, 64)}


def grounded(config_class, model_class):
    text = hf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=1200
    )
    config = config_class(
        backbone_config=swin(2), text_config=text, d_model=32, num_queries=7, max_text_len=16, **LAYERS, **HEADS
    )
    words = torch.tensor([[101, 5, 1012, 6, 1012, 102]] * 2)
    inputs = {"pixel_values": image(64, 96), "input_ids": words, "attention_mask": torch.ones_like(words)}
    return model_class(config), inputs


@model
def grounding_dino():
    return grounded(hf.GroundingDinoConfig, hf.GroundingDinoForObjectDetection)


@model
def mm_grounding_dino():
    return grounded(hf.MMGroundingDinoConfig, hf.MMGroundingDinoForObjectDetection)


@model
def rf_detr():
    backbone = hf.RfDetrDinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14, num_windows=1,
        out_features=["stage1", "stage2"],
    )  # fmt: skip
    config = hf.RfDetrConfig(
        backbone_config=backbone, d_model=32, decoder_ffn_dim=32, decoder_layers=2, decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4, num_queries=7, group_detr=2, c2f_num_blocks=1,
    )  # fmt: skip
    return hf.RfDetrForObjectDetection(config), {"pixel_values": image(56, 56)}


@model
def oneformer():
    config = hf.OneFormerConfig(
        backbone_config=swin(), conv_dim=32, mask_dim=32, query_dec_layers=1, text_encoder_width=32,
        text_encoder_num_layers=1, task_seq_len=8, **SEGMENTER,
    )  # fmt: skip
    inputs = {"pixel_values": image(128, 160), "task_inputs": torch.ones(2, 8, dtype=torch.float64)}
    return hf.OneFormerForUniversalSegmentation(config), inputs
