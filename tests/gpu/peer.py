"""The Hugging Face peer of our engines: what transformers makes of the same checkpoint on the same NVIDIA GPU.
    trtvlm synth llava-1.5-7b -o synthetic && python3 tests/gpu/peer.py synthetic --json peer.json
Batch 1, float16, fixed random inputs: INPUT_LEN tokens of text and the features of each picture. Times are medians by
CUDA events. The file is written after every section; one that fails leaves its error there. Vision is tower and
projector, as in our engine; transformers also runs the blocks behind the chosen one.
"""
import argparse, json, pathlib, statistics, time, traceback
import torch, transformers

WARM_UPS, REPEATS, WARM_STEPS = 3, 20, 8


def median_time(action):
    """Each call by itself on an idle GPU: where launching takes longer than computing, it is what counts."""
    times = []
    for _ in range(WARM_UPS + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UPS:])


def copy_bandwidth(size=4 << 30):
    source, target = torch.empty(2, size, dtype=torch.uint8, device="cuda")
    return 2 * size / median_time(lambda: target.copy_(source)) / 1e6


def matmul_speed(size=8192):
    left, right = torch.randn(2, size, size, dtype=torch.float16, device="cuda")
    return 2 * size**3 / median_time(lambda: left @ right) / 1e9


class Peer:
    def __init__(self, arguments):
        self.checkpoint, self.output_len, self.pixels = arguments.checkpoint, arguments.output_len, None
        self.input_len, self.images = arguments.input_len, arguments.images

    def load(self):
        config = transformers.AutoConfig.from_pretrained(self.checkpoint, local_files_only=True)
        options = {"dtype": torch.float16, "device_map": "cuda", "local_files_only": True, "output_loading_info": True}
        kind = getattr(transformers, config.architectures[0])
        self.model, found = kind.from_pretrained(self.checkpoint, **options)
        draw = torch.Generator("cuda").manual_seed(0)
        image_token = getattr(config, "image_token_id", None)
        # Above the special tokens, and below the placeholder of pictures.
        limit = config.get_text_config().vocab_size if image_token is None else image_token
        self.ids = torch.randint(3, limit, (1, self.input_len), generator=draw, device="cuda")
        if image_token is not None and self.images > 0:
            vision = config.vision_config
            features = (vision.image_size // vision.patch_size) ** 2
            features += config.vision_feature_select_strategy == "full"
            pictures = torch.full((1, self.images * features), image_token, device="cuda")
            self.ids = torch.cat([pictures, self.ids], dim=1)
            shape = (self.images, 3, vision.image_size, vision.image_size)
            self.pixels = torch.randn(shape, generator=draw, device="cuda", dtype=torch.float16)
        return {"prompt_tokens": self.ids.shape[1]} | {name: sorted(found[name]) for name in found if found[name]}

    def vision(self):
        return None if self.pixels is None else median_time(lambda: self.model.get_image_features(self.pixels))

    def prefill(self, cache=None):
        pictures = {} if self.pixels is None else {"pixel_values": self.pixels}
        return self.model(self.ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **pictures)

    def prefill_language(self):
        embeddings = self.model.get_input_embeddings()(self.ids)
        return median_time(lambda: self.model(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1))

    def step(self, token, cache):
        return self.model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

    def decode(self, step, cache=None):
        """From one token's end to the next one's; nothing in between waits for the GPU."""
        for steps in (WARM_STEPS, self.output_len):
            if cache is not None:
                cache.reset()
            first = self.prefill(cache)
            token, filled = first.logits[:, -1].argmax(-1, keepdim=True), first.past_key_values
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
            marks[0].record()
            for mark in marks[1:]:
                torch.compiler.cudagraph_mark_step_begin()
                # A graph's output lies in memory that its next run overwrites.
                token = step(token, filled).clone()
                mark.record()
            torch.cuda.synchronize()
        return statistics.median(before.elapsed_time(after) for before, after in zip(marks, marks[1:]))

    def decode_compiled(self):
        rows = self.ids.shape[1] + max(WARM_STEPS, self.output_len)
        cache = transformers.StaticCache(config=self.model.config, max_cache_len=rows)
        return self.decode(torch.compile(self.step, mode="reduce-overhead"), cache)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    for name, default in (("--input-len", 64), ("--images", 1), ("--output-len", 128)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--skip-compile", action="store_true")
    parser.add_argument("--json", required=True, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    peer = Peer(arguments)
    report = {"torch": torch.__version__, "transformers": transformers.__version__, "wall_s": {}}
    sections = {
        "card": torch.cuda.get_device_name, "copy_gb_s": copy_bandwidth, "matmul_tflop_s": matmul_speed,
        "load": peer.load, "vision_ms": peer.vision, "prefill_ms": lambda: median_time(peer.prefill),
        "prefill_language_ms": peer.prefill_language, "decode_eager_ms": lambda: peer.decode(peer.step),
    }
    if not arguments.skip_compile:
        sections["decode_compiled_ms"] = peer.decode_compiled
    for name, action in sections.items():
        start = time.monotonic()
        try:
            report[name] = action()
        except Exception:
            report[name] = {"error": traceback.format_exc(limit=-3)}
        report["wall_s"][name] = round(time.monotonic() - start, 2)
        pathlib.Path(arguments.json).write_text(json.dumps(report, indent=2, default=str) + "\n")
        print(f"{name}: {report[name]}", flush=True)


if __name__ == "__main__":
    main()
