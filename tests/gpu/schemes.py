"""Every scheme in every family as TensorRT engines against the quantized reference; and checkpoints that other tools
quantized. TRTVLM_PEERS names the folder of the latter (`shared/fixtures/peers`)."""
import json, os, pathlib

FAMILIES = ("llava-hf", "vila-v15-siglip", "blip2-opt", "blip2-t5", "nougat", "mbart")
# Language and vision.
SCHEMES = (("int8", "int8"), ("int4-g16", "int4"), ("int4-channel", "int8-mse"), ("int4-awq-g16", "int8-awq"),
           ("int8-sq", "int8-sq"), ("int8-sq-token", "int8-sq-token"), ("int8-absmax", "int8-absmax"))
QUICK = ("--optimization-level", "1", "--max-batch-size", "2")


def samples(family, folder, picture):
    """Lines of samples as the family takes them; a page comes without a question, mBART has no tokenizer."""
    picture(folder / "picture.png")
    lines = [dict(prompt="What is it?", answer="a cat", image="picture.png"), dict(prompt="Why?", answer="because"),
             dict(text="the quick brown fox jumps over the lazy dog"), dict(prompt="Where is it?", answer="here", image="picture.png")]
    if family == "nougat":
        lines = [dict(prompt="", answer="a page", image="picture.png")]
    if family == "vila-v15-siglip":
        # With its template a picture's prompt is longer than the tiny model's positions.
        lines = lines[2:3]
    path = folder / f"{family}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def scheme_checks(work, tools):
    root, run, compared, need, last_lines, picture = tools
    folder = work / "schemes"
    folder.mkdir(parents=True, exist_ok=True)
    checks = {}

    def gathered(model, data, name, dtype, *flags):
        """The same file for all checks of one model and type; gathered once, whoever comes first."""
        path = folder / f"{name}-{dtype}.safetensors"
        done = run("calibrate", model, "--data", data, "-o", path, "--dtype", dtype, "-q", *flags)
        need(done.returncode == 0, f"calibrate: {last_lines(done.stderr)}")
        return path

    def prepare():
        """Statistics of all, one after the other: checks at the same time would write the same files."""
        found = {}
        for family in FAMILIES[:-1]:
            for dtype in ("float16", "float32"):
                data = samples(family, folder, picture)
                found[family, dtype] = gathered(root / "fixtures" / family, data, family, dtype, "--window", "8")
        if smol:
            found["smollm2", "float16"] = gathered(smol, root / "fixtures/text/calibration.txt", "smollm2", "float16", "--samples", "8")
        return {"files": [path.name for path in found.values()]}

    smol = os.environ.get("TRTVLM_SMOLLM2")
    for family in FAMILIES[:-1]:
        for quant, vision in SCHEMES:
            vision = "int8" if family == "vila-v15-siglip" else vision
            for dtype in ("float16", "float32") if quant in ("int4-awq-g16", "int8-sq", "int8-sq-token") else ("float16",):
                def check(family=family, quant=quant, vision=vision, dtype=dtype):
                    flags = ("--dtype", dtype, "--quant", quant, "--vision-quant", vision,
                             "--calibration", folder / f"{family}-{dtype}.safetensors")
                    if not any(word in quant + vision for word in ("awq", "sq", "absmax")):
                        flags = flags[:-2]
                    return compared(root / "fixtures" / family, folder / f"{family}-{quant}-{dtype}", *flags, *QUICK)
                checks[f"{family} {dtype} {quant}, vision {vision}"] = check
    for quant in ("int8", "int4-g16", "int8-absmax-token"):
        checks[f"mbart float16 {quant}"] = lambda quant=quant: compared(
            root / "fixtures/mbart", folder / f"mbart-{quant}", "--dtype", "float16", "--quant", quant, *QUICK)
    if smol:
        for quant in ("int4-awq-g64", "int8-sq", "int8-sq-token"):
            checks[f"SmolLM2-135M float16 {quant}"] = lambda quant=quant: compared(
                smol, folder / f"smollm2-{quant}", "--dtype", "float16", "--quant", quant, "--calibration",
                folder / "smollm2-float16.safetensors", *QUICK, "--max-input-len", "64", "--max-output-len", "40")
    peers = os.environ.get("TRTVLM_PEERS")
    for peer in sorted(pathlib.Path(peers).iterdir()) if peers else ():
        if (peer / "config.json").exists():
            for dtype in ("float32", "float16"):
                checks[f"made by another tool: {peer.name} {dtype}"] = lambda peer=peer, dtype=dtype: compared(
                    peer, folder / f"{peer.name}-{dtype}", "--dtype", dtype, *QUICK, "--max-input-len", "64", "--max-output-len", "40")
    # Most of a check's time is that of processes that start.
    return [({"statistics of every family": prepare}, 1), (checks, max(8, (os.cpu_count() or 8) * 3 // 4))]
