"""The doors through which strangers' files and users' slips come: images, folders, checkpoints, yaml, flags, names.

Whatever stands there, the answer is a result or one line; nothing is executed, nothing hangs, and the file is left
alone. FUZZ=2000 pytest tests/test_fuzz.py looks longer.
"""

import io
import os
import pickle
import random
import re
import runpy
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, fixture, make_photos, png_that_claims, run_inside
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import minvqgan
from minvqgan import VQGAN, TwoStage, VQGANConfig
from minvqgan.conditioning import ClassCondition
from minvqgan.gpt import GPT, GPTConfig
from minvqgan.harness import checkpoint, data, official
from minvqgan.harness.run import MetricsFile
from minvqgan.harness.runtime import UserError
from minvqgan.two_stage import TwoStageConfig

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("FUZZ", 100))
often = settings(
    max_examples=CASES,
    deadline=10_000,  # milliseconds: nothing may hang
    derandomize="FUZZ" not in os.environ,  # the same hundred every time: a red run then means a change
    suppress_health_check=list(HealthCheck),
)
seldom = settings(often, max_examples=max(10, CASES // 10), deadline=60_000)  # where a case is a whole script


def one_line(error: UserError) -> None:
    assert len(str(error).strip().splitlines()) == 1 and str(error).isprintable()


def image_file(mode: str, size: tuple[int, int], file_format: str, rng: np.random.Generator) -> bytes:
    """A good file."""
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2, "YCbCr": 3, "HSV": 3}.get(mode, 1)
    if mode in ("I;16", "I"):
        image = Image.fromarray(rng.integers(0, 65536, size[::-1]).astype(np.uint16 if mode == "I;16" else np.int32))
    elif mode == "F":
        image = Image.fromarray(rng.random(size[::-1]).astype(np.float32))
    elif mode in ("1", "P"):
        image = Image.fromarray(rng.integers(0, 256, size[::-1], np.uint8)).convert(mode)
    else:
        shape = size[::-1] + ((channels,) if channels > 1 else ())
        image = Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode if channels > 1 else None)
    buffer = io.BytesIO()
    try:
        image.save(buffer, file_format)
    except (OSError, ValueError, KeyError):  # this format cannot hold this mode
        image.convert("RGB").save(buffer, file_format)
    return buffer.getvalue()


def spoil(content: bytes, way: str, r: random.Random) -> bytes:
    """A good file made worse."""
    if way == "cut":
        return content[: r.randrange(len(content))]
    if way == "flip":
        spoilt = bytearray(content)
        for _ in range(r.randint(1, 20)):
            spoilt[r.randrange(len(spoilt))] = r.randrange(256)
        return bytes(spoilt)
    if way == "noise":
        return r.randbytes(r.randint(0, 2000))
    if way == "tail":
        return content + r.randbytes(500)
    if way == "head":
        return content[: r.randint(4, 40)] + r.randbytes(400)
    return content


WAYS = st.sampled_from(["good", "cut", "flip", "noise", "tail", "head"])


@often
@given(
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["RGB", "RGBA", "CMYK", "L", "LA", "1", "P", "I;16", "I", "F", "YCbCr", "HSV"]),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    file_format=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]),
    way=WAYS,
    suffix=st.sampled_from([".png", ".jpg", ".webp", ".bmp", ".tif"]),
)
def test_images(tmp_path_factory, seed, mode, size, file_format, way, suffix):
    rng, r = np.random.default_rng(seed), random.Random(seed)
    folder = tmp_path_factory.mktemp("fuzz")
    content = spoil(image_file(mode, size, file_format, rng), way, r)
    (folder / f"odd{suffix}").write_bytes(content)
    for i in range(2):
        (folder / f"good{i}.png").write_bytes(image_file("RGB", (20, 20), "PNG", rng))
    try:
        sets = data.open_data(str(folder), 16)
        for part in sets:
            for batch in data.held_out_batches(part, 4, 4):
                assert batch["image"].shape[1:] == (3, 16, 16)
                assert batch["image"].isfinite().all() and batch["image"].abs().max() <= 1
    except UserError as error:
        one_line(error)
    assert (folder / f"odd{suffix}").read_bytes() == content


