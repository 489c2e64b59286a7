"""Turn an image ViT into a ViViT, fine-tune it on video files, reload it with the Auto classes, and classify files.

    python examples/demo.py                        takes less than two minutes of CPU time
    python examples/demo.py --small                takes about a minute, with less data
    python examples/demo.py --video my_video.mp4   also classifies that file
    python examples/demo.py --source google/vit-base-patch16-224-in21k   starts from a real image ViT (needs a GPU)

Nothing is downloaded without --source. The videos show shapes that move along one of the four diagonals (see
`moving_shapes.py`); no single frame shows the direction.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from moving_shapes import write_moving_shapes
from rich.console import Console
from rich.table import Column, Table
from transformers import (
    AutoImageProcessor,
    AutoModelForVideoClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
    set_seed,
)

from vivit_hf import (
    InitialisationReport,
    VideoDecodingError,
    ViViTConfig,
    ViViTForVideoClassification,
    ViViTVideoProcessor,
    config_from_vit,
    initialise_from_vit,
)
from vivit_hf.initialisation import processor_for


# Files per class for training and testing, epochs, and the required accuracy (chance is 0.25).
FULL = {"clips_per_class": 200, "test_clips_per_class": 50, "epochs": 4, "required_accuracy": 0.9}
SMALL = {"clips_per_class": 100, "test_clips_per_class": 25, "epochs": 12, "required_accuracy": 0.7}


class TrainingClips(torch.utils.data.Dataset):
    """Random clips and crops of videos, without flips, which would reverse the motion."""

    def __init__(self, files: list[Path], processor: ViViTVideoProcessor, label2id: dict[str, int]):
        self.processor = processor
        self.labels = [label2id[file.parent.name] for file in files]
        # Decode and resize each file once, and keep it as uint8.
        whole = {"do_sample_frames": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
        self.videos = [processor(file, **whole)["pixel_values"][0] for file in files]

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Return `pixel_values`, float32 (frames, channels, height, width), and `labels`."""
        features = self.processor(self.videos[index], clip_start="random", crop_position="random")
        return {"pixel_values": features["pixel_values"][0], "labels": self.labels[index]}


def build_image_vit(folder: Path) -> None:
    """Save a small image ViT with random weights and the sizes of the preset `vivit-tiny`."""
    tiny = ViViTConfig.from_preset("vivit-tiny")
    names = "hidden_size num_hidden_layers num_attention_heads intermediate_size image_size initializer_range".split()
    ViTModel(ViTConfig(**{name: getattr(tiny, name) for name in names})).save_pretrained(folder)


def finetune(
    folder: Path, source: str | Path, train_files: list[Path], epochs: float, seed: int
) -> InitialisationReport:
    """Train a factorised encoder that starts from the image ViT `source`; save it with its processor."""
    vit = ViTModel.from_pretrained(source)
    labels = sorted({file.parent.name for file in train_files})
    config = config_from_vit(
        vit.config,
        attention_type="factorised_encoder",
        num_frames=16,
        num_temporal_layers=2,
        id2label=dict(enumerate(labels)),
    )
    processor = processor_for(config, resize=config.image_size, frame_stride=1)
    model = ViViTForVideoClassification(config)
    report = initialise_from_vit(model, vit)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # of all steps
        weight_decay=0.05,
        logging_strategy="epoch",
        save_strategy="no",
        dataloader_pin_memory=False,
        report_to="none",
        seed=seed,
    )
    Trainer(model=model, args=arguments, train_dataset=TrainingClips(train_files, processor, config.label2id)).train()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return report


def classify(folder: Path, files: list[Path], batch_size: int = 25) -> Iterator[list[tuple[str, float]]]:
    """Yield the labels and scores of each video file, best first, by the model in `folder`."""
    model = AutoModelForVideoClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    for start in range(0, len(files), batch_size):
        inputs = processor(files[start : start + batch_size], return_tensors="pt")
        with torch.inference_mode():
            scores = model(**inputs).logits.softmax(dim=-1)  # (batch, labels)
        for row in scores:
            best_first = row.argsort(descending=True)
            yield [(model.config.id2label[int(index)], float(row[index])) for index in best_first]


def results_table(title: str, predictions: dict[str, list[tuple[str, float]]], top_k: int) -> Table:
    table = Table(Column("file", overflow="fold"), *(f"top {rank}" for rank in range(1, top_k + 1)), title=title)
    for name, prediction in predictions.items():
        table.add_row(name, *(f"{label} {score:.3f}" for label, score in prediction[:top_k]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a small ViViT on files of moving shapes and try it.")
    parser.add_argument("--small", action="store_true", help="less data and fewer epochs: about a minute")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the videos and the model")
    parser.add_argument("--source", help="folder or Hub id of an image ViT (default: a small random one)")
    parser.add_argument("--video", type=Path, help="a video file to classify at the end")
    parser.add_argument("--epochs", type=float, help=f"{FULL['epochs']}, with --small {SMALL['epochs']}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the videos and of the training")
    parser.add_argument("--top-k", type=int, default=3, help="labels shown per file")
    arguments = parser.parse_args()
    if arguments.video is not None and not arguments.video.is_file():
        parser.error(f"--video {arguments.video}: there is no such file")
    scale = SMALL if arguments.small else FULL
    console = Console()

    videos = arguments.output / ("videos_small" if arguments.small else "videos")
    with console.status("Writing the videos"):
        clips = {name: scale[name] for name in ("clips_per_class", "test_clips_per_class")}
        write_moving_shapes(videos, seed=arguments.seed, **clips)
    train_files, test_files = (sorted(videos.glob(f"{split}/*/*.mp4")) for split in ("train", "test"))
    console.print(f"{videos}: {len(train_files)} files to train on, {len(test_files)} held out")

    model_folder = arguments.output / "model"
    epochs = scale["epochs"] if arguments.epochs is None else arguments.epochs
    set_seed(arguments.seed)
    source = arguments.source
    if source is None:
        source = arguments.output / "image_vit"
        build_image_vit(source)
        torch.set_num_threads(1)  # several threads slow down such a small model
    report = finetune(model_folder, source, train_files, epochs, arguments.seed)
    console.print(f"{model_folder}: model and processor; from {source}: {report} parameters")

    names = [f"{file.parent.name}/{file.name}" for file in test_files]
    predictions = dict(zip(names, classify(model_folder, test_files), strict=True))
    shown = {name: predictions[name] for name in names[:: len(names) // 8 + 1]}
    console.print(results_table(f"Held-out files in {videos / 'test'}", shown, arguments.top_k))
    correct = sum(name.startswith(f"{best[0][0]}/") for name, best in predictions.items())
    accuracy, required = correct / len(names), scale["required_accuracy"]
    console.print(f"Accuracy on {len(names)} held-out files: {accuracy:.3f} (required: {required}, chance: 0.25)")

    if arguments.video is not None:
        try:
            [prediction] = classify(model_folder, [arguments.video])
        except VideoDecodingError as error:
            sys.exit(f"--video {arguments.video}: {error}")
        console.print(results_table("Your video", {str(arguments.video): prediction}, arguments.top_k))
    if accuracy < required:
        sys.exit(f"The accuracy on held-out files is {accuracy:.3f}; at least {required} was expected.")


if __name__ == "__main__":
    main()
