"""The architectures that are covered, with random weights, and inputs of two sizes for each."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from .case import Inputs, alive


@dataclass(frozen=True)
class Case:
    """One architecture.

    Parameters
    ----------
    name
        Unique among the cases of its library.
    build
        Returns the model with random weights that all matter, in evaluation mode.
    inputs
        Return random inputs; the second differ in batch, and in length or resolution where the
        model allows.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Callable[[], Inputs], Callable[[], Inputs]]

    def make_inputs(self) -> list[Inputs]:
        """Return both inputs."""
        return [make() for make in self.inputs]


# ---- torchvision -------------------------------------------------------------------------

_SIZES: Mapping[str, tuple[int, int]] = {
    "inception_v3": (96, 128),
    "maxvit_t": (224, 224),
    "vit_b_16": (224, 224),
    "vit_b_32": (224, 224),
    "vit_h_14": (224, 224),
    "vit_l_16": (224, 224),
    "vit_l_32": (224, 224),
}
"""Where a model takes one size only, or cannot take small ones."""

REPRESENTATIVES = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
)
"""One or two small models of each family of torchvision."""


def torchvision_names() -> list[str]:
    """Return the names of all classification models of torchvision."""
    models = importlib.import_module("torchvision.models")
    names: list[str] = models.list_models(module=models)
    return names


_SMALL_IMAGES: Mapping[str, int] = {
    **dict.fromkeys(("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32"), 64),
    "vit_h_14": 56,
}
"""Images that a model can be built for, in place of those of its weights."""


def torchvision_case(name: str, *, small: bool = False) -> Case:
    """Return a model of torchvision by name.

    Parameters
    ----------
    name
        As torchvision spells it.
    small
        Build transformers that take images of one size for smaller ones; only their table of
        positions differs.
    """
    sizes, options = _SIZES.get(name, (64, 96)), {}
    if small and name in _SMALL_IMAGES:
        size = _SMALL_IMAGES[name]
        sizes, options = (size, size), {"image_size": size}

    def build() -> nn.Module:
        torch.manual_seed(0)
        models = importlib.import_module("torchvision.models")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _alive_images(models.get_model(name, weights=None, **options), name)

    def images(batch: int, size: int) -> Callable[[], Inputs]:
        return lambda: (torch.randn(batch, 3, size, size),)

    return Case(name, build, (images(2, sizes[0]), images(1, sizes[1])))