@pytest.mark.parametrize("side", [20_000, 60_000, 2**31 - 1])
def test_decompression_bombs_are_skipped(tmp_path, side, capfd):
    rng = np.random.default_rng(0)
    (tmp_path / "bomb.png").write_bytes(png_that_claims(side, side))
    for i in range(3):
        (tmp_path / f"good{i}.png").write_bytes(image_file("RGB", (20, 20), "PNG", rng))
    train_set, val_set = data.open_data(str(tmp_path), 16)
    assert len(train_set) + len(val_set) == 3
    assert "bomb.png" in capfd.readouterr().err


def good_checkpoints() -> dict[str, dict]:
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=4, ch_mult=(1, 2), z_channels=4, code_dim=4, codebook_size=8))
    gpt = GPT(GPTConfig(8, 3, 64, 1, 2, 8))
    two_stage = TwoStage(vqgan, ClassCondition(2), gpt, TwoStageConfig(8, guided=True, classes=("a", "b")))
    one = {"format": checkpoint.FORMAT, "kind": "vqgan", "config": asdict(vqgan.config), "model": vqgan.state_dict()}
    both = {"format": checkpoint.FORMAT, "kind": "two_stage", **checkpoint.pack_two_stage(two_stage)}
    return {"vqgan": one, "two_stage": both}


GOOD = good_checkpoints()
LIGHTNING = ROOT / "tests" / "fixtures" / "lightning_style.ckpt"


def written(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


BYTES = {kind: written(content) for kind, content in GOOD.items()}


def either_a_model_or_one_line(path: Path) -> None:
    before = path.read_bytes()
    for door in (minvqgan.load, checkpoint.read_foreign):
        try:
            door(path)
        except UserError as error:
            one_line(error)
    assert path.read_bytes() == before


@often
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(list(GOOD)), way=WAYS)
@example(seed=9544, kind="two_stage", way="flip")  # a control character in a key's name
def test_bytes_of_checkpoints(tmp_path_factory, seed, kind, way):
    path = tmp_path_factory.mktemp("fuzz") / "odd.pt"
    path.write_bytes(spoil(BYTES[kind], way, random.Random(seed)))
    either_a_model_or_one_line(path)


def places(content: dict, at: tuple = ()) -> list[tuple]:
    """Paths to everything within nested dicts."""
    found = []
    for key, value in content.items():
        found.append((*at, key))
        if isinstance(value, dict):
            found += places(value, (*at, key))
    return found


ODD_VALUES = [
    None, 0, -1, 1, 10**6, 10**30, 1.5, float("nan"), "text", "", [], [1, 2], {}, {"a": 1}, True, (1, 2), (0,) * 2000,
    torch.zeros(0), torch.zeros(3, 3), torch.zeros(2, dtype=torch.int8), torch.full((4,), float("inf")),
    torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(1, dtype=torch.bool),
]  # fmt: skip


def spoilt(content: dict, place: int, value, way: str, other: int = 0) -> dict:
    """The content of a checkpoint with one thing in it replaced, deleted, swapped with another, or a tensor of another
    dtype or shape."""
    everything = places(content)
    *at, key = everything[place % len(everything)]
    holder = content
    for step in at:
        holder = holder[step]
    is_tensor = isinstance(holder[key], torch.Tensor)
    if way == "delete":
        del holder[key]
    elif way == "swap":
        twin = list(holder)[other % len(holder)]
        holder[key], holder[twin] = holder[twin], holder[key]
    elif way == "dtype" and is_tensor:
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.complex64)
        holder[key] = holder[key].to(kinds[(other or place) % 5])
    elif way == "shape" and is_tensor:
        shapes = (holder[key].reshape(-1)[:1], holder[key][None], holder[key].expand(3, *holder[key].shape))
        holder[key] = shapes[place % 3]
    else:
        holder[key] = value
    return content


@often
@given(
    kind=st.sampled_from(list(GOOD)),
    place=st.integers(0, 10**6),
    other=st.integers(0, 10**6),
    value=st.sampled_from(range(len(ODD_VALUES))),
    way=st.sampled_from(["replace", "delete", "swap", "dtype"]),
)
@example(kind="vqgan", place=1, other=0, value=18, way="replace")  # a tensor is printed over many lines
@example(kind="two_stage", place=957, other=0, value=5, way="replace")  # torch answers 10**30 with a trace of its C++
def test_content_of_checkpoints(tmp_path_factory, kind, place, other, value, way):
    """A key missing, exchanged with another, of another type, shape or number: gigantic ones get no memory."""
    content = spoilt(torch.load(io.BytesIO(BYTES[kind]), weights_only=True), place, ODD_VALUES[value], way, other)
    path = tmp_path_factory.mktemp("fuzz") / "odd.pt"
    path.write_bytes(written(content))
    either_a_model_or_one_line(path)


