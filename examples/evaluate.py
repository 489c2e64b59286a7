"""Score a ViViT on labelled videos with the paper's views: 4 clips x 3 crops of every video, which is decoded once.

    python examples/evaluate.py --model my_vivit --data videos/test --num_clips 4 --num_crops 3 --output_dir scores
    torchrun --nproc_per_node 8 examples/evaluate.py ...     several processes give the same scores

This is the command `vivit-hf evaluate`; --help lists its arguments. The same in Python:

    from vivit_hf.inference.evaluation import evaluate_videos, read_split

    videos = read_split("videos.csv", "test")
    evaluation = evaluate_videos(model, processor, videos, num_clips=4, num_crops=3)
    print(evaluation.metrics["top1"], evaluation.protocol)
"""

import sys

from vivit_hf.cli.app import main


if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
