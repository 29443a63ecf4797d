//! `synth`: checkpoints with random weights, through the binary and back in.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::interpret::{Array, Caches, Data, Interpreter};
use graphs::{DType, Logits};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use trtvlm::checkpoint::Checkpoint;
use trtvlm::processor::Processor;
use trtvlm::source::{CheckpointValues, ModelSource};

fn open(folder: &Path) -> ModelSource {
    ModelSource::new(Checkpoint::open_folder(folder).unwrap()).unwrap()
}

fn synth(config: &str, output: &Path, flags: &[&str]) {
    succeed(&[&["synth", config, "-o", output.to_str().unwrap(), "-q"], flags].concat());
}

fn fixture_config() -> String {
    fixture("llava-hf").join("config.json").display().to_string()
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let root = tempfile::tempdir().unwrap();
    let folder = |name: &str| root.path().join(name);
    synth(&fixture_config(), &folder("one"), &[]);
    synth(fixture("llava-hf").to_str().unwrap(), &folder("other"), &["--seed", "0"]);
    synth(&fixture_config(), &folder("seed"), &["--seed", "1"]);
    let mut alone = Command::new(env!("CARGO_BIN_EXE_trtvlm"));
    alone.args(["synth", &fixture_config(), "-o", folder("alone").to_str().unwrap(), "-q"]);
    assert!(alone.env("RAYON_NUM_THREADS", "1").output().unwrap().status.success());
    let one = contents(&folder("one"));
    assert_eq!(one, contents(&folder("other")));
    assert_eq!(one, contents(&folder("alone")));
    let other = contents(&folder("seed"));
    let differing: Vec<&String> = one.keys().filter(|name| one[*name] != other[*name]).collect();
    assert_eq!(differing, ["model.safetensors"]);
    let names: Vec<&str> = one.keys().map(String::as_str).collect();
    let wanted = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, wanted);
}

/// Every intermediate result of every network, for random tokens and a random picture; gives the largest.
fn largest(source: &ModelSource, compute: DType) -> BTreeMap<String, f32> {
    let values = CheckpointValues { source, compute };
    let mut found = BTreeMap::new();
    let mut state = 1u32;
    let mut random = |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % below
    };
    let mut table = Array::float([1, source.facts().hidden], vec![0.0; source.facts().hidden]);
    for network in source.networks(DType::Float32, Logits::All).unwrap() {
        let name = network.name.clone();
        let inputs = if name == "vision" {
            let size = source.facts().pictures.unwrap().size;
            let pixels = (0..3 * size[0] * size[1]).map(|_| random(4000) as f32 / 1000.0 - 2.0).collect();
            BTreeMap::from([("input", Array::float([1, 3, size[0], size[1]], pixels))])
        } else {
            let rows = table.shape[0];
            let vocab = source.facts().vocab;
            let mut ids: Vec<i32> = (0..24).map(|_| random(vocab as u32) as i32).collect();
            if source.facts().pictures.is_some() {
                ids.extend((0..rows).map(|row| (vocab + row) as i32));
            }
            let tokens = ids.len();
            BTreeMap::from([
                ("input_ids", Array::int([1, tokens], ids)),
                ("position_ids", Array::int([1, tokens], (0..tokens as i32).collect())),
                ("past_lengths", Array::int([1], vec![0])),
                ("sequence_lengths", Array::int([1], vec![tokens as i32])),
                ("prompt_embedding_table", table.clone()),
            ])
        };
        let mut caches = Caches::new(&network, 1, 64);
        let mut peak = 0f32;
        let mut tap = |node: &graphs::Node, array: &Array| {
            if let Data::Float(data) = &array.data {
                assert!(data.iter().all(|value| value.is_finite()), "`{}` of {name}", node.path);
                peak = data.iter().fold(peak, |peak, value| peak.max(value.abs()));
            }
        };
        let interpreter = Interpreter::new(network, &values).unwrap();
        let outputs = interpreter.run(&inputs, &mut caches, Some(&mut tap)).unwrap();
        if let Some(output) = outputs.get("output") {
            table = Array { shape: output.shape[1..].to_vec(), data: output.data.clone() };
        }
        found.insert(name, peak);
    }
    found
}

