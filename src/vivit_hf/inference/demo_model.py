"""The small trained model that ships in the package, and its sample videos."""

import errno
import shutil
from pathlib import Path


def demo_model_path() -> Path:
    """
    Return the folder of a small trained model that ships in the package, to try everything without a download.

    It is a factorised encoder for 16 frames of 64 x 64 that recognises along which diagonal a shape moves: `down_left`,
    `down_right`, `up_left` or `up_right`. `examples/train_demo_model.py` trained it.
    """
    return Path(__file__).parents[1] / "demo_model"


def copy_samples(folder: Path) -> list[Path]:
    """
    Copy the sample videos of the demo model into `folder` and return their new paths.

    Raises:
        FileExistsError: if a file of that name with other content is there; nothing is copied then.
        OSError: if the files cannot be written.
    """
    samples = sorted((demo_model_path() / "samples").glob("*.mp4"))
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        file = folder / sample.name
        if file.exists() and file.read_bytes() != sample.read_bytes():
            raise FileExistsError(errno.EEXIST, "there is another video of that name", str(file))
    return [Path(shutil.copyfile(sample, folder / sample.name)) for sample in samples]
