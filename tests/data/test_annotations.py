"""Test reading annotations: class folders, CSV, JSON, and published files; errors name file and line."""

import json
import re

import pytest

from vivit_hf.data.annotations import AnnotationError, read_videos


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def labels_by_name(annotations):
    return {re.split(r"[\\/]", str(one.video))[-1]: one.labels for one in annotations.videos}


def test_class_folders_are_read(tmp_path):
    touch(tmp_path, "jump/a.mp4", "jump/day/b.webm", "run/c.AVI", "run/notes.txt", ".cache/x.mp4")
    found = read_videos(tmp_path)
    assert labels_by_name(found) == {"a.mp4": ("jump",), "b.webm": ("jump",), "c.AVI": ("run",)}
    assert found.groups == ("",)
    assert all(one.where == one.video for one in found.videos)


def test_videofolder_metadata_is_read(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.mp4,jump\nb.mp4,run\n")
    assert labels_by_name(read_videos(tmp_path)) == {"a.mp4": ("jump",), "b.mp4": ("run",)}


TABLES = {
    "a.csv": "label,path\nrun,v/1.mp4\n\njump,v/2.mp4\n",
    "b.csv": "video;class\nv/1.mp4;run\nv/2.mp4;jump\n",
    "c.tsv": "video_path\tlabel\nv/1.mp4\trun\nv/2.mp4\tjump\n",
    "d.json": '[\n {"path": "v/1.mp4", "label": "run"},\n\n {"path": "v/2.mp4",\n  "label": "jump"}]',
    "e.jsonl": '{"path": "v/1.mp4", "label": "run"}\n\n{"path": "v/2.mp4", "label": "jump"}\n',
    "f.csv": '\ufefffile,category\n"v/1.mp4",run\nv/2.mp4,jump\n',
}
LINES = {"a.csv": (2, 4), "b.csv": (2, 3), "c.tsv": (2, 3), "d.json": (2, 4), "e.jsonl": (1, 3), "f.csv": (2, 3)}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_with_line_numbers(tmp_path, name):
    touch(tmp_path, "v/1.mp4", "v/2.mp4")
    (tmp_path / name).write_text(TABLES[name], encoding="utf-8")
    found = read_videos(tmp_path / name)
    assert labels_by_name(found) == {"1.mp4": ("run",), "2.mp4": ("jump",)}
    assert [one.where for one in found.videos] == [f"{tmp_path / name}:{line}" for line in LINES[name]]


def test_columns_root_time_ranges_and_urls_are_supported(tmp_path):
    touch(tmp_path / "videos", "long.mp4")
    table = tmp_path / "t.csv"
    table.write_text(
        "name,what,label,start,end\nlong.mp4,run,x,1.5,00:00:02.5\nhttps://example.org/a.mp4,jump,y,,\n",
    )
    found = read_videos(table, video_root=tmp_path / "videos", video_column="name", label_columns=["what"])
    path = str(tmp_path / "videos" / "long.mp4")
    assert found.videos[0].video == {"path": path, "start": 1.5, "end": 2.5}
    assert found.videos[1].video == "https://example.org/a.mp4"
    assert [one.labels for one in found.videos] == [("run",), ("jump",)]


def test_label_groups_and_multiple_labels_are_read(tmp_path):
    touch(tmp_path, "1.mp4")
    table = tmp_path / "t.csv"
    table.write_text("path,noun,verb\n1.mp4,pan,wash\n")
    found = read_videos(table, label_columns=["noun", "verb"])
    assert (found.groups, found.videos[0].labels) == (("noun", "verb"), ("pan", "wash"))
    table.write_text("path,labels\n1.mp4,run| jump\n")
    assert read_videos(table, label_separator="|").videos[0].labels == ("run", "jump")
    rows = tmp_path / "t.json"
    rows.write_text('[{"path": "1.mp4", "labels": ["run", "jump"]}]')
    assert read_videos(rows).videos[0].labels == ("run", "jump")


def test_kinetics_annotations_are_read(tmp_path):
    touch(tmp_path / "k400", "abseiling/abc_000010_000020.mp4", "-x_y.mkv")
    table = tmp_path / "train.csv"
    table.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        '"abseiling",abc,10,20,train\n"air drumming",-x_y,3,13,train\n"zumba",gone,1,11,train\n'
    )
    with pytest.raises(AnnotationError, match=r"train\.csv:4: there is no file .*gone_000001_000011"):
        read_videos(table, video_root=tmp_path / "k400")
    found = read_videos(table, video_root=tmp_path / "k400", missing_videos="skip")
    assert labels_by_name(found) == {"abc_000010_000020.mp4": ("abseiling",), "-x_y.mkv": ("air drumming",)}


