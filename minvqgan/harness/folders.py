"""What a folder of images holds: which files, of which classes, which of them held out. One line says what was found.

    photos/**.jpg             images without classes
    photos/{cat,dog}/**.jpg   the subfolders are the classes
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

import numpy as np

from .imagefiles import EXTENSIONS, open_image
from .runtime import UserError, say

TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "test")
PAIRED = {"image": "images", "labels": "labels", "depth": "depth"}  # the folder of each source
HELD_OUT = 0.05


class Row(NamedTuple):
    """One image: its name without the ending (a pair's files share it), its class, and its files by source."""

    stem: str
    name: str
    paths: tuple[str, ...]


def _listed(names, most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _images(count: int) -> str:
    return f"{count} image" + "s" * (count != 1)


def _find(root: str, notes: list[str]) -> list[str]:
    """The files in root with an image's ending: paths relative to it, sorted. Links are followed, unless they lead back
    into root or to a folder around it, which would be a walk through the whole machine."""
    found, skipped, others, seen = [], [], Counter(), set()
    top = Path(root).resolve()
    for folder, inside, names in os.walk(root, followlinks=True, onerror=lambda error: skipped.append(error.filename)):
        real = Path(folder).resolve()
        returns = folder != root and os.path.islink(folder) and (real.is_relative_to(top) or top.is_relative_to(real))
        if returns or real in seen:
            skipped.append(folder)
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not name.startswith("."))  # which of two links comes first
        base = "" if folder == root else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if name.startswith(".") or not os.path.isfile(os.path.join(folder, name)):  # no pipe, no device
                continue
            if ending in EXTENSIONS:
                found.append(base + name)
            else:
                others[ending or "without ending"] += 1
    if skipped:
        notes.append(f"skipped folders (no permission, or a link back): {_listed(skipped)}")
    if others:
        notes.append("not read: " + _listed((f"{count} {ending}" for ending, count in others.most_common()), 6))
    return sorted(found, key=lambda path: path.split("/"))


def _readable(root: str, paths: list[str], notes: list[str]) -> tuple[list[str], bool]:
    """(the files whose header is that of an image, are all of them square?) Broken pixels behind a good header are met
    in training."""
    good, bad, deep, square = [], [], [], True
    for path in paths:
        try:
            with open_image(os.path.join(root, path)) as image:
                square = square and image.width == image.height
                if image.mode.startswith("I;16") and len(deep) < 10:
                    deep.append(int(np.asarray(image).max()))
            good.append(path)
        except Exception:  # Pillow raises a dozen kinds for broken files, struct.error among them
            bad.append(path)
    if bad:
        notes.append(f"skipped as unreadable: {len(bad)} ({_listed(bad)})")
    if deep and 255 < max(deep) < 4096:
        notes.append(f"16-bit images hold nothing above {max(deep)}: if they have 12 bits, multiply them by 16")
    return good, square


def _class_of(path: str) -> str:
    return path.partition("/")[0] if "/" in path else ""


def _rows(root: str, base: str, paths: list[str], sources: tuple[str, ...], notes: list[str]) -> tuple[list[Row], bool]:
    """(images, are all square?) of the folder `base` in root ("" or ending in "/"); paths: relative to it."""
    where, subfolders = os.path.join(root, base), Counter(map(_class_of, paths))
    if "images" in subfolders and subfolders.keys() & {"labels", "depth"}:
        return _pairs(where, base, paths, sources, notes)
    if len(sources) > 1:
        folders = " beside ".join(where + PAIRED[source] for source in sources)
        raise UserError(f"{where}: {' and '.join(sources)} together need {folders}")
    loose = subfolders.pop("", 0)
    has_classes = 2 * loose < len(paths)
    if loose and has_classes:
        paths = [path for path in paths if "/" in path]
        notes.append(f"ignored: {_images(loose)} beside the subfolders")
    elif subfolders and not has_classes:
        notes.append("no classes, because most images lie outside the subfolders")
    if has_classes and len(subfolders) == 1:
        deeper = sorted({path.split("/")[1] for path in paths if path.count("/") > 1})
        hint = f"; --data {where}{_class_of(paths[0])} has the classes {_listed(deeper)}" if len(deeper) > 1 else ""
        notes.append("one subfolder, hence one class" + hint)
    good, square = _readable(where, paths, notes)
    name = _class_of if has_classes else lambda path: ""
    return [Row(os.path.splitext(path)[0], name(path), (base + path,)) for path in good], square


def _pairs(where: str, base: str, paths: list[str], sources, notes: list[str]) -> tuple[list[Row], bool]:
    files, all_square = {}, True
    for source in sources:
        folder = PAIRED[source] + "/"
        good, square = _readable(where, [path for path in paths if path.startswith(folder)], notes)
        files[source] = {os.path.splitext(path.removeprefix(folder))[0]: path for path in good}
        all_square = all_square and square
    first = files[sources[0]]
    for source in sources[1:]:
        for stem in sorted(first.keys() ^ files[source].keys()):
            lonely, folders = first.get(stem) or files[source][stem], " and ".join(PAIRED[s] for s in sources)
            raise UserError(f"{where}{lonely} has no partner of the same name in {folders}")
    return [Row(stem, "", tuple(base + files[s][stem] for s in sources)) for stem in sorted(first)], all_square


def _parts(paths: list[str], notes: list[str]) -> list[str]:
    """The folders to read: [training, held-out], [training], or [""] where there is no split."""
    subfolders = Counter(map(_class_of, paths))
    loose = subfolders.pop("", 0)
    named = {name.lower(): name for name in subfolders}
    train, val = ([named[name] for name in names if name in named] for names in (TRAIN, VAL))
    others = sorted(named.keys() - {*TRAIN, *VAL})
    if not train or others:
        if train + val and others:
            notes.append(f"{_listed(train + val)}: not a split, because there are images in {_listed(others)} too")
        return [""]
    parts = train[:1] + val[:1]
    ignored = {f"in {name}/": count for name, count in subfolders.items() if name not in parts}
    ignored |= {f"beside {parts[0]}/": loose} if loose else {}
    notes += [f"ignored: {_images(count)} {where}" for where, count in ignored.items()]
    return [name + "/" for name in parts]


def is_held_out(rows: list[Row]) -> np.ndarray:
    """(N,) bools: 5 % of the images, by a hash of their names alone. So they are the same for every seed and script,
    and no image moves when others come or go. One is held out at least, and a class keeps one for training."""
    hashes = [hashlib.sha256(os.fsencode(row.stem)).digest()[:4] for row in rows]
    numbers = np.array([int.from_bytes(digits, "big") for digits in hashes]) / 2**32
    order = np.argsort(-numbers, kind="stable")
    last = order[np.unique([rows[i].name for i in order], return_index=True)[1]]  # of each class
    free = ~np.isin(np.arange(len(rows)), last)
    chosen = free & (numbers < HELD_OUT)
    if not chosen.any():
        chosen[np.where(free, numbers, 2).argmin()] = True
    return chosen


def open_folder(root: str, sources: tuple[str, ...]) -> tuple[list[Row], list[Row], tuple[str, ...], bool]:
    """(training images, held-out images, class names, are all images square?) of a folder. The first process says what
    was found. Raises UserError."""
    notes: list[str] = []
    paths, found = _find(root, notes), []
    for base in _parts(paths, notes):
        inside = [path.removeprefix(base) for path in paths if path.startswith(base)]
        found.append(_rows(root, base, inside, sources, notes))
        if not found[-1][0]:
            looked_for = f"looked for {', '.join(sorted(EXTENSIONS))}"
            raise UserError("; ".join([f"no readable image in {os.path.join(root, base)} ({looked_for})", *notes]))
    rows, known = found[0][0], {row.name for row in found[0][0]}
    if len(found) == 2:
        train, val, how = rows, [row for row in found[1][0] if row.name in known], f"from {base}"
        strange = sorted({row.name for row in found[1][0]} - known)
        if strange:
            notes.append(f"ignored: held-out images of classes without training images: {_listed(strange)}")
    elif len(rows) < 2:
        raise UserError(f"{root} holds one image; at least two are needed, one of them held out")
    else:
        chosen, how = is_held_out(rows), "chosen by their names"
        train, val = ([row for row, out in zip(rows, chosen, strict=True) if out == want] for want in (False, True))
    classes = tuple(sorted(known, key=int if all(name.isdecimal() for name in known) else None))
    if os.environ.get("RANK", "0") == "0":
        counts = Counter(row.name for row in train + val)
        listed = _listed([f"{name} {counts[name]}" for name in classes], 10)
        kinds = f"{len(classes)} classes ({listed})" if known != {""} else "no classes"
        say("; ".join([f"{root}: {len(train)} training images, {kinds}; {len(val)} held out, {how}", *notes]))
    return train, val, classes, all(square for _, square in found)
