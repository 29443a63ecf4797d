//! Build time and memory of TensorRT-RTX engines of a LLaMA-7B shape, and how fast a plan of a whole LLaVA-1.5-7B is.
//! `cargo bench -p trtvlm --bench build`; needs the library (`trtvlm backend install rtx`), 4 GiB of disk and minutes.
//! Prints tables, asserts nothing about time. `TRTVLM_BENCH_LAYERS` sets the layers (4).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a bench ends where it cannot go on")]
use graphs::{DType, Logits, Model};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

fn trtvlm(arguments: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_trtvlm")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A checkpoint of float16 tensors: random ones, or holes in the file where only headers matter.
fn write(folder: &Path, config: &Value, random: bool) -> u64 {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let networks = Model::from_config(config).unwrap().networks(DType::Float16, Logits::Last).unwrap();
    let mut tensors: std::collections::BTreeMap<String, Vec<usize>> = Default::default();
    for (_, weight) in networks.iter().flat_map(graphs::Network::weights) {
        tensors.extend(weight.tensors().into_iter().map(|(name, shape)| (name.to_owned(), shape.to_vec())));
    }
    let (mut header, mut end) = (serde_json::Map::new(), 0u64);
    for (name, shape) in &tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        header.insert(name.clone(), json!({ "dtype": "F16", "shape": shape, "data_offsets": [start, end] }));
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    while !header.len().is_multiple_of(8) {
        header.push(b' ');
    }
    let mut file = BufWriter::with_capacity(1 << 20, File::create(folder.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    if !random {
        file.flush().unwrap();
        file.get_ref().set_len(8 + header.len() as u64 + end).unwrap();
        return end;
    }
    let mut state = 1u64;
    let mut block = vec![0u8; 1 << 20];
    let mut left = end as usize;
    while left > 0 {
        for pair in block.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Four numbers of magnitude 2^-7 to 2^-6.
            let bits = (state >> 8) & 0x83FF_83FF_83FF_83FF | 0x2000_2000_2000_2000;
            pair.copy_from_slice(&bits.to_le_bytes());
        }
        let size = left.min(block.len());
        file.write_all(&block[..size]).unwrap();
        left -= size;
    }
    file.flush().unwrap();
    end
}

fn llama(layers: usize, vocab: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": layers, "num_attention_heads": 32, "vocab_size": vocab,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "torch_dtype": "float16",
    })
}

fn builds(root: &Path) {
    let layers = std::env::var("TRTVLM_BENCH_LAYERS").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    let checkpoint = root.join("llama");
    let bytes = write(&checkpoint, &llama(layers, 64), true);
    println!("{layers} layers of LLaMA-7B, {:.0} MiB of float16 weights, for sm89", bytes as f64 / 1048576.0);
    println!(
        "{:<14} {:>10} {:>10} {:>12} {:>16} {:>10}",
        "quantization", "total s", "engine s", "engine MiB", "own memory MiB", "x weights"
    );
    for quant in ["none", "int8", "int4"] {
        let output = root.join(quant);
        let start = Instant::now();
        let report = trtvlm(&[
            "build",
            checkpoint.to_str().unwrap(),
            "-o",
            output.to_str().unwrap(),
            "--target",
            "rtx",
            "--quant",
            quant,
            "--max-input-len",
            "2048",
            "--max-output-len",
            "512",
            "--json",
            "-q",
        ]);
        let total = start.elapsed().as_secs_f64();
        let engine = &report["engines"][0];
        let mib = |key: &str| engine[key].as_f64().unwrap() / 1048576.0;
        let factor = match quant {
            "int8" => 0.5,
            "int4" => 0.25 * (1.0 + 4.0 / 128.0),
            _ => 1.0,
        };
        let weights = bytes as f64 * factor / 1048576.0;
        println!(
            "{quant:<14} {total:>10.1} {:>10.1} {:>12.0} {:>16.0} {:>10.2}",
            engine["seconds"].as_f64().unwrap(),
            mib("bytes"),
            mib("peak_own_memory_bytes"),
            mib("peak_own_memory_bytes") / weights
        );
        std::fs::remove_dir_all(&output).unwrap();
    }
    std::fs::remove_dir_all(&checkpoint).unwrap();
}

fn plans(root: &Path) {
    let config = json!({
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
        "text_config": llama(32, 32064),
        "vision_config": { "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14 },
    });
    let checkpoint = root.join("llava");
    let bytes = write(&checkpoint, &config, false);
    println!("\nplan of LLaVA-1.5-7B, {:.1} GiB (headers only, the rest holes)", bytes as f64 / 1073741824.0);
    for quant in ["none", "int4"] {
        let start = Instant::now();
        let report = trtvlm(&["plan", checkpoint.to_str().unwrap(), "--quant", quant, "--json", "-q"]);
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        let memory = report["networks"][1]["build_memory_bytes"].as_f64().unwrap() / 1073741824.0;
        println!("{quant:<14} {milliseconds:>8.0} ms, language engine builds in about {memory:.1} GiB of own memory");
    }
}

fn main() {
    let root = tempfile::tempdir().unwrap();
    builds(root.path());
    plans(root.path());
}
