"""Processors for the pico models that have a vision tower."""

from conftest import byte_tokenizer

GEMMA = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
"""Tokens 259 and on; 260 is the image's in the pico configs."""


def make_processor(family: str):
    """Images of 16 x 16 pixels become 4 tokens (Gemma) or 1 (Qwen)."""
    import transformers

    tokenizer = byte_tokenizer()
    tokens = GEMMA if family == "gemma3" else QWEN
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    size = {"height": 16, "width": 16}
    if family == "gemma3":
        for name, token in zip(("boi", "image", "eoi"), tokens, strict=True):
            tokenizer._set_model_specific_special_tokens({f"{name}_token": token})
        images = transformers.Gemma3ImageProcessor(size=size)
        return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    pixels = {"patch_size": 8, "min_pixels": 256, "max_pixels": 256}
    images = transformers.Qwen2VLImageProcessor(**pixels)
    if family == "qwen3_vl":
        videos = transformers.Qwen3VLVideoProcessor(patch_size=8)
        return transformers.Qwen3VLProcessor(images, tokenizer, videos)
    videos = transformers.Qwen2VLVideoProcessor(patch_size=8)
    return transformers.Qwen2_5_VLProcessor(images, tokenizer, videos)
