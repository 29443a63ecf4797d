"""What tests/gpu.sh runs on a machine with a GPU: builds, verifies, refuses, times; writes one JSON record per check.

usage: checks.py PHASE WORK    PHASE: small | schemes | sanitize | real | shapes | calibrate | memory;  needs TRTVLM (the program) and
TRTVLM_TENSORRT
Nothing here decides what is right: `trtvlm verify` does, against the reference that the CPU tests hold to the goldens.
"""
import concurrent.futures, json, os, pathlib, re, shutil, signal, struct, subprocess, sys, time, zlib
from ranks import memory_checks, rank_checks
from calibration import calibrate_checks
from schemes import scheme_checks

PROGRAM = os.environ["TRTVLM"]
ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "fixtures/llava-hf"
BLIP2 = ROOT / "fixtures/blip2-opt"
BLIP2_T5 = ROOT / "fixtures/blip2-t5"


def run(*arguments, timeout=400, env=None):
    return subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "NO_COLOR": "1", **(env or {})})


def last_lines(text, count=6):
    return "\n".join(text.strip().splitlines()[-count:])


class Failed(Exception):
    pass


def need(condition, message):
    if not condition:
        raise Failed(message)


def build(model, directory, *flags, target="tensorrt,reference", timeout=400):
    done = run("build", model, "-o", directory, "--target", target, "--json", *flags, timeout=timeout)
    need(done.returncode == 0, f"build: exit {done.returncode}\n{last_lines(done.stderr, 12)}")
    return json.loads(done.stdout)


def verify(directory, *flags, timeout=400):
    done = run("verify", directory, "--json", *flags, timeout=timeout)
    need(done.stdout.strip(), f"verify: exit {done.returncode}\n{last_lines(done.stderr, 12)}")
    found = json.loads(done.stdout)
    need("comparisons" in found, f"verify: {json.dumps(found)}")
    return found


def compared(model, directory, *build_flags, verify_flags=(), all_equal=False):
    """Builds and compares; gives the worst error of each stage."""
    built = build(model, directory, *build_flags)
    found = verify(directory, *verify_flags)
    stages, worst, rounding, bound = {}, 0, 0, 0
    for one in found["comparisons"]:
        name = one["stage"] + (" layers" if one["result"].startswith("mark/") else "")
        stages[name] = max(stages.get(name, 0), one["relative_error"] or float("nan"))
        need(one["worst_call"] is not None, f"a result is not finite: {json.dumps(one)}")
        worst, rounding, bound = max(worst, one["worst_call"]), max(rounding, one["rounding_error"]), max(bound, one["bound"])
    record = {"errors": stages, "worst_call": worst, "rounding": rounding, "bound": bound, "equal": found["equal_choices"], "choices": found["choices"],
              "build_seconds": {engine["network"]: round(engine["seconds"], 1) for engine in built["engines"]}}
    need(found["passed"], f"beyond the bound: {json.dumps(record)}")
    need(not all_equal or found["equal_choices"] == found["choices"], f"other tokens: {json.dumps(record)}")
    return record


def shape(work, name, **config):
    """A LLaMA of its own shape with random weights."""
    folder = work / "shapes" / name
    folder.mkdir(parents=True, exist_ok=True)
    base = dict(architectures=["LlamaForCausalLM"], model_type="llama", num_hidden_layers=2, vocab_size=1003,
                max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu",
                tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    (folder / "config.json").write_text(json.dumps({**base, **config}))
    done = run("synth", folder / "config.json", "-o", folder / "checkpoint", "--dtype", "float32")
    need(done.returncode == 0, f"synth: {last_lines(done.stderr)}")
    return folder / "checkpoint"


def t5_alone(work):
    """T5 by itself, with random weights; heads as wide as flan-t5's, so that the kernel on tensor cores takes part."""
    folder = work / "shapes" / "t5"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(
        architectures=["T5ForConditionalGeneration"], model_type="t5", d_model=128, d_ff=256, d_kv=64, num_heads=4,
        num_layers=2, num_decoder_layers=3, vocab_size=1003, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)))
    done = run("synth", folder / "config.json", "-o", folder / "checkpoint", "--dtype", "float32")
    need(done.returncode == 0, f"synth: {last_lines(done.stderr)}")
    return folder / "checkpoint"


