"""What the tools room is tested against: Meta's own tokenizer and formats, from the `llama-models` package.

Its text and its tokenizer are under the Llama community licence, so nothing of it is in this repository. The package is taken
where it is installed, else its wheel is downloaded once into the cache; without either, the tests that need it are skipped.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from unsloth_ext.cache import cache_dir

LLAMA_MODELS = "llama-models==0.3.0"


def _package_folder() -> Path:
    """The folder `llama_models`: installed, or unpacked from the wheel in the cache."""
    spec = find_spec("llama_models")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations)))
        if (folder / "llama3" / "tokenizer.model").is_file():
            return folder
    unpacked = cache_dir("llama-models") / LLAMA_MODELS.partition("==")[2]
    if not unpacked.is_dir():
        with tempfile.TemporaryDirectory(dir=unpacked.parent) as temporary:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            pip += ["--retries", "1", "--timeout", "10"]
            done = subprocess.run([*pip, "--dest", temporary, LLAMA_MODELS], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{LLAMA_MODELS} is not installed and cannot be downloaded: {done.stderr.strip()[-200:]}")
            (wheel,) = Path(temporary).glob("*.whl")
            half = Path(temporary, "unpacked")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(half, [name for name in archive.namelist() if name.startswith("llama_models/")])
            _move_into_place(half, unpacked)
    return unpacked / "llama_models"


def _move_into_place(half: Path, whole: Path) -> None:
    try:
        os.rename(half, whole)
    except OSError:  # another process was faster
        if not whole.is_dir():
            raise


@pytest.fixture(scope="session")
def llama_models():
    """The path of the package `llama_models`, importable while the tests run. Its ChatFormat needs tiktoken and pydantic."""
    for needed in ("tiktoken", "pydantic", "PIL"):
        pytest.importorskip(needed)
    folder = _package_folder()
    sys.path.insert(0, str(folder.parent))
    yield folder
    sys.path.remove(str(folder.parent))


@pytest.fixture(scope="session")
def llama3_tokenizer_folder(llama_models):
    """A folder with the real Llama 3 tokenizer (128,256 tokens, no chat template) in transformers' format."""
    folder = cache_dir("llama-models") / f"tokenizer-{LLAMA_MODELS.partition('==')[2]}"
    if not folder.is_dir():
        half = Path(tempfile.mkdtemp(dir=folder.parent))
        _build_tokenizer(llama_models / "llama3" / "tokenizer.model").save_pretrained(half)
        _move_into_place(half, folder)
        shutil.rmtree(half, ignore_errors=True)
    return folder


@pytest.fixture(scope="session")
def llama3_tokenizer(llama3_tokenizer_folder):
    """The real Llama 3 tokenizer, one for the whole session: a test that changes it takes a deep copy."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama3_tokenizer_folder)


def _build_tokenizer(model: Path):
    """The conversion of transformers' `convert_llama_weights_to_hf.py`, with the names that Llama 3.1's vocabulary has."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from unsloth_ext.tools.special_tokens import SPECIAL_TOKENS, VOCABULARY_SIZE

    names = {token_id: name for name, token_id in SPECIAL_TOKENS.items()}
    reserved = iter(range(256))
    specials = [
        names.get(token_id) or f"<|reserved_special_token_{next(reserved)}|>"
        for token_id in range(128000, VOCABULARY_SIZE)
    ]
    from llama_models.llama3.tokenizer import Tokenizer

    tokenizer = TikTokenConverter(str(model), pattern=Tokenizer.pat_str, extra_special_tokens=specials).converted()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    bos = "<|begin_of_text|>"
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, SPECIAL_TOKENS[bos])]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=131072,
    )
    assert len(fast) == VOCABULARY_SIZE
    assert {name: fast.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS} == SPECIAL_TOKENS
    return fast


@pytest.fixture(scope="session")
def llama31_template():
    """The Llama 3.1 template of the installed Unsloth, its default system message (none) filled in."""
    from unsloth_ext.tools.templates import installed_template

    template = installed_template()
    if template is None:
        pytest.skip("Unsloth is not installed")
    return template.replace("{system_message}", "")
