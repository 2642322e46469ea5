"""Tiny random encoders, encoder-decoders and speech models for the zoo.

Every model is small enough to build in well under a second, and every weight that transformers starts at a constant is
moved off it, so that two layers taken for one another always show.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GenerationConfig,
    HubertConfig,
    HubertForCTC,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MT5Config,
    MT5ForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tiny import VOCAB_SIZE, WINDOW
from zoo import Specimen

PAD, BOS, EOS = 256, 257, 258
LENGTH = 24  # tokens; three times the local window of ModernBERT, so a layer of the wrong kind shows
PADDED = 5  # tokens at the end of the second row
SAMPLES = 4000
# Whisper's word timestamps read these [decoder layer, head] pairs; layer 1 is dropped, layers 2 and 4 move.
ALIGNMENT_HEADS = [[1, 0], [2, 1], [4, 0], [4, 1]]

TEXT = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
ENCODER = TEXT | {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
T5 = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_heads": 4,
    "num_layers": 6,
    "num_decoder_layers": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
SPEECH: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "initializer_range": 0.1,
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 4, 2],
    "conv_kernel": [10, 8, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """``make()`` in evaluation mode with weights that depend on the seed alone, none left at a constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 or "pos_bias" in name:  # Wav2Vec2-Conformer starts its two position biases at 0
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif parameter.ndim == 2 and ("embed" in name or name == "shared.weight"):
                    # Small against what the layers add, or a tied head would only repeat the last token.
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm1d):  # a fresh one is the same in every layer
                    assert module.running_mean is not None
                    assert module.running_var is not None
                    module.running_mean.normal_(std=0.1)
                    module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def tokens(seed: int) -> dict[str, torch.Tensor]:
    """Two rows of text, the second padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, PAD, (2, LENGTH), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, -PADDED:] = PAD
    attention_mask[1, -PADDED:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def decoder_tokens(seed: int) -> torch.Tensor:
    """What the decoder was given so far: shorter than the encoder's text, and not the same."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(0, PAD, (2, LENGTH // 2), generator=generator)