def small_checks(work):
    smol = os.environ.get("TRTVLM_SMOLLM2")
    trained = os.environ.get("TRTVLM_TRAINED_LLAVA")
    batch = ("--max-batch-size", "2")
    # Tiny engines need no search for the fastest kernels.
    quick = ("--optimization-level", "1")
    checks = {}

    def fixture(dtype, *flags, layers=False):
        directory = work / "-".join(["fixture", dtype, *flags[1::2]])
        mark = ("--mark", "**.mlp.down_proj", "**.mlp.fc2", "**.o_proj") if layers else ()
        return lambda: compared(FIXTURE, directory, "--dtype", dtype, *batch, *quick, *flags, *mark, all_equal=dtype == "float32",
                                verify_flags=("--layers",) if layers else ())

    for dtype in ("float32", "float16", "bfloat16"):
        checks[f"llava-hf {dtype}, layer by layer"] = fixture(dtype, layers=True)
    checks["llava-hf float32 int8, vision too"] = fixture("float32", "--quant", "int8", "--vision-quant", "int8")
    for quant in ("int8", "int4-g16"):
        checks[f"llava-hf float16 {quant}, vision too"] = fixture("float16", "--quant", quant, "--vision-quant", quant)
    # Cross-attention, learned positions, heads of 6, 8 and 12.
    for dtype, quant, vision in (("float32", "none", "none"), ("float16", "none", "none"), ("bfloat16", "none", "none"),
                                 ("float32", "int8", "int8"), ("float16", "int4-g16", "int4")):
        directory = work / f"blip2-{dtype}-{quant}"
        flags = ("--dtype", dtype, "--quant", quant, "--vision-quant", vision, *batch, *quick)
        mark = ("--mark", "**.fc2", "**.dense") if quant == "none" else ()
        checks[f"blip2-opt {dtype} {quant}, vision too"] = lambda directory=directory, flags=flags, mark=mark, dtype=dtype: compared(
            BLIP2, directory, *flags, *mark, all_equal=dtype == "float32", verify_flags=("--layers",) if mark else ())
    # An encoder, a bias by distance, keys and values handed on; the second prompt is a token shorter.
    for dtype, quant in (("float32", "none"), ("float16", "none"), ("bfloat16", "none"), ("float32", "int8"), ("float16", "int4-g16")):
        directory = work / f"blip2-t5-{dtype}-{quant}"
        flags = ("--dtype", dtype, "--quant", quant, *batch, *quick)
        checks[f"blip2-t5 {dtype} {quant}"] = lambda directory=directory, flags=flags, dtype=dtype: compared(
            BLIP2_T5, directory, *flags, all_equal=dtype == "float32")
    checks["blip2-t5 float32, layer by layer"] = lambda: compared(
        BLIP2_T5, work / "blip2-t5-marked", "--dtype", "float32", *batch, *quick, "--mark", "**.wo", verify_flags=("--layers",))
    # More steps than the bias has buckets and than one block of cache rows.
    for dtype in ("float32", "float16", "bfloat16"):
        def alone(dtype=dtype):
            sizes = ("--max-batch-size", "3", "--max-input-len", "200", "--max-output-len", "150", *quick)
            return compared(t5_alone(work / dtype), work / f"t5-{dtype}", "--dtype", dtype, *sizes,
                            verify_flags=("--input-len", "197", "--steps", "140"), all_equal=dtype == "float32")
        checks[f"T5 alone {dtype}, 3 prompts of 197, 196 and 195 tokens, 140 steps"] = alone
    # Windows of a page, learned positions behind an encoder; a text encoder with the same decoder.
    for dtype, quant in (("float32", "none"), ("float16", "none"), ("bfloat16", "none"), ("float32", "int8"), ("float16", "int4-g16")):
        directory = work / f"nougat-{dtype}-{quant}"
        flags = ("--dtype", dtype, "--quant", quant, "--vision-quant", quant.split("-")[0], *batch, *quick)
        mark = ("--mark", "**.output.dense", "**.fc2") if quant == "none" else ()
        checks[f"nougat {dtype} {quant}, vision too"] = lambda directory=directory, flags=flags, mark=mark, dtype=dtype: compared(
            ROOT / "fixtures/nougat", directory, *flags, *mark, all_equal=dtype == "float32", verify_flags=("--layers",) if mark else ())
    for dtype in ("float32", "float16"):
        directory = work / f"mbart-{dtype}"
        checks[f"mbart {dtype}"] = lambda directory=directory, dtype=dtype: compared(
            ROOT / "fixtures/mbart", directory, "--dtype", dtype, *batch, *quick, all_equal=dtype == "float32")
    # VILA 1.0's and LLaVA's own layouts.
    for name in ("vila-v10-clip", "llava-original"):
        checks[f"{name} float32"] = lambda name=name: compared(
            ROOT / "fixtures" / name, work / name, "--dtype", "float32", *batch, *quick, all_equal=True)
    # SigLIP, a padded grid, a rope with other sizes.
    for dtype in ("float32", "float16"):
        directory = work / f"vila-{dtype}"
        checks[f"vila-v15-siglip {dtype}"] = lambda directory=directory, dtype=dtype: compared(
            ROOT / "fixtures/vila-v15-siglip", directory, "--dtype", dtype, *batch, *quick, all_equal=dtype == "float32")
    if smol:
        sizes = ("--max-input-len", "64", "--max-output-len", "40")
        for dtype, quant in (("float32", "none"), ("float16", "none"), ("bfloat16", "none"), ("float16", "int8"),
                             ("float16", "int4-g64")):
            directory = work / f"smollm2-{dtype}-{quant}"
            checks[f"SmolLM2-135M {dtype} {quant}"] = lambda directory=directory, dtype=dtype, quant=quant: compared(
                smol, directory, "--dtype", dtype, "--quant", quant, *batch, *sizes, all_equal=dtype == "float32")
    # Keys and values as INT8. In float32 and float16 alike the last bit decides to which side a value is rounded, so that near
    # ties may fall elsewhere: how many choices were equal is in the record, and not asked for.
    kept = ("--kv-cache", "int8")
    for dtype in ("float32", "float16", "bfloat16"):
        checks[f"llava-hf {dtype}, INT8 cache"] = lambda dtype=dtype: compared(
            FIXTURE, work / f"kv-fixture-{dtype}", "--dtype", dtype, *kept, *batch, *quick)
    for dtype in ("float32", "float16"):
        for name, model in (("blip2-opt", BLIP2), ("blip2-t5", BLIP2_T5), ("nougat", ROOT / "fixtures/nougat")):
            checks[f"{name} {dtype}, INT8 cache"] = lambda dtype=dtype, name=name, model=model: compared(
                model, work / f"kv-{name}-{dtype}", "--dtype", dtype, *kept, *batch, *quick)
        if smol:
            checks[f"SmolLM2-135M {dtype}, INT8 cache"] = lambda dtype=dtype: compared(
                smol, work / f"kv-smollm2-{dtype}", "--dtype", dtype, *kept, *batch, *sizes)
    every = ("float32", "float16", "bfloat16")
    shapes = {
        "4 heads of 6": (every[:1], dict(hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=4, head_dim=6)),
        "6 heads of 64 on 2": (every, dict(hidden_size=384, intermediate_size=512, num_attention_heads=6, num_key_value_heads=2)),
        "4 heads of 80 on 1": (every[1:2], dict(hidden_size=320, intermediate_size=512, num_attention_heads=4, num_key_value_heads=1)),
        "4 heads of 128": (every[:2], dict(hidden_size=512, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4)),
        "2 heads of 256": (every[:1], dict(hidden_size=512, intermediate_size=512, num_attention_heads=2, num_key_value_heads=2)),
    }
    long = ("--max-batch-size", "3", "--max-input-len", "200", "--max-output-len", "60", *quick)
    for name, (types, config) in shapes.items():
        for dtype in types:
            def check(name=name, config=config, dtype=dtype):
                model = shape(work, f"{name}-{dtype}".replace(" ", "_"), **config)
                return compared(model, work / f"engine-{name}-{dtype}".replace(" ", "_"), "--dtype", dtype, *long,
                                verify_flags=("--input-len", "197", "--steps", "40"), all_equal=dtype == "float32")
            checks[f"{name}, {dtype}, 3 prompts of 197, 196 and 195 tokens"] = check
    checks.update(rank_checks(work, batch, (PROGRAM, ROOT, run, build, verify, shape, need, last_lines, picture)))
    # Every kind of loads, blocks of rows of which the last is not full, and tiles.
    for name in ("4 heads of 6", "6 heads of 64 on 2", "4 heads of 80 on 1", "4 heads of 128", "2 heads of 256"):
        for dtype in ("float32", "float16"):
            def cached(name=name, dtype=dtype):
                model = shape(work, f"kv-{name}-{dtype}".replace(" ", "_"), **shapes[name][1])
                return compared(model, work / f"kv-engine-{name}-{dtype}".replace(" ", "_"), "--dtype", dtype, *kept, *long,
                                verify_flags=("--input-len", "197", "--steps", "40"))
            checks[f"{name}, {dtype}, INT8 cache"] = cached
    checks["a run says what the reference says"] = lambda: same_answer(work, smol, trained)
    checks["killed in the middle, the directory before is whole"] = lambda: killed(work)
    checks["inspect shows the layers"] = lambda: inspected(work)
    checks["inspect shows the layers of an encoder and a decoder"] = lambda: inspected(
        work, BLIP2_T5, {"vision", "encoder", "cross", "decoder"})
    checks["another version or GPU is refused"] = lambda: refused(work)
    return checks


