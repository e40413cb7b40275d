"""Models of images and text, calibrated on what their processors return."""

import pytest
import torch
import transformers as hf

import osscar
from osscar.data.loaders import load_batches
from tests.osscar.masked import masked

IMAGE, SAMPLES = 98, 8
TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIGHT = {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def batch(images=None, side="right", length=14):
    """Return texts of several lengths, with the places of four patches of an image in each."""
    ids = torch.randint(3, 94, (SAMPLES, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if images is not None:
        ids[:, 5:9] = images
    for row in range(1, SAMPLES, 2):
        gap = slice(length - 2, length) if side == "right" else slice(0, 2)
        ids[row, gap], mask[row, gap] = 0, 0
    pixels = torch.randn(SAMPLES, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def clip():
    config = hf.CLIPConfig(text_config=TEXT, vision_config=SIGHT, projection_dim=16)
    return hf.CLIPModel(config), batch()


def llava():
    text = hf.LlamaConfig(**TEXT, num_key_value_heads=2)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**SIGHT), text_config=text, image_token_id=IMAGE,
        vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), batch(IMAGE, "left")


def paligemma():
    """Return one that attends in both directions to what is no answer, as its processor says."""
    text = hf.GemmaConfig(**TEXT, num_key_value_heads=2, head_dim=8)
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**SIGHT, vision_use_head=False), text_config=text,
        image_token_id=IMAGE, projection_dim=32,
    )  # fmt: skip
    given = batch(IMAGE, "left")
    kinds = torch.zeros_like(given["input_ids"])
    return hf.PaliGemmaForConditionalGeneration(config), {**given, "token_type_ids": kinds}


def qwen2_vl():
    """Return one whose images have four patches of a token, or eight: its batch has no row each."""
    sight = {
        "depth": 1, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = hf.Qwen2VLConfig(
        vision_config=sight, image_token_id=IMAGE, video_token_id=97, vision_start_token_id=96,
        text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": rotary},
    )  # fmt: skip
    given = batch()
    grids = torch.tensor([[1, 4, 4], [1, 2, 4]] * (SAMPLES // 2))
    for row, grid in enumerate(grids.prod(1).tolist()):
        given["input_ids"][row, 4], given["input_ids"][row, 5 : 5 + grid // 4] = 96, IMAGE
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 8 * 8)
    kinds = (given["input_ids"] == IMAGE).long()
    return hf.Qwen2VLForConditionalGeneration(config), {
        **given, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds,
    }  # fmt: skip


slow = pytest.mark.slow
FAMILIES = [clip, *(pytest.param(one, marks=slow) for one in (llava, paligemma, qwen2_vl))]


def real(inputs):
    return {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}


def scores(model, inputs):
    with torch.no_grad():
        found = model(**real(inputs))
    return found.logits if "logits" in found else found.logits_per_image


@pytest.mark.filterwarnings("ignore:1 layer:UserWarning", "ignore:the Gram:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_processor_returns_calibrates(family):
    torch.manual_seed(0)
    model, given = family()
    model = model.double().eval()
    with pytest.warns(UserWarning, match="a dict, 8 samples; padding cut off"):
        result = osscar.prune(
            model, given, heads=0.5, neurons=0.5, round_to=1, device="cpu", backend="magnitude"
        )
    smaller = {group.name for group in result.plan.groups if len(group.kept) < group.units}
    assert any("vis" in name for name in smaller)
    assert any("language" in name or "text" in name for name in smaller)
    # The layout of images is read off numbers, so that there is no program for all of them.
    assert bool(result.certificate.unproved) == (family is qwen2_vl)
    twin = masked(model, result)
    for sample in load_batches(given, model).samples:
        expected = scores(twin, sample)
        torch.testing.assert_close(scores(result.model, sample), expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(expected, scores(model, sample))


@pytest.mark.parametrize("family", [llava, paligemma, qwen2_vl])
def test_images_go_with_the_tokens_that_stand_for_them(family):
    torch.manual_seed(0)
    model, given = family()
    model = model.double().eval()
    whole = scores(model, given)
    for row, sample in enumerate(load_batches(given, model).samples):
        kept = given["attention_mask"][row].bool()
        found = scores(model, sample)[0]
        torch.testing.assert_close(found, whole[row, kept], rtol=1e-6, atol=1e-6)
