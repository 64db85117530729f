"""Pictures and clips: upright, in order and whole; attacks through them are refused in one sentence."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnctl.app.commands.common import UsageError
from attnctl.data import picture_files
from attnctl.data.clips import ClipError, FileClip, mp4_bytes, open_clip
from attnctl.data.files import natural
from attnctl.data.picture_files import read_picture, upright
from attnctl.errors import AttnctlError, ConfigError

ORIENTATION = 0x0112
GRADIENT = np.tile(np.linspace(0, 255, 24, dtype=np.uint8)[None, :, None], (16, 1, 3))  # dark on the left


def sideways(path: Path, orientation: int) -> Image.Image:
    """Save a picture as a camera does that was held another way, and return it as Pillow opens it."""
    turned = Image.fromarray(GRADIENT)
    way = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = way[orientation]
    stored = turned if turn is None else turned.transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(path, exif=exif, **({"quality": 98} if path.suffix == ".jpg" else {}))
    return Image.open(path)


def is_upright(frame: np.ndarray) -> bool:
    return frame.shape == GRADIENT.shape and int(np.abs(frame.astype(int) - GRADIENT).max()) < 12


# One reader for pictures (11)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
def test_pictures_are_upright_however_they_are_given(suffix: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    opened = sideways(path, orientation)
    lossy = 40 if suffix == ".webp" else 12
    for frame in (
        FileClip(path).read([0])[0],
        open_clip(opened).read([0])[0],
        open_clip([opened]).read([0])[0],
        np.asarray(read_picture(path, ConfigError)),
    ):
        assert frame.shape == GRADIENT.shape
        assert int(np.abs(frame.astype(int) - GRADIENT).max()) < lossy
    folder = tmp_path / "frames"
    folder.mkdir()
    shutil.copy(path, folder)
    assert FileClip(folder).read([0]).shape == (1, *GRADIENT.shape)


def test_the_command_and_masks_read_pictures_upright(tmp_path: Path) -> None:
    from attnctl.app.commands.maps import Maps
    from attnctl.processors import BroadWay

    opened = sideways(tmp_path / "a.jpg", 6)
    command = Maps(image=tmp_path / "a.jpg", point=("0.5,0.5",))
    assert is_upright(np.asarray(command._opened()))
    by_path = np.asarray(BroadWay(mask=str(tmp_path / "a.jpg")).mask)
    by_image = np.asarray(BroadWay(mask=opened).mask)
    assert by_path.shape == by_image.shape == GRADIENT.shape[:2]
    assert np.abs(by_path - GRADIENT[:, :, 0] / 255).max() < 0.05


def test_deep_grey_pictures_keep_their_shades(tmp_path: Path) -> None:
    deep = (GRADIENT[:, :, 0].astype(np.uint16)) * 257
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert np.array_equal(FileClip(tmp_path / "a.png").read([0])[0], GRADIENT)


# Order and what is no frame (10, 28)


def test_frames_are_in_the_order_that_people_count_in(tmp_path: Path) -> None:
    names = [f"frame_{i}.png" for i in range(1, 13)] + ["frame_007b.png", "Frame_13.PNG"]
    for i, name in enumerate(names):
        Image.new("RGB", (4, 4), (i * 10, 0, 0)).save(tmp_path / name)
    (tmp_path / "._frame_1.png").write_bytes(b"\0\5\26\7 what macOS leaves")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    clip = FileClip(tmp_path)
    order = [p.name for p in clip._files]
    assert order == [*names[:7], "frame_007b.png", *names[7:12], "Frame_13.PNG"]
    assert clip.read(range(3))[:, 0, 0, 0].tolist() == [0, 10, 20]


@pytest.mark.parametrize("seed", range(3))
def test_natural_order_sorts_mixed_names(seed: int) -> None:
    names = ["a", "a1", "a2b1", "a2b10", "a10", "b", "9", "10", "x1y2z3", "x1y10z1"]
    shuffled = random.Random(seed).sample(names, len(names))
    expected = ["9", "10", "a", "a1", "a2b1", "a2b10", "a10", "b", "x1y2z3", "x1y10z1"]
    assert [p.name for p in sorted(map(Path, shuffled), key=natural)] == expected


@pytest.mark.parametrize("suffix", [".webp", ".png", ".gif", ".tiff"])
def test_an_animation_is_a_clip(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), (40 * i, 0, 0)) for i in range(5)]
    options: dict[str, Any] = {} if suffix == ".tiff" else {"duration": 100}
    options |= {"lossless": True} if suffix == ".webp" else {}
    path = tmp_path / f"moving{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    clip = FileClip(path)
    assert clip.count == 5
    assert clip.fps == pytest.approx(8.0 if suffix == ".tiff" else 10.0)
    assert clip.read([4, 0, 2])[:, 0, 0, 0].tolist() == [160, 0, 80]
    if suffix != ".gif":  # which is no frame at all
        with pytest.raises(ClipError, match="holds 5 pictures: expected one"):
            FileClip(tmp_path).read([0])
    with pytest.raises(UsageError, match="holds 5 pictures"):
        read_picture(path, UsageError)


# Playlists and scripts (48)


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """Make a video that nobody has asked for."""
    path = tmp_path / "private.mp4"
    path.write_bytes(mp4_bytes([np.full((32, 32, 3), 200, np.uint8)] * 4, 8))
    return path


SCRIPTS = {
    "playlist.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{path}\n#EXT-X-ENDLIST\n",
    "playlist.mp4": "#EXTM3U\n#EXTINF:10,\n{path}\n#EXT-X-ENDLIST\n",
    "script.mp4": "ffconcat version 1.0\nfile '{path}'\n",
    "script.mkv": "ffconcat version 1.0\nfile '{path}'\n",
    "call.avi": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=control:file://{path}\n",
    "manifest.mpd": '<?xml version="1.0"?><MPD profiles="urn:mpeg:dash:profile:isoff-live:2011">{path}</MPD>',
    "list.webm": "[playlist]\nFile1={path}\n",
    "list.asx": '<asx version="3.0"><entry><ref href="file://{path}"/></entry></asx>',
    "page.mp4": "<html><video src='{path}'></html>",
    "metadata.mov": ";FFMETADATA1\ntitle={path}\n",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_other_file_is_followed(name: str, private: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(SCRIPTS[name].format(path=private))
    with pytest.raises(ClipError, match="is no video that is read: expected MP4"):
        FileClip(path)


def test_a_name_is_neither_an_address_nor_a_pattern(private: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clip%02d.mp4", "concat:private.mp4", "subfile,,start,0,end,0,,:private.mp4"):
        shutil.copy(private, name)
        assert FileClip(name).count == 4
    for name in ("http://127.0.0.1:9/x.mp4", "concat:a.mp4|b.mp4", "file:private.mp4"):
        with pytest.raises(ClipError, match="There is no video"):
            FileClip(name)


@pytest.mark.parametrize("brand", [b"heic", b"avif", b"mif1"])
def test_still_pictures_are_no_videos(brand: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0" * 64)
    with pytest.raises(ClipError, match="convert it to PNG or JPEG"):
        FileClip(tmp_path / "a.heic")


@pytest.mark.parametrize(("container", "codec"), [("matroska", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx-vp9")])
def test_usual_videos_are_read(container: str, codec: str, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "a.video"
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(4):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 60 * i, np.uint8), "rgb24")))
        file.mux(stream.encode())
    assert FileClip(path).count == 4
    assert abs(int(FileClip(path).read([3])[0].mean()) - 180) < 12


# Sizes (52)


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(65535, 65535), (1 << 30, 1), (8193, 8192)])
def test_enormous_pictures_are_not_unpacked(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "frame_1.png").write_bytes(_png(*size))
    for act in (
        lambda: FileClip(tmp_path / "frame_1.png"),
        lambda: FileClip(tmp_path).read([0]),
        lambda: read_picture(tmp_path / "frame_1.png", ClipError),
    ):
        with pytest.raises(ClipError, match=r"pixels; expected|cannot be read"):
            act()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + b"\0" * 40, b"\xff\xd8\xff" + b"x" * 90])
def test_damaged_pictures_are_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    for act in (lambda: FileClip(tmp_path / "a.png"), lambda: FileClip(tmp_path).read([0])):
        with pytest.raises(AttnctlError, match=r"a\.png"):
            act()


def test_frames_of_a_truncated_animation_are_one_error(tmp_path: Path) -> None:
    frames = [Image.effect_noise((32, 32), 60 + i) for i in range(4)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    whole = buffer.getvalue()
    for cut in range(40, len(whole), 301):
        (tmp_path / "a.gif").write_bytes(whole[:cut])
        with contextlib.suppress(ClipError):
            clip = FileClip(tmp_path / "a.gif")
            assert clip.read(range(clip.count)).shape[1:] == (32, 32, 3)


def test_upright_leaves_a_plain_picture_as_it_is() -> None:
    assert np.array_equal(np.asarray(upright(Image.fromarray(GRADIENT))), GRADIENT)


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_an_animation_may_not_be_as_large_as_a_picture(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders hold several pictures of an animation at once."""
    assert picture_files._MOST_MOVING <= picture_files.MOST_PIXELS // 4
    monkeypatch.setattr(picture_files, "_MOST_MOVING", 30 * 20)
    for size in ((30, 20), (31, 20)):
        path, pictures = tmp_path / f"a.{kind.lower()}", [Image.new("RGB", size, c) for c in ("black", "white")]
        pictures[0].save(path)
        assert FileClip(path).count == 1
        pictures[0].save(path, save_all=True, append_images=pictures[1:])
        if size == (30, 20):
            assert FileClip(path).count == 2
        else:
            with pytest.raises(ClipError, match="31x20 pixels; expected 1 to 600"):
                FileClip(path)


