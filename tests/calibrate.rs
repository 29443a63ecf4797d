//! `calibrate`, and what is quantized by it, through the binary: statistics, resuming, refusals, engines that run.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;
use common::*;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The fixture's picture and question as lines of samples.
fn samples(folder: &Path) -> PathBuf {
    let picture = image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([(x * 6) as u8, (y * 8) as u8, 99]));
    picture.save(folder.join("picture.png")).unwrap();
    let lines = [
        json!({ "prompt": "What is it?", "answer": "a cat", "image": "picture.png" }),
        json!({ "prompt": "Why?", "answer": "because" }),
        json!({ "text": "the quick brown fox jumps over the lazy dog" }),
        json!({ "prompt": "Where is it?", "answer": "here", "image": "picture.png" }),
    ];
    let path = folder.join("samples.jsonl");
    std::fs::write(&path, lines.map(|line| line.to_string()).join("\n")).unwrap();
    path
}

fn calibrate(model: &Path, data: &Path, output: &Path, flags: &[&str]) -> Value {
    let [model, data, output] = [model, data, output].map(|path| path.to_str().unwrap());
    let all = [&["calibrate", model, "--data", data, "-o", output, "--json", "-q", "--window", "8"], flags].concat();
    serde_json::from_slice(&succeed(&all).stdout).unwrap()
}

#[test]
fn parts_and_resumed_runs_gather_the_same() {
    let root = tempfile::tempdir().unwrap();
    let data = samples(root.path());
    let [one, many, whole] = ["one", "many", "whole"].map(|name| root.path().join(name));
    let found = calibrate(&fixture("llava-hf"), &data, &one, &[]);
    assert!(found["samples"].as_u64().unwrap() >= 4 && found["resumed"] == 0, "{found}");
    calibrate(&fixture("llava-hf"), &data, &many, &["--together", "1"]);
    assert!(std::fs::read(&one).unwrap() == std::fs::read(&many).unwrap());
    // A run that was killed after its first part: what it left is what a run over the first sample alone leaves, but for
    // the number of samples that it says it is of.
    let first = root.path().join("first");
    calibrate(&fixture("llava-hf"), &data, &first, &["--samples", "1"]);
    let bytes = std::fs::read(&first).unwrap();
    let (header, of_first) = header_of(&bytes);
    let (_, of_whole) = header_of(&std::fs::read(&one).unwrap());
    let mut cut = of_whole.clone();
    cut["done"] = json!(1);
    cut["counts"] = of_first["counts"].clone();
    let unfinished = root.path().join("whole.unfinished");
    std::fs::write(&unfinished, with_header(&bytes, header, &cut)).unwrap();
    let found = calibrate(&fixture("llava-hf"), &data, &whole, &["--together", "1"]);
    assert_eq!(found["resumed"], 1);
    assert!(std::fs::read(&one).unwrap() == std::fs::read(&whole).unwrap());
    assert!(!unfinished.exists());
    // Of other samples nothing is taken over.
    std::fs::write(&unfinished, with_header(&bytes, header_of(&bytes).0, &of_first)).unwrap();
    assert_eq!(calibrate(&fixture("llava-hf"), &data, &whole, &[])["resumed"], 0);
}

/// The whole header, and what it says of the statistics.
fn header_of(bytes: &[u8]) -> (Value, Value) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let own = serde_json::from_str(header["__metadata__"]["trtvlm"].as_str().unwrap()).unwrap();
    (header, own)
}

fn with_header(bytes: &[u8], mut header: Value, own: &Value) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    header["__metadata__"]["trtvlm"] = json!(own.to_string());
    let mut text = header.to_string();
    text += &" ".repeat((8 - text.len() % 8) % 8);
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &bytes[8 + length..]].concat()
}

#[test]
fn every_calibrated_scheme_builds_and_answers_for_every_family() {
    let root = tempfile::tempdir().unwrap();
    let data = samples(root.path());
    // A page comes without a question, and no text without a page.
    let pages = root.path().join("pages.jsonl");
    std::fs::write(&pages, json!({ "prompt": "", "answer": "a page", "image": "picture.png" }).to_string()).unwrap();
    for family in ["llava-hf", "blip2-opt", "blip2-t5", "nougat"] {
        let statistics = root.path().join(format!("{family}.safetensors"));
        let (data, question) = if family == "nougat" { (&pages, "") } else { (&data, "What is it?") };
        calibrate(&fixture(family), data, &statistics, &[]);
        for (quant, vision) in [("int4-awq-g16", "int8-awq"), ("int8-sq", "int8-sq"), ("int8-sq-token", "int8-absmax")]
        {
            let output = root.path().join(format!("{family}-{quant}"));
            let flags = ["--quant", quant, "--vision-quant", vision, "--calibration", statistics.to_str().unwrap()];
            build_reference(&fixture(family), &output, &flags);
            let picture = root.path().join("picture.png");
            let picture = picture.to_str().unwrap();
            let found = run(&output, &["--image", picture, "--prompt", question, "--max-new-tokens", "3"]);
            assert!(!ids(&found[0]).is_empty(), "{family} {quant}");
        }
    }
}

