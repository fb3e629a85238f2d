"""Prompts from users' own files and from published benchmarks, and splits for them.

Nothing is downloaded: give the path of a file you have. A file is read whole or not at all: the first thing
wrong with it is reported with its place, and nothing is guessed.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

from rim_lens.errors import NotEnoughData, PromptFileError
from rim_lens.prompts.intents import INTENTS
from rim_lens.prompts.records import PROMPT_FIELDS, SPLITS, Prompt, Split

# The numbers in the file names of HEx-PHI; category 2 is withheld by its authors.
HEX_PHI_CATEGORIES: dict[int, str] = {
    1: "illegal_activity",
    2: "child_abuse_content",
    3: "hate_harassment",
    4: "malware",
    5: "physical_harm",
    6: "economic_harm",
    7: "fraud",
    8: "adult_content",
    9: "political_campaigning",
    10: "privacy",
    11: "financial_advice",
}


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        place: Where it stands: "line 3", or "item 3" of a JSON list.
        cells: Text by column.
        nested: Columns that hold a JSON list or object, and so no text.
    """

    place: str
    cells: Mapping[str, str]
    nested: frozenset[str] = frozenset()


# --- users' own files --------------------------------------------------------------------------------


def load_file(
    path: str | PathLike[str],
    text: str = "text",
    kind: str = "",
    *,
    columns: Mapping[str, str | None] | None = None,
    language: str = "en",
) -> list[Prompt]:
    """Load prompts from a CSV, TSV, JSON (a list of objects) or JSONL file.

    A column that bears the name of a field of `Prompt` is taken as that field. Rows without an id get
    ``<file name>-<row>``, rows without a family are a family of their own: give a family where requests share
    a verb or a frame, as statistics cluster by it.

    Args:
        path: The file; its ending tells the format. UTF-8, with or without a byte order mark.
        text: The column that holds the request.
        kind: "harmful", "harmless", "reasoning" or a label of your own for all rows; "" leaves it to a
            column ``kind``, if there is one.
        columns: Further fields by column, for instance ``{"category": "Topic", "family": "Template"}``; None
            for a field ignores a column of its name.
        language: A label for all rows that have none.

    Raises:
        PromptFileError: No such file, an unknown ending, bad encoding, a corrupt line, a missing column, an
            empty file or text, an id that stands twice, a split that does not exist. The message gives
            file, line, what was found and what to do.
    """
    path = Path(path)
    rows = list(_read(path))
    chosen = _columns(path, rows, text, columns or {})
    prompts: list[Prompt] = []
    for number, row in enumerate(rows, start=1):
        _check_plain(path, row, list(chosen.values()))
        fields: dict[str, Any] = {name: row.cells.get(column, "") for name, column in chosen.items()}
        if not fields["text"].strip():
            raise _broken(path, row.place, f"the column {text!r} is empty", "Fill it in, or remove the row.")
        if fields.get("split") and fields["split"] not in SPLITS:
            raise _broken(
                path,
                row.place,
                f"the split is {fields['split']!r}",
                f"Splits are {', '.join(SPLITS)} or empty; columns={{'split': None}} ignores the column.",
            )
        fields = {name: value for name, value in fields.items() if value}
        fields.setdefault("id", f"{path.stem}-{number}")
        fields.setdefault("family", fields["id"])
        fields.setdefault("language", language)
        if kind:
            fields["kind"] = kind
        prompts.append(Prompt(**fields))
    return _unique(path, prompts, [row.place for row in rows])


def _columns(path: Path, rows: Sequence[Row], text: str, columns: Mapping[str, str | None]) -> dict[str, str]:
    unknown = sorted(set(columns) - set(PROMPT_FIELDS))
    if unknown:
        raise PromptFileError(
            f"columns= names {', '.join(map(repr, unknown))}, which a prompt does not have; its fields are"
            f" {', '.join(PROMPT_FIELDS)}."
        )
    present = list(dict.fromkeys(column for row in rows for column in row.cells))
    wanted = {"text": text, **{name: column for name, column in columns.items() if column is not None}}
    _require(path, present, list(wanted.values()))
    same_name = {name: name for name in PROMPT_FIELDS if name in present and name not in columns}
    return {**same_name, **wanted}


