"""Draw how a clip is sampled from a video: the package's own functions choose the frames of a real file."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from moving_shapes import Scene, write_video

from vivit_hf import VideoReader
from vivit_hf.frame_sampling import (
    fixed_crops,
    mask_missing_frames,
    sample_clips,
    sample_clips_at_rate,
    sample_uniform_clip,
)


WIDTH, MARGIN, CELL = 1050, 18, 42  # pixels
NUM_FRAMES, HEIGHT, FRAME_WIDTH, FPS = 24, 80, 112, 12
INK, GREY, MARK = (20, 20, 20), (95, 95, 95), (0, 68, 136)
TITLE, TEXT, SMALL = (ImageFont.load_default(size) for size in (21, 18, 16))


class Sheet:
    """A picture that grows downwards."""

    def __init__(self, frames: np.ndarray) -> None:
        self.height = round((CELL - 3) * frames.shape[1] / frames.shape[2])
        self.cells = [Image.fromarray(frame).resize((CELL - 3, self.height)) for frame in frames]
        self.faded = [Image.blend(cell, Image.new("RGB", cell.size, "white"), 0.72) for cell in self.cells]
        self.picture = Image.new("RGB", (WIDTH, 2000), "white")
        self.draw = ImageDraw.Draw(self.picture)
        self.top = MARGIN

    def title(self, code: str, words: str) -> None:
        self.draw.text((MARGIN, self.top), code, fill=INK, font=TITLE)
        left = MARGIN + self.draw.textlength(code, font=TITLE) + 16
        self.draw.text((left, self.top + 3), words, fill=GREY, font=TEXT)
        self.top += 32

    def cell(self, place: int, frame: int, is_chosen: bool) -> None:
        left = MARGIN + place * CELL
        self.picture.paste((self.cells if is_chosen else self.faded)[frame], (left, self.top))
        if is_chosen:
            box = (left - 2, self.top - 2, left + CELL - 2, self.top + self.height + 1)
            self.draw.rectangle(box, outline=MARK, width=3)

    def strip(self, chosen: np.ndarray) -> None:
        """Draw all frames of the video, and those of a clip bright, with their numbers."""
        for frame in range(len(self.cells)):
            self.cell(frame, frame, frame in chosen)
        self.top += self.height + 3
        for frame in np.unique(chosen):
            self.number(int(frame), int(frame))
        self.top += 27

    def number(self, place: int, frame: int) -> None:
        middle = MARGIN + place * CELL + (CELL - 3) / 2
        self.draw.text((middle, self.top), str(frame), fill=INK, font=SMALL, anchor="ma")

    def sequence(self, label: str, frames: np.ndarray) -> None:
        """Draw the frames of a clip in its order, and those that its mask hides faded and without a number."""
        shown, mask = (one[0] for one in mask_missing_frames(frames[None]))
        self.draw.text((MARGIN, self.top + self.height // 2 - 10), label, fill=INK, font=TEXT)
        for place, (frame, is_visible) in enumerate(zip(shown, mask, strict=True)):
            self.cell(place + 6, int(frame), bool(is_visible))
        self.top += self.height + 3
        for place in np.flatnonzero(mask):
            self.number(int(place) + 6, int(shown[place]))
        self.top += 27

    def save(self, path: Path) -> None:
        self.picture.crop((0, 0, WIDTH, self.top + MARGIN)).quantize(192).save(path, optimize=True)


def draw_views(sheet: Sheet, frame: np.ndarray) -> None:
    """Draw 4 clips x 3 crops."""
    sheet.title(
        "num_clips=4, num_crops=3", "the paper's views: 4 clips from the first window to the last, each in 3 crops"
    )
    clips = sample_clips(NUM_FRAMES, 8, 1, num_clips=4)
    start = sheet.top
    for number, clip in enumerate(clips):
        sheet.draw.text((MARGIN, sheet.top + 8), f"clip {number + 1}", fill=INK, font=TEXT)
        for index in range(NUM_FRAMES):
            left = MARGIN + 80 + index * 22
            colour = MARK if index in clip else (221, 221, 221)
            sheet.draw.rectangle((left, sheet.top + 6, left + 18, sheet.top + 30), fill=colour)
        sheet.top += 38
    scale = 1.95
    height, width = round(HEIGHT * scale), round(FRAME_WIDTH * scale)
    left, top = WIDTH - MARGIN - width - 60, start
    sheet.picture.paste(Image.fromarray(frame).resize((width, height)), (left, top))
    for number, (y, x, high, wide) in enumerate(fixed_crops(height, width, height, height, num_crops=3)):
        inset = 3 + 7 * number
        box = (left + x, top + y + inset, left + x + wide - 1, top + y + high - 1 - inset)
        sheet.draw.rectangle(box, outline=("black", "white", MARK)[number], width=4)
        label, anchor = (("left", "la"), ("centre", "ma"), ("right", "ra"))[number]
        sheet.draw.text((left + number * width / 2, top + height + 4), label, fill=INK, font=SMALL, anchor=anchor)
    sheet.top = max(sheet.top, top + height + 26) + 14


def main(folder: Path) -> Path:
    """Write sampling.png to the folder."""
    scene = Scene.draw(np.random.default_rng(0), NUM_FRAMES, HEIGHT, FRAME_WIDTH)
    background = np.full((HEIGHT, FRAME_WIDTH, 3), (250.0, 214.0, 130.0))
    scene = replace(scene, background=background, shape="disc", colour=np.array([30.0, 40.0, 90.0]), radius=12.0)
    scene = replace(scene, start=np.array([16.0, 14.0]), speed=np.array([2.1, 3.7]))  # stays in the picture
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "clip.mp4")
        write_video(file, scene.render("down_right", NUM_FRAMES), FPS)
        with VideoReader(file) as video:
            frames, times = video.frames_at(range(video.num_frames)), video.timestamps
    sheet = Sheet(frames)
    sheet.title("frame_stride=2", f"8 frames, 2 apart, from the middle of a video of {NUM_FRAMES} frames")
    sheet.strip(sample_clips(NUM_FRAMES, 8, 2)[0])
    sheet.title("frames_per_second=5", f"8 frames at 5 per second, whatever the rate of the video (here {FPS})")
    sheet.strip(sample_clips_at_rate(times, 8, 5.0)[0])
    sheet.title('frame_sampling="uniform"', "8 frames spread over the whole video")
    sheet.strip(sample_uniform_clip(NUM_FRAMES, 8))
    draw_views(sheet, frames[12])
    sheet.title("short_video_policy", "a video of 10 frames, of which 8 frames with a stride of 2 need 15")
    for policy in ("repeat_last", "loop", "mask"):
        sheet.sequence(f'"{policy}"', sample_clips(10, 8, 2, short_video_policy=policy)[0])
    path = folder / "sampling.png"
    sheet.save(path)
    return path
