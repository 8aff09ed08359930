"""Videos on the model's side: frames, views, placeholders, and a prefix model that reads them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.errors import BadSample
from data_pipelines.media.limits import media_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.shards.tar_writer import ShardWriter
from tests.data.arrays import ImageTransform
from tests.data.text.rendering import load
from tests.support.small_run import picture
from tests.support.tiny_models import llama_config, tiny_llm, tiny_vision, with_views
from tests.support.videos import numbers, video
from vlm_train.contracts.layout import MediaSize
from vlm_train.data.collate import collate_rows
from vlm_train.data.datamodule import Samples
from vlm_train.data.images import transform as images_transform
from vlm_train.data.images.video import decode_frames
from vlm_train.data.media_layout import make_layout
from vlm_train.data.order.sample_plan import SampleRef
from vlm_train.data.processor import Processor
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.families.prefix_vlm import PrefixVLM


@pytest.fixture(scope="module")
def clip() -> bytes:
    return video()


def test_frames_by_count_and_by_times(clip):
    frames = decode_frames(clip, count=4)
    assert frames.shape == (4, 40, 48, 3) and frames.dtype == np.uint8 and numbers(frames) == [0, 6, 12, 19]
    assert np.array_equal(frames, decode_frames(clip, count=4))
    assert numbers(decode_frames(clip, count=1)) == [9] and len(decode_frames(clip, count=99)) == 20
    assert numbers(decode_frames(clip, times=[0.0, 0.55, 1.0])) == [0, 5, 10]
    with pytest.raises(ValueError, match="give one of the two"):
        decode_frames(clip, count=2, times=[0.0])


def test_broken_videos_name_the_place(clip, monkeypatch):
    with pytest.raises(BadSample, match=r"^shard-3 key 17: cannot decode video \(400 bytes\)"):
        decode_frames(clip[:400], count=2, where="shard-3 key 17")
    monkeypatch.setattr("vlm_train.data.images.video.MAX_DECODED", 48 * 40 * 2)
    with pytest.raises(BadSample, match=r"^here: .*3 frames of 48 x 40 pixels; at most 3840 pixels"):
        decode_frames(clip, count=3, where="here")


@pytest.mark.parametrize("mode", ["crop", "pad", "resize"])
def test_every_used_frame_is_a_view(clip, mode):
    transform = ImageTransform(mode=mode, size=(24, 32), frames=5)
    views = transform(clip)
    assert views.shape == (5, 3, 24, 32) and views.dtype == np.uint8
    assert numbers(views[..., 8:16, 12:20]) == [0, 4, 9, 14, 19]
    assert len(transform.grids(MediaSize(48, 40, frames=20))) == 5
    assert len(transform.grids(MediaSize(48, 40, frames=3))) == 3 == len(transform(video(3)))
    assert len(transform.grids(MediaSize(48, 40))) == 1 == len(transform(picture(0)))


def test_all_frames_of_a_video_are_mirrored_alike(clip):
    flipping = ImageTransform(size=(8, 8), flip=True, frames=3)
    flipping._make_view = lambda image, resized, mirror, *_: np.full((3, 8, 8), 255 * mirror)  # type: ignore[method-assign]
    seen = {tuple(flipping(clip, np.random.default_rng(seed))[:, 0, 0, 0]) for seed in range(12)}
    assert seen == {(0, 0, 0), (255, 255, 255)}


def test_no_frames_is_a_wrong_setting():
    with pytest.raises(ConfigError, match=r"image\.frames: 0; allowed: at least 1"):
        ImageTransform(size=(8, 8), frames=0)


def write(folder: Path, clip: bytes) -> Path:
    """A sample of an image and a video, and one of an image alone."""
    with ShardWriter(folder) as writer:
        for key, blobs in (("both", [picture(0), clip]), ("one", [picture(1)])):
            ask = Turn(role="user", parts=(*(Media(item=n) for n in range(len(blobs))), Text(text="What?")))
            turns = (ask, Turn(role="assistant", parts=(Text(text="this"),)))
            media = tuple(media_item(number, blob) for number, blob in enumerate(blobs))
            writer.write_sample(Sample(key=key, media=media, annotations=(Annotation(turns=turns),)), blobs)
    return folder


def test_a_prefix_model_reads_a_video(tmp_path, clip):
    tokenizer = byte_level()
    vision, llm = tiny_vision(), tiny_llm(llama_config(vocab_size=len(tokenizer)))
    model = PrefixVLM(vision=vision, connector=MLP(in_dim=vision.out_dim, out_dim=llm.dim), llm=llm)
    images = {
        "vision": images_transform.ImageTransform(mode="resize", size=(32, 32), frames=3, patch_grid=vision.patch_grid)
    }
    layout = pickle.loads(pickle.dumps(make_layout(model, images)))
    processor = Processor(template=load("qa"), tokenizer=tokenizer, layout=layout, images=images)
    samples = Samples([{"shards": str(write(tmp_path / "set", clip))}], processor, {}, seed=0, limit=None)
    items = [samples.load_example(SampleRef(index, 0), training=True) for index in range(2)]
    batch = collate_rows([[item] for item in items], images)
    assert batch.media.inputs["vision"].view_counts == (1, 3, 1) and batch.media.slot_counts == (4, 12, 4)
    hidden = model(batch)
    changed = batch.media.inputs["vision"].values.clone()
    changed[2] = 255 - changed[2]  # the middle frame of the video
    other = model(with_views(batch, changed))
    assert not torch.equal(hidden[0], other[0]) and torch.equal(hidden[1], other[1])
