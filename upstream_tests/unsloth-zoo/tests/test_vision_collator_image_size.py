"""The collator shrinks an image to the model's size. By default that must bound both sides, not the
width alone."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from unsloth_zoo.vision_utils import UnslothVisionDataCollator

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}"
)


def collator(**kwargs):
    words = ["[UNK]", "<pad>", "<image>", ":", "user", "assistant", "hello", "there"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token = "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object = backend, pad_token = "<pad>", additional_special_tokens = ["<image>"]
    )
    processor = LlavaProcessor(
        image_processor = CLIPImageProcessor(
            size = {"shortest_edge": 28}, crop_size = {"height": 28, "width": 28}
        ),
        tokenizer = tokenizer,
        patch_size = 14,
        vision_feature_select_strategy = "default",
        chat_template = TEMPLATE,
    )
    config = SimpleNamespace(
        vision_config = SimpleNamespace(patch_size = 14, image_size = 56), torch_dtype = torch.float32
    )
    embedding = torch.nn.Embedding(8, 4)
    model = SimpleNamespace(config = config, get_input_embeddings = lambda: embedding)
    return UnslothVisionDataCollator(model, processor, **kwargs)


def shrunk(size, **kwargs):
    seen = []
    one = collator(**kwargs)
    call = one.processor.image_processor.__class__.__call__

    class Watching(one.processor.image_processor.__class__):
        def __call__(self, images, *args, **kwargs):
            flat = images if not isinstance(images[0], list) else [i for row in images for i in row]
            seen.extend(image.size for image in flat)
            return call(self, images, *args, **kwargs)

    one.processor.image_processor.__class__ = Watching
    content = [
        {"type": "image", "image": Image.new("RGB", size)},
        {"type": "text", "text": "hello"},
    ]
    one([{"messages": [{"role": "user", "content": content}], "images": [Image.new("RGB", size)]}])
    return seen[-1]


@pytest.mark.parametrize("size", [(40, 600), (56, 57), (20, 400)])
def test_a_tall_image_is_bounded(size):
    width, height = shrunk(size)
    assert height == 56 and width == max(1, round(56 * size[0] / size[1]))


@pytest.mark.parametrize("size", [(600, 40), (112, 112), (400, 20)])
def test_a_wide_or_square_image_as_before(size):
    assert shrunk(size) == (56, max(1, round(56 * size[1] / size[0])))


@pytest.mark.parametrize("size", [(56, 56), (10, 30)])
def test_a_small_image_as_before(size):
    assert shrunk(size) == size


def test_a_given_dimension_holds():
    assert shrunk((40, 600), resize_dimension = 0) == (40, 600)
    assert shrunk((600, 40), resize_dimension = 1) == (600, 40)
    assert shrunk((112, 224), resize_dimension = "min") == (56, 112)


def test_other_sizes_as_before():
    assert shrunk((40, 600), resize = "max") == (40, 600)
    assert shrunk((40, 600), resize = (28, 28)) == (28, 28)