TRAINING = {
    "train_vqgan.py": "--image-size 16 --ch 8 --ch-mult 1 2 --z-channels 8 --code-dim 4 --codebook-size 16 "
    "--batch-size 4 --val-images 4 --disc-channels 8 --disc-start 0 --disc-warmup 0 --steps 2 --out run",
    "train_gpt.py": "--vqgan first/last.pt --n-layer 1 --n-head 2 --n-embd 16 --batch-size 4 --val-images 4 "
    "--cond none --data photos --resize 20 --steps 2 --out run",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder of each training script, of two steps."""
    folders = {script: tmp_path_factory.mktemp("run") for script in TRAINING}
    first, second = folders.values()
    make_photos(second / "photos", n=6, size=(24, 20))
    for script, words in TRAINING.items():
        done = run_inside(script, *words.split(), cwd=folders[script])
        assert done.returncode == 0, done.stderr[-2000:]
        shutil.copytree(first / "run", second / "first", dirs_exist_ok=True)
    return folders


def ends_well(done) -> None:
    """Exit code 0, or 2 and one line that says why."""
    assert "Traceback" not in done.stderr and done.returncode in (0, 2), done.stderr[-3000:]
    if done.returncode == 2:
        line = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(line) == 1 and line[0].isprintable(), done.stderr[-3000:]


@seldom
@given(
    script=st.sampled_from(list(TRAINING)),
    place=st.integers(0, 10**6),
    value=st.sampled_from(range(len(ODD_VALUES))),
    way=st.sampled_from(["replace", "delete", "dtype", "shape", "shape"]),
)
@example(script="train_vqgan.py", place=0, value=0, way="replace")
def test_resuming_from_an_edited_checkpoint(runs, tmp_path_factory, script, place, value, way):
    """Optimizer states, steps, flags and random states included: the fused Adam writes through bare pointers."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(runs[script], folder, dirs_exist_ok=True)
    content = torch.load(folder / "run" / "last.pt", weights_only=True)
    # What only a run has, more often than the hundreds of weights.
    part = [name for name in content if name not in ("model", "gpt", "discriminator", "vqgan", "format")]
    content |= spoilt({name: content[name] for name in part}, place, ODD_VALUES[value], way)
    torch.save(content, folder / "run" / "last.pt")
    before = everything_in(folder.parent, but=folder)
    ends_well(run_inside(script, "--resume", "--steps", "3", "--out", "run", cwd=folder))
    assert everything_in(folder.parent, but=folder) == before


def everything_in(folder: Path, but: Path) -> set[Path]:
    return {path for path in folder.iterdir() if path != but}


YAML = yaml.safe_dump(
    {"model": {"target": "taming.models.vqgan.VQModel", "params": fixture("net2net_none")["first_stage"]}}
)
ODD_YAML = [
    "", "[" * 5000, "&a [*a]", "9" * 6000, "2020-99-99", "!!python/object/apply:os.system [touch made]", "~", "-1",
    "1e999", ".nan", "true", "{a: 1}", "[1, x]", "0x", "!!int ''", "? {a: b} : c", "\x00", "=", "<<: 3", "1:99:99",
    "2001-12-14t21:59:43+99:99", "*a", "1_0", "10000000", "99999999999999999999", "'\x1b[31m'", "a: b: c", "- - -",
]  # fmt: skip


@often
@given(
    seed=st.integers(0, 2**32),
    value=st.sampled_from(ODD_YAML),
    way=st.sampled_from(["value", "key", "line", "cut", "flip", "again"]),
)
def test_configurations(tmp_path_factory, seed, value, way):
    """The yaml of an official model: too deep, too long, of wrong kinds, or no yaml at all."""
    r, lines = random.Random(seed), YAML.splitlines()
    i = r.randrange(len(lines))
    if way == "value":
        lines[i] = lines[i].split(":")[0] + ": " + value
    elif way == "key":
        lines[i] = value + ":" + lines[i].partition(":")[2]
    elif way == "line":
        lines[i] = value
    elif way == "again":
        lines.insert(i, lines[r.randrange(len(lines))])
    content = "\n".join(lines).encode()
    path = tmp_path_factory.mktemp("fuzz") / "odd.yaml"
    path.write_bytes(spoil(content, way, r))
    try:
        assert official.load(LIGHTNING, path)
    except UserError as error:
        one_line(error)
    assert not os.path.exists("made")  # the command in ODD_YAML


def test_a_yaml_of_aliases_fills_no_memory(tmp_path):
    laughs = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    for name, text in (("aliases", "\n".join(laughs)), ("deep", "[" * 99_000), ("long", "a: " + "b" * 200_000)):
        (tmp_path / f"{name}.yaml").write_text(text)
        with pytest.raises(UserError, match=f"{name}.yaml is not the yaml of an official model"):
            official.load(LIGHTNING, tmp_path / f"{name}.yaml")


FLAGS = {
    **TRAINING,
    "train_gpt.py": TRAINING["train_gpt.py"].replace("--steps 2", "--steps 1"),
    "sample.py": "--gpt run/best.pt -n 1 --out out",
    "evaluate.py": "--gpt run/best.pt -n 4 --images 4 --features none --perceptual none --out out",
}
ODD_TEXTS = [
    "", " ", "0", "-1", "1", "2", "3", "0.5", "1e-9", "1e-320", "1e30", "1e300", "1e999", "nan", "-inf", "²", "٣",
    "9" * 5000, "1000000000000", "1099511627776", "18446744073709551616", "none", "meta", "cpu:9", "cuda:99",
    "~nobody/x", "../x", "/dev/null", "/proc/self/mem", "run", "run/best.pt", "run/metrics.csv", "a\x1b[31mb", "a,b",
    "1x1", "8x8", "²x²", "99999x99999", "0x0", "true", "--", "-", "\udcff", "🙂", "labels", "shapes", "vgg16x",
    "." * 300,
]  # fmt: skip


@seldom
@given(script=st.sampled_from(list(FLAGS)), flag=st.integers(0, 10**6), value=st.sampled_from(ODD_TEXTS))
@example(script="sample.py", flag=0, value="--")  # argparse makes an empty list of it
def test_flags(runs, tmp_path_factory, script, flag, value):
    """Every flag with what nobody means. Not --steps and --compile, whose large values are only long."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(runs["train_gpt.py"], folder, dirs_exist_ok=True)
    names = [name for name in NAMES[script] if name not in ("--steps", "--compile", "--help")]
    name = names[flag % len(names)]
    given = FLAGS[script].replace("--out run", "--out new").split()
    ends_well(run_inside(script, *given, f"{name}={value}" if name.startswith("--") else name + value, cwd=folder))
    assert not list(folder.parent.glob("x*"))


def flag_names(script: str) -> list[str]:
    """All flags of a script, from its --help."""
    return re.findall(r"^  (--?[a-z][a-z-]*)", run_inside(script, "--help", cwd=ROOT).stdout, re.MULTILINE)


NAMES = {script: flag_names(script) for script in FLAGS}


ODD_NAMES = [
    "../../x",
    "/etc/x",
    "a/b",
    "a\\b",
    ".",
    "..",
    "",
    "CON",
    "a",
    "A",
    "é" * 60,
    "\x00",
    "x" * 300,
    "a_b",
    "0_a",
]


@often
@given(st.lists(st.one_of(st.text(max_size=60), st.sampled_from(ODD_NAMES)), max_size=12))
def test_class_names_become_names_of_files(classes):
    """Whatever a checkpoint calls its classes: each has a name of its own, in the folder, that any system can write."""
    names = FILE_NAMES(tuple(classes))
    assert len({name.casefold() for name in names}) == len(classes)
    for name in names:
        assert re.fullmatch(r"[\w -]+", name) and len(os.fsencode(f"{name}_0000.png")) < 255


FILE_NAMES = runpy.run_path(str(ROOT / "sample.py"))["file_names"]


@often
@given(seed=st.integers(0, 2**32))
def test_folders(tmp_path_factory, seed):
    """Trees of odd names, links and special files: a dataset or one line; nothing in them changes."""
    r, folder = random.Random(seed), tmp_path_factory.mktemp("fuzz")
    stems = [
        "a",
        "train",
        "val",
        "images",
        "labels",
        "depth",
        "é",
        "x\x1b[1m",
        "\n",
        " ",
        "-",
        "'",
        ".hidden",
        "a" * 200,
    ]
    stems.append(os.fsdecode(b"\xff"))
    folders = [folder]
    for _ in range(r.randint(0, 6)):
        inner = r.choice(folders) / r.choice(stems)
        if not inner.exists() and len(str(inner)) < 1000:
            inner.mkdir()
            folders.append(inner)
    for _ in range(r.randint(0, 12)):
        path = r.choice(folders) / (r.choice(stems) + r.choice([".png", ".jpg", "", ".txt", ".PNG"]))
        if os.path.lexists(path):
            continue
        what = r.choice(["good", "good", "good", "bad", "link", "pipe", "broken link", "empty"])
        if what in ("good", "bad"):
            path.write_bytes(spoil(GOOD_IMAGE, "good" if what == "good" else "cut", r))
        elif what == "pipe":
            os.mkfifo(path)
        elif what == "empty":
            path.touch()
        else:
            path.symlink_to(r.choice(folders) if what == "link" else "nothing")
    sources = r.choice([("image",), ("labels",), ("image", "labels"), ("image", "coords"), ("depth",)])
    before = sorted(folder.rglob("*"))
    try:
        for part in data.open_data(str(folder), 16, sources=sources, num_labels=300):
            for batch in data.held_out_batches(part, 4, 4):
                assert len(batch["class"]) and batch["class"].max() < len(part.classes)
    except UserError as error:
        one_line(error)
    assert sorted(folder.rglob("*")) == before


GOOD_IMAGE = image_file("L", (20, 20), "PNG", np.random.default_rng(0))


@often
@given(seed=st.integers(0, 2**32), way=st.sampled_from(["cut", "flip", "noise", "tail", "head", "good"]))
def test_damaged_metrics(tmp_path_factory, seed, way):
    """What can be read stays, the rest is put aside, and the run goes on."""
    path, columns = tmp_path_factory.mktemp("fuzz") / "metrics.csv", ["step", "seconds", "loss"]
    whole = MetricsFile(path, columns, 0)
    for step in range(1, 9):
        whole.write(step=step, seconds=step / 3, loss=1 / step)
    good, rows = path.read_bytes(), whole.rows()
    path.write_bytes(spoil(good, way, random.Random(seed)))
    again = MetricsFile(path, columns, 6)
    again.write(step=7, seconds=3.0, loss=0.5)
    kept = again.rows()
    assert kept[-1] == {"step": "7", "seconds": "3", "loss": "0.5"} and again.damaged == 0
    if way == "good":
        assert kept[:-1] == rows[:6] and len(list(path.parent.iterdir())) == 1
    if way == "tail":
        assert [row for row in kept[:-1] if row in rows[:6]] == rows[:6]


class Runs:
    """Code in a pickle."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@often
@given(
    kind=st.sampled_from(list(GOOD)),
    place=st.integers(0, 10**6),
    which=st.integers(0, 4),
    protocol=st.sampled_from([2, 3, 4, 5]),
    bare=st.booleans(),
)
def test_code_in_checkpoints(tmp_path_factory, kind, place, which, protocol, bare):
    folder = tmp_path_factory.mktemp("fuzz")
    marker = folder / "executed"
    calls = [(os.mkdir, str(marker)), (os.system, f"touch {marker}"), (eval, f"open({str(marker)!r}, 'w')"),
             (exec, f"open({str(marker)!r}, 'w')"), (Path.touch, marker)]  # fmt: skip
    content = torch.load(io.BytesIO(BYTES[kind]), weights_only=True)
    everything = places(content)
    *at, key = everything[place % len(everything)]
    holder = content
    for step in at:
        holder = holder[step]
    holder[key] = Runs(*calls[which])
    path = folder / "odd.pt"
    if bare:
        path.write_bytes(pickle.dumps(holder[key], protocol))
    else:
        torch.save(content, path, pickle_protocol=protocol)
    with pytest.raises(UserError):
        minvqgan.load(path)
    with pytest.raises(UserError):
        checkpoint.read_foreign(path)
    assert not marker.exists()


def test_the_fixtures_stand(tmp_path):
    """The doors are open for what is good."""
    for kind, content in BYTES.items():
        (tmp_path / f"{kind}.pt").write_bytes(content)
        assert isinstance(minvqgan.load(tmp_path / f"{kind}.pt"), VQGAN if kind == "vqgan" else TwoStage)
    assert checkpoint.read_foreign(ROOT / "tests" / "fixtures" / "lightning_style.ckpt")
