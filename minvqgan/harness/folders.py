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
            path, kind = os.path.join(folder, name), os.path.splitext(name)[1].lower() or "without ending"
            if name.startswith("."):
                continue
            if not os.path.exists(path):
                others[f"{kind} (broken link)"] += 1
            elif not os.path.isfile(path):  # a pipe or a device
                continue
            elif kind in EXTENSIONS:
                found.append(base + name)
            else:
                others[kind] += 1
    if skipped:
        notes.append(f"skipped folders (no permission, or a link back): {_listed(skipped)}")
    if others:
        notes.append("not read: " + _listed((f"{count} {ending}" for ending, count in others.most_common()), 6))
    return sorted(found, key=lambda path: path.split("/"))


def _readable(root: str, paths: list[str], notes: list[str]) -> dict[str, bool]:
    """The files whose header is that of an image, and whether each is square. Broken pixels behind a good header are
    met in training."""
    good, bad, deep = {}, [], []
    for path in paths:
        try:
            with open_image(os.path.join(root, path)) as image:
                if image.mode.startswith("I;16") and len(deep) < 10:
                    deep.append(int(np.asarray(image).max()))
                good[path] = image.width == image.height
        except OSError:  # whose message would repeat the path
            bad.append(path)
        except Exception as error:  # Pillow raises a dozen kinds for broken files, struct.error among them
            bad.append(f"{path}: {error}")
    if bad:
        notes.append(f"skipped as unreadable: {len(bad)} ({_listed(bad)})")
    if deep and 255 < max(deep) < 4096:
        notes.append(f"16-bit images hold nothing above {max(deep)}: if they have 12 bits, multiply them by 16")
    return good


def _class_of(path: str) -> str:
    return path.partition("/")[0] if "/" in path else ""


def _rows(root: str, base: str, paths: list[str], sources: tuple[str, ...], notes: list[str]) -> list[Row]:
    """The images of the folder `base` in root ("" or ending in "/"); paths: relative to it."""
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
    return [
        Row(os.path.splitext(path)[0], _class_of(path) if has_classes else "", (base + path,), square)
        for path, square in _readable(where, paths, notes).items()
    ]


def _pairs(where: str, base: str, paths: list[str], sources: tuple[str, ...], notes: list[str]) -> list[Row]:
    files = []  # for each source: {stem: (path, square)}
    for source in sources:
        folder = PAIRED[source] + "/"
        good = _readable(where, [path for path in paths if path.startswith(folder)], notes)
        files.append({os.path.splitext(path.removeprefix(folder))[0]: (path, good[path]) for path in good})
    for lonely in sorted(set.union(*map(set, files)) - set.intersection(*map(set, files))):
        path = next(f[lonely][0] for f in files if lonely in f)
        raise UserError(f"{where}{path} has no partner of the same name in {' and '.join(PAIRED[s] for s in sources)}")
    found = [(stem, *zip(*(f[stem] for f in files), strict=True)) for stem in sorted(files[0])]
    return [Row(stem, "", tuple(base + path for path in names), all(square)) for stem, names, square in found]


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
    paths, found = _find(root, notes), []
    for base in _parts(paths, notes):
        inside = [path.removeprefix(base) for path in paths if path.startswith(base)]
        found.append(_rows(root, base, inside, sources, notes))
        if not found[-1]:
            looked_for = f"looked for {', '.join(sorted(EXTENSIONS))}"
            raise UserError("; ".join([f"no readable image in {os.path.join(root, base)} ({looked_for})", *notes]))
    rows, known = found[0], {row.name for row in found[0]}
    if len(found) == 2:
        train, val, how = rows, [row for row in found[1] if row.name in known], f"from {base}"
        strange = sorted({row.name for row in found[1]} - known)
        if strange:
            notes.append(f"ignored: held-out images of classes without training images: {_listed(strange)}")
    elif len(rows) < 2:
        raise UserError(f"{root} holds one image; at least two are needed, one of them held out")
    else:
        chosen, how = held_out(rows), "chosen by their names"
        train, val = ([row for i, row in enumerate(rows) if (i in chosen) == want] for want in (False, True))
    classes = tuple(sorted(known, key=int if all(name.isdecimal() for name in known) else None))
    if os.environ.get("RANK", "0") == "0":
        counts = Counter(row.name for row in train + val)
        listed = _listed([f"{name} {counts[name]}" for name in classes], 10)
        kinds = f"{len(classes)} classes ({listed})" if known != {""} else "no classes"
        say("; ".join([f"{root}: {len(train)} training images, {kinds}; {len(val)} held out, {how}", *notes]))
    return train, val, classes, all(row.square for row in train + val)
