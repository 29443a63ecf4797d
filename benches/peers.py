"""Other quantizers beside trtvlm: perplexity, time and memory on one model and one set of calibration samples.

Set up (AutoAWQ 0.2.9 needs older packages, so it has an environment of its own; leave --awq-python out to skip it):
    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install llmcompressor==0.14.0.1
    python3 -m venv /tmp/peers-awq && /tmp/peers-awq/bin/pip install torch==2.6.0 transformers==4.51.3 setuptools wheel \
        && /tmp/peers-awq/bin/pip install --no-build-isolation autoawq==0.2.9 transformers==4.51.3 datasets==3.6.0
Usage:
    /tmp/peers/bin/python benches/peers.py table --model /tmp/smollm2 --trtvlm target/release/trtvlm --out /tmp/peers-out \
        --awq-python /tmp/peers-awq/bin/python [--only NAME,...]
    /tmp/peers/bin/python benches/peers.py perplexity --model DIR    (the same windows by transformers: a check of the reader)
Each row is what one tool takes as whole commands, from loading the checkpoint to files written; for trtvlm `calibrate` and
`build`. The perplexity is always trtvlm's own reference on the saved files. What --out has is not made again.
"""
import argparse, json, math, os, pathlib, subprocess, sys, time

TEXT = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "text"
OURS = {"trtvlm-awq": "int4-awq-g64", "trtvlm-sq": "int8-sq-token"}
THEIRS = {
    "lc-awq": "llm-compressor AWQ", "lc-sq": "llm-compressor SmoothQuant 0.5",
    "lc-rtn-w8": "llm-compressor W8A8, rounded",
    "autoawq": "AutoAWQ", "autoawq-no-clip": "AutoAWQ without its search for clipping",
}


def windows(model, file, size, count=None):
    """Token ids of a text, cut without overlap; nothing put in between."""
    from transformers import AutoTokenizer
    ids = AutoTokenizer.from_pretrained(model)(file.read_text(), add_special_tokens=False)["input_ids"]
    return [ids[i:i + size] for i in range(0, len(ids), size)][:count]


def compress(name, args, samples):
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if not torch.cuda.is_available():
        # 0.14's AWQ pins what it caches, which fails without a GPU's driver.
        IntermediatesCache.pin_memory = lambda *_: None
    int4 = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=64))
    w4 = QuantizationModifier(config_groups={"group_0": int4}, ignore=["lm_head"])
    w8 = {"targets": "Linear", "scheme": "W8A8", "ignore": ["lm_head"]}
    recipe = {
        "lc-awq": lambda: [AWQModifier(), w4],
        "lc-rtn-w8": lambda: [QuantizationModifier(**w8)],
        "lc-sq": lambda: [SmoothQuantModifier(), QuantizationModifier(**w8)],
    }[name]()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(s) for s in samples]})
    oneshot(model=model, recipe=recipe, dataset=data, num_calibration_samples=len(samples), max_seq_length=args.window,
            shuffle_calibration_samples=False)
    model.save_pretrained(args.out, save_compressed=True)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)


