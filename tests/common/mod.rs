//! What several test files need: the binary, fixtures, checkpoints made on the spot.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
use graphs::{DType, Logits, Model};
use half::{bf16, f16};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

pub(crate) fn trtvlm(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_trtvlm")).args(arguments).output().unwrap()
}

/// Runs a command that must succeed.
pub(crate) fn succeed(arguments: &[&str]) -> Output {
    let output = trtvlm(arguments);
    assert!(output.status.success(), "{arguments:?}\n{}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Runs a command that must be refused; gives its exit code and standard error.
pub(crate) fn refuse(arguments: &[&str]) -> (i32, String) {
    let output = trtvlm(arguments);
    assert!(!output.status.success(), "{arguments:?} was taken");
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The outputs of `run --json`.
pub(crate) fn run(directory: &Path, arguments: &[&str]) -> Vec<Value> {
    let all = [&["run", directory.to_str().unwrap(), "--json", "-q"], arguments].concat();
    let value: Value = serde_json::from_slice(&succeed(&all).stdout).unwrap();
    assert!(value["timings"]["decode_seconds"].is_number());
    value["outputs"].as_array().unwrap().clone()
}

pub(crate) fn ids(output: &Value) -> Vec<u64> {
    output["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

/// A LLaMA config; keys of `changes` replace or join those of the base.
pub(crate) fn llama_config(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 448, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32",
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// Tensors by name: shape and values.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Random weights for every tensor that the model reads, the same for the same names.
pub(crate) fn random_tensors(config: &Value) -> Tensors {
    let networks = Model::from_config(config).unwrap().networks(DType::Float32, Logits::Last).unwrap();
    let mut tensors = Tensors::new();
    for (_, weight) in networks.iter().flat_map(graphs::Network::weights) {
        for (name, shape) in weight.tensors() {
            let count: usize = shape.iter().product();
            let mut state =
                name.bytes().fold(0x9E37_79B9u32, |state, byte| (state ^ u32::from(byte)).wrapping_mul(0x0100_0193));
            let scale = 1.5 / (*shape.last().unwrap() as f32).sqrt();
            let values = (0..count).map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (f32::from((state >> 16) as u16) / 32768.0 - 1.0) * scale
                    + if name.contains("norm") { 1.0 } else { 0.0 }
            });
            tensors.insert(name.to_owned(), (shape.to_vec(), values.collect()));
        }
    }
    tensors
}

/// Writes a checkpoint with the tokenizer of the LLaVA fixture, its tensors dealt out over `shards` files.
pub(crate) fn write_checkpoint(folder: &Path, config: &Value, tensors: &Tensors, dtype: DType, shards: usize) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json"] {
        std::fs::copy(fixture("llava-hf").join(name), folder.join(name)).unwrap();
    }
    let mut weight_map = serde_json::Map::new();
    for shard in 0..shards {
        let file = match shards {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{shards:05}.safetensors", shard + 1),
        };
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, (shape, values)) in tensors.iter().skip(shard).step_by(shards) {
            let start = data.len();
            for &value in values {
                match dtype {
                    DType::Float16 => data.extend(f16::from_f32(value).to_le_bytes()),
                    DType::Bfloat16 => data.extend(bf16::from_f32(value).to_le_bytes()),
                    _ => data.extend(value.to_le_bytes()),
                }
            }
            let entry = json!({ "dtype": dtype.safetensors(), "shape": shape, "data_offsets": [start, data.len()] });
            header.insert(name.clone(), entry);
            weight_map.insert(name.clone(), json!(file));
        }
        let header = Value::Object(header).to_string().into_bytes();
        let bytes = [&(header.len() as u64).to_le_bytes(), &header[..], &data[..]].concat();
        std::fs::write(folder.join(file), bytes).unwrap();
    }
    if shards > 1 {
        let index = json!({ "metadata": {}, "weight_map": weight_map });
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

/// Copies a folder with those in it; what is read-only may be written there.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy_folder(&path, &target),
            false => std::fs::write(&target, std::fs::read(&path).unwrap()).unwrap(),
        }
    }
}

/// Changes a JSON file in place.
pub(crate) fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

/// Builds for the reference with extra flags.
pub(crate) fn build_reference(checkpoint: &Path, output: &Path, flags: &[&str]) {
    let all = [
        &["build", checkpoint.to_str().unwrap(), "-o", output.to_str().unwrap(), "--target", "reference", "-q"],
        flags,
    ];
    succeed(&all.concat());
}

/// Every file of a folder with its content, the build time in the manifest taken out.
pub(crate) fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(root: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, files);
                continue;
            }
            let name = path.strip_prefix(root).unwrap().display().to_string();
            let mut content = std::fs::read(&path).unwrap();
            if name == "manifest.json" {
                let mut manifest: Value = serde_json::from_slice(&content).unwrap();
                assert!(manifest.as_object_mut().unwrap().remove("built_at").is_some());
                content = manifest.to_string().into_bytes();
            }
            files.insert(name, content);
        }
    }
    let mut files = BTreeMap::new();
    walk(folder, folder, &mut files);
    files
}

/// A LLaVA config around [`llama_config`], with CLIP sizes other than the fixtures'.
pub(crate) fn llava_config(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 400,
        "text_config": llama_config(json!({ "num_key_value_heads": 2, "attention_bias": true })),
        "vision_config": { "model_type": "clip_vision_model", "hidden_size": 40, "intermediate_size": 72,
            "num_hidden_layers": 3, "num_attention_heads": 5, "image_size": 28, "patch_size": 7 },
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// An OPT config; keys of `changes` replace or join those of the base.
pub(crate) fn opt_config(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 64, "ffn_dim": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 448, "max_position_embeddings": 128,
        "torch_dtype": "float32",
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// The language part of a fixture as a checkpoint of its own, with the fixture's tokenizer.
pub(crate) fn language_alone(name: &str, folder: &Path) {
    part_of(name, folder, |name| name.strip_prefix("language_model."));
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(fixture(name).join(file), folder.join(file)).unwrap();
    }
    let config: Value = serde_json::from_slice(&std::fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
    let mut config = config["text_config"].clone();
    let t5 = config["model_type"] == "t5";
    config["architectures"] = json!([if t5 { "T5ForConditionalGeneration" } else { "OPTForCausalLM" }]);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

/// Writes the tensors of a fixture that `rename` keeps, under their new names.
pub(crate) fn part_of(name: &str, folder: &Path, rename: impl Fn(&str) -> Option<&str>) {
    std::fs::create_dir_all(folder).unwrap();
    let bytes = std::fs::read(fixture(name).join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<(String, safetensors::tensor::TensorView<'_>)> =
        file.iter().filter_map(|(name, view)| Some((rename(name)?.to_owned(), view))).collect();
    safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors")).unwrap();
}
