"""The sound of a clip, taken over into the MP4 that is made of it: packets as they are, or encoded anew as AAC."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnctl.errors import AttnctlError

__all__ = ["Sound", "SoundError", "sound_of"]

_COPIED = ("aac", "mp3", "ac3", "eac3", "opus", "alac")  # what an MP4 holds as it is
_READ = (*_COPIED, "vorbis", "flac", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_f32le", "pcm_u8", "mp2", "wmav2")
_LONGEST = 24 * 3600.0  # seconds
_RATE = 48_000  # of what is encoded anew


class SoundError(AttnctlError):
    """The sound of a clip cannot be taken over; the message says why."""


@dataclass(frozen=True)
class Sound:
    """A part of a file's sound.

    Attributes:
        path: The file.
        begin: First second.
        end: Second after the last.
        codec: What compresses it.
    """

    path: Path
    begin: float
    end: float
    codec: str

    def write_into(self, output: Any) -> Iterator[None]:
        """Add a stream to an open container of PyAV, then its packets: at the first `next` and at the second."""
        import av

        with _opened(self.path) as source:
            stream = source.streams.audio[0]
            if self.codec in _COPIED:
                into = output.add_stream_from_template(stream)
                yield
                self._copy(source, stream, into, output)
            else:
                into = output.add_stream("aac", rate=_RATE, layout="stereo")
                yield
                self._encode(source, stream, into, output, av.AudioResampler(into.format, "stereo", _RATE))
        yield

    def _copy(self, source: Any, stream: Any, into: Any, output: Any) -> None:
        for packet in source.demux(stream):
            if packet.pts is None or packet.time_base is None:
                continue
            at = float(packet.pts * packet.time_base)
            if at >= self.end:
                break
            if at >= self.begin:
                shift = round(self.begin / packet.time_base)
                packet.pts -= shift
                packet.dts = packet.pts
                packet.stream = into
                output.mux(packet)

    def _encode(self, source: Any, stream: Any, into: Any, output: Any, resampler: Any) -> None:
        samples = 0
        for frame in source.decode(stream):
            if frame.time is None or frame.time < self.begin:
                continue
            if frame.time >= self.end:
                break
            frame.pts = None
            for part in resampler.resample(frame):
                part.pts, samples = samples, samples + part.samples
                output.mux(into.encode(part))
        output.mux(into.encode(None))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import av

    # The file was told apart by its first bytes already; an absolute path is no address, and nothing else is opened.
    with av.open(str(path.resolve()), options={"protocol_whitelist": "file"}, metadata_errors="ignore") as source:
        yield source


def sound_of(path: Path, begin: float, end: float) -> Sound | None:
    """Return the sound of a part of a video file, None where it has none.

    Raises:
        SoundError: PyAV is missing, or the sound cannot be read.
    """
    try:
        import av
    except ImportError:
        raise SoundError('PyAV is missing: pip install "attnctl[video]"') from None
    try:
        with _opened(path) as source:
            if not source.streams.audio:
                return None
            codec = source.streams.audio[0].codec_context.name
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise SoundError(f"it cannot be read ({' '.join(str(error).split())[:120]})") from None
    name = codec.removesuffix("float").removesuffix("_fixed")
    if name not in _READ:
        raise SoundError(f"it is compressed by {codec!r:.40}, which is not read")
    return Sound(path, begin, min(end, _LONGEST), name)