def same_answer(work, smol, trained):
    record = {}
    if smol:
        directory = work / "answer-smollm2"
        build(smol, directory, "--dtype", "float16", "--optimization-level", "1", "--max-input-len", "64", "--max-output-len", "40")
        said = [run("run", directory, "--target", target, "--prompt", "The capital of France is", "--max-new-tokens", "8",
                    "--json") for target in ("tensorrt", "reference")]
        texts = [json.loads(one.stdout)["outputs"][0]["text"] if one.stdout else last_lines(one.stderr) for one in said]
        need(texts[0] == texts[1] and texts[0].startswith("Paris"), f"{texts}")
        record["SmolLM2"] = texts[0]
    if trained:
        directory = work / "answer-llava"
        build(trained, directory, "--dtype", "float16", "--optimization-level", "1")
        task = json.loads((pathlib.Path(trained) / "task.json").read_text())
        picture = os.environ["TRTVLM_PICTURE"]
        said = [run("run", directory, "--target", target, "--image", picture, "--prompt", task["prompt"], "--json")
                for target in ("tensorrt", "reference")]
        texts = [json.loads(one.stdout)["outputs"][0]["text"] if one.stdout else last_lines(one.stderr) for one in said]
        need(texts[0] == texts[1] and texts[0], f"{texts}")
        record["trained LLaVA"] = texts[0]
    return record


