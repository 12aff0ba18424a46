"""Pruning a large checkpoint file by file: CPU time beside that of `cp`, memory, and inspection.

    python benchmarks/stream.py [--gigabytes 8] [--rounds 3] [--folder DIR] [--json FILE]

Makes a synthetic checkpoint of a llama in bf16 and eight shards, copies it with `cp -r`, prunes it
globally at 90 % and in 2:4, and inspects its headers. Each is a process of its own; CPU time is
user and system together, memory the greatest resident set. The folder needs twice the size.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARDS = 8
HIDDEN, INNER, KEY_VALUE, WORDS = 2048, 5824, 512, 32000
POOL = 1 << 24


def layer_shapes(index):
    """Name → shape of one layer."""
    head = f"model.layers.{index}"
    return {
        f"{head}.input_layernorm.weight": (HIDDEN,),
        f"{head}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{head}.self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
        f"{head}.self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
        f"{head}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{head}.post_attention_layernorm.weight": (HIDDEN,),
        f"{head}.mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{head}.mlp.up_proj.weight": (INNER, HIDDEN),
        f"{head}.mlp.down_proj.weight": (HIDDEN, INNER),
    }


def size(shape):
    """Elements."""
    count = 1
    for one in shape:
        count *= one
    return count


def all_shapes(gigabytes):
    """Number of layers, and name → shape of all tensors."""
    layer = sum(map(size, layer_shapes(0).values()))
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * WORDS * HIDDEN) / layer))
    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for index in range(layers):
        shapes |= layer_shapes(index)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}
    return layers, shapes


def make(folder, gigabytes):
    """Write the checkpoint; normal weights, whose values repeat every 16 million."""
    import numpy as np

    layers, shapes = all_shapes(gigabytes)
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    floats = generator.standard_normal(POOL, dtype=np.float32) * np.float32(0.02)
    pool = (floats.view(np.uint32) >> 16).astype(np.uint16)
    names = list(shapes)
    per_shard = -(-len(names) // SHARDS)
    weight_map, total = {}, 0
    for shard in range(SHARDS):
        inside = names[shard * per_shard : (shard + 1) * per_shard]
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        header, place = {"__metadata__": {"format": "pt"}}, 0
        for name in sorted(inside):
            end = place + 2 * size(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [place, end]}
            place = end
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            for name in sorted(inside):
                weight_map[name] = file
                left = size(shapes[name])
                while left:
                    begin = int(generator.integers(POOL // 2))
                    part = pool[begin : begin + left]
                    out.write(part.tobytes())
                    left -= len(part)
        total += place
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": WORDS, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def measured(command):
    """CPU seconds, wall seconds, MiB of memory and output of a process."""
    with tempfile.TemporaryFile("w+") as out:
        began = time.monotonic()
        process = subprocess.Popen(list(map(str, command)), stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, command
        out.seek(0)
        text = out.read()
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "user_seconds": round(usage.ru_utime, 3),
        "wall_seconds": round(wall, 3),
        "peak_mib": round(usage.ru_maxrss / 1024, 1),
    }, text


def one_round(source, work):
    """Every row of the table, once."""
    ham = [sys.executable, "-m", "hamcli"]
    rows = {}
    rows["cp"], _ = measured(["cp", "-r", source, work / "copy"])
    shutil.rmtree(work / "copy")
    for name, words in (
        ("prune 0.9", ["--target", "0.9"]),
        ("prune 2:4", ["--pattern", "2:4"]),
    ):
        out = work / "pruned"
        rows[name], text = measured([*ham, "prune", source, *words, "--out", out, "--json", "-q"])
        found = json.loads(text)["sparsity"]
        assert found["zeros"] == round(found["target"] * found["total"])
        shutil.rmtree(out)
    rows["inspect"], text = measured([*ham, "inspect", source, "--json"])
    rows["inspect"]["tensors"] = len(json.loads(text)["tensors"])
    return rows


def summary(rounds):
    """Of each row the median of every number, and the ratio to `cp` of the same round."""
    rows = {}
    for name in rounds[0]:
        rows[name] = {
            key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]
        }
        if name.startswith("prune"):
            ratios = [one[name]["cpu_seconds"] / one["cp"]["cpu_seconds"] for one in rounds]
            rows[name]["cpu_over_cp"] = round(statistics.median(ratios), 2)
            rows[name]["cpu_over_cp_spread"] = [round(min(ratios), 2), round(max(ratios), 2)]
            least = [min(one[of]["cpu_seconds"] for one in rounds) for of in (name, "cp")]
            rows[name]["least_over_least"] = round(least[0] / least[1], 2)
    return rows


def main():
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=1, help="of all, in turn")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="file of the record")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.make:
        make(words.make, words.gigabytes)
        return
    with tempfile.TemporaryDirectory(dir=words.folder) as folder:
        work = Path(folder)
        source = work / "model"
        # in a process of its own: a child's memory is counted from its parent's
        making = [sys.executable, __file__, "--make", source, "--gigabytes", words.gigabytes]
        subprocess.run(list(map(str, making)), check=True)
        num_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        subprocess.run([sys.executable, "-m", "hamcli", "--version"], check=True)
        load = os.getloadavg()[0]
        rounds = [one_round(source, work) for _ in range(words.rounds)]
    rows = summary(rounds)
    print(f"{num_bytes / 1e9:.2f} GB, {SHARDS} shards, bf16, {rows['inspect']['tensors']} tensors")
    for name, row in rows.items():
        ratio = ""
        if "cpu_over_cp" in row:
            ratio = f"{row['cpu_over_cp']:.2f} x cp, {row['least_over_least']:.2f} of least times"
        print(
            f"{name:10} {row['cpu_seconds']:8.2f} s CPU {row['wall_seconds']:8.2f} s wall "
            f"{row['peak_mib']:7.1f} MiB  {ratio}"
        )
    if words.json:
        record = {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "load": round(load, 1),
            "rounds": words.rounds,
            "bytes": num_bytes,
            "shards": SHARDS,
            "dtype": "BF16",
            "rows": rows,
        }
        words.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
