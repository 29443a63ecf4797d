"""Divided models as TensorRT engines: two ranks against their own reference, and against the whole on the same GPU."""
import json, os, shutil, socket, subprocess, time


def rank_checks(work, batch, tools):
    """Divided models: on one GPU through memory that the ranks share, on two likewise and by NCCL."""
    program, root, run, build, verify, shape, need, last_lines, picture = tools
    llava, blip2_t5 = root / "fixtures/llava-hf", root / "fixtures/blip2-t5"

    def gpus():
        tool = shutil.which("nvidia-smi")
        return subprocess.run([tool, "-L"], capture_output=True, text=True).stdout.count("GPU ") if tool else 1

    def tokens(directory, *flags, target="tensorrt"):
        done = run("run", directory, "--target", target, "--json", *flags)
        need(done.returncode == 0, f"run: exit {done.returncode}\n{last_lines(done.stderr, 12)}")
        return [output["token_ids"] for output in json.loads(done.stdout)["outputs"]]

    def divided(work, model, name, dtype, *flags, asks=(), verify_flags=(), places=((),), bench=()):
        """Two ranks against their reference, and against the whole on the same GPU; `places` are flags that say where they run."""
        whole, parts = work / f"{name}-tp1", work / f"{name}-tp2"
        flags = ("--dtype", dtype, "--optimization-level", "1", *flags)
        build(model, whole, *flags, target="tensorrt")
        build(model, parts, "--tp", "2", *flags)
        record = {}
        for place in places:
            found, start = verify(parts, *verify_flags, *place), time.monotonic()
            worst = {one["stage"]: one["relative_error"] for one in found["comparisons"]}
            of_place = {"errors": worst, "equal": found["equal_choices"], "choices": found["choices"]}
            need(found["passed"], f"beyond the bound: {json.dumps(found)}")
            need(dtype != "float32" or found["equal_choices"] == found["choices"], f"other choices: {json.dumps(of_place)}")
            if asks:
                said = [tokens(whole, *asks), tokens(parts, *asks, *place)]
                of_place["tokens"] = [sum(a == b for a, b in zip(*pair)) / max(len(pair[0]), 1) for pair in zip(*said)]
                # Sums in another order round in another way, which near ties of random weights show.
                need(dtype != "float32" or said[0] == said[1], f"other tokens than the whole: {said}")
            if bench:
                times = [run("bench", directory, *bench, *(place if directory == parts else ()), "--json") for directory in (whole, parts)]
                need(all(done.returncode == 0 for done in times), "\n".join(last_lines(done.stderr) for done in times))
                of_place["ms"] = [{row["work"]: round(row["milliseconds"], 4) for row in json.loads(done.stdout)["results"]} for done in times]
            record[" ".join(place) or "where it likes"] = {**of_place, "seconds": round(time.monotonic() - start, 1)}
        return record

    def launched(directory, *flags):
        """A process for each of two ranks, as torchrun starts them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = lambda rank: {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        start = lambda rank: subprocess.Popen([program, "run", str(directory), "--target", "tensorrt", *map(str, flags)], text=True,
                                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **place(rank)})
        return [start(rank) for rank in range(2)]

    def processes(work):
        """Two processes say what two threads say; when one is killed the other ends and names it."""
        model = shape(work, "tp-processes", hidden_size=1024, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=2,
                      num_hidden_layers=4, max_position_embeddings=20000, vocab_size=448)
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 447}))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(llava / name, model / name)
        directory = work / "tp-processes"
        build(model, directory, "--tp", "2", "--dtype", "float16", "--optimization-level", "1", "--max-input-len", "64",
              "--max-output-len", "16000", target="tensorrt")
        wanted = tokens(directory, "--prompt", "Why?", "--max-new-tokens", "24", "--devices", "0,1")
        both = launched(directory, "--prompt", "Why?", "--max-new-tokens", "24", "--json")
        said = [one.communicate(timeout=120) for one in both]
        need(all(one.returncode == 0 for one in both), "\n".join(last_lines(err) for _, err in said))
        found = [output["token_ids"] for output in json.loads(said[0][0])["outputs"]]
        need(found == wanted and not said[1][0], f"{found} {wanted} {said[1][0]}")
        first, second = launched(directory, "--prompt", "Why?", "--max-new-tokens", "16000", "--rank-timeout", "20")
        need(first.stdout.read(1), "it said nothing")
        second.kill()
        start = time.monotonic()
        _, error = first.communicate(timeout=60)
        second.communicate()
        need(first.returncode not in (0, None) and "rank 1" in error, f"exit {first.returncode} {error}")
        return {"tokens": len(found[0]), "ended after": round(time.monotonic() - start, 2), "error": error.strip()}

    places = [("--devices", "0,0")]
    if gpus() > 1:
        places += [("--devices", "0,1", "--join", "local"), ("--devices", "0,1", "--join", "nccl")]
    checks = {}
    for dtype in ("float32", "float16"):
        for name, model in (("llava-hf", llava), ("blip2-t5", blip2_t5)):
            def fixture(name=name, model=model, dtype=dtype):
                asks = ("--prompt", "What is it?", "Why?", "--image", picture(work / f"tp-{name}-{dtype}.png"), "--max-new-tokens", "12")
                return divided(work, model, f"tp-{name}-{dtype}", dtype, *batch, asks=asks, places=places)
            checks[f"two ranks: {name} {dtype}"] = fixture
        def llama(dtype=dtype, cache="auto"):
            name = f"tp-llama-{dtype}-{cache}"
            model = shape(work, name, hidden_size=1024, intermediate_size=2816, num_attention_heads=8,
                          num_key_value_heads=2, num_hidden_layers=4)
            sizes = ("--max-batch-size", "3", "--max-input-len", "200", "--max-output-len", "60")
            return divided(work, model, name, dtype, *sizes, "--kv-cache", cache, verify_flags=("--input-len", "197", "--steps", "40"),
                           places=places, bench=("--batch", "1,3", "--input-len", "128"))
        if gpus() > 1 and dtype == "float16":
            checks["two ranks: a process for each"] = lambda: processes(work)
        name = f"two ranks: LLaMA of 4 layers, 8 heads of 128 on 2, {dtype}, 3 prompts of 197 tokens, 40 steps"
        checks[name] = llama
        # In float32 choices would have to be equal, which INT8 does not promise.
        if dtype == "float16":
            checks[f"{name}, INT8 cache"] = lambda llama=llama: llama(cache="int8")
    return checks


def memory_checks(work, tools):
    """Building real shapes for 1, 2 and 8 ranks: seconds and memory; one at a time and nothing kept, as one model fills the disk."""
    run, need, last_lines = tools
    checks = {}

    def synth(shape, checkpoint):
        done = run("synth", shape, "-o", checkpoint, "--json")
        need(done.returncode == 0, last_lines(done.stderr))
        return json.loads(done.stdout)

    def built(checkpoint, ranks, jobs, last):
        directory, start = work / "memory-engines", time.monotonic()
        shutil.rmtree(directory, ignore_errors=True)
        done = run("build", checkpoint, "-o", directory, "--target", "tensorrt", "--dtype", "float16", "--tp", ranks, "--jobs", jobs,
                   "--optimization-level", "0", "--max-input-len", "640", "--max-output-len", "512", "--json", timeout=590)
        shutil.rmtree(directory, ignore_errors=True)
        if last:
            shutil.rmtree(checkpoint)
        need(done.returncode == 0, last_lines(done.stderr, 12))
        told = json.loads(done.stdout)
        engines = [{key: engine.get(key) for key in ("network", "bytes", "seconds", "peak_own_memory_bytes")} for engine in told["engines"]]
        return {"wall": round(time.monotonic() - start, 1), "parent": told.get("parent_peak_memory_bytes"), "engines": engines}

    for shape in ("llava-1.5-7b", "llava-1.5-13b"):
        checkpoint = work / f"memory-{shape}"
        checks[f"{shape} shape: synth for ranks"] = lambda shape=shape, checkpoint=checkpoint: synth(shape, checkpoint)
        plans = ((1, 1), (2, 2), (8, 8))
        for ranks, jobs in plans:
            checks[f"{shape} shape: build tp {ranks}, {jobs} at once"] = lambda checkpoint=checkpoint, ranks=ranks, jobs=jobs: built(
                checkpoint, ranks, jobs, (ranks, jobs) == plans[-1])
    return checks