def killed(work):
    """SIGKILL of the whole tree while TensorRT works."""
    directory = work / "killed"
    build(FIXTURE, directory, "--dtype", "float16", "--optimization-level", "1")
    before = (directory / "manifest.json").read_bytes()
    child = subprocess.Popen([PROGRAM, "build", FIXTURE, "-o", directory, "--dtype", "float32", "--target", "tensorrt,reference"],
                             stderr=subprocess.DEVNULL, start_new_session=True)
    time.sleep(4)
    need(child.poll() is None, "the build was over before it was killed")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    time.sleep(1)
    left = subprocess.run(["pgrep", "-f", f"build-engine"], capture_output=True, text=True).stdout.split()
    need((directory / "manifest.json").read_bytes() == before, "the manifest changed")
    inspected = run("inspect", directory)
    need(inspected.returncode == 0, f"inspect: {last_lines(inspected.stderr)}")
    need(verify(directory, "--steps", "4")["passed"], "the engines no longer verify")
    build(FIXTURE, directory, "--dtype", "float32", "--optimization-level", "1")
    need(verify(directory, "--steps", "4")["passed"], "a build afterwards does not verify")
    stale = [path.name for path in work.iterdir() if path.name.startswith(".killed")]
    return {"left behind after the next build": stale, "builders of other checks at that time": len(left)}