# --- benchmarks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The published columns of a benchmark, and how a row becomes a record."""

    columns: tuple[str, ...]
    record: Callable[[Row, int], Prompt]


def load_benchmark(name: str, path: str | PathLike[str], kind: str | None = None) -> list[Prompt]:
    """Load a published benchmark from its own file.

    - hex-phi: one ``category_<n>.csv`` without a header, a prompt a row, or the folder of them. The records
      bear the sentence of intent of their category from arXiv 2509.00544.
    - advbench: CSV with goal, target.
    - jailbreakbench: CSV with Index, Goal, Target, Behavior, Category, Source. "benign" in the file's name
      makes the records harmless; behaviours of one Index are each other's twins.
    - xstest: CSV with id, prompt, type, label, focus. The family is type and focus, contrasts included.
    - strongreject: CSV with category, source, forbidden_prompt.
    - alpaca: JSON with instruction, input. The output is not kept.
    - gsm8k: JSONL with question and answer, ``#### 42`` at its end. The solution becomes the cot.
    - math-500: JSONL with problem, solution, answer, subject, level, unique_id.

    No split is set, as none of them is cut by family: see `assign_splits`.

    Args:
        name: As above; case and punctuation do not matter.
        path: The file, for HEx-PHI also the folder.
        kind: Overrides the kind of all records.

    Raises:
        PromptFileError: No such benchmark, or the file is not in its layout.
    """
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    known = {re.sub(r"[^a-z0-9]", "", label): label for label in (*LAYOUTS, "hex-phi")}
    if key not in known:
        raise PromptFileError(
            f"no benchmark is called {name!r}; there are {', '.join(sorted(known.values()))}. Read other files with"
            " load_file."
        )
    path = Path(path)
    if known[key] == "hex-phi":
        prompts, places = _hex_phi(path)
    else:
        layout = LAYOUTS[known[key]]
        rows = list(_read(path))
        _require(path, list(dict.fromkeys(column for row in rows for column in row.cells)), layout.columns)
        prompts = []
        for number, row in enumerate(rows, start=1):
            absent = [column for column in layout.columns if column not in row.cells]
            if absent:
                raise _broken(
                    path, row.place, f"no {absent[0]!r}", f"Check that this is a {known[key]} file."
                )
            _check_plain(path, row, layout.columns)
            try:
                prompt = layout.record(row, number)
            except ValueError as error:
                raise _broken(
                    path, row.place, str(error), f"Check that this is a {known[key]} file."
                ) from None
            if not prompt.text.strip():
                raise _broken(path, row.place, "the prompt is empty", "Fill it in, or remove the row.")
            prompts.append(prompt)
        places = [row.place for row in rows]
        if known[key] == "jailbreakbench" and "benign" in path.name.lower():
            prompts = [_jailbreakbench_benign(prompt) for prompt in prompts]
    if kind is not None:
        prompts = [replace(prompt, kind=kind) for prompt in prompts]
    return _unique(path, prompts, places)


def _hex_phi(path: Path) -> tuple[list[Prompt], list[str]]:
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("category_*.csv"), key=lambda file: (len(file.stem), file.stem))
        if not files:
            raise PromptFileError(
                f"{path}: no category_<n>.csv lies here. Give the folder that holds HEx-PHI's files."
            )
    prompts, places = [], []
    for file in files:
        digits = re.search(r"\d+", file.stem)
        category = HEX_PHI_CATEGORIES.get(int(digits.group()), file.stem) if digits else file.stem
        for number, (line, cells) in enumerate(_csv_rows(file, _text_of(file), ","), start=1):
            place = f"line {line}"
            if len(cells) != 1:
                raise _broken(
                    file,
                    place,
                    f"{len(cells)} cells",
                    "HEx-PHI has one prompt a row and no header; quote a prompt that holds a comma.",
                )
            if number == 1 and " " not in cells[0].strip():
                raise _broken(
                    file, place, f"{cells[0]!r}, which looks like a header", "Remove it: HEx-PHI has none."
                )
            name = f"hex-phi-{file.stem}-{number}"
            prompts.append(
                Prompt(
                    id=name,
                    text=cells[0],
                    kind="harmful",
                    category=category,
                    family=name,
                    intent=INTENTS.get(category),
                )
            )
            places.append(f"{file.name} {place}")
    return prompts, places


