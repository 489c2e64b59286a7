"""Classify any number of videos in shards: `vivit-hf classify-dataset` as a script, with the same arguments.

    python examples/classify_dataset.py --model my_vivit --videos folder_or_list --output_dir labels
    accelerate launch --num_processes 8 examples/classify_dataset.py ...     each process takes a share of the shards
    python examples/classify_dataset.py --help

docs/beyond_one_machine.md shows it on several machines and with S3, Google Cloud Storage and the Hub.
"""

from vivit_hf.cli.classify_dataset import main


if __name__ == "__main__":
    main()
