"""A folder of images: order, scaling, cropping, and words for what is wrong with it."""

import numpy as np
import pytest
import torch
from PIL import Image

from dmdr_fast.data.images import load_image_folder
from dmdr_fast.errors import UserError


def test_files_in_path_order_with_exact_values(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    (tmp_path / "b").mkdir()
    for name, image in zip(("b/0.png", "a.PNG", "c.bmp"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    images = load_image_folder(tmp_path, (4, 4))
    expected = torch.from_numpy(pixels[[1, 0, 2]]).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert images.dtype == torch.float32 and torch.equal(images, expected)


def test_grey_images_become_rgb_and_wide_ones_are_resized_and_cropped_at_the_centre(tmp_path):
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    images = load_image_folder(str(tmp_path), (8, 8))
    assert torch.equal(images, torch.ones(1, 3, 8, 8))
    assert load_image_folder(tmp_path, (4, 4)).shape == (1, 3, 4, 4)
    assert load_image_folder(tmp_path, (4, 4))[0, :, :, 2].min() > 0.9
    assert load_image_folder(tmp_path, (8, 16))[0, :, :, 4:12].min() == 1  # height and width
    assert load_image_folder(tmp_path, (8, 16))[0, :, :, :4].max() == -1


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(UserError, match="missing: no such directory"):
        load_image_folder(tmp_path / "missing", (8, 8))
    with pytest.raises(UserError, match=r"no image in it; expected files ending in \.png"):
        load_image_folder(tmp_path, (8, 8))
    with pytest.raises(UserError, match="expected at least 1 pixel, got 0 x 8"):
        load_image_folder(tmp_path, (0, 8))
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    with pytest.raises(UserError, match=r"torn\.png cannot be read"):
        load_image_folder(tmp_path, (8, 8))
