"""The text cache with an encoder that counts its calls: what is computed, when, and what is never mixed."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmdr_fast.data import text_cache
from dmdr_fast.data.text_cache import TextCache
from dmdr_fast.errors import UserError


class Letters:
    """Embeds a prompt as its letters' codes times a weight: any mix-up shows in the numbers."""

    def __init__(self, weight=1.0):
        self.identity = {"encoder": "letters", "weight": weight, "length": 20}
        self.weight, self.computed, self.loaded = weight, [], 0

    def encode(self, prompts, *, negative):
        self.loaded += 1
        self.computed += prompts
        return [self.truth(p, negative) for p in prompts]

    def truth(self, prompt, negative=False):
        codes = self.weight * torch.tensor([[ord(c), -negative] for c in prompt or " "], dtype=torch.bfloat16)
        return {"prompt_embeds": codes, "pooled_embeds": codes.sum(0).float()}

    def release(self):
        self.loaded = 0


def assert_holds(cache, encoder, prompts):
    for prompt in prompts:
        entry, truth = cache.get(prompt), encoder.truth(prompt)
        assert entry.keys() == truth.keys()
        for name in truth:
            assert entry[name].dtype == truth[name].dtype
            assert torch.equal(entry[name], truth[name])


def shards(cache):
    return sorted(cache.directory.glob("*.safetensors"))


def test_prompts_are_computed_once_and_read_without_the_encoder(tmp_path):
    encoder = Letters()
    cache = TextCache(encoder, tmp_path)
    assert cache.fill(["cat", "a dog", "cat"], ["", "blurry"]) == 4
    assert encoder.computed == ["cat", "a dog", "", "blurry"]
    assert encoder.loaded == 0  # released
    again = Letters()
    reader = TextCache(again, tmp_path)
    assert reader.fill(["cat", "a dog"], ["blurry"]) == 0
    assert again.computed == []
    assert_holds(reader, again, ["cat", "a dog"])
    assert torch.equal(
        reader.get("blurry", negative=True)["prompt_embeds"], again.truth("blurry", True)["prompt_embeds"]
    )
    assert reader.fill(["cat", "sea"]) == 1
    assert again.computed == ["sea"]
    assert reader.longest(["cat", "a dog"]) == 5
    assert reader.longest(["cat"], ["blurry"]) == 6


def test_embeddings_are_mapped_not_read(tmp_path):
    cache = TextCache(Letters(), tmp_path)
    cache.fill(["cat"])
    first, second = cache.get("cat")["prompt_embeds"], cache.get("cat")["prompt_embeds"]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_another_encoder_has_another_directory(tmp_path):
    one, two = TextCache(Letters(1.0), tmp_path), TextCache(Letters(2.0), tmp_path)
    one.fill(["cat"])
    with pytest.raises(UserError, match="no embedding of 'cat'; fill the cache with it first"):
        two.get("cat")
    two.fill(["cat"])
    assert_holds(one, one.encoder, ["cat"])
    assert_holds(two, two.encoder, ["cat"])


def test_a_directory_that_is_anothers_is_refused(tmp_path):
    cache = TextCache(Letters(), tmp_path)
    (cache.directory / "key.json").write_text(json.dumps({"encoder": "other"}))
    with pytest.raises(UserError, match=r"its key\.json is another encoder's"):
        TextCache(Letters(), tmp_path)


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def header(file):
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def relabel(file):
    save_file(load_file(file), file, metadata={"format": "pt", "key": "of another", "entries": "{}"})


@pytest.mark.parametrize("damage", [flip, cut, header, relabel])
def test_a_broken_or_stale_shard_is_computed_again(tmp_path, damage, caplog):
    TextCache(Letters(), tmp_path).fill(["cat", "dog"])
    (file,) = shards(TextCache(Letters(), tmp_path))
    damage(file)
    encoder = Letters()
    cache = TextCache(encoder, tmp_path)
    assert cache.fill(["cat", "dog"]) == 2
    assert "is broken or stale" in caplog.text
    assert_holds(cache, encoder, ["cat", "dog"])


def test_checksums_are_read_again_only_after_a_change(tmp_path, monkeypatch):
    TextCache(Letters(), tmp_path).fill(["cat"])
    read = []
    monkeypatch.setattr(text_cache, "_crc", lambda tensor: read.append(tensor))
    cache = TextCache(Letters(), tmp_path)
    cache.get("cat")
    assert read == []
    shards(cache)[0].touch()
    TextCache(Letters(), tmp_path).fill([])
    assert read


def test_a_shard_is_closed_when_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(text_cache, "SHARD_BYTES", 1)
    monkeypatch.setattr(text_cache, "CHUNK", 2)
    encoder = Letters()
    cache = TextCache(encoder, tmp_path)
    prompts = [f"cat {n}" for n in range(5)]
    cache.fill(prompts)
    assert len(shards(cache)) == 3
    assert_holds(cache, encoder, prompts)


def test_a_run_that_dies_keeps_its_full_shards_and_leaves_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(text_cache, "SHARD_BYTES", 1)
    monkeypatch.setattr(text_cache, "CHUNK", 1)

    class Dies(Letters):
        def encode(self, prompts, *, negative):
            if "boom" in prompts:
                raise RuntimeError("out of memory")
            return super().encode(prompts, negative=negative)

    cache = TextCache(Dies(), tmp_path)
    (cache.directory / ".fill-0-of-1.123").write_text("half a shard of a killed run")
    with pytest.raises(RuntimeError):
        cache.fill(["cat", "boom"])
    encoder = Letters()
    cache = TextCache(encoder, tmp_path)
    cache.fill(["cat", "boom"])
    assert encoder.computed == ["boom"]
    assert not list(cache.directory.glob(".fill*"))


def test_ranks_fill_their_parts_and_jobs_take_turns(tmp_path):
    prompts = [f"cat {n}" for n in range(20)]
    encoders = [Letters() for _ in range(4)]
    caches = [TextCache(encoder, tmp_path) for encoder in encoders]  # two jobs of two ranks
    work = [
        threading.Thread(target=c.fill, args=(prompts,), kwargs={"part": i % 2, "parts": 2})
        for i, c in enumerate(caches)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert sorted(p for e in encoders for p in e.computed) == sorted(prompts)
    for cache, encoder in zip(caches, encoders, strict=True):
        assert_holds(cache, encoder, prompts)


def test_what_it_lacks(tmp_path):
    cache = TextCache(Letters(), tmp_path)
    cache.fill(["cat"], ["blurry"])
    assert cache.lacks(["dog", "cat", "sea", "dog", "blurry"]) == ["dog", "sea", "blurry"]
    assert cache.lacks(["blurry", "cat"], negative=True) == ["cat"]


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_encoders_that_cannot_be_loaded_are_the_users_to_put_right(tmp_path, error, monkeypatch):
    cache = TextCache(Letters(), tmp_path)

    def encode(prompts, *, negative):
        raise error("text_encoder holds no weights")

    monkeypatch.setattr(cache.encoder, "encode", encode)
    with pytest.raises(UserError, match="text embeddings: text_encoder holds no weights"):
        cache.fill(["cat"])


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .* set DMDR_FAST_CACHE"):
        TextCache(Letters(), tmp_path / "file")
