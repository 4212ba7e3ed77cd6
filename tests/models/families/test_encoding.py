"""The real text encoders behind the text cache."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from dmdr_fast.data.text_cache import TextCache
from dmdr_fast.models.families import TextEncoder, open_family, to_device
from tests.families import PROMPTS


def test_the_bits_of_an_embedding_do_not_depend_on_its_company(case):
    alone = case.encoder.encode(PROMPTS[1:2])[0]
    among = case.encoder.encode(["sea", *PROMPTS])[2]
    assert alone.keys() == among.keys()
    for name in alone:
        assert torch.equal(alone[name], among[name])
        assert alone[name].isfinite().all()


def test_a_full_cache_needs_no_encoder(case, tmp_path, monkeypatch):
    encoder = TextEncoder(case.family, dtype=torch.float32)
    monkeypatch.setattr(encoder, "_load", lambda **_: case.encoder._load())
    cache = TextCache(encoder, tmp_path)
    assert cache.fill(PROMPTS, [""]) == 4
    reader = TextEncoder(case.family, dtype=torch.float32)
    monkeypatch.setattr(reader, "_load", lambda **_: pytest.fail("a pipeline was loaded"))
    cache = TextCache(reader, tmp_path)
    assert cache.fill(PROMPTS, [""]) == 0
    condition = case.family.condition([cache.get(p) for p in PROMPTS], cache.longest(PROMPTS, [""]))
    direct = case.family.condition(case.entries, cache.longest(PROMPTS, [""]))
    for name in direct:
        assert torch.equal(condition[name], direct[name])


def test_negatives_are_the_pipelines(case):
    (negative,), (plain,) = (case.encoder.encode([""], negative=n) for n in (True, False))
    zeros = case.name == "sdxl"  # force_zeros_for_empty_prompt
    for name in plain:
        assert torch.equal(negative[name], torch.zeros_like(plain[name]) if zeros else plain[name])
        assert plain[name].any()


def test_identity_follows_weights_tokenizer_length_and_dtype(cases, tmp_path):
    folder = shutil.copytree(cases("flux").folder, tmp_path / "flux")

    def identity(dtype=torch.float32, **kwargs):
        return json.dumps(TextEncoder(open_family(folder, **kwargs), dtype=dtype).identity, sort_keys=True)

    seen = [identity(), identity(torch.bfloat16), identity(length=128)]
    assert seen[0] == json.dumps(cases("flux").encoder.identity, sort_keys=True)  # wherever the folder is
    weights = folder / "text_encoder_2/model.safetensors"
    state = load_file(weights)
    next(iter(state.values())).view(-1)[5] += 1e-3
    save_file(state, weights, metadata={"format": "pt"})
    seen.append(identity())
    (folder / "tokenizer_2/tokenizer.json").write_text("{}")
    seen.append(identity())
    assert len(set(seen)) == 5


def test_an_encoder_that_cannot_be_loaded(cases, tmp_path):
    folder = shutil.copytree(cases("z_image").folder, tmp_path / "z")
    encoder = TextEncoder(open_family(folder), dtype=torch.float32)
    weights = folder / "text_encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="its text encoders and tokenizers cannot be loaded"):
        encoder.encode(["a"])
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="text_encoder holds no weights"):
        encoder.encode(["a"])


def test_a_pipeline_saved_without_an_encoder(cases, tmp_path):
    folder = shutil.copytree(cases("sd3").folder, tmp_path / "sd3")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None]}))
    with pytest.raises(ValueError, match="it was saved without text_encoder_3"):
        TextEncoder(open_family(folder), dtype=torch.float32).encode(["a"])


def test_a_hub_id_is_known_by_its_commit(cases, tmp_path, monkeypatch):
    snapshot = shutil.copytree(cases("flux").folder, tmp_path / "snapshots/0a1b2c")
    asked = []

    def download(repository, file, *, subfolder, revision):
        asked.append((repository, revision))
        return str(snapshot / (subfolder or "") / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    family = open_family("organisation/teacher", revision="v2")
    assert family.network_config == cases("flux").family.network_config
    identity = TextEncoder(family, dtype=torch.float32).identity
    assert (identity["hub"], identity["commit"]) == ("organisation/teacher", "0a1b2c")
    assert set(asked) == {("organisation/teacher", "v2")}


def test_a_hub_that_does_not_answer(monkeypatch):
    def download(*_, **__):
        raise ConnectionError("no route to the hub\nand a long story")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json could not be fetched \(no route to the hub\)"):
        open_family("organisation/teacher")


def test_lengths_stay_on_the_host():
    condition = {"prompt_embeds": torch.ones(2, 3, 4), "lengths": torch.tensor([1, 2])}
    moved = to_device(condition, torch.device("meta"))
    assert (moved["prompt_embeds"].device.type, moved["lengths"].device.type) == ("meta", "cpu")
