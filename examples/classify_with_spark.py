"""Label videos on a Spark cluster: every line of a list becomes a row with labels, as `classify-dataset` writes it.

    python examples/classify_with_spark.py --model my_vivit --videos list.txt --output labels
    spark-submit --master ... examples/classify_with_spark.py --model you/your-vivit --videos s3a://bucket/list.txt ...

--videos is a text file with a path or address per line, which all machines can open. The workers need vivit_hf:
PYSPARK_PYTHON names their Python, by default the one that runs this script.
"""

import argparse
import os
import sys

from pyspark.sql import SparkSession

from vivit_hf.inference import BatchPredictor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id, or a folder that all machines have")
    parser.add_argument("--videos", required=True, help="text file with a path or address per line")
    parser.add_argument("--output", required=True, help="folder or address of the Parquet files to write")
    parser.add_argument("--tasks", type=int, default=8, help="parts of the list; a lost one is computed again")
    args = parser.parse_args(argv)

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.appName("classify videos").getOrCreate()
    videos = spark.read.text(args.videos).selectExpr("value as video").where("video != ''").repartition(args.tasks)
    predictor = BatchPredictor(args.model)
    answers = videos.mapInPandas(predictor, f"video string, {BatchPredictor.SPARK_COLUMNS}")
    answers.write.parquet(args.output)
    spark.stop()


if __name__ == "__main__":
    main()
