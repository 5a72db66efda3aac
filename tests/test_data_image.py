"""The image loader on small files."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from d2v_fast.nn.batch import make_batch
from d2v_fast.nn.config import Data2VecConfig, EncoderConfig, ImageFrontEndConfig
from d2v_fast.nn.masking import BlockMask
from d2v_fast.train.data import DataError, ImageData, ImageDataConfig, UnreadableFile, batches, build_data, read_image
from d2v_fast.train.errors import ConfigError
from d2v_fast.train.graph import signature

SIZE = 32  # pixels; patches of 8


def model(channels=3):
    return Data2VecConfig(
        modality="image",
        frontend=ImageFrontEndConfig(image_size=SIZE, patch_size=8, channels=channels),
        encoder=EncoderConfig(),
        mask=BlockMask(num_masked=8, min_block=2),
    )


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Ten images of different shapes in two classes."""
    for i in range(10):
        path = tmp_path / f"class{i % 2}" / f"{i}.{('png', 'jpg')[i % 2]}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise(30 + i, 40 - i, i)).save(path)
    return tmp_path


def config(path, **kwargs):
    return ImageDataConfig(path=str(path), **({"batch_size": 4} | kwargs))


def take(data, count, **kwargs):
    return list(itertools.islice(batches(data, **kwargs), count))


def assert_same(got, expected):
    assert len(got) == len(expected)
    for (*place, a), (*other, b) in zip(got, expected, strict=True):
        assert place == other and a.skipped == b.skipped
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.mask, b.mask)


def test_batches_depend_on_seed_and_place_only(folder):
    (folder / "broken.png").write_bytes(b"\x89PNG")
    data = ImageData(config(folder), model(), 3)
    alone = take(data, 6)
    assert_same(take(data, 6, num_workers=2), alone)
    assert_same(take(ImageData(config(folder), model(), 3), 3, epoch=alone[3][0], index=alone[3][1]), alone[3:])
    other = take(ImageData(config(folder), model(), 4), 6)
    assert not all(torch.equal(a[2].mask, b[2].mask) for a, b in zip(alone, other, strict=True))


def test_batch_layout(folder):
    data = build_data(config(folder), model(), 0)
    assert len(data.plan(0)) == 2  # ten images, batches of four: the last two are left for another epoch
    batch = take(data, 1)[0][2]
    side = 37  # 8/7 of 32, rounded up
    assert batch.inputs.shape == (4, 3, side, side) and batch.inputs.dtype == torch.uint8
    assert batch.mask.shape == (4, 16) and (batch.mask.sum(1) <= 8).all() and batch.num_masked > 0
    assert ImageData(config(folder, decode_size=50), model(), 0).load(0, 0, (1,)).inputs.shape[-1] == 50
    assert "10 files" in data.describe()


def test_static_shapes(folder):
    """The same masks, in batches of one shape."""
    plain, static = (build_data(config(folder), model(), 0, static_shapes=flag) for flag in (False, True))
    shapes = set()
    for a, b in zip(take(plain, 4), take(static, 4), strict=True):
        assert torch.equal(a[2].mask, b[2].mask) and a[2].num_masked == b[2].num_masked
        shapes.add(signature(b[2]))
    assert len(shapes) == 1 and b[2].positions.shape == (4 * 8,)


def test_small_folder_makes_one_small_batch(folder):
    assert [len(b) for b in ImageData(config(folder, batch_size=64), model(), 0).plan(0)] == [10]


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (20, 20), (30, 200)])
def test_read_image_is_the_central_square(tmp_path, shape):
    pixels = np.zeros((*shape, 3), np.uint8)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    pixels[top : top + side, left : left + side] = (10, 200, 30)  # black around the square
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png", 12)
    assert got.shape == (12, 12, 3) and got.dtype == np.uint8
    assert (got[2:-2, 2:-2] == (10, 200, 30)).all() and got[..., 1].min() > 150  # the filter reaches over the edge