#[test]
fn a_config_by_path_becomes_a_checkpoint_that_runs() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("checkpoint");
    synth(&fixture_config(), &folder, &["--layers", "5", "--dtype", "bfloat16"]);
    let source = open(&folder);
    assert_eq!((source.facts().layers, source.dtype()), (5, DType::Bfloat16));
    let config = source.checkpoint.config();
    assert_eq!((&config["torch_dtype"], &config["dtype"]), (&json!("bfloat16"), &json!("bfloat16")));
    assert_eq!(config["vision_config"]["num_hidden_layers"], 3);
    let largest = largest(&source, DType::Bfloat16);
    assert!(largest["vision"] < 100.0 && largest["language"] < 100.0, "{largest:?}");
    // Bytes go in and come out, and the picture's placeholder has the id that the config names.
    let processor = Processor::open(&folder).unwrap();
    assert_eq!(processor.image.unwrap().size(), Some((28, 28)));
    let text = processor.text;
    let ids = text.encode("<image> Grüße, 世界\n", true).unwrap();
    assert_eq!((ids[0], ids[1], text.token_id("<image>"), text.eos_ids()), (1, 400, Some(400), &[2][..]));
    assert_eq!(ids.len(), 2 + " Grüße, 世界\n".len());
    assert_eq!(text.decode(&ids).unwrap(), " Grüße, 世界\n");
}

#[test]
fn build_and_run_take_it() {
    let root = tempfile::tempdir().unwrap();
    let (folder, output, black) =
        (root.path().join("checkpoint"), root.path().join("engines"), root.path().join("black.png"));
    synth(&fixture_config(), &folder, &[]);
    build_reference(&folder, &output, &["--quant", "int4-g16"]);
    image::RgbImage::new(40, 30).save(&black).unwrap();
    let found = run(&output, &["--image", black.to_str().unwrap(), "--prompt", "What?", "--max-new-tokens", "6"]);
    assert!(!ids(&found[0]).is_empty());
}

/// VILA's three folders, each with its config; a vocabulary of 400 has room for the bytes.
#[test]
fn parts_are_written_into_their_folders() {
    let root = tempfile::tempdir().unwrap();
    let (folder, output, black) =
        (root.path().join("checkpoint"), root.path().join("engines"), root.path().join("black.png"));
    let config = fixture("vila-v15-siglip").join("config.json");
    synth(&config.display().to_string(), &folder, &["--layers", "3"]);
    let files = ["llm/model.safetensors", "vision_tower/preprocessor_config.json", "mm_projector/config.json"];
    assert!(files.iter().all(|file| folder.join(file).is_file()) && !folder.join("model.safetensors").exists());
    let source = open(&folder);
    assert_eq!((source.facts().layers, source.checkpoint.folders().len()), (3, 4));
    assert!(source.coverage().ignored.is_empty() && source.coverage().unused.is_empty());
    build_reference(&folder, &output, &[]);
    image::RgbImage::new(40, 30).save(&black).unwrap();
    let black = black.display().to_string();
    let found = run(&output, &["--image", &black, "--prompt", "<image>What?", "--max-new-tokens", "6"]);
    assert!(!ids(&found[0]).is_empty());
    let again = root.path().join("again");
    synth(&config.display().to_string(), &again, &["--layers", "3"]);
    assert_eq!(contents(&folder), contents(&again));
}

