//! `build` for TensorRT-RTX, with the library itself: engines for what the reference runs, and what happens when
//! TensorRT fails.
#![cfg(feature = "rtx")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::DType;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Stdio};

fn build(checkpoint: &Path, output: &Path, flags: &[&str]) {
    let all = [&["build", checkpoint.to_str().unwrap(), "-o", output.to_str().unwrap(), "-q"], flags].concat();
    succeed(&all);
}

fn manifest(directory: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(directory.join("manifest.json")).unwrap()).unwrap()
}

#[test]
fn every_type_and_scheme_builds() {
    let root = tempfile::tempdir().unwrap();
    for (dtype, quant, vision) in [
        ("float16", "none", "none"),
        ("float16", "int8", "int8"),
        ("float16", "int4-g16", "int4-g16"),
        ("bfloat16", "int4-g16", "int8"),
        ("bfloat16", "none", "none"),
        ("float32", "int8", "none"),
        ("float32", "int4-channel", "none"),
    ] {
        let output = root.path().join(format!("{dtype}-{quant}-{vision}"));
        let flags = ["--dtype", dtype, "--quant", quant, "--vision-quant", vision, "--gpu", "sm89,sm120"];
        build(&fixture("llava-hf"), &output, &[&flags[..], &["--max-batch-size", "2"]].concat());
        let entry = &manifest(&output)["targets"]["rtx"];
        assert!(entry["library"].as_str().unwrap().starts_with("TensorRT-RTX 1."), "{entry}");
        assert_eq!(entry["gpus"], json!(["sm89", "sm120"]));
        for engine in ["vision/model.engine", "language/rank0.engine"] {
            let path = output.join(engine);
            let text = succeed(&["inspect", path.to_str().unwrap()]);
            let text = String::from_utf8_lossy(&text.stdout).into_owned();
            assert!(text.contains("for sm89 sm120"), "{engine}: {text}");
        }
    }
}

#[test]
fn calibrated_schemes_build() {
    let root = tempfile::tempdir().unwrap();
    let prose = root.path().join("prose.txt");
    std::fs::write(&prose, "the quick brown fox jumps over the lazy dog ".repeat(8)).unwrap();
    let statistics = root.path().join("statistics");
    let (model, data, statistics) = (fixture("llava-hf"), prose.to_str().unwrap(), statistics.to_str().unwrap());
    let model_name = model.to_str().unwrap();
    succeed(&["calibrate", model_name, "--data", data, "-o", statistics, "-q", "--dtype", "float16", "--window", "8"]);
    for quant in ["int8-sq", "int8-sq-token", "int8-absmax", "int4-awq-g16", "int8-awq", "int4-mse-g16"] {
        let output = root.path().join(quant);
        let flags = ["--dtype", "float16", "--quant", quant, "--calibration", statistics, "--gpu", "sm89,sm120"];
        build(&model, &output, &flags);
        assert_eq!(manifest(&output)["targets"]["rtx"]["gpus"], json!(["sm89", "sm120"]), "{quant}");
        assert_eq!(manifest(&output)["quantization"]["language"], json!(quant));
    }
}

#[test]
fn every_rank_builds() {
    let root = tempfile::tempdir().unwrap();
    for (name, quant, network) in [("llava-hf", "int8", "language"), ("blip2-t5", "none", "decoder")] {
        let output = root.path().join(name);
        build(&fixture(name), &output, &["--dtype", "float16", "--quant", quant, "--tp", "2", "--target", "rtx"]);
        for rank in ["rank0", "rank1"] {
            let engine = output.join(format!("{network}/{rank}.engine"));
            assert!(std::fs::read(engine).unwrap().windows(9).any(|text| text == b"allreduce"), "{name} {rank}");
        }
    }
}

#[test]
fn blip2_and_opt_alone_build() {
    let root = tempfile::tempdir().unwrap();
    for (dtype, quant, vision) in
        [("float16", "none", "none"), ("float16", "int4-g16", "int4"), ("bfloat16", "int8", "int8")]
    {
        let output = root.path().join(format!("{dtype}-{quant}-{vision}"));
        let flags = ["--dtype", dtype, "--quant", quant, "--vision-quant", vision, "--gpu", "sm89,sm120"];
        build(&fixture("blip2-opt"), &output, &[&flags[..], &["--max-batch-size", "2"]].concat());
        assert_eq!(manifest(&output)["targets"]["rtx"]["gpus"], json!(["sm89", "sm120"]));
    }
    let alone = root.path().join("opt");
    language_alone("blip2-opt", &alone);
    build(&alone, &root.path().join("alone"), &["--dtype", "bfloat16", "--quant", "int8"]);
    let config = opt_config(json!({ "do_layer_norm_before": false, "word_embed_proj_dim": 48, "enable_bias": false }));
    let other = root.path().join("other");
    write_checkpoint(&other, &config, &random_tensors(&config), DType::Float16, 1);
    build(&other, &root.path().join("other-engines"), &["--quant", "int4-g16"]);
}

