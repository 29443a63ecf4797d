//! `--kv-cache int8`: what is built and said, and which targets refuse it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;
use common::*;
use serde_json::Value;
use std::path::Path;

const INT8: [&str; 2] = ["--kv-cache", "int8"];

fn config(directory: &Path, network: &str) -> Value {
    let bytes = std::fs::read(directory.join(network).join("config.json")).unwrap();
    serde_json::from_slice::<Value>(&bytes).unwrap()["pretrained_config"]["quantization"].clone()
}

/// Every attention over a cache of a network, as text.
fn cached(directory: &Path, network: &str) -> Vec<String> {
    let text = std::fs::read_to_string(directory.join(network).join("network.txt")).unwrap();
    text.lines().filter(|line| line.contains("\"cache\":")).map(str::to_owned).collect()
}

#[test]
fn every_family_runs_with_it() {
    let root = tempfile::tempdir().unwrap();
    let picture = root.path().join("picture.png");
    image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([(x * 6) as u8, (y * 8) as u8, 99])).save(&picture).unwrap();
    let picture = picture.to_str().unwrap();
    for (name, network, prompt) in [
        ("llava-hf", "language", true),
        ("blip2-opt", "language", true),
        ("blip2-t5", "decoder", true),
        ("nougat", "decoder", false),
    ] {
        let answers = [&[][..], &INT8].map(|flags| {
            let output = root.path().join(format!("{name}-{}", flags.len()));
            build_reference(&fixture(name), &output, &[&["--dtype", "float32"], flags].concat());
            let int8 = !flags.is_empty();
            let found = cached(&output, network);
            assert!(
                !found.is_empty() && found.iter().all(|line| line.contains("\"int8_cache\":true") == int8),
                "{found:?}"
            );
            let kept = &config(&output, network)["kv_cache_quant_algo"];
            assert_eq!(kept.as_str(), int8.then_some("INT8"), "{name}");
            let asked: &[&str] = if prompt { &["--prompt", "Why?"] } else { &[] };
            let all = [&["--image", picture, "--max-new-tokens", "6"], asked].concat();
            ids(&run(&output, &all)[0])
        });
        // Weights are random, so that words may change; the first ones come of the prompt's largest logits.
        assert_eq!(answers[0][..2], answers[1][..2], "{name}");
    }
}

#[test]
fn targets_that_cannot_refuse_it_before_anything_is_read() {
    for command in ["build", "plan"] {
        let output = tempfile::tempdir().unwrap();
        let written = output.path().join("engines");
        let flags: &[&str] = if command == "build" { &["-o", written.to_str().unwrap()] } else { &[] };
        // Not even that there is no such checkpoint is looked at.
        let (code, text) = refuse(&[&[command, "no-such-folder"], flags, &INT8].concat());
        assert_eq!(code, 1, "{text}");
        assert!(
            text.contains("--kv-cache int8: target `rtx` keeps keys and values in the networks' own type"),
            "{text}"
        );
        assert!(text.contains("--target tensorrt,reference"), "{text}");
        assert!(!written.exists());
    }
}

#[test]
fn a_plan_counts_its_bytes() {
    let bytes = |flags: &[&str]| {
        let checkpoint = fixture("llava-hf");
        let sizes = ["--target", "reference", "--dtype", "float16", "--max-batch-size", "2", "--json"];
        let output = succeed(&[&["plan", checkpoint.to_str().unwrap()], &sizes[..], flags].concat());
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        let rows = plan["sizes"]["max_seq_len"].as_u64().unwrap();
        let networks = plan["networks"].as_array().unwrap();
        let language = networks.iter().find(|network| network["name"] == "language").unwrap();
        (language["cache_bytes"].as_u64().unwrap(), rows)
    };
    // 2 layers, 2 requests, keys and values, 4 heads of 12: 24 bytes, or 12 and a scale of 4.
    let ((plain, rows), (int8, _)) = (bytes(&[]), bytes(&INT8));
    assert_eq!((plain, int8), (2 * 2 * 2 * 4 * rows * 24, 2 * 2 * 2 * 4 * rows * 16));
}
