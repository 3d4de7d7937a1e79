"""The collator edits the messages for the processor. The caller's rows must be what they were, and what
the model sees must not change."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import copy
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


def rows(style):
    image = Image.new("RGB", (28, 28))
    parts = [
        {"type": "image", "image": image, "text": None},
        {"type": "text", "text": "hello", "image": None},
    ]
    answer = [{"type": "text", "text": "there", "image": None}]
    user, assistant = {"role": "user", "content": parts}, {"role": "assistant", "content": answer}
    plain = {"role": "user", "content": "hello"}
    return {
        "messages": [{"messages": [user, assistant]}],
        "conversations": [{"conversations": [user, assistant]}],
        "plain text": [{"messages": [plain, assistant], "images": [image]}],
        "prompt and completion": [{"prompt": [user], "completion": [assistant]}],
        "plain prompt": [{"prompt": [plain], "completion": [{**plain, "role": "assistant"}]}],
    }[style]


STYLES = ["messages", "conversations", "plain text", "prompt and completion", "plain prompt"]


@pytest.mark.parametrize("single", [False, True], ids = ["parts", "single text"])
@pytest.mark.parametrize("style", STYLES)
def test_the_rows_are_what_they_were(style, single):
    one, examples = collator(), rows(style)
    one.assistant_single_content = single
    before = copy.deepcopy(examples)
    pixels = [id(part.get("image")) for part in parts_of(examples)]
    one(examples)
    assert without_images(examples) == without_images(before)
    assert [id(part.get("image")) for part in parts_of(examples)] == pixels


def parts_of(examples):
    for example in examples:
        for messages in example.values():
            for message in messages:
                if isinstance(message, dict) and isinstance(message["content"], list):
                    yield from message["content"]


def without_images(value):
    if isinstance(value, dict):
        return {key: without_images(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_images(item) for item in value]
    return "image" if isinstance(value, Image.Image) else value


@pytest.mark.parametrize("style", STYLES)
def test_a_second_batch_of_the_same_rows_is_the_same(style):
    one, examples = collator(), rows(style)
    first, second = one(examples), one(examples)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_the_model_sees_as_before():
    batch = collator()(rows("messages"))
    # user : <image> x 3 hello assistant : there
    assert batch["input_ids"].tolist() == [[4, 3, 2, 2, 2, 6, 5, 3, 7]]
    assert batch["labels"][0, -1] == 7 and batch["pixel_values"].shape == (1, 3, 28, 28)