def test_read_image_is_bicubic_with_antialiasing(tmp_path):
    Image.fromarray(noise(40, 40)).save(tmp_path / "a.png")
    x = torch.from_numpy(noise(40, 40)).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(x, (16, 16), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    assert np.abs(read_image(tmp_path / "a.png", 16) - expected.clamp(0, 255).numpy()).max() <= 1


def test_big_jpegs_keep_their_content(tmp_path):
    y, x = np.mgrid[:600, :600] / 599
    pixels = np.stack([255 * x, 255 * y, 127 + 0 * x], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    jpeg, png = read_image(tmp_path / "a.jpg", 24).astype(int), read_image(tmp_path / "a.png", 24)
    assert np.abs(jpeg - png).max() <= 8


def grey(value, mode="L"):
    return Image.new(mode, (20, 20), value)


def palette():
    image = Image.new("P", (20, 20), 0)
    image.putpalette([7, 8, 9, 250, 0, 0])
    return image


@pytest.mark.parametrize(
    ("image", "kwargs", "expected"),
    [
        (grey(40), {}, (40, 40, 40)),
        (grey(1, "1"), {}, (255, 255, 255)),
        (Image.new("RGBA", (20, 20), (200, 100, 0, 0)), {}, (255, 255, 255)),
        (Image.new("RGBA", (20, 20), (200, 100, 0, 255)), {}, (200, 100, 0)),
        (Image.new("LA", (20, 20), (80, 0)), {}, (255, 255, 255)),
        (palette(), {}, (7, 8, 9)),
        (palette(), {"transparency": 0}, (255, 255, 255)),
        (Image.fromarray(np.full((20, 20), 0x4020, np.uint16)), {}, (0x40, 0x40, 0x40)),
    ],
    ids=["L", "1", "transparent", "opaque", "LA", "palette", "transparent-palette", "16-bit"],
)
def test_odd_modes(tmp_path, image, kwargs, expected):
    image.save(tmp_path / "a.png", **kwargs)
    assert (read_image(tmp_path / "a.png", 8) == expected).all()
    one = read_image(tmp_path / "a.png", 8, channels=1)
    assert one.shape == (8, 8, 1) and np.abs(one - np.dot(expected, (0.299, 0.587, 0.114))).max() <= 1


@pytest.mark.parametrize("content", ["garbage", "empty", "truncated", "float", "gone"])
def test_unreadable_files(folder, content):
    victim = folder / "class1" / "3.jpg"
    if content == "float":
        victim = folder / "f.tif"
        Image.fromarray(np.zeros((9, 9), np.float32)).save(victim)
    elif content == "gone":
        victim = folder / "gone.png"
        victim.symlink_to("nowhere")
    else:
        victim.write_bytes({"garbage": b"xyz", "empty": b"", "truncated": victim.read_bytes()[:700]}[content])
    with pytest.raises(UnreadableFile, match=victim.name):
        read_image(victim, 16)
    data = ImageData(config(folder, batch_size=100), model(), 0)
    batch = take(data, 1)[0][2]
    assert [name for name, _ in batch.skipped] == [victim.relative_to(folder).as_posix()]
    assert len(batch.inputs) == len(batch.mask) == len(data.names) - 1


def test_what_takes_too_much_memory_is_unreadable(folder, monkeypatch):
    def convert(image, mode):
        raise MemoryError

    monkeypatch.setattr("d2v_fast.train.data.image._opaque", convert)
    with pytest.raises(UnreadableFile, match=r"3\.jpg: it takes more memory than there is"):
        read_image(folder / "class1" / "3.jpg", 16)


def test_nothing_usable(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        ImageData(config(tmp_path / "no"), model(), 0)
    with pytest.raises(DataError, match="holds no images"):
        ImageData(config(tmp_path), model(), 0)
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=r"nothing readable in epoch 0 .*a\.png"):
        take(ImageData(config(tmp_path), model(), 0), 1)


SWITCHES = {
    "all": {},
    "no jitter": {"color_jitter": 0},
    "no flip": {"hflip": 0},
    "no crop": {"crop_scale": (1, 1)},
    "none": {"color_jitter": 0, "hflip": 0, "crop_scale": [1.0, 1.0]},
}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_augment(folder, switches, channels):
    data = ImageData(config(folder, **switches), model(channels), 0)
    batch = take(data, 1)[0][2]
    torch.manual_seed(0)
    first = data.augment(batch)
    assert first.inputs.shape == (4, channels, SIZE, SIZE) and first.inputs.dtype == torch.float32
    assert first.mask is batch.mask and batch.inputs.dtype == torch.uint8
    mean, std = torch.tensor(data.mean).view(-1, 1, 1), torch.tensor(data.std).view(-1, 1, 1)
    pixels = first.inputs * std + mean
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5
    second = data.augment(batch).inputs
    assert torch.equal(second, first.inputs) == (switches == SWITCHES["none"])
    torch.manual_seed(0)
    assert torch.equal(data.augment(batch).inputs, first.inputs)  # only torch's generator matters


def plain(folder, **kwargs):
    defaults = SWITCHES["none"] | {"decode_size": SIZE, "mean": (0, 0, 0), "std": (1, 1, 1)}
    return ImageData(config(folder, **(defaults | kwargs)), model(), 0)


def one_image(data, pixels):  # [H, W, 3] uint8
    inputs = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return data.augment(make_batch(inputs, np.ones((1, 16), bool))).inputs[0]


def test_without_augmentation_pixels_are_only_scaled(folder):
    pixels = noise(SIZE, SIZE)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert torch.allclose(one_image(plain(folder), pixels), expected)
    shifted = one_image(plain(folder, mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2)), pixels)
    parts = [(expected[c] - m) / s for c, (m, s) in enumerate([(0.1, 0.5), (0.2, 1), (0.3, 2)])]
    assert torch.allclose(shifted, torch.stack(parts), atol=1e-6)


def test_flip_alone(folder):
    pixels = noise(SIZE, SIZE)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert torch.allclose(one_image(plain(folder, hflip=1), pixels), expected.flip(-1), atol=1e-6)


def test_crops_have_the_scale_and_ratio_asked_for(folder):
    ramp = np.linspace(0, 255, SIZE)
    pixels = np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], ramp[None] * 0), -1).astype(np.uint8)
    data = plain(folder, crop_scale=(0.2, 0.5), crop_ratio=(0.5, 2))
    torch.manual_seed(0)
    areas, ratios = [], []
    for _ in range(60):
        crop = one_image(data, pixels)
        width, height = (float(crop[0].max() - crop[0].min()), float(crop[1].max() - crop[1].min()))
        areas.append(width * height)
        ratios.append(width / height)
    # a ramp shows how much of each side a crop spans, up to the rounding of a pixel at either end
    assert 0.12 < min(areas) < 0.26 and 0.38 < max(areas) < 0.62
    assert 0.4 < min(ratios) < 0.75 and 1.4 < max(ratios) < 2.4


