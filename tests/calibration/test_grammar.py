from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.calibration.grammar import OPTIONS, DatasetItem, parse_dataset
from auto_round.errors import ConfigError


def one(text: str) -> DatasetItem:
    (item,) = parse_dataset(text)
    return item


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("NeelNanda/pile-10k", DatasetItem("NeelNanda/pile-10k")),
        ("NeelNanda/pile-10k:train", DatasetItem("NeelNanda/pile-10k", ("train",))),
        ("mbpp:train+validation+test", DatasetItem("mbpp", ("train", "validation", "test"))),
        ("mbpp:split = train + test : num = 8", DatasetItem("mbpp", ("train", "test"), num=8)),
        ("a:train:num=3", DatasetItem("a", ("train",), num=3)),
        ("a:concat", DatasetItem("a", concat=True)),
        ("a:Concat=True", DatasetItem("a", concat=True)),
        ("a:concat=false", DatasetItem("a", concat=False)),
        ("a:apply_chat_template", DatasetItem("a", apply_chat_template=True)),
        ("a:apply-chat-template=1", DatasetItem("a", apply_chat_template=True)),
        (
            'a:system_prompt="You are: a, helpful  assistant. "',
            DatasetItem("a", apply_chat_template=True, system_prompt="You are: a, helpful  assistant. "),
        ),
        (
            r"a:system_prompt='say \'no\'\n, \\ or \"yes\"':num=2",
            DatasetItem("a", num=2, apply_chat_template=True, system_prompt="say 'no'\n, \\ or \"yes\""),
        ),
        (
            "a:system_prompt=You are helpful:num=2",
            DatasetItem("a", num=2, apply_chat_template=True, system_prompt="You are helpful"),
        ),
        ('a:system_prompt=""', DatasetItem("a", apply_chat_template=True, system_prompt="")),
        (r"C:\data sets\a.jsonl:num=8", DatasetItem(r"C:\data sets\a.jsonl", num=8)),
        ("c:/data/a.jsonl", DatasetItem("c:/data/a.jsonl")),
        (r"..\a.jsonl:concat", DatasetItem(r"..\a.jsonl", concat=True)),
        ('"./a, b: c.txt":num=1', DatasetItem("./a, b: c.txt", num=1)),
        ("  ./a b.txt  ", DatasetItem("./a b.txt")),
    ],
)
def test_one_item(text: str, wanted: DatasetItem) -> None:
    assert one(text) == wanted


def test_a_mixture_keeps_its_order() -> None:
    items = parse_dataset("./tmp.json,NeelNanda/pile-10k:num=256 , mbpp:train+validation+test:num=128")
    assert [item.name for item in items] == ["./tmp.json", "NeelNanda/pile-10k", "mbpp"]
    assert [item.num for item in items] == [None, 256, 128]
    assert [item.position for item in items] == [0, 11, 40]


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", 1, "name is missing"),
        ("a,,b", 3, "name is missing"),
        ("a, ", 4, "name is missing"),
        (":num=3", 1, "name is missing"),
        ('""', 1, "name is missing"),
        ("a:nmu=3", 3, '"num"'),
        ("a:concatt", 3, '"concat"'),
        ("a:sytem_prompt='x'", 3, '"system_prompt"'),
        ("a:num=0", 7, "at least 1"),
        ("a:num=-4", 7, "at least 1"),
        ("a:num=1e3", 7, "at least 1"),
        ("a:num=٣", 7, "at least 1"),
        ("a:num", 3, "needs a value"),
        ("a:split", 3, "needs a value"),
        ("a:split=", 9, "name of a split"),
        ("a:split=train+", 9, "name of a split"),
        ("a:concat=maybe", 10, "true or false"),
        ("a:num=1:num=2", 9, "twice"),
        ("a:train:split=test", 9, "twice"),
        ("a:num=1:train", 9, "unknown option"),
        ("a:", 3, "option is missing"),
        ("a:num=1:=3", 9, "option is missing"),
        ('a:system_prompt="x', 17, "never closed"),
        ('a:system_prompt="x"y', 20, "expected ','"),
        ("a:system_prompt=x:apply_chat_template=false", 1, "needs the chat template"),
    ],
)
def test_an_error_points_at_its_place(text: str, column: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_dataset(text)
    first, line, caret = str(caught.value).split("\n")
    assert f"position {column}:" in first
    assert words in first
    assert line[4:] == text
    assert caret.index("^") == 4 + column - 1


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
items = st.builds(
    DatasetItem,
    name=names,
    splits=st.lists(st.from_regex(r"[\w.\-]{1,8}", fullmatch=True), max_size=3).map(tuple),
    num=st.none() | st.integers(1, 10**9),
    concat=st.none() | st.booleans(),
    apply_chat_template=st.none() | st.booleans(),
    system_prompt=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
).map(lambda item: item if item.system_prompt is None else replace(item, apply_chat_template=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(items, min_size=1, max_size=3))
def test_items_come_back_from_their_text(mixture: list[DatasetItem]) -> None:
    assert list(parse_dataset(", ".join(map(str, mixture)))) == mixture


def generated(count: int, seed: int) -> list[str]:
    """Return specifications made of grammar pieces, some of them damaged at one place."""
    rng = random.Random(seed)
    heads = ["a/b", "./x.jsonl", r"C:\x\y.txt", "python-docs", "mbpp", '"q, r"', "", " z ", "~/d", "x=y"]
    values = [
        "",
        "3",
        "0",
        "true",
        "False",
        "maybe",
        "train+test",
        "a++b",
        '"q: , \\" s"',
        "'open",
        "é",
        "-1",
    ]
    keys = [*OPTIONS, "nmu", "train", "conCAT", "apply-chat-template", "", "seed"]
    made = []
    for _ in range(count):
        parts = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            text = rng.choice(heads)
            for _ in range(rng.choice([0, 1, 1, 2, 3])):
                text += ":" + rng.choice(keys) + rng.choice(["", "=", " = "]) + rng.choice(values)
            parts.append(text)
        text = ",".join(parts)
        if rng.random() < 0.3:
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice([":", ",", '"', "\\", "=", " ", "\x00", "🙂", "\n"]) + text[at:]
        made.append(text)
    return made


def test_two_thousand_strings_are_parsed_or_refused_in_our_words() -> None:
    accepted, refused = 0, []
    for text in generated(2000, seed=7):
        try:
            found = parse_dataset(text)
        except ConfigError as error:
            refused.append(str(error))
            continue
        accepted += 1
        assert parse_dataset(",".join(map(str, found))) == found, text
    assert 200 < accepted < 1800
    assert all(message.startswith("data set, position ") and message.endswith("^") for message in refused)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab:,=+\"'\\ 1\ntrue") | st.characters(), max_size=30))
def test_any_text_is_parsed_or_refused_in_our_words(text: str) -> None:
    try:
        found = parse_dataset(text)
    except ConfigError:
        return
    assert parse_dataset(",".join(map(str, found))) == found