#[test]
fn blip2_with_t5_builds() {
    let root = tempfile::tempdir().unwrap();
    for (dtype, quant) in [("float16", "none"), ("bfloat16", "int8"), ("float16", "int4-g16")] {
        let output = root.path().join(format!("{dtype}-{quant}"));
        let flags = ["--dtype", dtype, "--quant", quant, "--gpu", "sm89,sm120", "--max-batch-size", "2"];
        build(&fixture("blip2-t5"), &output, &flags);
        for engine in ["vision/model", "encoder/rank0", "cross/rank0", "decoder/rank0"] {
            assert!(output.join(format!("{engine}.engine")).is_file(), "{engine}");
        }
    }
}

#[test]
fn vila_builds() {
    let root = tempfile::tempdir().unwrap();
    for name in ["vila-v15-siglip", "vila-v10-clip"] {
        for (dtype, quant) in [("float16", "none"), ("float16", "int4-g16"), ("bfloat16", "int8")] {
            let output = root.path().join(format!("{name}-{dtype}-{quant}"));
            let flags = ["--dtype", dtype, "--quant", quant, "--vision-quant", quant, "--gpu", "sm89,sm120"];
            build(&fixture(name), &output, &[&flags[..], &["--max-batch-size", "2"]].concat());
            assert_eq!(manifest(&output)["targets"]["rtx"]["gpus"], json!(["sm89", "sm120"]));
        }
    }
}

#[test]
fn nougat_and_mbart_build() {
    let root = tempfile::tempdir().unwrap();
    for (dtype, quant) in [("float16", "none"), ("float16", "int4-g16"), ("bfloat16", "int8")] {
        let output = root.path().join(format!("{dtype}-{quant}"));
        let flags = ["--dtype", dtype, "--quant", quant, "--vision-quant", quant, "--gpu", "sm89,sm120"];
        build(&fixture("nougat"), &output, &[&flags[..], &["--max-batch-size", "2"]].concat());
        assert_eq!(manifest(&output)["targets"]["rtx"]["gpus"], json!(["sm89", "sm120"]));
        for engine in ["vision/model", "cross/rank0", "decoder/rank0"] {
            assert!(output.join(format!("{engine}.engine")).is_file(), "{engine}");
        }
    }
    let config = json!({
        "architectures": ["MBartForConditionalGeneration"], "d_model": 64, "vocab_size": 448, "encoder_layers": 1,
        "encoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_layers": 2, "decoder_ffn_dim": 80,
        "decoder_attention_heads": 2, "max_position_embeddings": 128, "scale_embedding": true,
    });
    let checkpoint = root.path().join("mbart");
    write_checkpoint(&checkpoint, &config, &random_tensors(&config), DType::Float16, 1);
    build(&checkpoint, &root.path().join("mbart-engines"), &["--quant", "int4-g16", "--gpu", "sm89,sm120"]);
}

#[test]
fn other_shapes_build() {
    let root = tempfile::tempdir().unwrap();
    let changes = [
        json!({ "num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": true }),
        json!({ "num_key_value_heads": 2, "attention_bias": true, "mlp_bias": true, "hidden_act": "gelu" }),
        json!({ "hidden_size": 36, "head_dim": 18, "num_attention_heads": 2, "intermediate_size": 50,
                "rope_scaling": { "rope_type": "linear", "factor": 2.0 } }),
    ];
    for (number, changes) in changes.into_iter().enumerate() {
        let config = llama_config(changes);
        let checkpoint = root.path().join(format!("checkpoint-{number}"));
        write_checkpoint(&checkpoint, &config, &random_tensors(&config), DType::Bfloat16, 2);
        for quant in ["none", "int8"] {
            build(&checkpoint, &root.path().join(format!("{number}-{quant}")), &["--quant", quant]);
        }
    }
}

#[test]
fn other_ways_to_pick_features_build() {
    let root = tempfile::tempdir().unwrap();
    let config = llava_config(json!({
        "vision_feature_select_strategy": "full", "vision_feature_layer": [-2, -1], "multimodal_projector_bias": false,
    }));
    let checkpoint = root.path().join("checkpoint");
    write_checkpoint(&checkpoint, &config, &random_tensors(&config), DType::Float16, 1);
    build(&checkpoint, &root.path().join("engines"), &["--vision-quant", "int4-channel", "--max-batch-size", "3"]);
}

