"""Label videos on a Ray cluster: every line of a list becomes a row with labels, as `classify-dataset` writes it.

    python examples/classify_with_ray.py --model my_vivit --videos list.txt --output labels --actors 1

--videos is a text file with a path or address per line, which all machines can open. Each actor loads the model once
and keeps a CPU (with --gpus, a GPU instead). Reading and writing need a CPU besides: with as many actors as CPUs,
nothing would ever be read, and Ray would wait without end.
"""

import argparse

import ray

from vivit_hf.inference import BatchPredictor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id, or a folder that all machines have")
    parser.add_argument("--videos", required=True, help="text file with a path or address per line")
    parser.add_argument("--output", required=True, help="folder or address of the Parquet files to write")
    parser.add_argument("--actors", type=int, default=1, help="processes that hold a model")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of an actor")
    args = parser.parse_args(argv)

    ray.init(ignore_reinit_error=True)
    num_cpus = int(ray.cluster_resources().get("CPU", 0))
    if not args.gpus and args.actors >= num_cpus:
        parser.error(f"--actors {args.actors}: the cluster has {num_cpus} CPUs, of which reading needs one.")
    rows = ray.data.read_text(args.videos, drop_empty_lines=True).rename_columns({"text": "video"})
    answers = rows.map_batches(
        BatchPredictor,
        fn_constructor_kwargs={"model": args.model},
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        batch_format="pyarrow",
        batch_size=64,
        num_gpus=args.gpus,
    )
    answers.write_parquet(args.output)
    ray.shutdown()


if __name__ == "__main__":
    main()