/// The smallest shape: 49152 rows of a tied embedding, and layers to the same scheme.
#[test]
fn a_named_shape_has_the_statistics_of_its_kinds() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("checkpoint");
    std::fs::create_dir(&folder).unwrap();
    synth("smollm2-135m", &folder, &["--layers", "2"]);
    let source = open(&folder);
    assert!(source.coverage().ignored.is_empty() && source.coverage().unused.is_empty());
    for (name, mean, deviation) in [
        ("model.embed_tokens.weight", 0.0, 1.0),
        ("model.layers.0.self_attn.k_proj.weight", 0.0, 576f64.sqrt().recip()),
        ("model.layers.1.mlp.down_proj.weight", 0.0, 1536f64.sqrt().recip()),
        ("model.norm.weight", 1.0, 0.1),
    ] {
        let entry = source.checkpoint.tensor(name).unwrap();
        let mut bytes = vec![0; entry.bytes as usize];
        source.checkpoint.read_into(name, 0, &mut bytes).unwrap();
        let values: Vec<f64> =
            bytes.chunks_exact(2).map(|pair| half::f16::from_le_bytes([pair[0], pair[1]]).to_f64()).collect();
        let count = values.len() as f64;
        let found = values.iter().sum::<f64>() / count;
        let spread = (values.iter().map(|value| (value - found).powi(2)).sum::<f64>() / count).sqrt();
        // Five standard errors, or 2 percent where that is more.
        let error = 5.0 * deviation / count.sqrt();
        assert!((found - mean).abs() < error, "{name}: mean {found}");
        assert!((spread - deviation).abs() < (0.02 * deviation).max(error), "{name}: deviation {spread}");
    }
    let largest = largest(&source, DType::Float16);
    assert!(largest["language"] < 1000.0, "{largest:?}");
}

#[test]
fn other_families_run_too() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("checkpoint");
    synth(fixture("blip2-opt").to_str().unwrap(), &folder, &["--layers", "3"]);
    let source = open(&folder);
    assert_eq!(source.facts().layers, 3);
    let largest = largest(&source, DType::Float16);
    assert!(largest["vision"] < 100.0 && largest["language"] < 100.0, "{largest:?}");
}

#[test]
fn what_cannot_be_written_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name).display().to_string();
    let full = path("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(path("full/file"), "kept").unwrap();
    std::fs::write(path("gpt.json"), json!({ "architectures": ["GPT2LMHeadModel"] }).to_string()).unwrap();
    std::fs::write(path("broken.json"), "{").unwrap();
    std::fs::write(path("tiny.json"), llama_config(json!({ "vocab_size": 200 })).to_string()).unwrap();
    let cases: [(&[&str], i32, &str); 9] = [
        (&["lava-1.5-7b", "-o", "x"], 1, "known shapes are llava-1.5-7b, "),
        (&["smollm2-135m", "-o", &full], 1, "exists and is not an empty folder"),
        (&["smollm2-135m", "-o", &path("full/file")], 1, "exists and is not an empty folder"),
        (&["smollm2-135m", "-o", "x", "--dtype", "int8"], 2, "wanted float16, bfloat16 or float32"),
        (&["smollm2-135m", "-o", "x", "--dtype", "auto"], 2, "wanted float16, bfloat16 or float32"),
        (&["smollm2-135m", "-o", "x", "--layers", "0"], 1, "num_hidden_layers"),
        (&[&path("gpt.json"), "-o", "x"], 1, "`GPT2LMHeadModel` is not supported"),
        (&[&path("broken.json"), "-o", "x"], 1, "is not valid JSON"),
        (&[&path("tiny.json"), "-o", "x"], 1, "a vocabulary of 200 is too small"),
    ];
    for (arguments, code, message) in cases {
        let (found, error) = refuse(&[&["synth"], arguments].concat());
        assert_eq!(found, code, "{arguments:?}: {error}");
        assert!(error.contains(message), "{arguments:?}: {error}");
    }
    assert!(!Path::new("x").exists());
    assert_eq!(std::fs::read_to_string(path("full/file")).unwrap(), "kept");
}

#[test]
fn the_report_is_there_as_json() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("a/new/folder");
    let output = succeed(&["synth", &fixture_config(), "-o", folder.to_str().unwrap(), "--json", "-q"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["files"], json!(["model.safetensors"]));
    assert_eq!(report["bytes"].as_u64().unwrap(), 2 * report["values"].as_u64().unwrap());
    assert_eq!(report["tensors"], open(&folder).checkpoint.tensors().len());
}