def test_jitter_changes_colours_only(folder):
    torch.manual_seed(0)
    flat = np.full((SIZE, SIZE, 3), (60, 120, 180), np.uint8)
    out = [one_image(plain(folder, color_jitter=0.4), flat) for _ in range(8)]
    assert all(o.std((1, 2)).max() < 1e-5 for o in out)
    level = torch.stack([o.mean() for o in out])
    assert level.std() > 0.03 and level.min() > 0.6 * 120 / 255 - 0.01 and level.max() < 1.4 * 120 / 255 + 0.01


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"path": ""}, "path"),
        ({"batch_size": 0}, "batch_size"),
        ({"decode_size": 0}, "decode_size"),
        ({"crop_scale": (0, 1)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale"),
        ({"crop_ratio": (2, 1)}, "crop_ratio"),
        ({"hflip": 2}, "hflip"),
        ({"color_jitter": -0.1}, "color_jitter"),
        ({"std": (1, 0, 1)}, "std"),
    ],
)
def test_bad_config(kwargs, name):
    with pytest.raises(ConfigError, match=f"data.{name} must be"):
        config(**({"path": "x"} | kwargs))


def test_model_that_does_not_fit(folder):
    with pytest.raises(ConfigError, match=r"model\.modality"):
        ImageData(config(folder), Data2VecConfig.speech("base"), 0)
    with pytest.raises(ConfigError, match=r"data\.mean must be 1 numbers"):
        ImageData(config(folder, mean=(0, 0, 0)), model(1), 0)
    with pytest.raises(ConfigError, match=r"model\.frontend\.channels"):
        ImageData(config(folder), model(4), 0)


@pytest.mark.parametrize("arguments", [(0, 3), (8, 2)])
def test_read_image_bad_arguments(folder, arguments):
    with pytest.raises(ConfigError, match=r"size|channels"):
        read_image(folder / "class0" / "0.png", *arguments)


def test_survives_pickling(folder):
    data = ImageData(config(folder), model(), 0)  # what a spawned worker receives
    data.augment(take(data, 1)[0][2])
    assert_same(take(pickle.loads(pickle.dumps(data)), 3), take(data, 3))