#[test]
fn every_gpu_builds_what_it_can() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("engines");
    build(
        &fixture("llava-hf"),
        &output,
        &["--dtype", "float16", "--quant", "int8", "--gpu", "sm75,sm80,sm86,sm89,sm120,sm121,sm75"],
    );
    let gpus = ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"];
    assert_eq!(manifest(&output)["targets"]["rtx"]["gpus"], json!(gpus));
    for flags in [["--quant", "int4-g16"], ["--dtype", "bfloat16"]] {
        let llava = fixture("llava-hf");
        let base = ["build", llava.to_str().unwrap(), "-o", output.to_str().unwrap(), "--gpu", "sm89,sm75"];
        let (code, text) = refuse(&[&base[..], &flags].concat());
        assert!(code == 1 && text.contains("cannot be built for sm75") && text.contains("hint:"), "{text}");
    }
}

/// The engines hold the very bytes that the reference reads: its weights lie in the plan.
#[test]
fn engines_hold_the_weights_of_the_reference() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("engines");
    build(&fixture("llava-hf"), &output, &["--dtype", "float16", "--quant", "int8"]);
    let plan = std::fs::read(output.join("language/rank0.engine")).unwrap();
    let weights = std::fs::read(output.join("language/weights.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let mut found = 0;
    for (name, tensor) in file.iter() {
        let head = &tensor.data()[..tensor.data().len().min(48)];
        found += usize::from(plan.windows(head.len()).any(|window| window == head));
        assert!(!name.is_empty());
    }
    // The builder rewrites some (it may transpose or join them), most it keeps.
    assert!(found * 2 > file.len(), "{found} of {} tensors", file.len());
}

#[test]
fn two_builds_are_equal_byte_for_byte() {
    let root = tempfile::tempdir().unwrap();
    let built = |name: &str| {
        let output = root.path().join(name);
        build(&fixture("llava-hf"), &output, &["--dtype", "float16", "--quant", "int4-g16"]);
        contents(&output)
    };
    let (first, second) = (built("a"), built("with a longer name"));
    assert_eq!(first.keys().collect::<Vec<_>>(), second.keys().collect::<Vec<_>>());
    let differing: Vec<&String> = first.keys().filter(|name| first[*name] != second[*name]).collect();
    // On a machine with several times more work than cores two builds in five were seen to differ in one engine; without
    // what makes builds repeatable hardly two of any number are equal, so a third one still tells.
    if !differing.is_empty() {
        assert!(differing.iter().all(|name| name.ends_with(".engine") || *name == "manifest.json"), "{differing:?}");
        let third = built("b");
        assert!(third == first || third == second, "no two of three builds are equal: {differing:?}");
    }
}

#[test]
fn engines_alone_take_weights_from_the_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let both = root.path().join("both");
    let alone = root.path().join("alone");
    build(&fixture("llava-hf"), &both, &[]);
    build(&fixture("llava-hf"), &alone, &["--target", "rtx"]);
    for engine in ["vision/model.engine", "language/rank0.engine"] {
        let size = |folder: &Path| std::fs::metadata(folder.join(engine)).unwrap().len();
        assert_eq!(size(&both), size(&alone), "{engine}");
    }
    assert!(!alone.join("language/weights.safetensors").exists());
    let (code, text) = refuse(&["run", alone.to_str().unwrap(), "--prompt", "a"]);
    assert!(code == 1 && text.contains("was not built for target `reference`, only for rtx"), "{text}");
}

#[test]
fn the_demo_builds_and_answers() {
    let root = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_trtvlm"))
        .args(["demo", "-q", "-o", root.path().join("engines").to_str().unwrap()])
        .env_remove("TRTVLM_DEMO_MODEL")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for wanted in
        ["float16 answers `", "INT4 answers", "they agree on the first", "TensorRT-RTX 1.", "trtvlm build llava-hf"]
    {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    for engine in ["tiny/none/vision/model.engine", "tiny/int4/language/rank0.engine"] {
        assert!(root.path().join("engines").join(engine).is_file(), "{engine}");
    }
}

#[test]
fn a_killed_build_leaves_the_previous_directory() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("engines");
    build(&fixture("llava-hf"), &output, &["--quant", "int8"]);
    let before = contents(&output);
    for delay in [0, 100, 300, 600] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_trtvlm"))
            .args(["build", fixture("llava-hf").to_str().unwrap(), "-o", output.to_str().unwrap()])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(contents(&output) == before, "killed after {delay} ms");
    }
    build(&fixture("llava-hf"), &output, &["--quant", "int8"]);
    assert!(contents(&output) == before);
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1, "what the killed builds left is swept away");
}

#[test]
fn a_library_that_is_none_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let library = root.path().join("libtensorrt_rtx.so.1");
    std::fs::write(&library, b"not a library").unwrap();
    let output = root.path().join("engines");
    let build = Command::new(env!("CARGO_BIN_EXE_trtvlm"))
        .args(["build", fixture("llava-hf").to_str().unwrap(), "-o", output.to_str().unwrap()])
        .env("TRTVLM_TENSORRT", &library)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&build.stderr).into_owned();
    assert_eq!(build.status.code(), Some(5), "{text}");
    assert!(text.contains("cannot load") && text.contains("hint: `trtvlm backend list`"), "{text}");
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1, "no half directory");
}
