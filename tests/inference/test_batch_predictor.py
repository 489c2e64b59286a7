"""`BatchPredictor` on tables of pandas and Arrow: the rows of `classify-dataset`, and every kind of video."""

import pickle
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from tiny_models import make_model, tiny_config
from video_files import moving_frames, write_video

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.cli.classify_dataset import main
from vivit_hf.inference import BatchPredictor, NonFiniteError, batch_predictor


ANSWERS = ["labels", "scores", "unknown", "error"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model, and a list of 5 videos, the fourth of which is broken."""
    folder = tmp_path_factory.mktemp("data")
    make_model(tiny_config("spatio_temporal")).save_pretrained(folder / "model")
    sizes = {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 40}}
    ViViTVideoProcessor(num_frames=8, frame_stride=1, **sizes).save_pretrained(folder / "model")
    names = [write_video(folder / f"{index}.mp4", moving_frames(20 + index)) for index in range(4)]
    names.insert(3, folder / "broken.mp4")
    names[3].write_bytes(b"no video")
    (folder / "list.txt").write_text("\n".join(map(str, names)))
    return folder


@pytest.fixture
def predictor(data):
    return BatchPredictor(str(data / "model"), top_k=2, device="cpu")


@pytest.fixture(scope="module")
def names(data):
    return (data / "list.txt").read_text().split("\n")


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    """The table that one process writes."""
    output = tmp_path_factory.mktemp("labels")
    arguments = ["--model", data / "model", "--videos", data / "list.txt", "--output_dir", output, "--top_k", 2]
    main(list(map(str, [*arguments, "--use_cpu", "--num_workers", 0])))
    return pyarrow.parquet.read_table(output)


def check(found, expected):
    """Compare answers: batches of other sizes round differently."""
    for row, other in zip(found, expected.to_pylist(), strict=True):
        assert [row[name] for name in ("labels", "unknown", "error")] == [
            other[name] for name in ("labels", "unknown", "error")
        ]
        assert row["scores"] == (other["scores"] and pytest.approx(other["scores"], abs=1e-6))


def test_a_data_frame_keeps_its_columns_and_its_index(predictor, names, expected):
    frame = pandas.DataFrame({"video": names, "number": range(5)}, index=[9, 8, 7, 6, 5])
    found = predictor(frame)
    assert list(found) == ["video", "number", *ANSWERS] and list(found.index) == [9, 8, 7, 6, 5]
    assert list(frame) == ["video", "number"], "the input stays as it was"
    check(found.to_dict("records"), expected)


def test_an_iterator_of_data_frames_gives_an_iterator(predictor, names, expected):
    found = predictor(pandas.DataFrame({"video": part}) for part in (names[:2], names[2:]))
    assert iter(found) is found
    check(pandas.concat(found).to_dict("records"), expected)


def test_arrow_and_numpy_give_arrow_with_the_types_of_the_shards(predictor, names, expected):
    for batch in (pyarrow.table({"video": names}), {"video": np.array(names, dtype=object)}):
        found = predictor(batch)
        assert isinstance(found, pyarrow.Table)
        assert [found.schema.field(name) for name in ANSWERS] == [expected.schema.field(name) for name in ANSWERS]
        check(found.to_pylist(), expected)


def test_types_stay_where_no_video_can_be_read(predictor, names, expected):
    for videos in ([names[3]], []):
        found = predictor(pyarrow.table({"video": pyarrow.array(videos, pyarrow.string())}))
        assert [found.schema.field(name) for name in ANSWERS] == [expected.schema.field(name) for name in ANSWERS]
        assert found["labels"].null_count == len(found) == len(videos)


def test_videos_in_memory_are_read_and_left_out_of_the_answer(predictor, names, expected):
    contents = [Path(name).read_bytes() for name in names]
    frame = predictor(pandas.DataFrame({"video": contents, "name": names}))
    assert list(frame) == ["name", *ANSWERS]
    rows = frame.to_dict("records")
    assert "bytes of video data" in rows[3]["error"]
    check([{**row, "error": row["error"] and expected["error"][3].as_py()} for row in rows], expected)
    structs = [{"bytes": content, "path": name} for content, name in zip(contents, names, strict=True)]
    table = predictor(pyarrow.table({"video": structs, "name": names}))
    assert table.column_names == ["name", *ANSWERS]
    assert table["labels"].to_pylist() == expected["labels"].to_pylist()


@pytest.mark.parametrize("value", [None, float("nan"), 3])
def test_a_row_without_a_video_says_so(predictor, names, value):
    frame = predictor(pandas.DataFrame({"video": pandas.Series([names[0], value], dtype=object)}))
    assert frame["error"][0] is None and frame["labels"][1] is None
    assert frame["error"][1] == (
        f"Expected a path, an address or the bytes of a video in column 'video', got {value!r}."
    )


def test_the_model_is_loaded_once_per_process_and_never_sent(predictor, names, monkeypatch):
    batch_predictor._loaded.cache_clear()
    load, count = ViViTForVideoClassification.from_pretrained, []
    monkeypatch.setattr(
        ViViTForVideoClassification, "from_pretrained", lambda *args, **kwargs: count.append(1) or load(*args, **kwargs)
    )
    for _ in range(3):
        sent = pickle.dumps(predictor)
        assert len(sent) < 1000
        pickle.loads(sent)(pandas.DataFrame({"video": names[:1]}))
    assert len(count) == 1


def test_views_and_decoding_processes_change_no_row(data, names):
    settings = {"model": str(data / "model"), "num_clips": 2, "num_crops": 3, "device": "cpu"}
    one = BatchPredictor(**settings)(pandas.DataFrame({"video": names}))
    two = BatchPredictor(**settings, num_workers=2, batch_size=4)(pandas.DataFrame({"video": names}))
    assert one["labels"].tolist() == two["labels"].tolist() and one["error"].tolist() == two["error"].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"dtype": "int8"}, "dtype"), ({"top_k": 0}, "top_k"), ({"batch_size": 0}, "batch_size")],
)
def test_settings_are_checked_where_the_predictor_is_made(data, settings, message):
    with pytest.raises(ValueError, match=message):
        BatchPredictor(str(data / "model"), **settings)


def test_wrong_models_and_tables_are_named(data, predictor, names, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        BatchPredictor(str(tmp_path / "nowhere"))
    with pytest.raises(KeyError, match="video"):
        predictor(pandas.DataFrame({"path": names}))
    with pytest.raises(KeyError, match="video"):
        predictor(pyarrow.table({"path": names}))
    with pytest.raises(ValueError, match="has a column 'error' already: rename it"):
        predictor(pandas.DataFrame({"video": names, "error": ""}))
    broken = ViViTForVideoClassification.from_pretrained(data / "model")
    broken.classifier.bias.data[0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    ViViTVideoProcessor.from_pretrained(data / "model").save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError, match=r"So do its weights \(classifier\.bias\)"):
        BatchPredictor(str(tmp_path / "broken"), device="cpu")(pandas.DataFrame({"video": names}))
