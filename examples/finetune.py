"""Fine-tune a ViViT on your videos: the command `vivit-hf finetune` as a script, with the same arguments.

    python examples/finetune.py --train_dir videos/train --validation_dir videos/test \\
        --model_name_or_path google/vit-base-patch16-224-in21k --recipe small-data --output_dir my_vivit
    python examples/finetune.py --help
"""

from vivit_hf.cli.finetune import main


if __name__ == "__main__":
    main()