def _advbench(row: Row, number: int) -> Prompt:
    name = f"advbench-{number}"
    return Prompt(id=name, text=row.cells["goal"], kind="harmful", family=name)


def _jailbreakbench(row: Row, _: int) -> Prompt:
    index = row.cells["Index"]
    return Prompt(
        id=f"jailbreakbench-harmful-{index}",
        text=row.cells["Goal"],
        kind="harmful",
        category=row.cells["Category"],
        family=f"jailbreakbench-{index}",
        twin=f"jailbreakbench-harmless-{index}",
    )


def _jailbreakbench_benign(prompt: Prompt) -> Prompt:
    return replace(prompt, id=cast(str, prompt.twin), twin=prompt.id, kind="harmless")


def _xstest(row: Row, _: int) -> Prompt:
    label = row.cells["label"]
    if label not in ("safe", "unsafe"):
        raise ValueError(f"the label is {label!r}, neither 'safe' nor 'unsafe'")
    name = f"xstest-{row.cells['id']}"
    focus = row.cells["focus"]
    topic = row.cells["type"].removeprefix("contrast_")
    return Prompt(
        id=name,
        text=row.cells["prompt"],
        kind="harmless" if label == "safe" else "harmful",
        category=row.cells["type"],
        family=f"xstest-{topic}-{focus}" if focus else name,
    )


def _strongreject(row: Row, number: int) -> Prompt:
    name = f"strongreject-{number}"
    return Prompt(
        id=name,
        text=row.cells["forbidden_prompt"],
        kind="harmful",
        category=row.cells["category"],
        family=name,
    )


def _alpaca(row: Row, number: int) -> Prompt:
    name = f"alpaca-{number}"
    parts = (row.cells["instruction"], row.cells.get("input", ""))
    return Prompt(
        id=name, text="\n\n".join(part for part in parts if part.strip()), kind="harmless", family=name
    )


def _gsm8k(row: Row, number: int) -> Prompt:
    name = f"gsm8k-{number}"
    solution, mark, answer = row.cells["answer"].rpartition("####")
    if not mark or not answer.strip():
        raise ValueError("the answer has no '#### <number>' at its end")
    return Prompt(
        id=name,
        text=row.cells["question"],
        kind="reasoning",
        category="gsm8k",
        family=name,
        answer=answer.strip().replace(",", ""),
        # <<16-3-4=9>> are the data set's calculator marks, not words
        cot=re.sub(r"<<[^<>]*>>", "", solution).strip() or None,
    )


def _math_500(row: Row, _: int) -> Prompt:
    name = f"math-500-{row.cells['unique_id']}"
    return Prompt(
        id=name,
        text=row.cells["problem"],
        kind="reasoning",
        category=row.cells["subject"],
        family=name,
        answer=row.cells["answer"],
        cot=row.cells["solution"] or None,
    )


LAYOUTS: dict[str, Layout] = {
    "advbench": Layout(("goal", "target"), _advbench),
    "jailbreakbench": Layout(("Index", "Goal", "Target", "Behavior", "Category", "Source"), _jailbreakbench),
    "xstest": Layout(("id", "prompt", "type", "label", "focus"), _xstest),
    "strongreject": Layout(("category", "source", "forbidden_prompt"), _strongreject),
    "alpaca": Layout(("instruction",), _alpaca),
    "gsm8k": Layout(("question", "answer"), _gsm8k),
    "math-500": Layout(("problem", "solution", "answer", "subject", "level", "unique_id"), _math_500),
}


# --- splits ------------------------------------------------------------------------------------------


