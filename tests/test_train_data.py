"""The data: readers and their errors, generated corpora, splits, batches, tokenizers."""

import io
import re
import tarfile
from datetime import date

import pytest

pytest.importorskip("tokenizers")

from fastattn.train.batches import epoch_batches
from fastattn.train.dates import STYLES, date_corpus, english_year, german_ordinal_word, german_year
from fastattn.train.errors import DataError, TrainingError
from fastattn.train.reviews import review_corpus
from fastattn.train.splits import split
from fastattn.train.text_files import read_aligned, read_imdb, read_labelled, read_pairs
from fastattn.train.tokens import train_subwords, train_words


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_pairs_from_one_file_and_from_two(tmp_path):
    expected = [("one", "eins"), ("two words", "zwei Wörter")]
    tsv = write(tmp_path / "a.tsv", "one\teins\r\n\ntwo words\tzwei Wörter\n")
    assert read_pairs(tsv) == expected
    source = write(tmp_path / "a.en", "one\n\ntwo words\n")
    target = write(tmp_path / "a.de", "eins\n\nzwei Wörter")
    assert read_aligned(source, target) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.tsv: the file is empty"),
        ("\n \n", "a.tsv: the file is empty"),
        ("a\tb\nno tab\n", "a.tsv:2: expected two columns separated by a tab, found 1"),
        ("a\tb\tc\n", "a.tsv:1: expected two columns separated by a tab, found 3"),
        ("a\tb\n\nc\t \n", "a.tsv:3: the second column is empty"),
        (b"a\tb\nc\t\xff\n", "a.tsv:2: not UTF-8 (byte 0xff)"),
    ],
)
def test_errors_in_pairs_name_file_and_line(tmp_path, text, message):
    with pytest.raises(DataError, match=re.escape(message) + "$"):
        read_pairs(write(tmp_path / "a.tsv", text))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"absent.tsv: No such file"):
        read_pairs(tmp_path / "absent.tsv")


def test_files_that_do_not_correspond(tmp_path):
    source = write(tmp_path / "s", "a\nb\nc\n")
    with pytest.raises(DataError, match=r"t:3: 2 lines, but .*s has 3"):
        read_aligned(source, write(tmp_path / "t", "a\nb\n"))
    with pytest.raises(DataError, match=r"t:2: blank, but its counterpart is not"):
        read_aligned(source, write(tmp_path / "t", "a\n\nc\n"))


def test_labelled_csv_and_tsv(tmp_path):
    csv = write(tmp_path / "a.csv", 'id,label,text\n1,pos,"good, very\ngood"\n2,neg,bad\n')
    assert read_labelled(csv) == [("good, very\ngood", "pos"), ("bad", "neg")]
    tsv = write(tmp_path / "a.tsv", "review\tstars\ngood, very\t5\n")
    assert read_labelled(tsv, "review", "stars") == [("good, very", "5")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.csv: the file is empty"),
        ("text,label\n", "a.csv: no examples in the file"),
        ("review,label\na,b\n", "a.csv:1: no column 'text'; the header has 'review', 'label'"),
        ("text,label\ngood,pos\nbad\n", "a.csv:3: expected 2 fields, found 1"),
        ('text,label\n"a\nb",pos\nc,\n', "a.csv:4: the column 'label' is empty"),
        ("text,label\n ,pos\n", "a.csv:2: the column 'text' is empty"),
        ("text,label\na,pos\nb,postive\n", "a.csv:3: the label 'postive' is not one of 'neg', 'pos'"),
        ('text,label\n"a"b,pos\n', "a.csv:2: malformed: "),
    ],
)
def test_errors_in_labelled_files_name_file_and_line(tmp_path, text, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read_labelled(write(tmp_path / "a.csv", text), labels=("neg", "pos"))


IMDB = {"train/pos/0_9.txt": "great", "train/neg/0_1.txt": "bad", "test/pos/1_8.txt": "ü", "test/neg/1_2.txt": "no"}


def imdb_folder(root):
    for name, text in IMDB.items():
        (root / "aclImdb" / name).parent.mkdir(parents=True, exist_ok=True)
        write(root / "aclImdb" / name, text)
    return root / "aclImdb"


def test_imdb_folder_and_tar(tmp_path):
    folder = imdb_folder(tmp_path)
    expected = [("bad", "neg"), ("great", "pos")], [("no", "neg"), ("ü", "pos")]
    assert read_imdb(folder) == expected
    assert read_imdb(tmp_path) == expected
    archive = tmp_path / "aclImdb_v1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "aclImdb")
    assert read_imdb(archive) == expected
    write(archive, archive.read_bytes()[:-60])
    with pytest.raises(DataError, match="truncated, or not a tar file"):
        read_imdb(archive)


def test_imdb_errors(tmp_path):
    folder = imdb_folder(tmp_path)
    write(folder / "test/pos/1_8.txt", b"\xfc")
    with pytest.raises(DataError, match=r"1_8.txt:1: not UTF-8"):
        read_imdb(folder)
    (folder / "test/pos/1_8.txt").unlink()
    with pytest.raises(DataError, match=r"no reviews in test/pos/"):
        read_imdb(folder)
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("readme.txt"), io.BytesIO())
    with pytest.raises(DataError, match=r"no reviews in train/neg/"):
        read_imdb(tmp_path / "other.tar")


