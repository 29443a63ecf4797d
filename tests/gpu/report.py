"""Writes the results of checks.py as Markdown: report.py WORK > tests/gpu-results.md"""
import json, os, pathlib, subprocess, sys


def read(work, phase):
    path = work / f"{phase}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    # A check that was run again counts as it went last.
    return list({record["check"]: record for record in map(json.loads, lines)}.values())


def table(head, rows):
    line = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def main():
    work = pathlib.Path(sys.argv[1])
    shell = lambda *command: subprocess.run(command, capture_output=True, text=True).stdout.strip()
    small, sanitize, real = (read(work, phase) for phase in ("small", "sanitize", "real"))
    small += read(work, "schemes")
    real += read(work, "shapes") + read(work, "calibrate") + read(work, "memory")
    everything = small + sanitize + real
    card = shell("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    commits = sorted({record["commit"] for record in everything})
    print(f"""# GPU checks

What `tests/gpu.sh` found last. Card and driver: {card}; {os.environ.get("TRTVLM_LIBRARY", "TensorRT")};
{shell("date", "-u", "+%Y-%m-%d %H:%M UTC")}; commit {" and ".join(commits)}.
{sum(record["passed"] for record in everything)} of {len(everything)} checks passed.

## Engines against the reference
Relative error (norm of the difference over norm of the reference) of each stage's outputs over prompts of different
lengths and up to 32 decode steps (40 and 140 for the shapes), the largest of several outputs; `worst` is that of the single
call where it was largest; `rounding` is what the reference differs by if every result is rounded to the engine's type; the
bound is the type's (1e-3, 1e-2, 6e-2; 2e-2 at least where inputs are rounded to INT8) or three times that, whichever is larger; `equal` counts greedy choices.
""")
    stages = ["vision", "vision layers", "prefill", "prefill layers", "decode", "decode layers"]
    compared = [record for record in small if record["passed"] and "errors" in record["found"]]
    used = [stage for stage in stages if any(stage in record["found"]["errors"] for record in compared)]
    rows = []
    for record in compared:
        found = record["found"]
        errors = [f"{found['errors'][stage]:.1e}" if stage in found["errors"] else "" for stage in used]
        build = ", ".join(f"{name} {seconds} s" for name, seconds in found["build_seconds"].items())
        rows.append([record["check"], *errors, f"{found['worst_call']:.1e}", f"{found['rounding']:.1e}", f"{found['bound']:.1e}", f"{found['equal']} of {found['choices']}", build])
    print(table(["check", *used, "worst", "rounding", "bound", "equal", "build, beside others"], rows))
    print("\n## Other checks\n")
    others = [record for record in small if record not in compared] + sanitize
    print(table(["check", "", "found"], [[record["check"], "ok" if record["passed"] else "FAILED",
                                         json.dumps(record["found"], ensure_ascii=False) if record["found"] else ""] for record in others]))
    print("\n## Speed\n")
    for record in real:
        found = record["found"]
        print(f"### {record['check']}{'' if record['passed'] else ': FAILED'}\n")
        if record["passed"] and "limits" in found:
            limits = found["limits"]
            flops = limits["operations_per_second"]
            flops = f"{flops / 1e12:.0f} TFLOP/s by a float16 product of 8192 x 8192 (cuBLASLt)" if flops else "no arithmetic limit"
            print(f"Limits measured in the same run: {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s by a copy, {flops}.\n")
            print(table(["work", "batch", "length", "ms", "a second", "TFLOP/s", "GB/s", "of the limit"], [
                [row["work"], row["batch"], row["length"], f"{row['milliseconds']:.3f}", f"{row['per_second']:.1f}",
                 f"{row['operations_per_second'] / 1e12:.1f}", f"{row['bytes_per_second'] / 1e9:.0f}",
                 f"{row['of_limit'] * 100:.1f} %" if row["of_limit"] else ""] for row in found["results"]]) + "\n")
        else:
            print("```json\n" + json.dumps(found, indent=1) + "\n```\n")


if __name__ == "__main__":
    main()