def assign_splits(
    prompts: Sequence[Prompt], fractions: Mapping[str, float] | None = None, seed: int = 0
) -> list[Prompt]:
    """Return the same records, in the same order, with a split each.

    Records that share a family, are twins, or have the same words stay together; that is all that can be
    seen from the records, so give families where requests share a verb or a frame. A record that has a split
    keeps it, and its group goes with it. Categories are spread evenly as far as whole groups allow.

    Args:
        prompts: Records with unique ids; pass harmful requests and their twins in one call.
        fractions: Share of the records by split, adding to 1; default one half select, one half evaluate.
        seed: Which group goes where.

    Raises:
        NotEnoughData: Fewer groups than splits.
        ValueError: Unknown split, fractions that do not add to 1, an id twice, or a group in two splits.

    >>> asks = [Prompt(id=str(i), text=f"Name fruit {i}.", family=str(i // 2)) for i in range(4)]
    >>> sorted(p.split for p in assign_splits(asks))
    ['evaluate', 'evaluate', 'select', 'select']
    """
    shares = {"select": 0.5, "evaluate": 0.5} if fractions is None else dict(fractions)
    if (
        set(shares) - set(SPLITS)
        or min(shares.values(), default=0) < 0
        or abs(sum(shares.values()) - 1) > 1e-6
    ):
        raise ValueError(
            f"fractions are {shares}; they must be at least 0, add to 1, and name splits of {', '.join(SPLITS)}."
        )
    repeated = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise ValueError(f"the id {repeated[0]!r} stands more than once; ids must be unique to tell twins.")
    groups = _groups(prompts)
    given = [_given_split(prompts, group) for group in groups]
    count = Counter[str]()
    for group, split in zip(groups, given, strict=True):
        if split is not None:
            count[split] += len(group)

    import numpy as np

    order = [int(place) for place in np.random.default_rng(seed).permutation(len(groups))]
    # Neighbours of one category are dealt out in turn, so each category is spread.
    order.sort(key=lambda place: (prompts[groups[place][0]].category, -len(groups[place])))
    split_of: dict[int, str] = {}
    for place in order:
        group = groups[place]
        # Records with a given split count from the start, so the others make up for them.
        seen = count.total() + len(group)
        split = given[place] or max(shares, key=lambda name: shares[name] * seen - count[name])
        if given[place] is None:
            count[split] += len(group)
        split_of |= dict.fromkeys(group, split)
    empty = [name for name, share in shares.items() if share > 0 and not count[name]]
    if empty:
        raise NotEnoughData(
            f"{len(prompts)} records make {len(groups)} groups that share a family, a twin or their words; no group is"
            f" left for {', '.join(empty)}. Bring more families, or ask for fewer splits."
        )
    return [replace(prompt, split=cast(Split, split_of[row])) for row, prompt in enumerate(prompts)]


def check_splits(prompts: Sequence[Prompt]) -> None:
    """Refuse records whose families, twins or words stand in two splits: a selection would be tested on what chose it.

    Raises:
        ValueError: They do; the message names a record of each split.
    """
    for group in _groups(prompts):
        _given_split(prompts, group)


