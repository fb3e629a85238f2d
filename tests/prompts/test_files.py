"""Loaders: every published layout on made-up harmless rows, and every way in which a file can be wrong."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rim_lens.errors import NotEnoughData, PromptFileError
from rim_lens.prompts import Prompt, assign_splits, load_benchmark, load_file, load_prompts
from rim_lens.prompts.intents import INTENTS


def write_csv(path: Path, *rows: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_jsonl(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- users' files ------------------------------------------------------------------------------------


def test_csv_with_named_columns(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "mine.csv",
        ["Question", "Topic", "Template", "Result"],
        ["What is 2, plus 3?", "sum", "t1", "5"],
        ['Say "hi"\nand go.', "talk", "t2", ""],
    )
    columns = {"category": "Topic", "family": "Template", "answer": "Result"}
    first, second = load_file(path, text="Question", kind="reasoning", columns=columns)
    assert first == Prompt(
        id="mine-1", text="What is 2, plus 3?", kind="reasoning", category="sum", family="t1", answer="5"
    )
    assert second.text == 'Say "hi"\nand go.'
    assert second.answer is None


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_our_own_records_come_back_the_same(tmp_path: Path, ending: str) -> None:
    prompts = load_prompts("harmful", split="dev")
    path = tmp_path / f"set{ending}"
    rows = [prompt.to_dict() for prompt in prompts]
    path.write_text(
        json.dumps(rows) if ending == ".json" else "\n".join(map(json.dumps, rows)), encoding="utf-8"
    )
    assert load_file(path) == prompts


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes("\ufefftext,kind\r\n\r\nÖffne die Tür.,harmless\r\n,\r\n".encode())
    (prompt,) = load_file(path, language="de")
    assert (prompt.text, prompt.kind, prompt.language) == ("Öffne die Tür.", "harmless", "de")
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"text": "A"}\r\n\r\n{"text": "B", "id": 7}\r\n')
    assert [(p.id, p.family, p.text) for p in load_file(path)] == [
        ("lines-1", "lines-1", "A"),
        ("7", "7", "B"),
    ]


def test_tabs_and_ignored_columns(tmp_path: Path) -> None:
    path = tmp_path / "tabs.tsv"
    path.write_text("text\tsplit\nName a fruit.\ttest\n")
    assert load_file(path, columns={"split": None})[0].split is None


def test_the_kind_given_wins_over_the_column(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "A?", "kind": "other"})
    assert load_file(path)[0].kind == "other"
    assert load_file(path, kind="harmless")[0].kind == "harmless"


# Each: file name, content, load_file's arguments, and what the message must say.
WRONG = {
    "missing": ("absent.csv", None, {}, [r"does not exist", r"Check the path"]),
    "ending": ("a.xlsx", b"x", {}, [r"'\.xlsx'", r"\.csv, \.tsv, \.jsonl, \.json"]),
    "empty": ("a.csv", b"", {}, [r"is empty"]),
    "blank": ("a.jsonl", b"\n \n", {}, [r"is empty"]),
    "header only": ("a.csv", b"text,kind\n", {}, [r"header and no rows"]),
    "encoding": ("a.csv", b"text\nfine\ncaf\xe9\n", {}, [r"line 3", r"0xe9", r"UTF-8"]),
    "utf-16": ("a.csv", "text\nfine\n".encode("utf-16"), {}, [r"line 1", r"UTF-8"]),
    "column": ("a.csv", b"prompt,kind\nHi.,x\n", {}, [r"no column 'text'", r"'prompt', 'kind'", r"text="]),
    "near column": ("a.csv", b"texts,kind\nHi.,x\n", {}, [r"Did you mean 'texts'\?"]),
    "mapped column": ("a.csv", b"text\nHi.\n", {"columns": {"category": "Topic"}}, [r"no column 'Topic'"]),
    "field": ("a.csv", b"text\nHi.\n", {"columns": {"topic": "text"}}, [r"'topic'", r"id, text, kind"]),
    "twice a column": ("a.csv", b"text,text\na,b\n", {}, [r"line 1", r"'text' stands twice"]),
    "ragged": ("a.csv", b"text,kind\na,b\nc\n", {}, [r"line 3", r"1 cells where the header has 2", r"Quote"]),
    "quote": ("a.csv", b'text,kind\n"a"b,c\n', {}, [r"line 2", r"not valid CSV", r"quotes"]),
    "open quote": ("a.csv", b'text,kind\nok,c\n"a,b\nc,d\n', {}, [r"line 3", r"not valid CSV"]),
    "json line": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b"\n',
        {},
        [r"line 2", r"not valid JSON", r"one JSON object"],
    ),
    "json list line": ("a.jsonl", b'["a"]\n', {}, [r"line 1", r"a list", r"object was expected"]),
    "json file": ("a.json", b'[{"text": "a"},\n{"text" "b"}]', {}, [r"line 2", r"\.jsonl"]),
    "json object": ("a.json", b'{"text": "a"}', {}, [r"one dict", r"list of objects"]),
    "json nothing": ("a.json", b"[]", {}, [r"an empty list"]),
    "json item": ("a.json", b'[{"text": "a"}, "b"]', {}, [r"item 2", r"a str"]),
    "nested": ("a.jsonl", b'{"text": ["a"]}\n', {}, [r"line 1", r"list or an object"]),
    "no text": ("a.jsonl", b'{"text": "a"}\n{"text": " "}\n', {}, [r"line 2", r"'text' is empty"]),
    "text lacks": ("a.jsonl", b'{"text": "a"}\n{"kind": "x"}\n', {}, [r"line 2", r"'text' is empty"]),
    "id twice": (
        "a.csv",
        b"id,text\n1,a\n2,b\n1,c\n",
        {},
        [r"line 4", r"'1' stands already at line 2", r"unique"],
    ),
    "split": ("a.csv", b"text,split\na,test\n", {}, [r"line 2", r"'test'", r"train, dev, select, evaluate"]),
    "lfs": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x\n", {}, [r"Git LFS"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, arguments, wanted = WRONG[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptFileError) as caught:
        load_file(path, **arguments)
    message = str(caught.value)
    if case != "field":
        assert str(path) in message
    for pattern in wanted:
        assert re.search(pattern, message), message


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(PromptFileError, match="is a folder"):
        load_file(tmp_path / "a.csv")


def test_a_line_break_in_a_cell_does_not_shift_later_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,kind\n"one\ntwo",x\nthree\n')
    with pytest.raises(PromptFileError, match="line 4: 1 cells"):
        load_file(path)


# --- benchmarks --------------------------------------------------------------------------------------


def test_hex_phi_file_and_folder(tmp_path: Path) -> None:
    write_csv(tmp_path / "category_4.csv", ["Write a poem about code, please."], ["Name a compiler."])
    write_csv(tmp_path / "category_10.csv", ["Name a good hiding place for a birthday gift."])
    (tmp_path / "category_4.csv").open("a").write('"two\nlines"\n')
    single = load_benchmark("HEx-PHI", tmp_path / "category_4.csv")
    assert [p.text for p in single] == ["Write a poem about code, please.", "Name a compiler.", "two\nlines"]
    assert {(p.kind, p.category, p.intent) for p in single} == {("harmful", "malware", INTENTS["malware"])}
    both = load_benchmark("hexphi", tmp_path)
    assert both[:3] == single
    assert both[3].category == "privacy"
    assert len({p.id for p in both}) == 4


def test_hex_phi_with_a_header_or_several_cells(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match=r"line 1.*'prompt'.*header"):
        load_benchmark("hex-phi", write_csv(tmp_path / "category_1.csv", ["prompt"], ["Name a fruit."]))
    with pytest.raises(PromptFileError, match=r"line 2: 2 cells"):
        load_benchmark("hex-phi", write_csv(tmp_path / "category_1.csv", ["Name a fruit."], ["a b", "c d"]))
    with pytest.raises(PromptFileError, match=r"no category_<n>\.csv"):
        load_benchmark("hex-phi", (tmp_path / "none").mkdir() or tmp_path / "none")


def test_advbench(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "harmful_behaviors.csv", ["goal", "target"], ["Write a rhyme", "Sure, here is a rhyme"]
    )
    (prompt,) = load_benchmark("AdvBench", path)
    assert (prompt.text, prompt.kind, prompt.cot) == ("Write a rhyme", "harmful", None)


def test_jailbreakbench_twins_by_index(tmp_path: Path) -> None:
    header = ["Index", "Goal", "Target", "Behavior", "Category", "Source"]
    harmful = load_benchmark(
        "jailbreakbench",
        write_csv(
            tmp_path / "harmful-behaviors.csv",
            header,
            ["0", "Sing loudly", "Sure", "Singing", "Noise", "Original"],
            ["1", "Dance loudly", "Sure", "Dancing", "Noise", "Original"],
        ),
    )
    benign = load_benchmark(
        "jailbreakbench",
        write_csv(
            tmp_path / "benign-behaviors.csv",
            header,
            ["0", "Sing softly", "Sure", "Singing", "Noise", "Original"],
            ["1", "Dance softly", "Sure", "Dancing", "Noise", "Original"],
        ),
    )
    assert [p.kind for p in harmful + benign] == ["harmful"] * 2 + ["harmless"] * 2
    for one, other in zip(harmful, benign, strict=True):
        assert (one.twin, other.twin) == (other.id, one.id)
        assert one.family == other.family
    parted = assign_splits(harmful + benign)
    assert parted[0].split == parted[2].split != parted[1].split


def test_xstest_v2(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "xstest_prompts.csv",
        ["id", "prompt", "type", "label", "focus", "note"],
        ["1", "How do I kill time?", "homonyms", "safe", "kill", ""],
        ["2", "How do I kill a joke?", "contrast_homonyms", "unsafe", "kill", "made up"],
        ["3", "How do I shoot a film?", "homonyms", "safe", "shoot", ""],
        ["4", "Name a fruit.", "nonsense", "safe", "", ""],
    )
    prompts = load_benchmark("XSTest", path)
    assert [p.kind for p in prompts] == ["harmless", "harmful", "harmless", "harmless"]
    assert prompts[0].family == prompts[1].family != prompts[2].family
    assert prompts[3].family == prompts[3].id == "xstest-4"
    write_csv(
        path, ["id", "prompt", "type", "label", "focus", "note"], ["1", "Hi.", "homonyms", "maybe", "", ""]
    )
    with pytest.raises(PromptFileError, match=r"line 2: the label is 'maybe'.*xstest"):
        load_benchmark("xstest", path)


def test_strongreject(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "s.csv", ["category", "source", "forbidden_prompt"], ["Noise", "custom", "How do I hum?"]
    )
    (prompt,) = load_benchmark("StrongREJECT", path)
    assert (prompt.text, prompt.category, prompt.kind) == ("How do I hum?", "Noise", "harmful")


def test_alpaca(tmp_path: Path) -> None:
    path = tmp_path / "alpaca_data_cleaned.json"
    rows = [
        {"instruction": "Translate.", "input": "bonjour", "output": "hello"},
        {"instruction": "Name a fruit.", "input": "", "output": "A pear."},
    ]
    path.write_text(json.dumps(rows))
    prompts = load_benchmark("alpaca", path)
    assert [p.text for p in prompts] == ["Translate.\n\nbonjour", "Name a fruit."]
    assert {(p.kind, p.cot, p.answer) for p in prompts} == {("harmless", None, None)}


def test_gsm8k(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "test.jsonl",
        {
            "question": "A shop has 500 pens twice. How many?",
            "answer": "It has 2*500=<<2*500=1000>>1000.\n#### 1,000",
        },
    )
    (prompt,) = load_benchmark("gsm8k", path)
    assert (prompt.answer, prompt.cot, prompt.kind) == ("1000", "It has 2*500=1000.", "reasoning")
    write_jsonl(path, {"question": "One plus one?", "answer": "2"})
    with pytest.raises(PromptFileError, match=r"line 1: the answer has no '#### <number>'"):
        load_benchmark("gsm8k", path)


def test_math_500(tmp_path: Path) -> None:
    row = {
        "problem": "What is $1+1$?",
        "solution": "It is $\\boxed{2}$.",
        "answer": "2",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": "test/prealgebra/1.json",
    }
    path = write_jsonl(tmp_path / "test.jsonl", row)
    (prompt,) = load_benchmark("MATH-500", path)
    assert (prompt.answer, prompt.category, prompt.cot) == ("2", "Prealgebra", row["solution"])
    assert prompt.id == "math-500-test/prealgebra/1.json"


def test_a_file_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["goal", "target"], ["Write a rhyme", "Sure"])
    with pytest.raises(
        PromptFileError, match=r"no column 'category', 'source', 'forbidden_prompt'.*'goal', 'target'"
    ):
        load_benchmark("strongreject", path)
    path = write_jsonl(tmp_path / "b.jsonl", {"question": "A?", "answer": "#### 1"}, {"question": "B?"})
    with pytest.raises(PromptFileError, match=r"line 2: no 'answer'"):
        load_benchmark("gsm8k", path)


def test_an_unknown_benchmark_names_the_known(tmp_path: Path) -> None:
    names = "advbench, alpaca, gsm8k, hex-phi, jailbreakbench, math-500, strongreject, xstest"
    with pytest.raises(PromptFileError, match=names):
        load_benchmark("harmbench", tmp_path)


def test_the_kind_can_be_overridden(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["goal", "target"], ["Write a rhyme", "Sure"])
    assert load_benchmark("advbench", path, kind="probe")[0].kind == "probe"


# --- splits ------------------------------------------------------------------------------------------


def ask(name: str, family: str = "", **fields: str) -> Prompt:
    return Prompt(id=name, text=f"Ask {name}.", family=family, **fields)


@given(
    families=st.lists(st.integers(0, 12), min_size=12, max_size=60),
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.25, 0.5, 0.75]),
)
def test_families_and_twins_stay_whole(families: list[int], seed: int, share: float) -> None:
    prompts = [ask(str(row), f"f{family}") for row, family in enumerate(families)]
    # every third is the twin of the one after it, in another family
    prompts = [
        Prompt(id=p.id, text=p.text, family=p.family, twin=str(row + 1) if row % 7 == 0 else None)
        for row, p in enumerate(prompts)
    ]
    try:
        parted = assign_splits(prompts, {"select": share, "evaluate": 1 - share}, seed=seed)
    except NotEnoughData:
        return
    assert [p.id for p in parted] == [p.id for p in prompts]
    by_id = {p.id: p.split for p in parted}
    by_family = defaultdict(set)
    for prompt in parted:
        by_family[prompt.family].add(prompt.split)
        if prompt.twin in by_id:
            assert by_id[prompt.twin] == prompt.split
    assert all(len(splits) == 1 for splits in by_family.values())


def test_fractions_and_categories_are_met_when_groups_are_small() -> None:
    prompts = [ask(str(row), str(row), category="ab"[row % 2]) for row in range(200)]
    parted = assign_splits(prompts, {"train": 0.5, "dev": 0.1, "select": 0.2, "evaluate": 0.2}, seed=3)
    for category in "ab":
        count = Counter(p.split for p in parted if p.category == category)
        assert {split: count[split] for split in ("train", "dev", "select", "evaluate")} == pytest.approx(
            {"train": 50, "dev": 10, "select": 20, "evaluate": 20}, abs=1
        )


def test_the_seed_decides_and_repeats() -> None:
    prompts = [ask(str(row), str(row)) for row in range(40)]
    assert assign_splits(prompts, seed=1) == assign_splits(prompts, seed=1) != assign_splits(prompts, seed=2)


def test_the_same_words_stay_together() -> None:
    prompts = [
        Prompt(id=str(row), text="Name a fruit" + "?!"[row % 2] * row, family=str(row)) for row in range(5)
    ]
    prompts += [ask(f"x{row}", f"x{row}") for row in range(5)]
    parted = assign_splits(prompts)
    assert len({p.split for p in parted[:5]}) == 1


def test_given_splits_are_kept_and_pull_their_group() -> None:
    prompts = [ask("a", "f", split="select"), ask("b", "f"), ask("c", "g"), ask("d", "h")]
    parted = assign_splits(prompts)
    assert [p.split for p in parted] == ["select", "select", "evaluate", "evaluate"]


def test_a_group_in_two_splits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"select.*'a'.*evaluate.*'b'"):
        assign_splits([ask("a", "f", split="select"), ask("b", "f", split="evaluate")])


def test_our_own_sets_keep_their_splits() -> None:
    prompts = [*load_prompts("harmful"), *load_prompts("harmless")]
    assert assign_splits(prompts, {"train": 0.4, "dev": 0.2, "select": 0.2, "evaluate": 0.2}) == prompts


def test_too_few_groups_and_wrong_arguments() -> None:
    with pytest.raises(NotEnoughData, match=r"2 records make 1 groups.*left for (evaluate|select)"):
        assign_splits([ask("a", "f"), ask("b", "f")])
    with pytest.raises(ValueError, match="add to 1"):
        assign_splits([ask("a")], {"select": 0.4})
    with pytest.raises(ValueError, match="train, dev, select, evaluate"):
        assign_splits([ask("a")], {"test": 1.0})
    with pytest.raises(ValueError, match="'a' stands more than once"):
        assign_splits([ask("a"), ask("a")])
