"""The demo's video: encoded, decoded, and refused when it cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from permattn.cli.demo import video
from permattn.cli.errors import UserError

WIDTH, HEIGHT = 128, 64


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    video.encode(path, num_frames=24, width=WIDTH, height=HEIGHT)
    return path


def test_frames_survive_encoding(made):
    clip = video.decode(made, num_frames=24, width=WIDTH, height=HEIGHT)
    want = list(video._shots(video.photographs(), 24, WIDTH, HEIGHT))
    assert clip.frames.shape == (24, HEIGHT, WIDTH, 3) and clip.source_frames == 24
    error = np.abs(clip.frames.astype(int) - np.stack(want).astype(int)).mean((1, 2, 3))
    # A frame of another shot is about 60 away; lossy coding about 5.
    assert error.max() < 15


def test_shots_move_and_are_cut(made):
    frames = video.decode(made, num_frames=24, width=WIDTH, height=HEIGHT).frames.astype(int)
    step = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    cuts = np.arange(3, 23, 4)
    inside = np.setdiff1d(np.arange(23), cuts)
    assert step[inside].min() > 0.3
    assert step[cuts].mean() > 1.5 * step[inside].mean()


@pytest.mark.parametrize("count", [6, 24, 50], ids=lambda n: f"{n}-frames")
def test_any_number_of_frames_is_read_evenly(made, count):
    few = video.decode(made, num_frames=count, width=WIDTH, height=HEIGHT)
    every = video.decode(made, num_frames=24, width=WIDTH, height=HEIGHT).frames
    wanted = np.linspace(0, 23, count).round().astype(int)
    assert np.array_equal(few.frames, every[wanted])
    assert few.seconds * count == pytest.approx(1.0)


def test_frames_are_scaled(made):
    assert video.aspect_of(made) == 2.0
    clip = video.decode(made, num_frames=4, width=56, height=84)
    assert clip.frames.shape == (4, 84, 56, 3) and clip.source_size == (WIDTH, HEIGHT)


@pytest.fixture(params=["text", "cut", "empty"])
def bad_file(request, tmp_path, made):
    path = tmp_path / "bad.mp4"
    whole = made.read_bytes()
    path.write_bytes(
        {"text": b"no video", "cut": whole[: len(whole) // 2], "empty": b""}[request.param]
    )
    return path


def test_corrupt_file_is_one_line(bad_file):
    with pytest.raises(UserError, match="cannot be decoded") as caught:
        video.decode(bad_file, num_frames=4, width=WIDTH, height=HEIGHT)
    assert "\n" not in str(caught.value) and str(bad_file) in str(caught.value)
    with pytest.raises(UserError, match="cannot be decoded"):
        video.aspect_of(bad_file)


def test_sound_alone_is_no_video(tmp_path):
    import av

    path = tmp_path / "tone.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(UserError, match="no video stream"):
        video.decode(path, num_frames=4, width=WIDTH, height=HEIGHT)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        video.decode(tmp_path / "none.mp4", num_frames=4, width=WIDTH, height=HEIGHT)


def test_interrupted_encoding_leaves_nothing(tmp_path):
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video.encode(
            tmp_path / "x.mp4", num_frames=8, width=WIDTH, height=HEIGHT, on_frame=interrupt
        )
    assert list(tmp_path.iterdir()) == []


def test_without_photographs(monkeypatch, tmp_path):
    monkeypatch.setattr(video, "PHOTOS", ("no-such-photo.png",))
    with pytest.raises(UserError, match="--video"):
        video.encode(tmp_path / "x.mp4", num_frames=8, width=WIDTH, height=HEIGHT)