def _groups(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Rows linked by a family, a twin or the same words, directly or through others."""
    parent = list(range(len(prompts)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[tuple[str, str], int] = {}
    for row, prompt in enumerate(prompts):
        marks = [("id", prompt.id), ("words", " ".join(re.findall(r"\w+", prompt.text.lower())))]
        marks += [("family", prompt.family)] if prompt.family else []
        marks += [("id", prompt.twin)] if prompt.twin else []
        for mark in marks:
            parent[root(row)] = root(first.setdefault(mark, row))
    groups: dict[int, list[int]] = {}
    for row in range(len(prompts)):
        groups.setdefault(root(row), []).append(row)
    return list(groups.values())


def _given_split(prompts: Sequence[Prompt], group: Sequence[int]) -> str | None:
    splits: dict[str, str] = {}
    for row in group:
        split = prompts[row].split
        if split is not None:
            splits.setdefault(split, prompts[row].id)
    if len(splits) > 1:
        raise ValueError(
            f"records that belong together have the splits {splits} (the first id of each); a selection would be tested"
            " on what chose it. Correct them, or clear the splits and assign anew."
        )
    return next(iter(splits), None)


# --- reading -----------------------------------------------------------------------------------------


def _broken(path: Path, place: str, found: str, advice: str) -> PromptFileError:
    return PromptFileError(f"{path}, {place}: {found}. {advice}")


def _text_of(path: Path) -> str:
    if path.is_dir():
        raise PromptFileError(f"{path} is a folder. Give a file in it.")
    if not path.exists():
        raise PromptFileError(f"{path} does not exist (looked from {Path.cwd()}). Check the path.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x}, which is not UTF-8"
        raise _broken(path, f"line {line}", found, "Save the file as UTF-8.") from None
    if not text.strip():
        raise PromptFileError(f"{path} is empty. Check that it was saved or downloaded whole.")
    if text.startswith("version https://git-lfs"):
        raise PromptFileError(
            f"{path} is a Git LFS pointer, not the data. Fetch the file itself (git lfs pull)."
        )
    return text


def _read(path: Path) -> Iterator[Row]:
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        found = f"ends with {path.suffix!r}" if path.suffix else "has no ending"
        raise PromptFileError(f"{path} {found}; files that can be read end with {', '.join(readers)}.")
    yield from reader(path, _text_of(path))


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line (of the row's first cell) and cells of every row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise _broken(
            path,
            f"line {line}",
            f"not valid CSV ({error})",
            "Check the quotes: a quote inside a cell is doubled.",
        ) from None


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    rows = _csv_rows(path, text, "\t" if path.suffix.lower() == ".tsv" else ",")
    _, header = next(rows)
    header = [name.strip() for name in header]
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated:
        raise _broken(path, "line 1", f"the column {repeated[0]!r} stands twice", "Rename one of them.")
    empty = True
    for line, cells in rows:
        empty = False
        if len(cells) != len(header):
            raise _broken(
                path,
                f"line {line}",
                f"{len(cells)} cells where the header has {len(header)}",
                "Quote cells that hold the delimiter or a line break.",
            )
        yield Row(f"line {line}", dict(zip(header, cells, strict=True)))
    if empty:
        raise PromptFileError(
            f"{path} has a header and no rows. Check that it was saved or downloaded whole."
        )


def _read_jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise _broken(
                path,
                f"line {number}",
                f"not valid JSON ({error.msg}, column {error.colno}): {line.strip()[:40]!r}",
                "JSONL holds one JSON object a line.",
            ) from None
        yield _object(path, f"line {number}", value)


def _read_json(path: Path, text: str) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken(
            path,
            f"line {error.lineno}",
            f"not valid JSON ({error.msg}, column {error.colno})",
            "One object a line is JSONL: name such a file .jsonl.",
        ) from None
    if not isinstance(values, list) or not values:
        found = "an empty list" if isinstance(values, list) else f"one {type(values).__name__}"
        raise PromptFileError(f"{path} holds {found}; a list of objects, one a prompt, was expected.")
    for number, value in enumerate(values, start=1):
        yield _object(path, f"item {number}", value)


def _object(path: Path, place: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise _broken(path, place, f"a {type(value).__name__}", 'An object was expected: {"text": …}.')
    nested = frozenset(name for name, cell in value.items() if isinstance(cell, dict | list))
    cells = {
        name: cell if isinstance(cell, str) else "" if cell is None else json.dumps(cell)
        for name, cell in value.items()
    }
    return Row(place, cells, nested)


def _check_plain(path: Path, row: Row, columns: Sequence[str]) -> None:
    nested = [column for column in columns if column in row.nested]
    if nested:
        found = f"{nested[0]!r} holds a list or an object: {row.cells[nested[0]][:40]}"
        raise _broken(path, row.place, found, "A text was expected.")


def _require(path: Path, present: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [column for column in wanted if column not in present]
    if missing:
        near = difflib.get_close_matches(missing[0], present, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PromptFileError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, present))}.{hint} Name"
            " the columns with text= and columns=."
        )


def _unique(path: Path, prompts: list[Prompt], places: Sequence[str]) -> list[Prompt]:
    first: dict[str, str] = {}
    for prompt, place in zip(prompts, places, strict=True):
        if prompt.id in first:
            raise _broken(
                path,
                place,
                f"the id {prompt.id!r} stands already at {first[prompt.id]}",
                "Make ids unique, or leave the column out with columns={'id': None}.",
            )
        first[prompt.id] = place
    return prompts
