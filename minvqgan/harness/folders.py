"""What a folder of images holds: which files, of which classes, which of them held out. One line says what was found.

    photos/**.jpg             images without classes
    photos/{cat,dog}/**.jpg   the subfolders are the classes, if most images lie in them
    photos/{train,val}/...    the split: `train` or `training`, and `val`, `valid`, `validation` or `test`, but only
                              where no other folder beside them holds images
    street/{images,labels}/   pairs: images/ beside labels/ or depth/, equal names in both

Without a split, 5 % of the images are held out, chosen by a hash of their names.
"""

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from .imagefiles import EXTENSIONS, open_image
from .runtime import UserError, say

TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "test")
PAIRED = {"image": "images", "labels": "labels", "depth": "depth"}  # the folder of each source
HELD_OUT = 0.05


class Row(NamedTuple):
    """One image: its name without the ending (a pair's files share it), its class, its files in the order of the
    sources, and whether all of them are square."""

    stem: str
    name: str
    paths: tuple[str, ...]
    square: bool


def _listed(names, most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _find(root: str, notes: list[str]) -> list[str]:
    """The files in root with an image's ending: paths relative to it, sorted. Links are followed, but to no folder
    twice, to none in root, and to none that root lies in, which would be a walk through the whole machine."""
    found, others, seen, top = [], Counter(), set(), Path(root).resolve()
    closed = "folder that cannot be opened"
    for folder, inside, names in os.walk(root, followlinks=True, onerror=lambda error: others.update([closed])):
        inside[:] = sorted(name for name in inside if not name.startswith("."))  # which of two links comes first
        real = Path(folder).resolve()
        returns = folder != root and os.path.islink(folder) and (real.is_relative_to(top) or top.is_relative_to(real))
        if returns or real in seen:
            inside.clear()
            continue
        seen.add(real)
        base = "" if folder == root else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        for name in (name for name in names if not name.startswith(".")):
            ending = os.path.splitext(name)[1].lower()
            if ending not in EXTENSIONS:
                others[ending or "without ending"] += 1
            elif os.path.isfile(os.path.join(folder, name)):
                found.append(base + name)
            else:
                others[f"{ending} (broken link)"] += 1
    if others:
        notes.append("not read: " + _listed((f"{count} {ending}" for ending, count in others.most_common()), 6))
    return sorted(found)


def _readable(root: str, paths: list[str], notes: list[str]) -> dict[str, bool]:
    """The files whose header is that of an image, and whether each is square. Broken pixels behind a good header are
    met in training."""
    good, bad = {}, []
    for path in paths:
        try:
            with open_image(os.path.join(root, path)) as image:
                good[path] = image.width == image.height
        except Exception as error:  # Pillow raises a dozen kinds for broken files; OSError's message repeats the path
            bad.append(path if isinstance(error, OSError) else f"{path}: {error}")
    if bad:
        notes.append(f"skipped as unreadable: {len(bad)} ({_listed(bad)})")
    return good


def _top(path: str) -> str:
    return path.partition("/")[0] if "/" in path else ""


def _rows(root: str, base: str, paths: list[str], sources: tuple[str, ...], notes: list[str]) -> list[Row]:
    """The images of the folder `base` in root ("" or ending in "/"). paths: relative to root."""
    where = os.path.join(root, base)
    good = _readable(where, [path.removeprefix(base) for path in paths if path.startswith(base)], notes)
    count = Counter(map(_top, good))
    if "images" in count and count.keys() & {"labels", "depth"}:
        files = []  # for each source: {stem: path}
        for source in sources:
            inside = [path for path in good if _top(path) == PAIRED[source]]
            files.append({os.path.splitext(path.partition("/")[2])[0]: path for path in inside})
        for lonely in sorted(set().union(*files).difference(set.intersection(*map(set, files)))):
            path = next(f[lonely] for f in files if lonely in f)
            folders = " and ".join(PAIRED[source] for source in sources)
            raise UserError(f"{where}{path} has no partner of the same name in {folders}")
        pairs = {stem: [f[stem] for f in files] for stem in files[0]}
        return [Row(s, "", tuple(base + p for p in pair), all(good[p] for p in pair)) for s, pair in pairs.items()]
    if len(sources) > 1:
        folders = " beside ".join(where + PAIRED[source] for source in sources)
        raise UserError(f"{where}: {' and '.join(sources)} together need {folders}")
    loose = count.pop("", 0)
    has_classes = 2 * loose < len(good)
    if loose and count:
        ignored = f"ignored: {loose} beside the subfolders"
        notes.append(ignored if has_classes else "no classes, because most images lie outside the subfolders")
    if has_classes and len(count) == 1:
        notes.append("one subfolder, hence one class")
    return [
        Row(os.path.splitext(path)[0], _top(path) if has_classes else "", (base + path,), square)
        for path, square in good.items()
        if "/" in path or not has_classes
    ]


def _parts(paths: list[str], notes: list[str]) -> list[str]:
    """The folders to read: [training, held-out], [training], or [""] where there is no split."""
    tops = {top.lower(): top for top in map(_top, paths) if top}
    train, val = ([tops[name] for name in names if name in tops] for names in (TRAIN, VAL))
    others = sorted(tops.keys() - {*TRAIN, *VAL})
    if not train or others:
        if train + val and others:
            notes.append(f"{_listed(train + val)}: not a split, because there are images in {_listed(others)} too")
        return [""]
    parts = [name + "/" for name in train[:1] + val[:1]]
    if ignored := sum(not path.startswith(tuple(parts)) for path in paths):
        notes.append(f"ignored: {ignored} outside {' and '.join(parts)}")
    return parts


def held_out(rows: list[Row]) -> set[int]:
    """Numbers of 5 % of the images, by a hash of their names alone. So they are the same for every seed and script, and
    no image moves when others come or go. One is held out at least, and a class keeps one for training."""
    digests = [hashlib.sha256(os.fsencode(row.stem)).digest()[:4] for row in rows]
    place = [int.from_bytes(digest, "big") / 2**32 for digest in digests]  # in [0, 1)
    order = sorted(range(len(rows)), key=place.__getitem__, reverse=True)
    kept = {rows[i].name: i for i in reversed(order)}  # the last image of each class
    free = [i for i in range(len(rows)) if kept[rows[i].name] != i] or [0]
    return {i for i in free if place[i] < HELD_OUT} or {min(free, key=place.__getitem__)}


def open_folder(root: str, sources: tuple[str, ...]) -> tuple[list[Row], list[Row], tuple[str, ...], bool]:
    """(training images, held-out images, class names, are all images square?) of a folder. The first process says what
    was found. Raises UserError."""
    notes: list[str] = []
    paths = _find(root, notes)
    parts = _parts(paths, notes)
    train, *val = (_rows(root, base, paths, sources, notes) for base in parts)
    if not train:
        looked_for = f"looked for {', '.join(sorted(EXTENSIONS))}"
        raise UserError("; ".join([f"no readable image in {os.path.join(root, parts[0])} ({looked_for})", *notes]))
    known = {row.name for row in train}
    if val and val[0] and {row.name for row in val[0]} <= known:
        val, how = val[0], f"from {parts[1]}"
    elif len(train) < 2:
        raise UserError(f"{root} holds one image; at least two are needed, one of them held out")
    else:
        if val:
            notes.append(f"ignored: {parts[1]}, which has other classes than {parts[0]}")
        chosen, rows, how = held_out(train), train, "chosen by their names"
        train, val = ([row for i, row in enumerate(rows) if (i in chosen) == want] for want in (False, True))
    classes = tuple(sorted(known, key=int if all(name.isdecimal() for name in known) else None))
    if os.environ.get("RANK", "0") == "0":
        counts = Counter(row.name for row in train + val)
        listed = _listed([f"{name} {counts[name]}" for name in classes], 10)
        kinds = f"{len(classes)} classes ({listed})" if known != {""} else "no classes"
        say("; ".join([f"{root}: {len(train)} training images, {kinds}; {len(val)} held out, {how}", *notes]))
    return train, val, classes, all(row.square for row in train + val)