@pytest.mark.parametrize("place", [(0, 0, 9000, 9000), (20000, 30000, 24, 16), (0, 3, 65535, 300)])
@pytest.mark.parametrize("frame", [0, 1, 2])
def test_a_gif_does_not_grow_with_a_picture_outside_of_it(
    place: tuple[int, int, int, int], frame: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its canvas grows to hold each picture, of which the header of the file says nothing."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 16, 24), dtype=np.uint8)
    pictures = [Image.fromarray(one) for one in noise]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:])
    content, descriptor = buffer.getvalue(), b"\x2c" + struct.pack("<4H", 0, 0, 24, 16)
    parts = content.split(descriptor)
    assert len(parts) == 4
    new = [descriptor] * 3
    new[frame] = b"\x2c" + struct.pack("<4H", *place)
    (tmp_path / "a.gif").write_bytes(parts[0] + b"".join(d + part for d, part in zip(new, parts[1:], strict=True)))
    sizes: list[int] = []
    allocate = Image.core.fill

    def noted(mode: str, size: tuple[int, int], color: Any) -> Any:
        sizes.append(size[0] * size[1])
        return allocate(mode, size, color)

    monkeypatch.setattr(Image.core, "fill", noted)
    with pytest.raises(ClipError, match=r"pixels; expected 1 to|exceeds limit"):
        FileClip(tmp_path / "a.gif")
    assert all(size <= 24 * 16 for size in sizes)
