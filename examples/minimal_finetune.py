"""Fine-tune an image ViT on video files with transformers' `Trainer`, in as few lines as possible.

    python examples/minimal_finetune.py videos/train my_vivit --source google/vit-base-patch16-224-in21k

`videos/train` has one folder of videos per class. `vivit-hf finetune` does the same with a validation set, recipes,
augmentation and checkpoints.
"""

import argparse

from transformers import Trainer, TrainingArguments

from vivit_hf import ViViTForVideoClassification, config_from_vit, initialise_from_vit
from vivit_hf.data import LabelMap, read_videos
from vivit_hf.initialisation import processor_for, read_image_source
from vivit_hf.training import ClipAugmentation, ClipCollator, VideoClips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", help="folder with one folder of videos per class")
    parser.add_argument("output", help="folder for the model")
    parser.add_argument("--source", default="google/vit-base-patch16-224-in21k", help="Hub id or folder of a ViT")
    parser.add_argument("--frames", type=int, default=16, help="frames per clip")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()

    # The labels are the names of the class folders.
    videos = read_videos(arguments.videos).videos
    labels = LabelMap.of(videos)

    # The ViT becomes a ViViT with a factorised encoder (Model 2). The processor makes clips of the right size, with the
    # pixel values that the ViT was trained on.
    source = read_image_source(arguments.source)
    config = config_from_vit(
        source.vit.config, num_frames=arguments.frames, num_temporal_layers=4, **labels.config_fields()
    )
    model = ViViTForVideoClassification(config)
    initialise_from_vit(model, source.vit)
    processor = processor_for(config, source.processor_settings)

    # An item is a random clip of a video; the collator makes batches of them.
    augmentation = ClipAugmentation(crop_size=config.frame_size, scale_jitter=(0.9, 1.33))
    clips = VideoClips(videos, processor, labels, augmentation=augmentation)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=arguments.output,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=1e-4,
            warmup_steps=0.1,  # of all steps
            lr_scheduler_type="cosine",
            logging_steps=10,
            report_to="none",
        ),
        train_dataset=clips,
        data_collator=ClipCollator(labels),
    )
    trainer.train()
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
