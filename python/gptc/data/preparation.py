"""Text to a dataset on disk: deterministic, in bounded memory, and restartable.

    dataset = prepare(["book.txt"], Path("data/book"), tokenizer="gpt2")

The text is read twice: the first reading finds sizes, checksums, document borders and characters,
the second encodes. An unfinished dataset grows in `OUT/.partial`, with a journal of the finished
shards; the same command continues after the last of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gptc.data import stories
from gptc.data.chat_job import ChatJob, has_chats
from gptc.data.choice import Choice
from gptc.data.crew import Crew
from gptc.data.dataset import Dataset
from gptc.data.description import DATASET_FILE, DATASET_VERSION, read_meta
from gptc.data.job import WORK_FOLDER, Job, occupied, source_notes
from gptc.data.known import KNOWN_DATASETS, STORIES, validates
from gptc.data.options import STORIES_BYTES, VAL_FRACTION, Errors, PrepareOptions
from gptc.data.readers import VERSION as READER_VERSION
from gptc.data.readers import Reading, suffixes
from gptc.data.sources import Gathering, identity, is_remote
from gptc.errors import GptcError, UsageError
from gptc.files.checksum import file_checksum
from gptc.files.download import ProgressCallback
from gptc.files.paths import cache_advice, cache_folder
from gptc.files.words import plural, quoted
from gptc.tokenizer.base import FILE_NAME, Tokenizer
from gptc.tokenizer.compare import same_tokens
from gptc.tokenizer.marks import NONE
from gptc.tokenizer.registry import bpe_size, is_spec, make_tokenizer, read_tokenizer
from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer

_OF_TRAIN = ("--tokenizer", "--seed")  # the options of gptc prepare that gptc train has too
_LARGE = 1.5  # of the part that is to validate: one that is noted
_LONGEST_STEM = 40  # characters of a source's name in that of its folder in the cache


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    force: bool = False,
    progress: ProgressCallback | None = None,
    notify: Callable[[str], None] | None = None,
    tokenizer_of_chats: Tokenizer | None = None,
    crew: Crew | None = None,
    **options: Any,
) -> Dataset:
    """Turns text into a dataset at `out`, which appears complete or not at all.

    `sources` are files, folders (every file below, sorted), globs, "-" (standard input), URLs, or
    names in KNOWN_DATASETS; they are joined in order. Of a folder or archive, hidden files and
    those that the globs `include` and `exclude` leave out are not read.
    `options` are the fields of `PrepareOptions`.

    Rows of conversations (data/chats.py) become sequences with masks, and whole rows validate.
    Their tokenizer is `tokenizer_of_chats`, a model's, or that of the options.

    Documents are files, rows, and texts that <|endoftext|> separates. With several, random ones
    that make up `val_fraction` of the bytes become the validation split, as a function of the seed.
    With `val_by="order"`, and for the built-in stories, these are the last ones. If there is one
    document, or few and long ones, it is the end of the text: that fraction of the bytes (with the
    bytes tokenizer) or characters. `val_tokens` takes exactly the last tokens instead. Without
    either, the validation files of known datasets are the split; without such files,
    `val_fraction` is VAL_FRACTION. The result does not depend on the number of `jobs`,
    nor of the ranks of a `crew`, which encode a text together.

    If `out` already holds the same dataset, it is returned with `already_there` set; an interrupted
    call is resumed. UsageError for options out of range; GptcError for sources that are missing,
    empty, damaged or not UTF-8, and, without `force`, for an `out` that holds anything else.
    """
    out = Path(out)
    if not sources:
        raise UsageError(f"name a SOURCE: a file, a folder, a URL, {' or '.join(KNOWN_DATASETS)}")
    how = PrepareOptions(**options)
    how.check()
    if how.val_fraction is None and (
        how.val_tokens is not None or not any(map(validates, sources))
    ):
        how = replace(how, val_fraction=VAL_FRACTION)
    if how.val_by is None and (
        how.val_fraction is None or how.val_tokens is not None or set(sources) <= set(STORIES)
    ):
        how = replace(how, val_by="order")  # the stories have a random order already
    report = progress or (lambda action, n_done, n_bytes: None)
    gathering = Gathering(
        out,
        out / WORK_FOLDER / "spool",
        Choice(how.include, how.exclude),
        how.raw,
        (how.stories_bytes, how.seed),
        report,
        notify or (lambda line: None),
    )
    reading = Reading(how.text_field, how.raw, gathering.choice)
    if has_chats(sources, gathering, reading):
        job: Job | ChatJob = ChatJob(
            out, sources, how, tokenizer_of_chats or _chat_tokenizer(how.tokenizer), force, report
        )
    else:
        _refuse_options_of_chats(how)
        job = _job(sources, out, how, force, report, crew)
    existed = out.exists()
    try:
        there = _run(job, gathering, reading)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        kept = "; the same command continues after the finished shards" if job.work.exists() else ""
        raise GptcError(
            f"cannot prepare {out}: {where}{e.strerror or e}; check the path, its permissions and "
            f"the free space{cache_advice(e.filename or out)}{kept}"
        ) from e
    finally:
        if not existed:
            with suppress(OSError):  # it holds something, or the disk is read-only
                out.rmdir()
    dataset = Dataset.open(out)
    dataset.already_there = there
    if notify:
        _note(dataset, notify)
    return dataset


def _chat_tokenizer(name: str) -> Tokenizer:
    """The tokenizer for conversations, with the special tokens and templates of its model."""
    if name == "char" or bpe_size(name) is not None:
        raise UsageError(
            f"--tokenizer {name} learns from a text, and the rows are conversations: give that of "
            "a model, such as the folder of a checkpoint"
        )
    return make_tokenizer(name)


def _refuse_options_of_chats(how: PrepareOptions) -> None:
    if how.chat_template is not None:
        raise UsageError(
            "--chat-template is for rows of conversations, and the sources are texts: leave it out"
        )


def _note(dataset: Dataset, notify: Callable[[str], None]) -> None:
    """Tells how much of a text the tokenizer has lost, and how much validates if it is a lot."""
    wanted = dataset.meta.get("options", {}).get("val_fraction")
    n = sum(source.get("documents", 0) for source in dataset.meta["sources"])
    if wanted and n > 1 and not dataset.is_chats:
        share = dataset.n_bytes("val") / max(1, dataset.n_bytes("all"))
        if share > _LARGE * wanted:
            notify(
                f"note: {share:.0%} of the text validates, and not {wanted:.0%}: whole documents "
                f"do, and it has {n}; gptc prepare --val-tokens N cuts one"
            )
    if n := dataset.n_unknown():
        share = n / dataset.n_tokens("all")
        notify(
            f"note: {plural(n, 'token')} ({share:.2g} of all) are <unk>: the tokenizer has none "
            "for that text, which is lost; --tokenizer bytes takes any text"
        )


def _job(
    sources: Sequence[str],
    out: Path,
    how: PrepareOptions,
    force: bool,
    progress: ProgressCallback,
    crew: Crew | None,
) -> Job:
    given = _given_tokenizer(how.tokenizer, how.errors)
    recorded: dict[str, Any] = {
        "tokenizer": _recorded_tokenizer(how.tokenizer, given, out, force),
        "val_fraction": how.val_fraction,
        "val_by": how.val_by,
        "seed": how.seed,
        "val_tokens": how.val_tokens,
        "shard_tokens": how.shard_tokens,
        "include": list(how.include),
        "exclude": list(how.exclude),
        "text_field": how.text_field,
        "errors": how.errors,
        "raw": how.raw,
    }
    if how.val_by == "order":
        del recorded["seed"]
    if any(source in STORIES for source in sources):
        recorded["stories"] = _stories_options(how.stories_bytes, how.seed)
    jobs = how.jobs if how.jobs is not None else len(os.sched_getaffinity(0))
    return Job(
        out, sources, recorded, how.tokenizer, given, how.errors, jobs, force, progress, crew
    )


def _recorded_tokenizer(name: str, given: Tokenizer | None, out: Path, force: bool) -> str:
    """The tokenizer in dataset.json; as it is there, if `out` was made with a copy of the same."""
    own = given.fingerprint() if given and not is_spec(name) else name
    # What --force replaces may be damaged.
    there = read_meta(out) if out.is_dir() and not force else None
    recorded = there["options"].get("tokenizer") if there else None
    if given is None or recorded in (None, own) or not (out / FILE_NAME).is_file():
        return own
    try:
        return recorded if same_tokens(read_tokenizer(out), given) else own
    except GptcError:
        return own


def _run(job: Job | ChatJob, how: Gathering, reading: Reading) -> bool:
    """Prepares the dataset. True when it is there already."""
    there = None if job.force else _dataset_at(job.out)
    if there and there["options"] != job.options:
        raise occupied(job.out)
    remote = all(is_remote(source) for source in job.sources)
    if there and remote and _identities(there) == [identity(source) for source in job.sources]:
        return True  # without downloading it again to compare
    with _locked(job.out):
        try:
            return job.run(how, reading, there)
        finally:
            job.clean()


def _identities(meta: dict[str, Any]) -> list[dict[str, str]]:
    """The identity of each source of a dataset.json."""
    return [{k: s[k] for k in ("source", "address") if k in s} for s in meta["sources"]]


def _given_tokenizer(name: str, errors: Errors) -> Tokenizer | None:
    """The tokenizer; None for one that learns from the text, which has to be read first."""
    learns = name == "char" or bpe_size(name) is not None
    given = None if learns else make_tokenizer(name)
    if given is not None:
        given.bos, given.marks = None, NONE  # a model's own, which are not in a dataset's text
    if errors == "bytes" and (name == "char" or (given and given.byte_ids is None)):
        raise UsageError(
            f"the tokenizer {name} has no tokens for single bytes: choose --errors replace, "
            "or another --tokenizer"
        )
    return given


def is_text_file(name_or_path: str) -> bool:
    """Whether `resolve_dataset` prepares a file of that name."""
    return name_or_path not in KNOWN_DATASETS and Path(name_or_path).is_file()


def check_exists(name_or_path: str) -> None:
    """GptcError unless a dataset has that name."""
    path = Path(name_or_path)
    if name_or_path in KNOWN_DATASETS or path.is_file() or (path / DATASET_FILE).is_file():
        return
    raise GptcError(
        f"no dataset {name_or_path!r}: name a folder made by gptc prepare, a text file, or one of "
        f"{', '.join(KNOWN_DATASETS)}"
    )


def resolve_dataset(
    name_or_path: str,
    tokenizer: str = "bytes",
    *,
    stories_bytes: int = STORIES_BYTES,
    seed: int = 0,
    jobs: int = 1,
    progress: ProgressCallback | None = None,
    notify: Callable[[str], None] | None = None,
) -> Dataset:
    """The dataset of that name: a prepared folder, a name in KNOWN_DATASETS, or a file of text.

    The latter two are prepared with `tokenizer` into the user's cache at first use. A prepared
    folder keeps its tokenizer. GptcError when there is nothing of that name.
    """
    path = Path(name_or_path)
    if path.is_dir() and (name_or_path not in KNOWN_DATASETS or (path / DATASET_FILE).exists()):
        return Dataset.open(path)
    defaults = asdict(PrepareOptions(tokenizer, stories_bytes=stories_bytes, seed=seed))
    key: dict[str, Any] = {"version": DATASET_VERSION, "tokenizer": tokenizer, "options": defaults}
    if validates(name_or_path):
        key["split"] = "its own"
    if name_or_path in STORIES:
        key["stories"] = _stories_options(stories_bytes, seed)
    elif name_or_path not in KNOWN_DATASETS:
        check_exists(name_or_path)
        try:
            key["checksum"] = file_checksum(path)
            # The same bytes are another text under a name that is read in another way.
            key["reader"] = [READER_VERSION, *suffixes(path.name)]
        except OSError as e:
            raise GptcError(f"cannot read {path}: {e.strerror}") from None
    kind = tokenizer
    if is_spec(tokenizer):
        kind = tokenizer.split(":")[0]
    else:
        given = make_tokenizer(tokenizer)
        kind, key["tokenizer"] = given.kind, given.fingerprint()
        if isinstance(given, HuggingFaceTokenizer | SentencePieceTokenizer):
            key["ids"] = 2  # 1: with spaces added and lost where the text was cut
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    stem = re.sub(r"[^\w.-]", "_", path.stem)[:_LONGEST_STEM]
    out = cache_folder() / "datasets" / f"{stem}-{kind}-{digest}"
    dataset = _cached(out)
    if dataset is not None:
        dataset.named = name_or_path
        for source in dataset.meta["sources"]:
            for note in source_notes({**source, "source": name_or_path}):
                if notify:
                    notify(note)
        if notify:
            _note(dataset, notify)
        return dataset
    try:
        dataset = prepare(
            [name_or_path],
            out,
            tokenizer=tokenizer,
            force=out.exists(),
            jobs=jobs,
            stories_bytes=stories_bytes,
            seed=seed,
            progress=progress,
            notify=notify,
        )
    except GptcError as error:
        raise _with_command(error, name_or_path) from error.__cause__
    dataset.named = name_or_path
    return dataset


def _cached(out: Path) -> Dataset | None:
    """The dataset at `out`; None where it is not there yet, or damaged: the cache is ours."""
    try:
        return Dataset.open(out)
    except GptcError:
        return None


def _with_command(error: GptcError, source: str) -> GptcError:
    """The error of a text file in `gptc train --data`, with the command that has its options."""
    named = dict.fromkeys(re.findall(r"--[a-z][a-z-]*", str(error)))
    lacking = [name for name in named if name not in _OF_TRAIN]
    if not lacking:
        return error
    options = " and ".join([", ".join(lacking[:-1]), lacking[-1]] if lacking[1:] else lacking)
    verb = "is an option" if len(lacking) == 1 else "are options"
    return type(error)(f"{error}; {options} {verb} of: gptc prepare {quoted(source)} --out DIR")


def _stories_options(n_bytes: int, seed: int) -> dict[str, Any]:
    """The recipe of the text of "stories": its size, its seed, and a checksum of its grammar."""
    digest = hashlib.sha256()
    for path in [Path(stories.__file__), *stories.grammar_files()]:
        digest.update(path.read_bytes())
    return {"bytes": n_bytes, "seed": seed, "grammar_sha256": digest.hexdigest()}


def _dataset_at(out: Path) -> dict[str, Any] | None:
    """The dataset.json at `out`, None where a dataset may be written."""
    if out.exists() and not out.is_dir():
        raise GptcError(f"{out} is a file: choose another --out")
    meta = read_meta(out)
    if meta is None and out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise GptcError(
            f"{out} holds other files: choose another --out, or write among them with --force"
        )
    return meta


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Locks the folder `out` against other processes; makes it when it is missing."""
    while True:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if out.exists() and os.path.samestat(os.fstat(descriptor), out.stat()):
                yield
                return
        finally:
            os.close(descriptor)
