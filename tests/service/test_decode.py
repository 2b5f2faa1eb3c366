import numpy as np
import pytest
from PIL import Image

from tests.support.pictures import encode, png_of_claimed_size
from unperturb.models.pixels import Preprocessing, to_rgb
from unperturb.service.decoding.decode import Decoded, decode
from unperturb.service.errors import MalformedRequestError, TooLargeError, UnprocessableError, UnsupportedTypeError


def read(payload: bytes, size: int = 32, max_pixels: int = 50_000_000) -> Decoded:
    return decode(payload, Preprocessing(size=size), max_pixels=max_pixels)


def channel_means(decoded: Decoded) -> list[int]:
    return [round(float(v)) for v in decoded.pixels.mean((1, 2))]


GRADIENT = Image.fromarray(np.linspace(0, 255, 32 * 32 * 3).astype(np.uint8).reshape(32, 32, 3))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_file_of_the_models_size_is_untouched(kind: str) -> None:
    decoded = read(encode(GRADIENT, kind, lossless=True))
    assert np.array_equal(decoded.pixels.transpose(1, 2, 0), np.asarray(GRADIENT))
    assert (decoded.width, decoded.height, decoded.mode, decoded.resized) == (32, 32, "RGB", False)


def test_jpeg_is_read() -> None:
    assert abs(read(encode(GRADIENT, "JPEG", quality=95)).pixels.mean() - 127) < 3


def test_larger_image_is_resized_with_antialiasing() -> None:
    checks = np.indices((256, 256)).sum(0) % 2 * 255  # one-pixel checks: grey when averaged, noise when sampled
    decoded = read(encode(Image.fromarray(checks.astype(np.uint8)).convert("RGB")))
    assert decoded.resized
    assert decoded.pixels.std() < 3
    assert channel_means(decoded) == [128, 128, 128]


def test_oblong_image_keeps_its_proportions() -> None:
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (16, 0, 48, 32))  # the middle square
    assert channel_means(read(encode(wide)))[2] > 245


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (32, 32), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 32, 16))  # the upper half is dark
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = read(encode(image, "JPEG", quality=95, exif=exif)).pixels
    assert pixels[:, :15].mean() > 240
    assert pixels[:, 17:].mean() < 15


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    decoded = read(encode(Image.fromarray(ramp)))
    assert decoded.mode.startswith("I")
    assert np.abs(decoded.pixels[0].astype(float) - ramp / 257).max() <= 0.51


@pytest.mark.parametrize("widened", [False, True], ids=["I;16", "I"])
def test_every_16_bit_level_is_rounded(widened: bool) -> None:
    levels = np.arange(65536).reshape(256, 256)
    image = Image.fromarray(levels.astype(np.int32 if widened else np.uint16))
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., 0], np.rint(levels / 257))


def test_grey_palette_and_bilevel_become_rgb() -> None:
    assert channel_means(read(encode(Image.new("L", (32, 32), 100)))) == [100] * 3
    palette = Image.new("RGB", (32, 32), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert channel_means(read(encode(palette))) == [10, 200, 30]
    assert channel_means(read(encode(Image.new("1", (32, 32), 1)))) == [255] * 3


def test_cmyk_becomes_the_right_colour() -> None:
    means = channel_means(read(encode(Image.new("CMYK", (32, 32), (255, 0, 0, 0)), "JPEG", quality=95)))
    assert means[0] < 20
    assert min(means[1:]) > 230  # cyan


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_shown_on_white(mode: str) -> None:
    hidden = Image.new(mode, (32, 32), (0,) * len(mode))  # black under alpha 0
    assert channel_means(read(encode(hidden))) == [255] * 3
    half = Image.new("RGBA", (32, 32), (255, 0, 0, 128))
    assert channel_means(read(encode(half))) == [255, 127, 127]


def test_transparent_palette_colour_and_key_are_shown_on_white() -> None:
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert channel_means(read(encode(palette, transparency=0))) == [255] * 3
    assert channel_means(read(encode(Image.new("RGB", (32, 32), (1, 2, 3)), transparency=(1, 2, 3)))) == [255] * 3
    grey = Image.fromarray(np.full((32, 32), 300, np.uint16))
    assert channel_means(read(encode(grey, transparency=300))) == [255] * 3


def test_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (32, 32), c) for c in ((255, 0, 0), (0, 0, 255))]
    payload = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert channel_means(read(payload)) == [255, 0, 0]


def test_no_bytes_are_malformed() -> None:
    with pytest.raises(MalformedRequestError, match="empty"):
        read(b"")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_image_types_are_unsupported(kind: str) -> None:
    with pytest.raises(UnsupportedTypeError, match="JPEG, PNG, WEBP"):
        read(encode(GRADIENT, kind))


@pytest.mark.parametrize("payload", [b"hello", b"<svg/>", b"\x00" * 100, b"RIFF\x00\x00\x00\x00WAVE"], ids=repr)
def test_bytes_that_are_no_image_are_unsupported(payload: bytes) -> None:
    with pytest.raises(UnsupportedTypeError):
        read(payload)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_file_is_unprocessable(kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    payload = encode(noise, kind)
    with pytest.raises(UnprocessableError, match="damaged"):
        read(payload[: int(len(payload) * share)])


@pytest.mark.parametrize("side", [7_100, 9_600, 60_000])
def test_too_many_pixels_are_refused_before_decoding(side: int) -> None:
    with pytest.raises(TooLargeError, match="50,000,000"):
        read(png_of_claimed_size(side, side))


def test_fuzzed_files_are_decoded_or_refused_and_nothing_else() -> None:
    generator = np.random.default_rng(1)
    sources = [encode(GRADIENT, kind) for kind in ("PNG", "JPEG", "WEBP")]
    refused = 0
    for round_ in range(300):
        payload = bytearray(sources[round_ % 3])
        for place in generator.integers(12, len(payload), 4):
            payload[place] = generator.integers(0, 256)
        try:
            assert read(bytes(payload)).pixels.shape == (3, 32, 32)
        except (UnprocessableError, TooLargeError, UnsupportedTypeError):
            refused += 1
    assert refused > 50