def test_something_something_annotations_are_read(tmp_path):
    touch(tmp_path / "20bn", "78687.webm", "42326.webm")
    rows = [
        {"id": "78687", "label": "holding potato", "template": "Holding [something]", "placeholders": ["potato"]},
        {"id": "42326", "label": "closing a box", "template": "Closing [something] [fast]", "placeholders": []},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows, indent=1))
    found = read_videos(tmp_path / "train.json", video_root=tmp_path / "20bn")
    assert labels_by_name(found) == {"78687.webm": ("Holding something",), "42326.webm": ("Closing something fast",)}
    assert found.videos[1].where.endswith("train.json:10")


EPIC_HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
)


def epic_row(start="00:00:00.14", stop="00:00:03.37", verb="3", noun="12"):
    return f"P01_01_0,P01,P01_01,00:00:01.089,{start},{stop},8,202,open door,open,{verb},door,{noun},['door'],[3]\n"


def test_epic_kitchens_annotations_are_read(tmp_path):
    touch(tmp_path / "epic", "P01/videos/P01_01.MP4")
    table = tmp_path / "EPIC_100_train.csv"
    table.write_text(EPIC_HEADER + epic_row() + epic_row("00:01:00.5", "00:01:02"))
    found = read_videos(table, video_root=tmp_path / "epic")
    assert found.groups == ("noun", "verb")
    path = str(tmp_path / "epic" / "P01" / "videos" / "P01_01.MP4")
    assert [one.video for one in found.videos] == [
        {"path": path, "start": 0.14, "end": 3.37},
        {"path": path, "start": 60.5, "end": 62.0},
    ]
    assert found.videos[0].labels == ("12", "3")
    for wrong, message in (
        (epic_row(noun="300"), r"EPIC_100_train\.csv:2: noun_class '300' is not a whole number from 0 to 299"),
        (epic_row(stop="00:00:00.1"), r"csv:2: the action ends at 0\.1 s, but begins at 0\.14 s"),
        (epic_row(start="soon"), r"csv:2: 'start_timestamp' is 'soon'; expected seconds"),
    ):
        table.write_text(EPIC_HEADER + wrong)
        with pytest.raises(AnnotationError, match=message):
            read_videos(table, video_root=tmp_path / "epic")