def inspected(work, model=FIXTURE, networks=frozenset({"vision", "language"})):
    directory = work / f"inspected-{model.name}"
    build(model, directory, "--dtype", "float16", "--optimization-level", "1", target="tensorrt")
    done = run("inspect", directory, "--layers")
    need(done.returncode == 0, last_lines(done.stderr))
    counts = {name: len(found["Layers"]) for name, found in json.loads(done.stdout)["networks"].items()}
    need(counts.keys() == networks and min(counts.values()) > 1, f"{counts}")
    return counts


def refused(work):
    directory = work / "refused"
    build(FIXTURE, directory, "--dtype", "float16", "--optimization-level", "1")
    manifest = directory / "manifest.json"
    text = manifest.read_text()
    record = {}
    for name, pattern, other in (("version", r"TensorRT \d+\.\d+", "TensorRT 10.5"), ("GPU", r'"sm\d+"', '"sm80"')):
        manifest.write_text(re.sub(pattern, other, text))
        done = run("run", directory, "--target", "tensorrt", "--prompt", "a")
        need(done.returncode == 1 and "trtvlm build" in done.stderr, f"{name}: exit {done.returncode} {done.stderr}")
        record[name] = done.stderr.strip()
    manifest.write_text(text)
    return record


def sanitize_checks(work):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    cases = {"llava-hf float16": ("fixture-float16", ()), "llava-hf float32": ("fixture-float32", ()),
             "blip2-t5 float32": ("blip2-t5-float32-none", ()), "T5 alone float16": ("t5-float16", ("--input-len", "70")),
             "6 heads of 64 on 2, bfloat16": ("engine-6_heads_of_64_on_2-bfloat16", ("--input-len", "70")),
             "4 heads of 128, float16": ("engine-4_heads_of_128-float16", ("--input-len", "70")),
             "llava-hf float16, INT8 cache": ("kv-fixture-float16", ()),
             "4 heads of 128, float16, INT8 cache": ("kv-engine-4_heads_of_128-float16", ("--input-len", "70")),
             "2 heads of 256, float32, INT8 cache": ("kv-engine-2_heads_of_256-float32", ("--input-len", "70")),
             "2 heads of 256, float32": ("engine-2_heads_of_256-float32", ("--input-len", "70"))}
    kernels = ["--kernel-name=kernel_substring=trtvlm_"]
    # Without what it says of frees in stream order (2026.4: fourth run in gpu-results.md); what our kernels touch is checked.
    options = {"memcheck": [*kernels, "--track-stream-ordered-races", "no"], "racecheck": kernels}
    version = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout.strip().split("\n")[-1]

    def sanitized(kind, name, flags):
        done = subprocess.run([tool, "--tool", kind, "--error-exitcode", "9", *options[kind], PROGRAM, "verify", str(work / name),
                               "--steps", "3", *flags], capture_output=True, text=True, timeout=300)
        text = done.stdout + done.stderr
        summary = [line for line in text.splitlines() if "SUMMARY" in line or "RACECHECK" in line]
        clean = bool(summary) and ("0 errors" in summary[-1] or "0 hazards" in summary[-1])
        told = [line for line in text.splitlines() if line.startswith("=====") and "Host Frame" not in line]
        need(done.returncode == 0 and clean,
             f"exit {done.returncode}\n" + "\n".join(told[:20] + told[-1:]) + "\n" + last_lines(done.stderr, 3))
        return {"summary": summary[-1].strip("= "), "tool": version}

    return {f"compute-sanitizer {kind}: {case}": lambda kind=kind, name=name, flags=flags: sanitized(kind, name, flags)
            for case, (name, flags) in cases.items() for kind in ("memcheck", "racecheck")}