def text(_model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Inputs of an encoder."""
    return tokens(seed)


def text_to_text(_model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Inputs of an encoder-decoder of text."""
    return tokens(seed) | {"decoder_input_ids": decoder_tokens(seed)}


def mel_to_text(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Inputs of Whisper, which takes spectrograms of one fixed length and no padding mask."""
    config = model.config
    assert isinstance(config, WhisperConfig)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    return {"input_features": features, "decoder_input_ids": decoder_tokens(seed)}


def waveform(_model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Inputs of a model with group normalisation, whose feature extractors hand out no padding mask."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_values": torch.randn(2, SAMPLES, generator=generator)}


def padded_waveform(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Inputs of a model with layer normalisation in its feature encoder: the second row is a quarter shorter."""
    values = waveform(model, seed)["input_values"]
    attention_mask = torch.ones(2, SAMPLES, dtype=torch.long)
    values[1, -SAMPLES // 4 :] = 0.0
    attention_mask[1, -SAMPLES // 4 :] = 0
    return {"input_values": values, "attention_mask": attention_mask}


@contextmanager
def identity_passes(model: AlbertForMaskedLM, passes: Collection[int]) -> Iterator[None]:
    """Make the given passes of an ALBERT hand their input on unchanged.

    Its passes share modules, so a hook on a module alone would silence every pass through it.
    """
    encoder = model.albert.encoder
    counter = 0

    def start(_module: nn.Module, _arguments: tuple[Any, ...]) -> None:
        nonlocal counter
        counter = 0

    def hand_on(_module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        nonlocal counter
        counter += 1
        given: torch.Tensor = arguments[0]
        return given if counter - 1 in passes else output

    handles = [encoder.register_forward_pre_hook(start)]
    handles += [group.register_forward_hook(hand_on) for group in encoder.albert_layer_groups]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bert() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(**ENCODER))


def _roberta() -> RobertaForSequenceClassification:
    # Positions count from the padding id upwards, so the table must reach past it.
    facts = ENCODER | {"max_position_embeddings": PAD + 1 + 64}
    return RobertaForSequenceClassification(RobertaConfig(**facts, num_labels=5))


def _distilbert() -> DistilBertForSequenceClassification:
    config = DistilBertConfig(
        **TEXT,
        dim=64,
        n_layers=6,
        n_heads=2,
        hidden_dim=96,
        max_position_embeddings=64,
        initializer_range=0.1,
        num_labels=5,
    )
    return DistilBertForSequenceClassification(config)


def _modernbert() -> ModernBertForMaskedLM:
    facts = ENCODER | {
        "num_hidden_layers": 7,  # full, local, local, full, local, local, full
        "local_attention": 2 * WINDOW,  # counts both sides
        "initializer_range": 0.2,  # the layers' outputs are scaled down by the depth
        "classifier_bias": True,
        # Closer together than the real 160,000 and 10,000, which 24 tokens could not tell apart.
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    }
    return ModernBertForMaskedLM(ModernBertConfig(**facts))


def _deberta_v3() -> DebertaV2ForSequenceClassification:
    config = DebertaV2Config(
        **ENCODER,
        relative_attention=True,
        position_buckets=8,
        pos_att_type="p2c|c2p",
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        num_labels=5,
    )
    return DebertaV2ForSequenceClassification(config)


def _deberta_v2_with_convolution() -> DebertaV2ForMaskedLM:
    config = DebertaV2Config(
        **ENCODER,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        conv_kernel_size=3,
        conv_act="gelu",
    )
    return DebertaV2ForMaskedLM(config)


def _albert() -> AlbertForMaskedLM:
    return AlbertForMaskedLM(AlbertConfig(**ENCODER, embedding_size=32))


def _t5() -> T5ForConditionalGeneration:
    return _with_positions_that_matter(T5ForConditionalGeneration(T5Config(**T5)))


def _t5_gated() -> T5ForConditionalGeneration:
    config = T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return _with_positions_that_matter(T5ForConditionalGeneration(config))


def _mt5() -> MT5ForConditionalGeneration:
    return _with_positions_that_matter(MT5ForConditionalGeneration(MT5Config(**T5)))


def _with_positions_that_matter(model: T5ForConditionalGeneration) -> T5ForConditionalGeneration:
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):  # a first layer that keeps its table must be seen to need it
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    return model


def _bart() -> BartForConditionalGeneration:
    config = BartConfig(
        **TEXT,
        d_model=64,
        encoder_layers=6,
        decoder_layers=5,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=64,
        init_std=0.1,
        decoder_start_token_id=EOS,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


def _whisper() -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        **TEXT,
        num_mel_bins=16,
        d_model=64,
        encoder_layers=6,
        decoder_layers=5,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_source_positions=30,
        max_target_positions=64,
        init_std=0.1,
        decoder_start_token_id=BOS,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        decoder_start_token_id=BOS,
        alignment_heads=[list(pair) for pair in ALIGNMENT_HEADS],
    )
    return model


def _wav2vec2(**changes: Any) -> Wav2Vec2ForCTC:
    return Wav2Vec2ForCTC(Wav2Vec2Config(**SPEECH | changes))


def _wav2vec2_with_convolutions_as_deep() -> Wav2Vec2ForCTC:
    # The default tdnn_dim, tdnn_kernel and tdnn_dilation have five entries too.
    return _wav2vec2(
        num_hidden_layers=5,
        conv_dim=[24, 28, 32, 36, 40],
        conv_stride=[5, 2, 2, 2, 1],
        conv_kernel=[10, 3, 3, 2, 2],
    )


def _hubert() -> HubertForCTC:
    return HubertForCTC(HubertConfig(**SPEECH))


def _wav2vec2_conformer() -> Wav2Vec2ConformerForCTC:
    facts = SPEECH | {
        "feat_extract_norm": "layer",
        "conv_bias": True,
        "conv_depthwise_kernel_size": 7,
        "max_source_positions": 128,
    }
    return Wav2Vec2ConformerForCTC(Wav2Vec2ConformerConfig(**facts))


SPECIMENS: tuple[Specimen, ...] = (
    Specimen("bert", "encoder", lambda: seeded(_bert), {"layers": (1, 2, 5)}, text),
    Specimen("roberta", "encoder", lambda: seeded(_roberta), {"layers": (0, 2, 3, 5)}, text),
    Specimen(
        "distilbert",
        "encoder",
        lambda: seeded(_distilbert),
        {"layers": (0, 2, 5)},
        text,
        note="the depth is n_layers; num_hidden_layers is another name for it",
    ),
    Specimen(
        "modernbert",
        "encoder",
        lambda: seeded(_modernbert),
        {"layers": (0, 2, 3, 6)},  # full, local, full, full: no period of the index gives this
        text,
        window=WINDOW,
        note="layer 0 has no norm before its attention and cannot go; the window is the reach to each side",
    ),
    Specimen("deberta-v2", "encoder", lambda: seeded(_deberta_v3), {"layers": (1, 2, 5)}, text),
    Specimen(
        "deberta-v2-convolution",
        "encoder",
        lambda: seeded(_deberta_v2_with_convolution),
        {"layers": (0, 2, 3, 5)},
        text,
        note="a convolution follows whichever layer comes first, so layer 0 cannot go",
    ),
    Specimen(
        "albert",
        "encoder",
        lambda: seeded(_albert),
        {"layers": (0, 2, 3, 5)},
        text,
        note="one layer run six times: a pass less, no weight less",
    ),
    Specimen(
        "t5",
        "encoder-decoder",
        lambda: seeded(_t5),
        {"encoder": (0, 2, 3, 5), "decoder": (0, 1, 4)},
        text_to_text,
        generates=True,
        note="layer 0 of each stack holds the position table of all layers, so it cannot go",
    ),
    Specimen(
        "t5-gated",
        "encoder-decoder",
        lambda: seeded(_t5_gated),
        {"encoder": (0, 1, 3, 4), "decoder": (0, 3, 4)},
        text_to_text,
        generates=True,
        note="T5 v1.1: gated feed-forward, decoder output not scaled",
    ),
    Specimen(
        "mt5",
        "encoder-decoder",
        lambda: seeded(_mt5),
        {"encoder": (0, 4, 5), "decoder": (0, 2)},
        text_to_text,
        generates=True,
    ),
    Specimen(
        "bart",
        "encoder-decoder",
        lambda: seeded(_bart),
        {"encoder": (1, 2, 5), "decoder": (0, 2, 3, 4)},
        text_to_text,
        generates=True,
    ),
    Specimen(
        "whisper",
        "encoder-decoder",
        lambda: seeded(_whisper),
        {"encoder": (0, 2, 3, 5), "decoder": (0, 2, 4)},
        mel_to_text,
        generates=True,
        note="the generation config names decoder layers in alignment_heads",
    ),
    Specimen("wav2vec2", "speech", lambda: seeded(_wav2vec2), {"layers": (1, 2, 5)}, waveform),
    Specimen(
        "wav2vec2-stable-layer-norm",
        "speech",
        lambda: seeded(lambda: _wav2vec2(do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True)),
        {"layers": (0, 2, 3, 5)},
        padded_waveform,
    ),
    Specimen(
        "wav2vec2-convolutions-as-deep",
        "speech",
        lambda: seeded(_wav2vec2_with_convolutions_as_deep),
        {"layers": (0, 2, 4)},
        waveform,
        note="conv_dim, conv_stride, conv_kernel and the tdnn lists are as long as the stack, and not about its layers",
    ),
    Specimen("hubert", "speech", lambda: seeded(_hubert), {"layers": (0, 1, 3, 5)}, waveform),
    Specimen(
        "wav2vec2-conformer", "speech", lambda: seeded(_wav2vec2_conformer), {"layers": (0, 2, 5)}, padded_waveform
    ),
)
