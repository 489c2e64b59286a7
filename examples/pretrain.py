"""
Pretrain a ViViT on videos without labels: the command `vivit-hf pretrain` as a script, with the same arguments.

    python examples/pretrain.py videos --model_name_or_path vivit-tiny --output_dir pretrained
    python examples/finetune.py --train_dir labelled --model_name_or_path pretrained --output_dir my_vivit
    python examples/pretrain.py --help
"""

from vivit_hf.cli.pretrain import main


if __name__ == "__main__":
    main()
