//! TensorRT-LLM's checkpoints: NVIDIA's own files read and written bit by bit, divided among other numbers of ranks, built.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;
#[path = "prequantized/files.rs"]
mod files;
#[path = "trtllm/folders.rs"]
mod folders;
#[path = "prequantized/logits.rs"]
mod logits;
#[path = "trtllm/refused.rs"]
mod refused;

use common::*;
use folders::{QUANTIZED, base, convert, rank_files, ranks};
use graphs::DType;
use logits::{golden, logits, relative};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;
use trtvlm::checkpoint::Checkpoint;

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

/// Key by key, apart from who wrote it.
fn same_config(found: &Path, wanted: &Path) {
    let [found, wanted] = [found, wanted].map(|folder| {
        let mut config = config(folder);
        config.as_object_mut().unwrap().remove("producer").unwrap();
        config
    });
    let keys = |config: &Value| config.as_object().unwrap().keys().cloned().collect::<std::collections::BTreeSet<_>>();
    assert_eq!(keys(&found), keys(&wanted));
    for (key, value) in wanted.as_object().unwrap() {
        assert_eq!(&found[key], value, "{key}");
    }
}

/// What NVIDIA's exporter wrote of the same model, in every bit.
#[test]
fn plain_files_are_nvidias() {
    for count in [1, 2] {
        let root = tempfile::tempdir().unwrap();
        let (model, output) = (root.path().join("base"), root.path().join("converted"));
        base(&model);
        convert(&model, &output, count);
        let peer = fixture(&format!("peers/trtllm-float16-tp{count}"));
        let digests: Value = serde_json::from_slice(&std::fs::read(peer.join("digests.json")).unwrap()).unwrap();
        let (files, wanted) = (rank_files(&output), digests.as_object().unwrap());
        assert_eq!(files.len(), wanted.len());
        for (file, (rank, wanted)) in files.iter().zip(wanted) {
            let digest = |raw: &files::Raw| {
                let digest: String = Sha256::digest(&raw.bytes).iter().map(|byte| format!("{byte:02x}")).collect();
                json!([raw.dtype, raw.shape, digest])
            };
            let found: BTreeMap<&String, Value> = file.iter().map(|(name, raw)| (name, digest(raw))).collect();
            let wanted: BTreeMap<&String, Value> =
                wanted.as_object().unwrap().iter().map(|(name, value)| (name, value.clone())).collect();
            assert_eq!(found, wanted, "{rank} of {count}");
        }
        same_config(&output, &peer);
    }
}

/// One rank's quantized files divided are NVIDIA's for two ranks, and those joined are the one's again.
#[test]
fn quantized_files_are_divided_as_nvidia_does() {
    let root = tempfile::tempdir().unwrap();
    let place = |name: &str| root.path().join(name);
    for name in QUANTIZED {
        ranks(name, &place(name), |_, _| ());
    }
    let (one, two) = (place("trtllm-tp1-w4a16-awq"), place("trtllm-tp2-w4a16-awq"));
    for (from, to, count) in [(&one, &two, 2), (&two, &one, 1)] {
        let output = place(&format!("awq {count}"));
        convert(from, &output, count);
        assert_eq!(rank_files(&output), rank_files(to));
        same_config(&output, to);
    }
    for name in ["trtllm-tp1-w8a16", "trtllm-tp1-w8a8-sq"] {
        let (four, back) = (place(&format!("{name} 4")), place(&format!("{name} back")));
        convert(&place(name), &four, 4);
        convert(&four, &back, 1);
        assert_eq!(rank_files(&back), rank_files(&place(name)));
        same_config(&back, &place(name));
    }
}