def real_checks(work):
    """LLaVA-1.5-7B's shape; one at a time, so that times mean something."""
    checkpoint, directory = work / "llava-7b", work / "engines-7b"
    sizes = ("--max-input-len", "640", "--max-output-len", "512")

    def synth():
        start = time.monotonic()
        done = run("synth", "llava-1.5-7b", "-o", checkpoint, "--json")
        need(done.returncode == 0, last_lines(done.stderr))
        return {**{key: json.loads(done.stdout)[key] for key in ("values", "bytes", "seconds")}, "wall": time.monotonic() - start}

    def builds():
        start = time.monotonic()
        built = build(checkpoint, directory, "--dtype", "float16", *sizes, target="tensorrt")
        return {"engines": built["engines"], "wall": time.monotonic() - start}

    def bench():
        done = run("bench", directory, "--input-len", "640", "--json")
        need(done.returncode == 0, last_lines(done.stderr))
        return json.loads(done.stdout)

    def peer():
        out = work / "peer.json"
        done = subprocess.run(["python3", str(ROOT / "tests/gpu/peer.py"), str(checkpoint), "--json", str(out)],
                              capture_output=True, text=True, timeout=210)
        need(out.exists(), last_lines(done.stderr))
        return json.loads(out.read_text())

    def smol_bench():
        done = run("bench", work / "smollm2-float16-none", "--batch", "1,2", "--input-len", "32,64", "--json")
        need(done.returncode == 0, last_lines(done.stderr))
        return json.loads(done.stdout)

    # What a cache of INT8 gives where the caches weigh: 8 requests of 2048 tokens have 8.6 GB of float16 rows, beside 13.2
    # GB of weights.
    long = ("--max-batch-size", "8", "--max-input-len", "2048", "--max-output-len", "128")

    def long_bench(kept):
        directory = work / f"engines-7b-long-{kept}"
        built = build(checkpoint, directory, "--dtype", "float16", "--kv-cache", kept, *long, target="tensorrt", timeout=560)
        done = run("bench", directory, "--batch", "1,8", "--input-len", "2048", "--json")
        shutil.rmtree(directory)
        need(done.returncode == 0, last_lines(done.stderr))
        return {"engines": built["engines"], **json.loads(done.stdout)}

    checks = {"LLaVA-1.5-7B shape: synth": synth, "LLaVA-1.5-7B shape: build float16": builds,
              "LLaVA-1.5-7B shape: bench": bench, "LLaVA-1.5-7B shape: transformers": peer,
              "LLaVA-1.5-7B shape, 8 x 2048 tokens": lambda: long_bench("auto"),
              "LLaVA-1.5-7B shape, 8 x 2048 tokens, INT8 cache": lambda: long_bench("int8")}
    if (work / "smollm2-float16-none").exists():
        checks["SmolLM2-135M float16: bench"] = smol_bench
    return checks


