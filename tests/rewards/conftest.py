"""Small random models, built with transformers' classes and saved as people save them."""

import string
from types import SimpleNamespace

import pytest
import torch

from tests.rewards import checkpoints


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory):
    """A saved CLIPModel with its tokenizer: .path, .model, .tokenizer."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase)]
    tokenizer = transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(path)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": len(words), "max_position_embeddings": 20, "hidden_act": "gelu"},
        vision_config={**sizes, "image_size": 24, "patch_size": 8, "hidden_act": "gelu"},
        projection_dim=12,
    )
    model = transformers.CLIPModel(config).eval()
    checkpoints.randomise(model)
    model.save_pretrained(path)
    return SimpleNamespace(path=path, model=model, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def bert_tokenizer(tmp_path_factory):
    """A saved BertTokenizer of letters: (path, tokenizer)."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("bert")
    letters = [*string.ascii_lowercase, *("##" + c for c in string.ascii_lowercase)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    tokenizer.save_pretrained(path)
    return path, tokenizer


@pytest.fixture
def images():
    """Two square images, a little beyond [-1, 1]."""
    return 0.8 * torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