#[test]
fn plan_knows_shapes_without_searching() {
    let root = tempfile::tempdir().unwrap();
    let statistics = root.path().join("statistics");
    calibrate(&fixture("llava-hf"), &samples(root.path()), &statistics, &[]);
    let plan = |quant: &str| -> Value {
        let model = fixture("llava-hf");
        let flags = ["plan", model.to_str().unwrap(), "--json", "-q", "--quant", quant, "--calibration"];
        serde_json::from_slice(&succeed(&[&flags[..], &[statistics.to_str().unwrap()]].concat()).stdout).unwrap()
    };
    let (plain, awq) = (plan("int4-g16"), plan("int4-awq-g16"));
    let bytes = |plan: &Value| plan["networks"][1]["weight_bytes"].as_u64().unwrap();
    assert_eq!(bytes(&plain), bytes(&awq), "all factors are folded, so nothing is added");
    assert!(bytes(&plan("int8-sq")) > bytes(&awq));
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let [text, seen] = ["text", "seen"].map(|name| root.path().join(name));
    let prose = root.path().join("prose.txt");
    std::fs::write(&prose, "the quick brown fox jumps over the lazy dog ".repeat(4)).unwrap();
    calibrate(&fixture("llava-hf"), &prose, &text, &[]);
    calibrate(&fixture("llava-hf"), &samples(root.path()), &seen, &[]);
    let build = |model: &str, flags: &[&str]| {
        let (model, output) = (fixture(model), root.path().join("engines"));
        let base = ["build", model.to_str().unwrap(), "-o", output.to_str().unwrap(), "--target", "reference"];
        refuse(&[&base[..], flags].concat())
    };
    let (text, seen) = (text.to_str().unwrap(), seen.to_str().unwrap());
    for (model, flags, wanted) in [
        ("llava-hf", &["--quant", "int4-awq-g16"][..], "trtvlm calibrate MODEL --data FILE"),
        ("llava-hf", &["--quant", "int8-sq", "--calibration", "missing"], "`missing`"),
        ("vila-v15-siglip", &["--quant", "int8-sq", "--calibration", seen], "are of another model"),
        (
            "llava-hf",
            &["--quant", "int8-sq", "--calibration", seen, "--dtype", "bfloat16"],
            "calibrate again with `--dtype bfloat16`",
        ),
        ("llava-hf", &["--vision-quant", "int8-sq", "--calibration", text], "lack `vision/"),
    ] {
        let (code, message) = build(model, flags);
        assert!(code == 1 && message.contains(wanted), "{flags:?}: {message}");
    }
    // Of the same config, with one tensor's values changed.
    let other = root.path().join("other");
    copy_folder(&fixture("llava-hf"), &other);
    let mut bytes = std::fs::read(other.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let name = header.as_object().unwrap().keys().find(|name| name.ends_with("mlp.up_proj.weight")).unwrap();
    let [start, end] = [0, 1].map(|at| header[name]["data_offsets"][at].as_u64().unwrap() as usize);
    bytes[8 + length + start..8 + length + end].rotate_left(4);
    std::fs::write(other.join("model.safetensors"), bytes).unwrap();
    let output = root.path().join("engines");
    let flags =
        ["build", other.to_str().unwrap(), "-o", output.to_str().unwrap(), "--quant", "int8-sq", "--calibration", seen];
    let (_, message) = refuse(&flags);
    assert!(message.contains("are of another model"), "{message}");
    // Samples that are none.
    let empty = root.path().join("empty.txt");
    std::fs::write(&empty, "").unwrap();
    let bad = root.path().join("bad.jsonl");
    std::fs::write(&bad, "{\"prompt\": \"x\"}\n{\"promt\": \"y\"}").unwrap();
    let model = fixture("llava-hf");
    for (data, wanted) in [(&empty, "holds no samples"), (&bad, "line 2")] {
        let flags = ["calibrate", model.to_str().unwrap(), "--data", data.to_str().unwrap(), "-o", seen];
        let (code, message) = refuse(&flags);
        assert!(code == 1 && message.contains(wanted), "{message}");
    }
}

/// The figure that schemes are ordered by: nothing for the model itself, less for eight bits than for four.
#[test]
fn divergence_orders_schemes() {
    let root = tempfile::tempdir().unwrap();
    let statistics = root.path().join("statistics");
    calibrate(&fixture("llava-hf"), &samples(root.path()), &statistics, &[]);
    let prose = root.path().join("prose.txt");
    std::fs::write(&prose, "the quick brown fox jumps over the lazy dog ".repeat(8)).unwrap();
    let model = fixture("llava-hf");
    let flags = [
        "eval",
        "text",
        model.to_str().unwrap(),
        "--text",
        prose.to_str().unwrap(),
        "--window",
        "16",
        "--json",
        "-q",
        "--quant",
        "none,int8,int8-sq,int4-awq-g16",
        "--calibration",
        statistics.to_str().unwrap(),
    ];
    let found: Value = serde_json::from_slice(&succeed(&flags).stdout).unwrap();
    let divergences: Vec<f64> =
        found["results"].as_array().unwrap().iter().map(|result| result["divergence"].as_f64().unwrap()).collect();
    let [none, int8, smoothed, awq] = divergences[..] else { unreachable!() };
    assert!(none == 0.0 && int8 > 0.0 && int8 < awq && smoothed < awq, "{divergences:?}");
}