/// NVIDIA's own for float16 and INT8; for the others those of a second reading, in Python, of the same files: NVIDIA's are of
/// the model before it was rounded for the export, 0.31 (AWQ) and 0.033 (SmoothQuant) away.
#[test]
fn logits_are_those_of_the_files() {
    let root = tempfile::tempdir().unwrap();
    let mut failed = Vec::new();
    let mut check = |what: String, error: f32, bound: f32| {
        println!("{what}: {error:e}");
        if error >= bound {
            failed.push(format!("{what}: {error:e}"));
        }
    };
    let model = root.path().join("base");
    base(&model);
    let (ids, wanted) = golden(&fixture("peers/trtllm-float16-tp1/golden.safetensors"));
    for count in [1, 2] {
        let folder = root.path().join(format!("plain {count}"));
        convert(&model, &folder, count);
        check(format!("float16 of {count}"), relative(&logits(&folder, &ids), &wanted), 1e-3);
    }
    for name in QUANTIZED {
        let folder = root.path().join(name);
        ranks(name, &folder, |_, _| ());
        let (ids, wanted) = golden(&fixture("peers").join(name).join("golden.safetensors"));
        let found = logits(&folder, &ids);
        let bound = if name.contains("w8a8") { 2e-2 } else { 1e-3 };
        check(name.to_owned(), relative(&found, &wanted), bound);
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// A llama whose key/value heads are fewer than ranks and whose vocabulary does not divide, as it is and with the rest.
fn models(root: &Path) -> Vec<(String, [usize; 2])> {
    let llama = |changes: Value| {
        let mut config = llama_config(json!({ "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 449 }));
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config
    };
    let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64 });
    let t5 = json!({
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 48, "d_kv": 16, "d_ff": 96,
        "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 237, "feed_forward_proj": "relu",
        "tie_word_embeddings": true, "decoder_start_token_id": 3, "torch_dtype": "float32",
    });
    let made = [
        ("llama", llama(json!({})), [2, 4]),
        (
            "llama tied",
            llama(json!({ "tie_word_embeddings": true, "rope_theta": 500000.0, "rope_scaling": llama3 })),
            [4, 2],
        ),
        ("llama biased", llama(json!({ "attention_bias": true, "mlp_bias": true, "rms_norm_eps": 1e-6 })), [2, 1]),
        ("opt", opt_config(json!({ "vocab_size": 449 })), [2, 4]),
        ("opt untied", opt_config(json!({ "tie_word_embeddings": false, "do_layer_norm_before": false })), [4, 1]),
        ("t5", t5, [2, 4]),
    ];
    let mut models = Vec::new();
    for (name, config, counts) in made {
        write_checkpoint(&root.join(name), &config, &random_tensors(&config), DType::Float16, 1);
        models.push((name.to_owned(), counts));
    }
    language_alone("blip2-opt", &root.join("blip2-opt"));
    language_alone("blip2-t5", &root.join("blip2-t5"));
    copy_folder(&fixture("mbart"), &root.join("mbart"));
    models.extend(["blip2-opt", "blip2-t5", "mbart"].map(|name| (name.to_owned(), [2, 1])));
    models
}

/// Every file but the manifest, which has the model's name in it.
fn built(model: &Path, output: &Path, flags: &[&str]) -> BTreeMap<String, Vec<u8>> {
    build_reference(model, output, flags);
    let mut files = contents(output);
    files.remove("manifest.json").unwrap();
    files
}

/// What is built of converted files is what is built of the model itself: weights, networks, configs, tokenizers.
#[test]
fn converted_models_build_the_same() {
    let root = tempfile::tempdir().unwrap();
    let place = |name: &str| root.path().join(name);
    for (name, [first, second]) in models(root.path()) {
        let model = place(&name);
        let (once, again) = (place(&format!("{name} {first}")), place(&format!("{name} {first} {second}")));
        convert(&model, &once, first);
        convert(&once, &again, second);
        // The files do not tell how they came to be.
        let direct = place(&format!("{name} {second}"));
        convert(&model, &direct, second);
        for side in ["", "encoder", "decoder"].map(Path::new) {
            assert_eq!(rank_files(&again.join(side)), rank_files(&direct.join(side)), "{name}");
        }
        let wanted = built(&model, &place(&format!("{name} wanted")), &[]);
        let found = built(&again, &place(&format!("{name} found")), &[]);
        assert!(found == wanted, "{name}");
        let wanted = built(&model, &place(&format!("{name} wanted 2")), &["--tp", "2"]);
        let found = built(&once, &place(&format!("{name} found 2")), &["--tp", "2"]);
        assert!(wanted.keys().any(|file| file.ends_with("rank1.weights.safetensors")) && found == wanted, "{name}");
    }
}

/// Any bytes of any tensor, wherever the ranks' parts meet.
#[test]
fn tensors_are_read_from_any_place() {
    let root = tempfile::tempdir().unwrap();
    for (name, [count, _]) in models(root.path()) {
        let (model, folder) = (root.path().join(&name), root.path().join(format!("{name} converted")));
        convert(&model, &folder, count);
        let [own, joined] = [&model, &folder].map(|folder| Checkpoint::open_folder(folder).unwrap());
        assert_eq!((own.ranks(), joined.ranks()), (None, Some(count)));
        for (tensor, entry) in own.tensors() {
            // Rows before that of position 0 are in no rank's file.
            let skip = if tensor.contains("embed_positions") { 2 * entry.bytes / entry.shape[0] as u64 } else { 0 };
            let Some(found) = joined.tensor(tensor).filter(|_| !tensor.ends_with("coder.embed_tokens.weight")) else {
                let copies = ["lm_head.weight", "coder.embed_tokens.weight"];
                assert!(copies.iter().any(|copy| tensor.ends_with(copy)), "{name} {tensor}");
                continue;
            };
            assert_eq!((&found.shape, found.dtype), (&entry.shape, entry.dtype), "{name} {tensor}");
            for (start, end) in
                [(skip, entry.bytes), (skip + 3, entry.bytes - 1), (entry.bytes / 2 + skip / 2, entry.bytes)]
            {
                let [wanted, found] = [&own, &joined].map(|checkpoint| {
                    let mut bytes = vec![0; (end - start) as usize];
                    checkpoint.read_into(tensor, start, &mut bytes).unwrap();
                    bytes
                });
                assert!(found == wanted, "{name} {tensor} {start}");
            }
            let beyond = joined.read_into(tensor, entry.bytes - 1, &mut [0; 2]).unwrap_err();
            assert!(beyond.to_string().contains("bytes"), "{beyond}");
        }
    }
}

/// The language part of a model with pictures is that model alone.
#[test]
fn language_parts_are_converted() {
    let root = tempfile::tempdir().unwrap();
    let (alone, one, other) = (root.path().join("alone"), root.path().join("one"), root.path().join("other"));
    language_alone("blip2-t5", &alone);
    convert(&fixture("blip2-t5"), &one, 2);
    convert(&alone, &other, 2);
    for side in ["encoder", "decoder"].map(Path::new) {
        assert_eq!(rank_files(&one.join(side)), rank_files(&other.join(side)));
        assert_eq!(config(&one.join(side)), config(&other.join(side)));
    }
    // And can be the language part of its pictures again.
    let (wanted, found) = (root.path().join("wanted"), root.path().join("found"));
    let wanted = built(&fixture("blip2-t5"), &wanted, &[]);
    let found = built(&fixture("blip2-t5"), &found, &["--language", one.to_str().unwrap()]);
    assert!(found == wanted);
}

/// Types are converted once, and scales never.
#[test]
fn types_are_converted() {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("model");
    let config = llama_config(json!({}));
    write_checkpoint(&model, &config, &random_tensors(&config), DType::Float32, 2);
    let (output, half) = (root.path().join("converted"), root.path().join("half"));
    write_checkpoint(&half, &config, &random_tensors(&config), DType::Float16, 1);
    let flags = ["convert", model.to_str().unwrap(), "-o", output.to_str().unwrap(), "--dtype", "float16", "--tp", "2"];
    succeed(&[&flags[..], &["-q"]].concat());
    let direct = root.path().join("direct");
    convert(&half, &direct, 2);
    assert_eq!(rank_files(&output), rank_files(&direct));
    assert_eq!(config_of(&output, "dtype"), "float16");
    let (quantized, bfloat) = (root.path().join("quantized"), root.path().join("bfloat"));
    ranks("trtllm-tp1-w8a16", &quantized, |_, _| ());
    let flags = ["convert", quantized.to_str().unwrap(), "-o", bfloat.to_str().unwrap(), "--dtype", "bfloat16", "-q"];
    succeed(&flags);
    let (before, after) = (rank_files(&quantized).remove(0), rank_files(&bfloat).remove(0));
    for (name, raw) in after {
        match name.ends_with(".ln_f.weight")
            || name.contains("layernorm")
            || name.contains("embedding")
            || name == "lm_head.weight"
        {
            true => assert_eq!(raw.dtype, "BF16", "{name}"),
            false => assert_eq!(Some(&raw), before.get(&name), "{name}"),
        }
    }
}

fn config_of(folder: &Path, key: &str) -> Value {
    config(folder)[key].clone()
}

/// Folders without a tokenizer are built all the same, with a word; one can be given.
#[test]
fn tokenizers_may_be_missing() {
    let root = tempfile::tempdir().unwrap();
    let (model, output) = (root.path().join("model"), root.path().join("engines"));
    ranks("trtllm-tp2-w4a16-awq", &model, |_, _| ());
    let flags = ["--target", "reference"];
    let build = [&["build", model.to_str().unwrap(), "-o", output.to_str().unwrap()], &flags[..]].concat();
    let said = String::from_utf8_lossy(&succeed(&build).stderr).into_owned();
    assert!(said.contains("without a tokenizer") && said.contains("--tokenizer DIR"), "{said}");
    assert!(said.contains("2 ranks in TensorRT-LLM's format") && said.contains("int4_g128 x 14"), "{said}");
    let (code, text) = refuse(&["run", output.to_str().unwrap(), "--prompt", "x"]);
    assert!(code == 1 && text.contains("tokenizer.json") && text.contains("--tokenizer"), "{text}");
    let (code, text) = refuse(&[&build[..], &["--tokenizer", root.path().to_str().unwrap()]].concat());
    assert!(code == 1 && text.contains("holds no tokenizer") && text.contains("hint"), "{text}");
    let tokenizer = fixture("llava-hf");
    let said = succeed(&[&build[..], &["--tokenizer", tokenizer.to_str().unwrap()]].concat());
    assert!(!String::from_utf8_lossy(&said.stderr).contains("tokenizer"));
    assert_eq!(ids(&run(&output, &["--prompt", "a cat", "--max-new-tokens", "3"])[0]).len(), 3);
    let manifest = config_at(&output.join("manifest.json"));
    assert!(manifest["command"].as_str().unwrap().contains(" --tokenizer llava-hf"), "{manifest}");
    let inspected = String::from_utf8_lossy(&succeed(&["inspect", model.to_str().unwrap()]).stdout).into_owned();
    assert!(inspected.contains("2 ranks") && inspected.contains("LlamaForCausalLM"), "{inspected}");
}

fn config_at(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// NVIDIA's folders, and plans that are the model's own bit by bit.
#[cfg(feature = "rtx")]
#[test]
fn engines_build_for_rtx() {
    let root = tempfile::tempdir().unwrap();
    let place = |name: &str| root.path().join(name);
    let flags = ["--target", "rtx,reference", "--gpu", "sm89", "-q"];
    let build = |model: &Path, more: &[&str]| {
        let output = place(&format!("{} engines", model.file_name().unwrap().display()));
        let start = ["build", model.to_str().unwrap(), "-o", output.to_str().unwrap()];
        succeed(&[&start[..], &flags, more].concat());
        contents(&output)
    };
    for name in QUANTIZED {
        ranks(name, &place(name), |_, _| ());
        let files = build(&place(name), &["--dtype", "float16"]);
        assert!(files["language/rank0.engine"].len() > 500_000, "{name}");
    }
    base(&place("base"));
    let wanted = build(&place("base"), &["--tp", "2"]);
    for count in [1, 2] {
        let folder = place(&format!("plain {count}"));
        convert(&place("base"), &folder, count);
        let found = build(&folder, &["--tp", "2"]);
        for file in ["language/rank0.engine", "language/rank1.engine", "language/rank1.weights.safetensors"] {
            assert!(found[file] == wanted[file], "{file} of {count}");
        }
    }
}
