import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.text import calibration
from axolotl_loram.text.calibration import load_calibration, pack_rows
from axolotl_loram.text.heldout import held_out

EOS = 1
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def choose(source: object, samples: int = 4, length: int = 16, seed: int = 0) -> PruningArgs:
    return PruningArgs(
        ratio=0.5,
        calibration_path=str(source),
        calibration_samples=samples,
        calibration_length=length,
        seed=seed,
    )


def write_rows(file: Path, rows: list) -> Path:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def read_back(tokens: np.ndarray) -> str:
    """What a byte tokenizer made these ids of, one window per line."""
    return "\n".join(byte_tokenizer().decode(window) for window in tokens)


# Packing. Documents are made of ids that say which document they are of, and where they stand.


def document(number: int, size: int) -> list[int]:
    return list(range(1000 * number + 2, 1000 * number + 2 + size))


@given(
    sizes=st.lists(st.integers(0, 90), max_size=12),
    samples=st.integers(2, 6),
    length=st.integers(1, 12),
    seed=st.integers(0, 5),
    separator=st.sampled_from([None, EOS]),
)
def test_windows_are_runs_of_the_text_and_do_not_overlap(sizes, samples, length, seed, separator):
    documents = [document(number, size) for number, size in enumerate(sizes, start=1)]
    ended = [d + [separator] * (separator is not None) for d in documents if d]
    if sum(map(len, ended)) < 2 * length:
        with pytest.raises(LoRAMError):
            pack_rows(documents, samples, length, seed, "x", separator)
        return
    packed = pack_rows(documents, samples, length, seed, "x", separator)
    windows, joined = packed.tokens.tolist(), list(itertools.chain(*ended))
    assert packed.tokens.dtype == np.int64
    assert packed.tokens.shape == (min(samples, len(joined) // length), length)
    own = packed.tokens[packed.tokens != EOS]
    assert len(set(own.tolist())) == own.size  # no place of the text is read twice
    if all(len(d) <= 4 * length for d in ended):
        assert all(
            any(joined[i : i + length] == window for i in range(len(joined))) for window in windows
        )
    for before, after in (pair for window in windows for pair in itertools.pairwise(window)):
        if EOS not in (before, after) and before // 1000 == after // 1000:
            assert after == before + 1
    if sum(min(len(d), 4 * length) for d in ended) >= samples * length:
        assert max(Counter((own // 1000).tolist()).values(), default=0) <= 4 * length
    again = pack_rows(iter(documents), samples, length, seed, "x", separator)
    assert np.array_equal(again.tokens, packed.tokens)


def test_the_seed_draws_windows_from_everywhere():
    text = [document(1, 900)]
    starts = {int(pack_rows(text, 2, 10, seed, "x", None).tokens[0, 0]) for seed in range(30)}
    assert len(starts) > 20
    assert min(starts) < 1300 and max(starts) > 1600


def test_windows_come_in_no_order():
    """Those at the end may be held out: they must not be all of the end of the text."""
    starts = pack_rows([document(1, 900)], 50, 10, 0, "x", None).tokens[:, 0].tolist()
    assert starts != sorted(starts)
    assert min(starts) < 1200 and max(starts) > 1700
    assert min(starts[-10:]) < 1400 and max(starts[-10:]) > 1500


def test_one_long_document_does_not_fill_everything():
    documents = [document(1, 900), *(document(number, 10) for number in range(2, 40))]
    tokens = pack_rows(documents, 10, 10, 0, "x", None).tokens
    of_the_long_one = (tokens < 2000).sum()
    assert 0 < of_the_long_one <= 40
    assert (tokens >= 2000).any()


def test_short_text_is_used_in_whole():
    documents = [document(1, 70), document(2, 8)]
    tokens = pack_rows(documents, 7, 10, 0, "x", EOS).tokens
    assert tokens.shape == (7, 10)  # 80 tokens; parts of at most 40 would make 4 windows


def test_no_more_is_read_than_needed():
    taken = []

    def documents():
        for number in range(1, 100):
            taken.append(number)
            yield document(number, 10)

    pack_rows(documents(), 5, 10, 0, "x", None)
    assert taken == [1, 2, 3, 4, 5]


def test_documents_that_end_in_the_separator_get_no_second_one():
    tokens = pack_rows([[5, 6, EOS], [7, 8]], 6, 1, 0, "x", EOS).tokens
    assert Counter(tokens.ravel().tolist()) == {5: 1, 6: 1, 7: 1, 8: 1, EOS: 2}


def test_fewer_windows_than_asked_for_are_used_with_a_warning(monkeypatch):
    said = []
    monkeypatch.setattr(
        calibration.LOG, "warning", lambda text, *values: said.append(text % values)
    )
    assert len(pack_rows([document(1, 35)], 4, 10, 0, "this text", None).tokens) == 3
    assert said == ["this text holds 3 calibration sequences of 10 tokens, not 4: using these"]
    pack_rows([document(1, 40)], 4, 10, 0, "this text", None)
    assert len(said) == 1


def test_the_record_tells_what_was_read():
    packed = pack_rows([document(1, 60)], 2, 10, 3, "this text", None)
    assert packed.record() == {
        "source": "this text",
        "samples": 2,
        "length": 10,
        "tokens": 20,
        "seed": 3,
        "sha256": hashlib.sha256(packed.tokens.astype("<i8").tobytes()).hexdigest(),
    }
    json.dumps(packed.record())


# Files.


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_files_are_read_from_everywhere_and_not_in_whole(make_model, tmp_path, monkeypatch, kind):
    lines = [f"{number:05}: a line of text" for number in range(20_000)]
    file = tmp_path / f"text.{kind}"
    if kind == "txt":
        file.write_text("\n".join(lines), encoding="utf-8")
    else:
        write_rows(file, [{"text": line} for line in lines])
    read = []
    original = calibration.pack_checked

    def watched(rows, *arguments):
        return original((read.append(row) or row for row in rows), *arguments)

    monkeypatch.setattr(calibration, "pack_checked", watched)
    found = load_calibration(choose(file, 32, 24), make_model())
    assert found.source == str(file)
    assert sum(map(len, read)) < 4000  # of half a million
    numbers = [int(part[-5:]) for part in read_back(found.tokens).split(":") if part[-5:].isdigit()]
    assert len(numbers) > 20
    assert min(numbers) < 5_000 and max(numbers) > 15_000
    assert all(line in lines for line in read_back(found.tokens).split("\n") if len(line) == 27)
    same, other = (load_calibration(choose(file, 32, 24, seed), make_model()) for seed in (0, 1))
    assert np.array_equal(found.tokens, same.tokens)
    assert not np.array_equal(found.tokens, other.tokens)


def test_a_text_file_is_cut_at_line_ends_without_losing_anything(tmp_path):
    file = tmp_path / "text.txt"
    text = "short\n" * 50 + "a line longer than any block " * 9 + "\nlast"
    file.write_text("\ufeff" + text, encoding="utf-8")
    blocks = list(calibration.blocks_of(file, 64, 0))
    assert sorted("".join(blocks)) == sorted(text)
    assert all(block in text and len(block) <= 64 for block in blocks)
    assert sum(block.endswith("\n") for block in blocks) >= 5


def test_rows_may_be_texts_segments_or_messages(make_model, tmp_path):
    rows = [
        {"text": "one "},
        {"segments": [{"label": False, "text": "two"}, {"label": True, "text": " three"}]},
        {"messages": [{"role": "user", "content": "four"}]},
    ]
    file, folder = write_rows(tmp_path / "lines.json", rows), tmp_path / "model"
    array = tmp_path / "array.json"
    array.write_text(json.dumps(rows, indent=2))
    marked, blank = tmp_path / "marked.json", tmp_path / "blank.json"
    marked.write_text(json.dumps(rows, indent=2), encoding="utf-8-sig")
    blank.write_text("\r\n  " + json.dumps(rows))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_bytes((make_model() / "config.json").read_bytes())
    expected = tokenizer("one two three<user>four", add_special_tokens=False)["input_ids"]
    for source in (file, array, marked, blank):
        found = load_calibration(choose(source, 40, 2), folder)
        assert sorted(found.tokens.ravel().tolist()) == sorted([*expected, EOS, EOS, EOS])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            b"too short",
            r"expected 64 tokens.*at least 32.*found 10 in .*a\.txt: give more",
        ),
        ("a.txt", b"", r"found 0 in .*more text or a shorter --calibration-length"),
        ("a.txt", b"\xff\xfe" * 99, r"expected UTF-8 text in .*a\.txt.*convert"),
        ("a.csv", b"text", r"expected a \.txt, \.jsonl or \.yml file.*found .*a\.csv: convert"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"}\n', r"found line 2 of .*a\.jsonl empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"found line 2 of .*a\.jsonl invalid"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"found line 1 of .*a\.jsonl invalid"),
        ("a.json", b'["x"]\n', r"text, segments or messages in row 1 of .*found str"),
        ("a.json", b'[{"text": "x"},\n', r"or one array of them, found neither"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"in line 1 of .*found body, id: give rows"),
        ("a.jsonl", b'{"text": null}\n', r"in line 1 of .*found text"),
        ("a.jsonl", b'{"segments": [{"label": true}]}\n', r"found segments, refused \(KeyError"),
        ("a.jsonl", b'{"messages": []}\n', r"found messages, .*no chat template"),
        ("a.yml", b"a: [", r"expected .*a\.yml to be YAML, found that it is not"),
        ("a.yml", b"- a", r"with `datasets:` for calibration, found none in .*a\.yml"),
        ("a.yaml", b"base_model: x\ndatasets:\n", r"with `datasets:`.*found none in .*a\.yaml"),
        ("a.yml", b"datasets: [{path: x}]\n", r"a\.yml refused \(.*base_model.*preprocess"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(make_model, tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(LoRAMError, match=message):
        load_calibration(choose(file), make_model())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "no such file: .*found 'nowhere.txt'"),
        ("./nowhere", "no such file: .*found './nowhere'"),
        ("~/nowhere", "no such file"),
        ("some/data/set", "no such file"),
        ("tests", "found the folder tests: name a file in it"),
        ("", "expected calibration text, found none"),
        ("no-such-org/data:subset", r"found 'no-such-org/data:subset' \(.*check the name"),
    ],
)
def test_what_is_named_but_not_there_is_told(make_model, monkeypatch, source, message):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(LoRAMError, match=message):
        load_calibration(choose(source), make_model())


def test_a_broken_chat_template_is_told(make_model, tmp_path):
    folder = tmp_path / "model"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_bytes((make_model() / "config.json").read_bytes())
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(LoRAMError, match=r"in line 1 of .*refused .*roles must alternate"):
        load_calibration(choose(file), folder)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_without_a_tokenizer_is_told(make_model, text_file, tmp_path, family):
    """For Qwen2, transformers makes up a tokenizer of one token."""
    (tmp_path / "config.json").write_bytes((make_model(family) / "config.json").read_bytes())
    with pytest.raises(
        LoRAMError, match=f"expected the model's tokenizer in {tmp_path}, found none"
    ):
        load_calibration(choose(text_file), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LoRAMError, match="expected the model's tokenizer"):
        load_calibration(choose(text_file), tmp_path)


def test_sequences_must_fit_the_model(make_model, text_file):
    with pytest.raises(LoRAMError, match="at most the model's 256 tokens, found 257"):
        load_calibration(choose(text_file, length=257), make_model())
    load_calibration(choose(text_file, length=256), make_model())
    small = make_model(vocab_size=40)
    with pytest.raises(LoRAMError, match=r"vocabulary of 40, found \d+ in .*belongs to the model"):
        load_calibration(choose(text_file), small)


def test_data_sets_on_the_hub_are_streamed(make_model, monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        rows = [{"text": f"{number:05}: a row of text"} for number in range(2000)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_calibration(choose("org/name:subset", 8, 32), make_model())
    assert found.source == "org/name:subset"
    assert asked == [(("org/name", "subset"), {"split": "train", "streaming": True})]
    numbers = [int(part[-5:]) for part in read_back(found.tokens).split(":") if part[-5:].isdigit()]
    assert max(numbers) > 500 and sorted(numbers) != numbers
    load_calibration(choose("org/name", 8, 32), make_model())
    assert asked[1][0] == ("org/name", None)
    other = load_calibration(choose("org/name:subset", 8, 32, seed=1), make_model())
    assert not np.array_equal(other.tokens, found.tokens)


def test_half_a_surrogate_pair_is_read_as_unknown(make_model, tmp_path):
    """As cut-off emoji leave: JSON holds it, a tokenizer does not take it."""
    text, read = "an emoji cut \ud83d, and \U0001f600", "an emoji cut \ufffd, and \U0001f600"
    rows = [{"text": text}, {"segments": [{"text": text, "label": True}]}]
    source = str(write_rows(tmp_path / "rows.jsonl", rows * 20))
    assert load_calibration(choose(source, 4, 32), make_model()).tokens.shape == (4, 32)
    held = held_out(source, "in_domain", byte_tokenizer(), 260, 64)
    assert {byte_tokenizer().decode(window.ids) for window in held.windows} == {read}
