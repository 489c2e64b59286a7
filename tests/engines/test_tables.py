"""The examples for Spark and Ray give the rows of one process; `make test-engines` runs this."""

import pyarrow.parquet
import pytest
from engine_data import check_rows
from paths import EXAMPLES


pytestmark = [pytest.mark.engines, pytest.mark.slow]


def given(data, output):
    return ["--model", data / "model", "--videos", data / "list.txt", "--output", output]


def test_spark_gives_the_rows_of_one_process(data, one_process, run_python, tmp_path):
    pytest.importorskip("pyspark", reason="make test-engines installs it")
    run_python(EXAMPLES / "classify_with_spark.py", *given(data, tmp_path / "labels"), "--tasks", 3)
    found = pyarrow.parquet.read_table(tmp_path / "labels")
    check_rows(found.to_pylist(), one_process)
    assert [str(field.type) for field in found.schema][1:] == [
        "list<element: string>",
        "list<element: float>",
        "bool",
        "string",
    ]


@pytest.mark.parametrize("actors", [1, 2])
def test_ray_gives_the_rows_of_one_process(data, one_process, run_python, tmp_path, actors):
    """On one CPU more than actors, whatever the machine has: Ray only counts them."""
    pytest.importorskip("ray", reason="make test-engines installs it")
    program = (
        f"import ray, sys; sys.path.insert(0, {str(EXAMPLES)!r}); ray.init(num_cpus={actors + 1}); "
        "import classify_with_ray; classify_with_ray.main(sys.argv[1:])"
    )
    more = ("--actors", actors)
    run_python("-c", program, *given(data, tmp_path / "labels"), *more, RAY_USAGE_STATS_ENABLED="0")
    check_rows(pyarrow.parquet.read_table(tmp_path / "labels").to_pylist(), one_process)


def test_ray_without_a_cpu_for_reading_is_refused_instead_of_waiting(data, run_python, tmp_path):
    pytest.importorskip("ray", reason="make test-engines installs it")
    program = (
        f"import ray, sys; sys.path.insert(0, {str(EXAMPLES)!r}); ray.init(num_cpus=2); import classify_with_ray\n"
        "try: classify_with_ray.main(sys.argv[1:])\n"
        "except SystemExit as error: print('exit', error.code)"
    )
    assert "exit 2" in run_python("-c", program, *given(data, tmp_path / "labels"), "--actors", 2, timeout=90)
    assert not (tmp_path / "labels").exists()
