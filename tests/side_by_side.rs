//! Engines built side by side, and the memory that `plan` states for it.
#![cfg(feature = "rtx")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;
use common::*;
use serde_json::{Value, json};
use std::path::Path;

fn build(model: &Path, output: &Path, flags: &[&str]) -> Value {
    let [model, output] = [model, output].map(|path| path.to_str().unwrap());
    let all = [&["build", model, "-o", output, "--json", "-q", "--gpu", "sm89", "--dtype", "float16"], flags].concat();
    serde_json::from_slice(&succeed(&all).stdout).unwrap()
}

fn plan(model: &Path, flags: &[&str]) -> Value {
    let all = [&["plan", model.to_str().unwrap(), "--json", "-q", "--dtype", "float16"], flags].concat();
    serde_json::from_slice(&succeed(&all).stdout).unwrap()
}

#[test]
fn the_same_bytes_however_many_at_once() {
    let root = tempfile::tempdir().unwrap();
    let [one, many] = ["one", "many"].map(|name| root.path().join(name));
    let reports = [(&one, "1"), (&many, "3")].map(|(output, jobs)| {
        let flags = ["--target", "rtx,reference", "--tp", "2", "--quant", "int8", "--jobs", jobs];
        build(&fixture("llava-hf"), output, &flags)
    });
    let (one, many) = (contents(&one), contents(&many));
    assert_eq!(one.keys().collect::<Vec<_>>(), many.keys().collect::<Vec<_>>());
    let differing: Vec<&String> = one.keys().filter(|name| one[*name] != many[*name]).collect();
    assert!(differing.iter().all(|name| name.ends_with(".engine") || *name == "manifest.json"), "{differing:?}");
    if !differing.is_empty() {
        // As in tests/rtx.rs: on a machine with much more work than cores one of three may differ.
        let third = root.path().join("third");
        build(
            &fixture("llava-hf"),
            &third,
            &["--target", "rtx,reference", "--tp", "2", "--quant", "int8", "--jobs", "3"],
        );
        let third = contents(&third);
        let equal = |name: &&String| third[*name] == one[*name] || third[*name] == many[*name];
        assert!(differing.iter().filter(|name| name.ends_with(".engine")).all(equal), "{differing:?}");
    }
    let names = |report: &Value| -> Vec<String> {
        report["engines"].as_array().unwrap().iter().map(|engine| engine["network"].to_string()).collect()
    };
    assert_eq!(names(&reports[0]), names(&reports[1]));
    let config: Value = serde_json::from_slice(&many["language/config.json"]).unwrap();
    assert_eq!(config["pretrained_config"]["use_parallel_embedding"], true);
}

/// The whole and its ranks, of a model with matrices large enough to count.
#[test]
fn no_build_takes_more_than_plan_states() {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("model");
    let config = llama_config(json!({
        "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 8192,
        "torch_dtype": "float16",
    }));
    write_checkpoint(&model, &config, &random_tensors(&config), graphs::DType::Float16, 1);
    for (quant, tp, jobs) in [("none", "1", "1"), ("none", "2", "1"), ("int8", "2", "2"), ("int4-g32", "4", "3")] {
        let flags = ["--target", "rtx", "--quant", quant, "--tp", tp, "--jobs", jobs];
        let (planned, built) = (plan(&model, &flags), build(&model, &root.path().join("engines"), &flags));
        let number = |value: &Value| value.as_u64().unwrap();
        let at_most = |found: &Value, stated: &Value| {
            assert!(number(found) > 0 && number(found) <= number(stated), "{flags:?}: {found}, stated {stated}");
        };
        at_most(&built["peak_own_memory_bytes"], &planned["peak_own_memory_bytes"]);
        at_most(&built["parent_peak_memory_bytes"], &planned["parent_memory_bytes"]);
        let (engines, networks) = (built["engines"].as_array().unwrap(), planned["networks"].as_array().unwrap());
        assert_eq!(engines.len(), networks.len());
        for (engine, network) in std::iter::zip(engines, networks) {
            at_most(&engine["peak_own_memory_bytes"], &network["build_memory_bytes"]);
            at_most(&engine["peak_resident_memory_bytes"], &network["build_resident_memory_bytes"]);
        }
    }
}

/// What is done with the first rank's weights when the second rank fails.
#[test]
fn a_failing_child_ends_the_build() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("engines");
    let flags =
        ["--target", "rtx", "--gpu", "sm89", "--tp", "2", "--jobs", "3", "--timeout", "0", "--dtype", "float16"];
    let model = fixture("llava-hf");
    let (code, text) =
        refuse(&[&["build", model.to_str().unwrap(), "-o", output.to_str().unwrap()], &flags[..]].concat());
    assert!(code == 5 && text.contains("did not finish in 0 s"), "{code}: {text}");
    assert!(std::fs::read_dir(root.path()).unwrap().next().is_none(), "something is left behind");
}