def _alive_images(model: nn.Module, name: str) -> nn.Module:
    """Let every layer matter: parameters away from zero, statistics that fit the weights."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3 or parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        if norms:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            size = 299 if name == "inception_v3" else 96  # its auxiliary head needs the size
            size = 224 if name == "maxvit_t" else size
            model.train()(torch.randn(4 if size < 100 else 2, 3, size, size))
    return model.eval()


# ---- transformers ------------------------------------------------------------------------

_VOCABULARY = 64
_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_WIDE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
_TEXT = {"vocab_size": _VOCABULARY, "max_position_embeddings": 64, **_WIDE, **_IDS}
# Two key heads and a batch of two: equal sizes must not be confused.
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_FALCON = {key: value for key, value in _TEXT.items() if key != "intermediate_size"}
_DEBERTA = {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_SEQUENCE: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 4,
    **_IDS,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": _VOCABULARY,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 6,
    "decoder_start_token_id": 1,
}
_GPT2 = {"vocab_size": _VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 40, **_IDS}


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, _VOCABULARY, (batch, length))


def _text(batch: int, length: int) -> Inputs:
    return {"input_ids": _tokens(batch, length)}


def _pair(batch: int, length: int) -> Inputs:
    return {
        "input_ids": _tokens(batch, length),
        "decoder_input_ids": _tokens(batch, length - 2),
    }


def _speech(batch: int, length: int) -> Inputs:
    return {
        "input_features": torch.randn(batch, 8, 32),
        "decoder_input_ids": _tokens(batch, length),
    }


def _sound(batch: int, length: int) -> Inputs:
    return {"input_values": torch.randn(batch, length)}


def _image(batch: int, size: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def _text_and_image(batch: int, length: int) -> Inputs:
    return {
        "input_ids": _tokens(batch, length),
        "pixel_values": torch.randn(batch, 3, 32, 32),
    }


_Sizes = tuple[tuple[int, int], tuple[int, int]]
_LENGTHS: _Sizes = ((2, 7), (3, 11))
_FIXED: _Sizes = ((2, 32), (3, 32))
_FREE: _Sizes = ((2, 64), (1, 96))

_CAUSAL = hf.AutoModelForCausalLM
_Row = tuple[Any, Callable[[], Any], Callable[[int, int], Inputs], _Sizes]
_FAMILIES: dict[str, _Row] = {
    "llama": (_CAUSAL, lambda: hf.LlamaConfig(**_GROUPED), _text, _LENGTHS),
    "llama-multi-query": (
        _CAUSAL,
        lambda: hf.LlamaConfig(**{**_TEXT, "num_key_value_heads": 1}),
        _text,
        _LENGTHS,
    ),
    "mistral": (_CAUSAL, lambda: hf.MistralConfig(**_GROUPED), _text, _LENGTHS),
    "qwen2": (
        _CAUSAL,
        lambda: hf.Qwen2Config(**_GROUPED, tie_word_embeddings=True),
        _text,
        _LENGTHS,
    ),
    "qwen3": (_CAUSAL, lambda: hf.Qwen3Config(**_GROUPED, head_dim=8), _text, _LENGTHS),
    "gemma2": (_CAUSAL, lambda: hf.Gemma2Config(**_GROUPED, head_dim=8), _text, _LENGTHS),
    "gemma3": (_CAUSAL, lambda: hf.Gemma3TextConfig(**_GROUPED, head_dim=8), _text, _LENGTHS),
    "phi3": (_CAUSAL, lambda: hf.Phi3Config(**_GROUPED), _text, _LENGTHS),
    "opt": (
        _CAUSAL,
        lambda: hf.OPTConfig(
            vocab_size=_VOCABULARY,
            hidden_size=48,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=64,
            word_embed_proj_dim=48,
            **_IDS,
        ),
        _text,
        _LENGTHS,
    ),
    "gpt2": (_CAUSAL, lambda: hf.GPT2Config(**_GPT2, n_positions=64), _text, _LENGTHS),
    "gpt-neox": (_CAUSAL, lambda: hf.GPTNeoXConfig(**_TEXT), _text, _LENGTHS),
    "gpt-j": (
        _CAUSAL,
        lambda: hf.GPTJConfig(**_GPT2, n_positions=64, rotary_dim=4),
        _text,
        _LENGTHS,
    ),
    "bloom": (
        _CAUSAL,
        lambda: hf.BloomConfig(vocab_size=_VOCABULARY, hidden_size=48, n_layer=2, n_head=6, **_IDS),
        _text,
        _LENGTHS,
    ),
    "falcon": (
        _CAUSAL,
        lambda: hf.FalconConfig(**_FALCON, multi_query=False, new_decoder_architecture=False),
        _text,
        _LENGTHS,
    ),
    "falcon-multi-query": (
        _CAUSAL,
        lambda: hf.FalconConfig(**_FALCON, multi_query=True, new_decoder_architecture=False),
        _text,
        _LENGTHS,
    ),
    "falcon-grouped": (
        _CAUSAL,
        lambda: hf.FalconConfig(**_FALCON, num_kv_heads=2, new_decoder_architecture=True),
        _text,
        _LENGTHS,
    ),
    "mixtral": (
        _CAUSAL,
        lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4),
        _text,
        _LENGTHS,
    ),
    "bert": (hf.BertForMaskedLM, lambda: hf.BertConfig(**_TEXT), _text, _LENGTHS),
    "roberta": (hf.RobertaForMaskedLM, lambda: hf.RobertaConfig(**_TEXT), _text, _LENGTHS),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        lambda: hf.DistilBertConfig(
            vocab_size=_VOCABULARY,
            dim=48,
            hidden_dim=40,
            n_layers=2,
            n_heads=6,
            max_position_embeddings=64,
            pad_token_id=2,
        ),
        _text,
        _LENGTHS,
    ),
    "deberta": (hf.DebertaForMaskedLM, lambda: hf.DebertaConfig(**_DEBERTA), _text, _LENGTHS),
    "deberta-v2": (
        hf.DebertaV2ForMaskedLM,
        lambda: hf.DebertaV2Config(
            **_DEBERTA, position_buckets=4, share_att_key=True, norm_rel_ebd="layer_norm"
        ),
        _text,
        _LENGTHS,
    ),
    "t5": (hf.T5ForConditionalGeneration, lambda: hf.T5Config(**_T5), _pair, _LENGTHS),
    "t5-gated": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        _pair,
        _LENGTHS,
    ),
    "bart": (
        hf.BartForConditionalGeneration,
        lambda: hf.BartConfig(**_SEQUENCE, max_position_embeddings=32),
        _pair,
        _LENGTHS,
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        lambda: hf.WhisperConfig(
            **{**_SEQUENCE, "num_mel_bins": 8}, max_source_positions=16, max_target_positions=16
        ),
        _speech,
        _LENGTHS,
    ),
    "wav2vec2": (
        hf.Wav2Vec2ForCTC,
        lambda: hf.Wav2Vec2Config(
            **_TEXT,
            conv_dim=(8, 8),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
        ),
        _sound,
        ((2, 400), (3, 600)),
    ),
    "clip": (
        hf.CLIPModel,
        lambda: hf.CLIPConfig(
            text_config=dict(_TEXT),
            vision_config={**_WIDE, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        ),
        _text_and_image,
        _LENGTHS,
    ),
    "vit": (
        hf.ViTForImageClassification,
        lambda: hf.ViTConfig(**_WIDE, image_size=32, patch_size=8),
        _image,
        _FIXED,
    ),
    "deit": (
        hf.DeiTForImageClassification,
        lambda: hf.DeiTConfig(**_WIDE, image_size=32, patch_size=8),
        _image,
        _FIXED,
    ),
    "swin": (
        hf.SwinForImageClassification,
        lambda: hf.SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        _image,
        _FIXED,
    ),
    "convnext": (
        hf.ConvNextForImageClassification,
        lambda: hf.ConvNextConfig(hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 2, 1], image_size=64),
        _image,
        _FREE,
    ),
    "detr": (
        hf.DetrForObjectDetection,
        lambda: hf.DetrConfig(
            use_timm_backbone=False,
            backbone=None,
            backbone_config=hf.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 16, 24],
                depths=[1, 1, 1, 1],
                out_features=["stage4"],
            ),
            num_queries=5,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=40,
            decoder_ffn_dim=36,
            encoder_attention_heads=6,
            decoder_attention_heads=4,
        ),
        _image,
        _FREE,
    ),
}
"""Class, configuration, kind of inputs, and two sizes of them."""

FAMILIES = tuple(_FAMILIES)
"""The names of the covered families of transformers."""


def transformers_case(name: str, attention: str | None = None) -> Case:
    """Return a tiny model of transformers by name of its family.

    Parameters
    ----------
    name
        One of `FAMILIES`.
    attention
        Implementation of attention; by default the family's.
    """
    kind, configure, inputs, sizes = _FAMILIES[name]

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = configure()
        if attention is not None:
            config._attn_implementation = attention
        model = kind.from_config(config) if kind is _CAUSAL else kind(config)
        alive(model)
        return model.eval()  # type: ignore[no-any-return]

    first, second = sizes
    return Case(name, build, (lambda: inputs(*first), lambda: inputs(*second)))