def autoawq(args, samples):
    import torch
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer
    model = AutoAWQForCausalLM.from_pretrained(args.model, device_map="cpu", torch_dtype=torch.float32, safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # It takes lists of ids as they are, joins them and cuts windows of its own: the same ones, as all are full.
    model.quantize(tokenizer, quant_config={"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
                   apply_clip=args.name == "autoawq", calib_data=samples, max_calib_samples=len(samples), max_calib_seq_len=args.window)
    model.save_quantized(args.out)
    tokenizer.save_pretrained(args.out)


def perplexity(args):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    loss = told = seen = 0
    for ids in windows(args.model, TEXT / "evaluation.txt", args.window, args.tokens // args.window):
        if len(ids) < 2:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        loss += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        told += len(ids) - 1
        seen += len(ids)
    print(json.dumps({"tokens": seen, "perplexity": math.exp(loss / told)}))


def measured(command):
    """Wall seconds, CPU seconds (user and system) and peak memory of a child, its mapped files included."""
    env = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2", RAYON_NUM_THREADS="2", TOKENIZERS_PARALLELISM="false")
    start = time.monotonic()
    child = subprocess.Popen(command, env=env, stdout=sys.stderr)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return {"wall": time.monotonic() - start, "cpu": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}


def evaluated(args, model, *options):
    command = [args.trtvlm, "eval", "text", model, "--text", TEXT / "evaluation.txt", "--tokens", str(args.tokens), "--dtype", "float32",
               "--window", str(args.window), "--json", "-q", *options]
    return json.loads(subprocess.check_output(command))["results"][-1]["perplexity"]


def row(args, name, to):
    """One tool's figures; those that an earlier run kept are not measured again."""
    kept = to.with_suffix(".json")
    row = json.loads(kept.read_text()) if kept.exists() else {}
    statistics = to.with_suffix(".safetensors")
    of = [args.model, "--dtype", "float32"]
    if name in OURS and "cpu" not in row:
        steps = [
            measured([args.trtvlm, "calibrate", *of, "--data", TEXT / "calibration.txt", "--samples", str(args.samples),
                      "--window", str(args.window), "-o", statistics]),
            measured([args.trtvlm, "build", *of, "-o", to, "--target", "reference", "--quant", OURS[name], "--calibration", statistics]),
        ]
        row = {key: (max if key == "peak_mib" else sum)(s[key] for s in steps) for key in steps[0]} | {"steps": steps}
    elif name in THEIRS and "cpu" not in row:
        python = args.awq_python if name.startswith("autoawq") else sys.executable
        row = measured([python, __file__, "quantize", name, "--model", args.model, "--out", to, "--samples", str(args.samples),
                        "--window", str(args.window)])
    kept.write_text(json.dumps(row))
    if "perplexity" not in row and not args.no_eval:
        options = ["--quant", OURS[name], "--calibration", statistics] if name in OURS else []
        row["perplexity"] = evaluated(args, to if name in THEIRS else args.model, *options)
        kept.write_text(json.dumps(row))
    return row


def table(args):
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    names = args.only.split(",") if args.only else ["none", *OURS, *THEIRS]
    rows = {name: row(args, name, out / name) for name in names if args.awq_python or not name.startswith("autoawq")}
    print("| | perplexity | CPU s | wall s | peak MiB |\n| --- | --- | --- | --- | --- |")
    for name, r in rows.items():
        figure = lambda key, digits: f"{r[key]:.{digits}f}" if key in r else ""
        label = OURS.get(name) or THEIRS.get(name) or "unquantized"
        print(f"| {label} | {figure('perplexity', 3)} | {figure('cpu', 0)} | {figure('wall', 0)} | {figure('peak_mib', 0)} |")


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("action", choices=["table", "quantize", "perplexity"])
    flags.add_argument("name", nargs="?", choices=THEIRS)
    flags.add_argument("--model", default="/tmp/smollm2")
    flags.add_argument("--out", default="/tmp/peers-out")
    flags.add_argument("--trtvlm", default="target/release/trtvlm")
    flags.add_argument("--awq-python")
    flags.add_argument("--only")
    flags.add_argument("--no-eval", action="store_true", help="quantize only; a later run measures the perplexity")
    flags.add_argument("--tokens", type=int, default=16384, help="of the text for evaluation, from its start")
    flags.add_argument("--samples", type=int, default=32)
    flags.add_argument("--window", type=int, default=512)
    args = flags.parse_args()
    if args.action == "quantize":
        samples = windows(args.model, TEXT / "calibration.txt", args.window, args.samples)
        autoawq(args, samples) if args.name.startswith("autoawq") else compress(args.name, args, samples)
    else:
        (table if args.action == "table" else perplexity)(args)


if __name__ == "__main__":
    main()