def test_dates_as_people_write_them():
    day = date(1998, 3, 3)  # a Tuesday
    written = {style.write(day) for style in STYLES}
    assert {
        "March 3, 1998",
        "3 March 1998",
        "Tuesday, March 3, 1998",
        "the third of March, nineteen ninety-eight",
        "Tue, 3 Mar 1998",
        "03/03/1998",
        "3. März 1998",
        "Dienstag, der 3. März 1998",
        "03.03.1998",
        "der dritte März neunzehnhundertachtundneunzig",
        "Di., 3. März 1998",
    } <= written
    assert [english_year(y) for y in (1900, 1905, 2000, 2007, 2031)] == [
        "nineteen hundred",
        "nineteen oh five",
        "two thousand",
        "two thousand and seven",
        "twenty thirty-one",
    ]
    assert [german_year(y) for y in (1900, 2001, 2031)] == [
        "neunzehnhundert",
        "zweitausendeins",
        "zweitausendeinunddreißig",
    ]
    assert [german_ordinal_word(n) for n in (1, 7, 19, 20, 31)] == [
        "erste",
        "siebte",
        "neunzehnte",
        "zwanzigste",
        "einunddreißigste",
    ]


def test_date_corpus_is_whole_distinct_and_held_out_by_day():
    parts = date_corpus(pairs=4000, seed=1)
    assert [len(p) for p in parts] == [3600, 200, 200]
    assert parts == date_corpus(pairs=4000, seed=1)
    days = []
    for part in parts:
        assert len({source for source, _ in part}) == len(part)
        iso = [
            re.search(r"\d{4}-\d\d-\d\d", target) or re.search(r"\d{4}-\d\d-\d\d", source) for source, target in part
        ]
        days.append({match.group() for match in iso})
        for day in days[-1]:
            date.fromisoformat(day)
    assert not days[0] & days[1] and not days[0] & days[2] and not days[1] & days[2]


def test_reviews_mislead_who_counts_words():
    from fastattn.train.classify import bag_of_words_accuracy

    train, validation, test = review_corpus()
    assert len({text for text, _ in train + validation + test}) == 8000
    share = sum(label == "positive" for _, label in train) / len(train)
    assert 0.45 < share < 0.55
    assert bag_of_words_accuracy(train, test) < 0.65


def test_split_keeps_equal_inputs_together():
    examples = [(f"text {i % 40}", str(i)) for i in range(100)]
    parts = split(examples, 0.1, seed=0)
    assert sorted(e for part in parts for e in part) == sorted(examples)
    inputs = [{text for text, _ in part} for part in parts]
    assert [len(s) for s in inputs] == [32, 4, 4]
    assert not inputs[0] & inputs[1] and not inputs[0] & inputs[2] and not inputs[1] & inputs[2]
    assert split(examples, 0.1, seed=0) == parts != split(examples, 0.1, seed=1)
    with pytest.raises(TrainingError, match="2 distinct examples are too few"):
        split([("a", 1), ("b", 2)], 0.1, seed=0)


def test_split_leaves_a_label_to_training():
    """By a swap with the first training example whose label stands there twice; otherwise nothing moves."""
    texts = [f"text {i}" for i in range(10)]
    train, (held,), (tested,) = ([text for text, _ in part] for part in split([(t, "") for t in texts], 0.1, seed=0))
    first, second, third, *others = train

    def texts_of_parts(labels):
        examples = [(text, labels.get(text, "usual")) for text in texts]
        return tuple([text for text, _ in part] for part in split(examples, 0.1, seed=0, every_label=True))

    assert texts_of_parts({}) == (train, [held], [tested])
    assert texts_of_parts({first: "odd"}) == (train, [held], [tested])
    assert texts_of_parts({held: "odd", tested: "odd", first: "odd"}) == (train, [held], [tested])
    assert texts_of_parts({held: "odd", first: "alone"}) == ([first, held, third, *others], [second], [tested])
    assert texts_of_parts({held: "odd", tested: "odd"}) == ([held, second, third, *others], [first], [tested])
    both = {held: "odd", tested: "rare", second: "alone"}
    assert texts_of_parts(both) == ([held, second, tested, *others], [first], [third])
    with pytest.raises(TrainingError, match="10 labels, and only 8 of 10 distinct examples left for training"):
        texts_of_parts({text: text for text in texts})
    two_labels = [("a", "x"), ("a", "y"), *((text, "x") for text in texts)]
    for seed in range(20):
        assert ("a", "y") in split(two_labels, 0.2, seed, every_label=True)[0]


def test_batches_hold_every_example_once_and_like_lengths():
    lengths = [(i * 37) % 91 for i in range(1000)]
    batches = epoch_batches(lengths, 16, seed=3, epoch=2)
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert batches == epoch_batches(lengths, 16, seed=3, epoch=2)
    assert batches != epoch_batches(lengths, 16, seed=3, epoch=3)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 10


def test_subwords_are_lossless_and_digits_single():
    tokenizer = train_subwords(["Dienstag, der 3. März 1998"] * 20, 300)
    for text in ("Dienstag, der 3. März 1998", "日本語 🙂  two  spaces", "1234"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("1998").ids) == 4
    assert tokenizer.encode("Dienstag").tokens == ["Dienstag"]


def test_words_know_their_place_in_the_text():
    tokenizer = train_words(["It isn't bad , not at all"] * 3, 100)
    text = "Isn't it BAD?"
    encoding = tokenizer.encode(text)
    assert [text[a:b] for a, b in encoding.offsets] == ["Isn't", "it", "BAD", "?"]
    assert encoding.tokens == ["isn't", "it", "bad", "<unk>"]
