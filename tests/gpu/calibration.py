"""Calibration: statistics by the GPU against those by the CPU; then LLaVA-1.5-7B's shape on 128 windows of 512 tokens."""
import json, os, shutil, struct, time


def calibrate_checks(work, tools):
    root, run, need, last_lines, picture = tools
    def statistics(model, data, name, *flags, timeout=600):
        out = work / f"{name}.safetensors"
        for old in (out, out.with_name(out.name + ".unfinished")):
            old.unlink(missing_ok=True)
        start = time.monotonic()
        done = run("calibrate", model, "--data", data, "-o", out, "--json", *flags, timeout=timeout)
        need(done.returncode == 0, last_lines(done.stderr, 12))
        return out, {**json.loads(done.stdout), "wall": time.monotonic() - start, "warnings": last_lines(done.stderr, 3)}

    def read(path):
        """Floats by name, of a file of statistics, and the lots by which rows were chosen."""
        text = path.read_bytes()
        length = struct.unpack("<Q", text[:8])[0]
        header, body = json.loads(text[8:8 + length]), memoryview(text)[8 + length:]
        kinds = {"F32": "f", "F64": "d", "U64": "Q"}
        return {name: body[info["data_offsets"][0]:info["data_offsets"][1]].cast(kinds[info["dtype"]])
                for name, info in header.items() if name != "__metadata__"}

    def equal(model, data, name, *flags):
        (one, _), (other, told) = (statistics(model, data, f"{name}-{device}", "--device", device, *flags) for device in ("cpu", "cuda"))
        one, other = read(one), read(other)
        need(one.keys() == other.keys() and told["device"] != "CPU", f"{told}, {one.keys() ^ other.keys()}")
        worst = {}
        for key, values in one.items():
            kind = key.rsplit(".", 1)[1]
            if kind == "lots":
                need(values == other[key], f"{key}: other rows were kept")
                continue
            largest = max(map(abs, values), default=0) or 1
            off = max((abs(a - b) for a, b in zip(values, other[key])), default=0) / largest
            need(len(values) == len(other[key]) and off == off, key)
            if off >= worst.get(kind, (0, ""))[0]:
                worst[kind] = (off, key)
        need(max(off for off, _ in worst.values()) < 1e-3, f"{worst}")
        return {"worst, relative to the largest": worst, "inputs": len(one) // 4}

    text = root / "tests/gpu/calibration.txt"
    if not text.exists():
        # Prose for 128 windows; which words does not matter for how long it takes.
        text = work / "calibration.txt"
        words = (root / "README.md").read_text().split()
        text.write_text(" ".join(words[place * 7919 % len(words)] for place in range(120_000)))
    lines = work / "seen.jsonl"
    seen = picture(work / "seen.png")
    lines.write_text("\n".join(json.dumps(one) for one in (
        {"prompt": "What is it?", "answer": "a cat", "image": str(seen)}, {"prompt": "Why?", "answer": "because"},
        {"prompt": "Where is it?", "answer": "here", "image": str(seen)})))
    checks = {}
    for dtype in ("float16", "float32", "bfloat16"):
        checks[f"llava-hf {dtype}: statistics by GPU and CPU"] = lambda dtype=dtype: equal(
            root / "fixtures/llava-hf", lines, f"statistics-{dtype}", "--dtype", dtype)
    checks["blip2-t5 float32: statistics by GPU and CPU"] = lambda: equal(
        root / "fixtures/blip2-t5", lines, "statistics-t5", "--dtype", "float32")
    if os.environ.get("TRTVLM_SMOLLM2"):
        checks["SmolLM2-135M float16: statistics by GPU and CPU"] = lambda: equal(
            os.environ["TRTVLM_SMOLLM2"], text, "statistics-smollm2", "--dtype", "float16", "--samples", "4", "--window", "256")
    checkpoint, found = work / "llava-7b", work / "statistics-7b.safetensors"

    def synth():
        if checkpoint.exists():
            return {"kept": True}
        done = run("synth", "llava-1.5-7b", "-o", checkpoint, "--json")
        need(done.returncode == 0, last_lines(done.stderr))
        return json.loads(done.stdout)

    def gathers():
        _, told = statistics(checkpoint, text, "statistics-7b", "--dtype", "float16", "--samples", "128", "--window", "512",
                             "--device", "cuda")
        need(told["device"] != "CPU", f"{told}")
        return told

    def searches(quant):
        directory = work / f"reference-7b-{quant}"
        start = time.monotonic()
        done = run("build", checkpoint, "-o", directory, "--target", "reference", "--dtype", "float16", "--quant", quant,
                   "--calibration", found, "--json", timeout=590)
        need(done.returncode == 0, last_lines(done.stderr, 12))
        shutil.rmtree(directory)
        steps = [line.strip() for line in done.stderr.splitlines() if " in " in line]
        return {"wall": time.monotonic() - start, "steps": steps, "peak_bytes": json.loads(done.stdout)["parent_peak_memory_bytes"]}

    checks["LLaVA-1.5-7B shape: synth"] = synth
    checks["LLaVA-1.5-7B shape: calibrate, 128 x 512 tokens"] = gathers
    for quant in ("int4-awq", "int8-sq"):
        checks[f"LLaVA-1.5-7B shape: search and build {quant}"] = lambda quant=quant: searches(quant)
    return checks