WRONG = {
    "no such file": (None, "nowhere.csv: there is no such file or folder"),
    "empty.csv": ("", r"empty\.csv: there are no videos"),
    "header.csv": ("path,label\n", r"header\.csv: there are no videos"),
    "column.csv": (
        "path,kind\n1.mp4,x\n",
        r"column\.csv:1: there is no column of labels named label or .*; the columns are: path, kind",
    ),
    "label.csv": ("path,label\n1.mp4,run\n1.mp4, \n", r"label\.csv:3: 'label' is empty"),
    "cells.csv": ("path,label\n1.mp4,run,fast\n", r"cells\.csv:2: the row has 3 cells, but the header has 2 columns"),
    "gone.csv": ("path,label\n1.mp4,run\nnope.mp4,run\n", r"gone\.csv:3: there is no file .*nope\.mp4"),
    "ftp.csv": (
        "path,label\n1.mp4,run\nftp://me:word@host/x.mp4?key=1,run\n",
        r"ftp\.csv:3: there is no file ftp://\*\*\*@host/x\.mp4\?\*\*\*; only http:// and https://",
    ),
    "quote.csv": ('path,label\n"1.mp4,run\n', r"quote\.csv:2"),
    "latin.csv": ("path,label\n1.mp4,caf\xe9\n".encode("latin-1"), r"latin\.csv:2: this is not UTF-8"),
    "bad.json": ('[\n{"path": "1.mp4", "label": "x"},\n{oops}]', r"bad\.json:3: this is not JSON"),
    "object.json": ('{"path": "1.mp4"}', r"object\.json:1: expected a JSON list"),
    "strings.json": ('[\n"1.mp4"]', r"strings\.json:2: expected an object"),
    "cut.json": ('[{"path": "1.mp4", "label": "x"},', r"cut\.json:1: this is not JSON"),
    "bad.jsonl": ('{"path": "1.mp4", "label": "x"}\n{"path"', r"bad\.jsonl:2: this is not JSON"),
    "table.xlsx": ("", r"table\.xlsx: expected a folder or a \.csv, .* file of annotations"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_in_annotation_files_name_file_and_line(tmp_path, name):
    content, message = WRONG[name]
    touch(tmp_path, "1.mp4")
    path = tmp_path / (name if content is not None else "nowhere.csv")
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AnnotationError, match=message):
        read_videos(path)


def test_folders_without_classes_or_videos_are_refused(tmp_path):
    with pytest.raises(AnnotationError, match=r"there are no class folders.*expected .*/CLASS/VIDEO"):
        read_videos(tmp_path)
    touch(tmp_path, "jump/a.mp4", "run/readme.txt")
    with pytest.raises(AnnotationError, match=r"run: this class folder holds no video"):
        read_videos(tmp_path)


def test_wrong_settings_are_refused(tmp_path):
    touch(tmp_path, "1.mp4")
    table = tmp_path / "t.csv"
    table.write_text("path,label\n1.mp4,run\n")
    for settings, message in (
        ({"annotation_format": "imagenet"}, "Expected one of 'auto', 'plain'"),
        ({"video_column": "clip"}, r"t\.csv:1: there is no column of paths named 'clip'; the columns are: path, label"),
        ({"label_columns": ["verb"]}, r"t\.csv:1: there is no column of labels named 'verb'"),
        ({"video_root": tmp_path / "no"}, "no: there is no such folder"),
        ({"annotation_format": "epic"}, "there is no column of epic annotations named 'video_id'"),
        ({"missing_videos": "maybe"}, "Expected one of 'error', 'skip'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_videos(table, **settings)


# Splits


SPLITS = "path,label,split,patient\n1.mp4,run,Train,a\n2.mp4,jump, training,a\n3.mp4,run,val,b\n4.mp4,,test,c\n"


def test_only_rows_of_the_chosen_splits_are_validated(tmp_path):
    touch(tmp_path, "1.mp4", "2.mp4", "3.mp4")  # the test row has neither a label nor a file
    table = tmp_path / "t.csv"
    table.write_text(SPLITS)
    asked = []

    def choose(where, counts):
        asked.append((where, counts))
        return ["train", "validation"]

    found = read_videos(table, choose_splits=choose, group_column="patient")
    assert asked == [(f"{table}, column 'split'", {"train": 2, "validation": 1, "test": 1})]
    assert [one.split for one in found.videos] == ["train", "train", "validation"]
    assert [one.keep_together for one in found.videos] == [("patient=a",), ("patient=a",), ("patient=b",)]
    assert [one.where[-2:] for one in found.videos] == [":2", ":3", ":4"]


@pytest.mark.parametrize("name", ["Subset", "partition"])
def test_split_columns_are_found_by_name_or_given(tmp_path, name):
    touch(tmp_path, "1.mp4", "2.mp4")
    (tmp_path / "t.csv").write_text(f"path,label,{name}\n1.mp4,run,train\n2.mp4,jump,dev\n")
    assert [one.split for one in read_videos(tmp_path / "t.csv").videos] == ["train", "validation"]
    (tmp_path / "t.csv").write_text("path,label,used\n1.mp4,run,train\n2.mp4,jump,validate\n")
    found = read_videos(tmp_path / "t.csv", split_column="used")
    assert [one.split for one in found.videos] == ["train", "validation"]
    assert {one.split for one in read_videos(tmp_path / "t.csv", split_column="none").videos} == {None}


def test_ambiguous_and_unknown_splits_are_refused(tmp_path):
    touch(tmp_path, "1.mp4", "2.mp4")
    table = tmp_path / "t.csv"
    for text, message in (
        (
            "path,label,split\n1.mp4,run,train\n2.mp4,run,fold2\n",
            r"t\.csv:3: 'fold2' in .* 'split' .* to none to ignore",
        ),
        ("path,label,split\n1.mp4,run,train\n2.mp4,run,\n", r"t\.csv:3: '' in the column 'split' is not a split"),
        (
            "path,label,used\n1.mp4,run,train\n2.mp4,run,test\n",
            r"t\.csv:1: the column 'used' holds split names \(test",
        ),
    ):
        table.write_text(text)
        with pytest.raises(AnnotationError, match=message):
            read_videos(table)
        assert len(read_videos(table, split_column="none").videos) == 2
    rows = tmp_path / "t.json"
    rows.write_text('[{"path": "1.mp4", "label": "run", "split": "train"},\n{"path": "2.mp4", "label": "run"}]')
    with pytest.raises(AnnotationError, match=r"t\.json:2: None in the column 'split' is not a split"):
        read_videos(rows)
    with pytest.raises(AnnotationError, match=r"t\.csv:1: there is no column of splits named 'fold'"):
        read_videos(table, split_column="fold")
    with pytest.raises(AnnotationError, match=r"t\.csv:1: there is no column of groups named 'patient'"):
        read_videos(table, split_column="none", group_column="patient")
    # Label columns are never split columns, whatever their names and values.
    table.write_text("path,label\n1.mp4,train\n2.mp4,test\n")
    assert [one.labels for one in read_videos(table).videos] == [("train",), ("test",)]
    table.write_text("path,split\n1.mp4,train\n2.mp4,bus\n")
    assert [one.labels for one in read_videos(table, label_columns=["split"]).videos] == [("train",), ("bus",)]


def test_published_files_support_splits_and_groups(tmp_path):
    touch(tmp_path, "P01_01.MP4", "7.webm", "abc.mp4")
    (tmp_path / "epic.csv").write_text(EPIC_HEADER + epic_row())
    found = read_videos(tmp_path / "epic.csv", group_column="participant_id")
    assert found.videos[0].keep_together == ("participant_id=P01",)
    rows = [{"id": "7", "template": "Moving [something]", "actor": "x", "split": "val"}]
    (tmp_path / "ssv2.json").write_text(json.dumps(rows))
    (one,) = read_videos(tmp_path / "ssv2.json", group_column="actor").videos
    assert (one.keep_together, one.split) == (("actor=x",), "validation")
    (tmp_path / "k400.csv").write_text("label,youtube_id,split\nrun,abc,validate\n")
    (one,) = read_videos(tmp_path / "k400.csv").videos
    assert (one.keep_together, one.split) == (("youtube_id=abc",), "validation")


def test_class_folders_refuse_column_settings(tmp_path):
    touch(tmp_path, "jump/a.mp4")
    for settings in ({"split_column": "split"}, {"group_column": "patient"}):
        with pytest.raises(AnnotationError, match=f"has no columns: leave {next(iter(settings))} out"):
            read_videos(tmp_path, **settings)


# Lists of paths


def test_published_lists_of_paths_are_read(tmp_path):
    touch(tmp_path, "Apply Make Up/v_1 3.avi", "Archery/v_2.AVI", "Archery/v,3.mp4")
    table = tmp_path / "trainlist01.txt"
    for text in (
        "Apply Make Up/v_1 3.avi 1\r\n\r\nArchery/v_2.AVI 2\r\nArchery/v,3.mp4\t2\r\n",
        "Apply Make Up/v_1 3.avi\n\n./Archery/v_2.AVI\nArchery/v,3.mp4",
    ):
        table.write_text(text)
        found = read_videos(table).videos
        assert [one.labels for one in found] == [("Apply Make Up",), ("Archery",), ("Archery",)]
        assert [one.where.rsplit(":")[-1] for one in found] == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run/1.mp4\n2.mp4\n", r"list\.txt:2: expected a path like Class/file\.mp4, got '2\.mp4'"),
        ("run/1.mp4\nrun/2.txt\n", r"list\.txt:2: expected a path like Class/file\.mp4"),
        ("run/1.mp4 1\nrun/2.mp4 2\n", r"list\.txt:2: the folder 'run' with class number 2 contradicts line 1"),
        ("run/1.mp4 1\njump/2.mp4 1\n", r"list\.txt:2: the folder 'jump' with class number 1 contradicts line 1"),
        ("run/1.mp4 1\nrun/2.mp4\n", r"list\.txt:2: the folder 'run' with class number \(none\) contradicts line 1"),
        ("run/1.mp4 1\nrun/9.mp4 1\n", r"list\.txt:2: there is no file .*9\.mp4"),
    ],
)
def test_lists_that_contradict_themselves_are_refused(tmp_path, text, message):
    touch(tmp_path, "run/1.mp4", "run/2.mp4", "jump/2.mp4")
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(AnnotationError, match=message):
        read_videos(tmp_path / "list.txt")


def test_unicode_line_separators_do_not_end_a_json_line(tmp_path):
    touch(tmp_path, "1.mp4")
    row = json.dumps({"path": "1.mp4", "label": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "t.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    assert [one.labels for one in read_videos(tmp_path / "t.jsonl").videos] == [("a\u2028b",)] * 2