def shape_checks(work):
    """The other families' real shapes: built beside each other, then timed one by one."""
    # Tokens that the engine takes, and those that are timed.
    shapes = {"blip2-opt-2.7b": (96, 96), "blip2-flan-t5-xl": (96, 96), "vila1.5-3b": (512, 260), "nougat-base": (None, None)}

    def builds(name, longest):
        checkpoint, directory = work / "synth" / name, work / f"engines-{name}"
        done = run("synth", name, "-o", checkpoint)
        need(done.returncode == 0, last_lines(done.stderr))
        start = time.monotonic()
        sizes = () if longest is None else ("--max-input-len", str(longest), "--max-output-len", "128")
        built = build(checkpoint, directory, "--dtype", "float16", *sizes, target="tensorrt", timeout=560)
        # The disk does not hold all of them twice.
        shutil.rmtree(checkpoint)
        return {"engines": built["engines"], "wall": time.monotonic() - start}

    def times(name, length):
        directory = work / f"engines-{name}"
        done = run("bench", directory, *(() if length is None else ("--input-len", str(length))), "--json")
        need(done.returncode == 0, last_lines(done.stderr))
        prompt = () if length is None else ("--prompt", "What is it?")
        said = run("run", directory, "--target", "tensorrt", "--image", picture(work / "picture.png"), *prompt,
                   "--max-new-tokens", "8", "--json")
        need(said.returncode == 0 and len(json.loads(said.stdout)["outputs"][0]["token_ids"]) > 0, last_lines(said.stderr))
        return json.loads(done.stdout)

    return [({f"{name} shape: build float16, beside the others": lambda name=name, longest=longest: builds(name, longest)
              for name, (longest, _) in shapes.items()}, len(shapes)),
            ({f"{name} shape: bench": lambda name=name, timed=timed: times(name, timed) for name, (_, timed) in shapes.items()}, 1)]


def picture(path, width=200, height=120):
    """A PNG of a slope of grey; its rows carry no filter."""
    rows = b"".join(b"\0" + bytes((x + y) % 256 for x in range(width)) for y in range(height))
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def main():
    phase, work = sys.argv[1], pathlib.Path(sys.argv[2])
    work.mkdir(parents=True, exist_ok=True)
    # Correctness does not mind company; times do.
    steps = {"small": lambda: [(small_checks(work), 8)], "sanitize": lambda: [(sanitize_checks(work), 8)],
             "schemes": lambda: scheme_checks(work, (ROOT, run, compared, need, last_lines, picture)),
             "real": lambda: [(real_checks(work), 1)], "shapes": lambda: shape_checks(work),
             "memory": lambda: [(memory_checks(work, (run, need, last_lines)), 1)],
             "calibrate": lambda: [(calibrate_checks(work, (ROOT, run, need, last_lines, picture)), 1)]}[phase]()
    only = os.environ.get("TRTVLM_ONLY")
    results, failures = work / f"{phase}.jsonl", 0

    def attempt(name, check):
        start = time.monotonic()
        try:
            record = {"passed": True, "found": check()}
        except Exception as error:
            record = {"passed": False, "found": f"{type(error).__name__}: {error}"}
        return {"check": name, **record, "commit": os.environ.get("TRTVLM_COMMIT", "unknown"), "seconds": round(time.monotonic() - start, 1)}

    with results.open("a") as out:
        for checks, workers in steps:
            wanted = {name: check for name, check in checks.items() if not only or re.search(only, name)}
            with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                for done in concurrent.futures.as_completed([pool.submit(attempt, *item) for item in wanted.items()]):
                    record = done.result()
                    failures += not record["passed"]
                    out.write(json.dumps(record) + "\n")
                    out.flush()
                    mark = "ok    " if record["passed"] else "FAILED"
                    print(f"{mark} {record['seconds']:6.1f} s  {record['check']}: {json.dumps(record['found'])[:1500]}", flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
